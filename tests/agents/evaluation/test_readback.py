"""The prompt's words after the image as a reward."""

import pickle
from pathlib import Path

import pytest
import torch

from agents.evaluation import readback
from agents.evaluation.readback import Readback
from agents.models.pixels import scale_pixels
from rewards import EpisodeBatch, make_reward

RELEASE = str(Path(__file__).parents[2] / "data" / "bagel_release")
PROMPTS = ["a red square", "draw two green circles and a cross", "a triangle"]


def batch(prompts=PROMPTS, side=24, **fields):
    images = torch.rand(len(prompts), 3, side, side, generator=torch.Generator().manual_seed(0))
    count = len(prompts)
    return EpisodeBatch(
        prompts, **{"texts": [""] * count, "images": images, **fields}, metadata=[{}] * count
    )


@pytest.fixture
def reads_with(monkeypatch):
    """Make the reward with a given model: `reads_with(model, **options)`."""

    def make(model, **options):
        monkeypatch.setattr(readback, "load_model", lambda name, **settings: model)
        return Readback(**options)

    return make


@torch.no_grad()
def word_by_word(model, image, prompt, latents=True, question=""):
    """The score of one image, each token read by itself."""
    processor = model.processor
    image = processor.fit_source(image)
    context = model.empty_context(1)
    latent = pixels = None
    if latents:
        latent = processor.encode_images(image[None])
    if processor.pixel_size is not None:
        pixels = scale_pixels(processor.view_images(image[None]))
    for token in processor.encode_prompt(question, sources=1):
        if token == processor.image_id:
            context = model.append_image(context, latent, pixels)
        else:
            logits, context = model.append_text(context, torch.tensor([[token]]))
    words = processor.encode_text(prompt)
    total = 0.0
    for word in words:
        total += float(logits[0, -1].float().log_softmax(-1)[word])
        logits, context = model.append_text(context, torch.tensor([[word]]))
    return total / len(words)


@pytest.mark.parametrize("name", ["small_bagel", "vision_bagel"])
def test_equals_a_pass_word_by_word(request, reads_with, name):
    model = request.getfixturevalue(name)
    episodes = batch()
    scores = reads_with(model)(episodes).reward
    expected = [word_by_word(model, *row) for row in zip(episodes.images, PROMPTS, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_released_model_reads():
    reward = Readback(model=RELEASE, dtype="float32", model_options={"height": 64, "width": 64})
    reward.prepare()
    # The second prompt has a token, but no word.
    episodes = batch([PROMPTS[0], " "], side=64)
    scores = reward(episodes).reward
    expected = word_by_word(reward.loaded.model, episodes.images[0], PROMPTS[0])
    assert float(scores[0]) == pytest.approx(expected, abs=1e-5)
    assert scores[1].isnan()


def test_pixels_alone(vision_bagel, reads_with):
    episodes = batch(PROMPTS[:1])
    alone = float(reads_with(vision_bagel, latents=False)(episodes).reward)
    both = float(reads_with(vision_bagel)(episodes).reward)
    expected = word_by_word(vision_bagel, episodes.images[0], PROMPTS[0], latents=False)
    assert alone == pytest.approx(expected, abs=1e-5)
    assert alone != pytest.approx(both, abs=1e-3)


def test_a_model_without_an_encoder_of_pixels_always_reads_latents(small_bagel, reads_with):
    episodes = batch()
    scores = reads_with(small_bagel, latents=False)(episodes).reward
    torch.testing.assert_close(scores, reads_with(small_bagel)(episodes).reward)


def test_the_prompt_is_the_answer_to_a_question(small_bagel, reads_with):
    episodes = batch(PROMPTS[:1])
    score = float(reads_with(small_bagel, question="draw")(episodes).reward)
    expected = word_by_word(small_bagel, episodes.images[0], PROMPTS[0], question="draw")
    assert score == pytest.approx(expected, abs=1e-5)


def test_batch_size_changes_nothing(vision_bagel, reads_with):
    episodes = batch()
    whole = reads_with(vision_bagel)(episodes).reward
    for size in (1, 2):
        parts = reads_with(vision_bagel, batch=size)(episodes).reward
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_a_prompt_without_words_has_no_score(small_bagel, reads_with):
    episodes = batch(["", "a red square", " "])
    scores = reads_with(small_bagel)(episodes)
    assert scores.reward.isnan().tolist() == [True, False, True]
    assert scores.failures.counts == {"no words": 2}
    assert "prompt with words" in str(scores.failures.first)
    expected = word_by_word(small_bagel, episodes.images[1], "a red square")
    assert float(scores.reward[1]) == pytest.approx(expected, abs=1e-5)


def test_what_the_policy_wrote_is_not_read(small_bagel, reads_with):
    reward = reads_with(small_bagel)
    silent = reward(batch()).reward
    spoken = batch(texts=PROMPTS, thoughts=[[prompt, "done"] for prompt in PROMPTS])
    assert torch.equal(reward(spoken).reward, silent)


def test_no_gradient(small_bagel, reads_with):
    episodes = batch()
    episodes.images.requires_grad_()
    reward = reads_with(small_bagel)
    assert not reward(episodes).reward.requires_grad
    assert not any(weight.requires_grad for weight in reward.loaded.model.parameters())


def test_pickled_without_its_model():
    reward = Readback(batch=2)
    expected = reward(batch()).reward
    written = pickle.dumps(reward)
    assert len(written) < 1000
    torch.testing.assert_close(pickle.loads(written)(batch()).reward, expected)


def test_registered_by_name():
    scores = make_reward("readback", {"dtype": "bfloat16"})(batch()).reward
    expected = Readback()(batch()).reward
    torch.testing.assert_close(scores, expected, atol=0.3, rtol=0)
    assert not torch.equal(scores, expected)


def test_a_model_that_reads_no_images_is_refused():
    with pytest.raises(ValueError, match=r"model that reads images .* got 'toy'"):
        Readback(model="toy").prepare()


def test_a_model_whose_words_ignore_the_image_is_refused(small_bagel, reads_with):
    reads_with(small_bagel).prepare()
    small_bagel.append_image = lambda context, latent, pixels: context
    with pytest.raises(ValueError, match="words depend on the image"):
        reads_with(small_bagel).prepare()


def test_broken_weights_are_refused(small_bagel, reads_with):
    torch.nn.init.constant_(small_bagel.language_model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match="expected finite numbers"):
        reads_with(small_bagel).prepare()


def test_images_of_another_size_name_the_option(small_bagel, reads_with):
    with pytest.raises(ValueError, match="resize") as caught:
        reads_with(small_bagel)(batch(side=32))
    assert "model_options" in caught.value.__notes__[0]


@pytest.mark.parametrize("options", [{"batch": 0}, {"dtype": "float64"}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"the {next(iter(options))} of reward 'readback'"):
        Readback(**options)
