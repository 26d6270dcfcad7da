"""Each different prompt is read once, with its own sources."""

import dataclasses

import torch

from agents.evaluation.accuracy import evaluate
from agents.policy.prefill import Sources, append_and_predict, read_prompts


@torch.no_grad()
def test_equal_prompts_are_read_once(small_bagel, monkeypatch):
    rows = []
    original = small_bagel.append_hidden

    def count_rows(context, ids, mask=None, **options):
        rows.append(len(ids))
        return original(context, ids, mask, **options)

    monkeypatch.setattr(small_bagel, "append_hidden", count_rows)
    ids = torch.tensor([[1, 9, 2], [1, 8, 0], [1, 9, 2], [1, 8, 0], [1, 8, 0]])
    lengths = torch.tensor([3, 2, 3, 2, 2])
    logits, context = read_prompts(small_bagel, ids, lengths)
    assert rows == [2]
    assert context.batch_size == 5
    for row, length in enumerate(lengths):
        alone, _ = small_bagel.append_text(
            small_bagel.empty_context(1), ids[row : row + 1, :length]
        )
        torch.testing.assert_close(logits[row], alone[0, -1:], atol=1e-5, rtol=0)


def test_shorter_prompt_is_another_prompt(small_bagel):
    """Padding is 0, so only the length tells these two apart."""
    ids = torch.tensor([[1, 0], [1, 0]])
    logits, _ = read_prompts(small_bagel, ids, torch.tensor([1, 2]))
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_group_reads_its_source_once(small_bagel, short_variant, monkeypatch):
    variant = short_variant("edit")
    first, second = variant.task.prompts("train", 2, 0)
    # The same words about another image.
    other = dataclasses.replace(first, sources=second.sources)
    prompts = [first, other, first, second, first, other]
    rows = []
    original = small_bagel.append_image

    def count_rows(context, latent, *others, **options):
        rows.append(len(latent))
        return original(context, latent, *others, **options)

    monkeypatch.setattr(small_bagel, "append_image", count_rows)
    shared = evaluate(small_bagel, variant, prompts)
    assert rows == [3]
    alone = evaluate(small_bagel, variant, prompts, batch_size=1)
    assert shared.texts == alone.texts
    torch.testing.assert_close(shared.images, alone.images, atol=1e-4, rtol=0)


def test_any_number_of_sources(small_bagel, short_variant):
    """Prompts with no source, one, and two are read side by side as each is read alone."""
    variant = short_variant("mixed_sources")
    prompts = variant.task.prompts("test", 6, 0)
    assert [len(prompt.sources) for prompt in prompts] == [0, 1, 2, 0, 1, 2]
    together = evaluate(small_bagel, variant, prompts)
    alone = evaluate(small_bagel, variant, prompts, batch_size=1)
    assert together.texts == alone.texts
    torch.testing.assert_close(together.images, alone.images, atol=1e-4, rtol=0)


def test_prompt_without_words_has_no_logits(small_bagel):
    ids = torch.zeros(2, 0, dtype=torch.int64)
    logits, context = read_prompts(small_bagel, ids, torch.tensor([0, 0]))
    assert logits.shape == (2, 1, 64)
    assert not logits.any()
    assert context.batch_size == 2


def test_sources_are_the_images_inside_the_prompt():
    images = torch.randn(2, 3, 4, 5)
    pixels = torch.randint(256, (2, 3, 3, 6, 7), dtype=torch.uint8)
    positions = torch.tensor([[0, 7, -1], [0, 1, 9]])
    found = Sources.of(images, pixels, positions, torch.tensor([5, 5]))
    assert torch.equal(found.latents, images[:, :2])
    assert torch.equal(found.pixels, pixels[:, :2])
    assert found.positions.tolist() == [[0, -1], [0, 1]]


def test_sources_of_text_alone():
    images = torch.zeros(2, 0, 4, 5)
    pixels = torch.zeros(2, 0, 3, 0, 0, dtype=torch.uint8)
    positions = torch.zeros(2, 0, dtype=torch.int64)
    found = Sources.of(images, pixels, positions, torch.tensor([5, 5]))
    assert found.latents.shape[1] == 0
    assert found.positions.shape == (2, 0)


def test_pixels_tell_sources_apart_that_have_no_latents(vision_bagel):
    ids = torch.tensor([[9, 1], [9, 1], [9, 1]])
    pixels = torch.zeros(3, 1, 3, 8, 8, dtype=torch.uint8)
    pixels[1] = 200
    sources = Sources(torch.zeros(3, 1, 0, 48), pixels, torch.zeros(3, 1, dtype=torch.int64))
    logits, _ = read_prompts(vision_bagel, ids, torch.tensor([2, 2, 2]), sources=sources)
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_logits_after_the_last_token_of_each_row(small_bagel):
    ids = torch.tensor([[5, 7, 8], [6, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found, _ = append_and_predict(small_bagel, small_bagel.empty_context(2), ids, mask, None)
    whole, _ = small_bagel.append_text(small_bagel.empty_context(2), ids, mask)
    torch.testing.assert_close(found[:, 0], torch.stack([whole[0, 2], whole[1, 0]]))


def test_rows_that_read_nothing_keep_their_logits(small_bagel):
    ids = torch.tensor([[5, 7], [6, 8]])
    mask = torch.tensor([[True, False], [False, False]])
    before = torch.randn(2, 1, 64)
    context = small_bagel.empty_context(2)
    found, context = append_and_predict(small_bagel, context, ids, mask, None, before)
    expected, _ = small_bagel.append_text(small_bagel.empty_context(1), ids[:1, :1])
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], before[1])
    assert context.position.tolist() == [1, 0]
