"""Each different prompt is read once, with its own sources."""

import dataclasses

import torch

from agents.evaluation.accuracy import evaluate
from agents.policy.prefill import keep_logits, prompt_images, read_prompts


@torch.no_grad()
def test_equal_prompts_are_read_once(small_bagel, monkeypatch):
    rows = []
    original = small_bagel.append_text

    def count_rows(context, ids, mask=None, **options):
        rows.append(len(ids))
        return original(context, ids, mask, **options)

    monkeypatch.setattr(small_bagel, "append_text", count_rows)
    ids = torch.tensor([[1, 9, 2], [1, 8, 0], [1, 9, 2], [1, 8, 0], [1, 8, 0]])
    lengths = torch.tensor([3, 2, 3, 2, 2])
    logits, context = read_prompts(small_bagel, ids, lengths)
    assert rows == [2]
    assert context.batch_size == 5
    for row, length in enumerate(lengths):
        alone, _ = original(small_bagel.empty_context(1), ids[row : row + 1, :length])
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

    def count_rows(context, latent, **options):
        rows.append(len(latent))
        return original(context, latent, **options)

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


def test_prompt_images_leaves_drawn_ones_out():
    images = torch.randn(2, 3, 4, 5)
    positions = torch.tensor([[0, 7, -1], [0, 1, 9]])
    found, places = prompt_images(images, positions, torch.tensor([5, 5]))
    assert torch.equal(found, images[:, :2])
    assert places.tolist() == [[0, -1], [0, 1]]


def test_prompt_images_of_text_alone():
    images = torch.zeros(2, 0, 4, 5)
    positions = torch.zeros(2, 0, dtype=torch.int64)
    found, places = prompt_images(images, positions, torch.tensor([5, 5]))
    assert found.shape[1] == 0
    assert places.shape == (2, 0)


def test_rows_that_read_nothing_keep_their_logits():
    before = torch.zeros(2, 1, 3)
    found = torch.ones(2, 1, 3)
    mask = torch.tensor([[True, False], [False, False]])
    assert keep_logits(found, mask, before)[:, 0, 0].tolist() == [1, 0]
    assert keep_logits(found, mask, None) is found
