"""Supervised losses read a demonstration as the env would have shown its episode."""

import pytest
import torch
from torch.nn.functional import interpolate

from agents.models.registry import load_model
from agents.policy.actor import Actor
from agents.training.supervised import (
    Stream,
    as_trajectory,
    lay_out,
    pad,
    require_demonstrations,
    sample_losses,
    supervised_losses,
)
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.tasks.shapes.editing import EditTask
from unigrpo_env.tasks.shapes.processor import ShapesProcessor
from unigrpo_env.tasks.task import Demonstration, Prompt
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

SCENARIOS = ["text_to_image", "edit", "reflect", "story", "dialogue"]
# Without text nobody ends a reflection.
CASES = [(name, True) for name in SCENARIOS]
CASES += [(name, False) for name in SCENARIOS if name != "reflect"]


def noised(images):
    """A flow time and noise for each of so many images."""
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(images, generator=generator)
    return t, torch.randn(images, 36, 48, generator=generator)


def all_latents(variant, demonstrations):
    images = torch.cat([demonstration.images for demonstration in demonstrations])
    return variant.processor.encode_images(images)


def script(variant, demonstration):
    """The tokens that the model would have to sample, in order."""
    tokens = []
    for number, thought in enumerate(demonstration.thoughts):
        if thought is None:
            continue
        words = variant.processor.encode_text(thought)
        tokens += words
        # A last text may end the episode by its own words.
        ends = words[-1:] == [variant.processor.end_id]
        if number < len(demonstration.images) or not ends:
            tokens.append(variant.rules.open_image_id)
    return tokens


@torch.no_grad()
def played(model, variant, demonstration, t, noise):
    """A demonstration forced through the env.

    Returns the negative log-likelihood of each token by the actor's own logits, and the squared
    velocity error of each image at (t, noise).
    """
    env = InterleavedGenVectorEnv(variant, 1)
    actor = Actor(model)
    observation, _ = env.reset(seed=0, options={"prompts": [demonstration.prompt]})
    actor.start([0])
    written = iter(script(variant, demonstration))
    latents = variant.processor.encode_images(demonstration.images)
    losses = []
    errors = []
    while observation["phase"] != Phase.DONE:
        number = min(int(observation["images_drawn"]), len(latents) - 1)
        latent = latents[number, None]
        token = 0
        actor.act(observation)
        if observation["phase"] == Phase.TEXT:
            token = next(written)
            losses.append(-actor.cache.logits[0, 0].log_softmax(-1)[token])
        elif observation["step"] == 0:
            level = t[number]
            noisy = (1 - level) * latent + level * noise[number]
            velocity = model.predict_velocity(actor.cache.context, noisy, level[None])
            errors.append(((velocity - (noise[number] - latent)) ** 2).mean())
        action = {"token": torch.tensor([token]), "next_latent": latent}
        observation, *_ = env.step(action)
    assert next(written, None) is None
    return losses, errors


@pytest.mark.slow
@pytest.mark.parametrize(("name", "thinks"), CASES)
def test_ragged_batch_is_what_the_env_shows(name, thinks):
    model = load_model("tiny")
    settings = {} if thinks else {"text_budget": 0}
    variant = make_variant(name, image_steps=1, **settings)
    demonstrations = variant.task.demonstrations(5, 2)
    if not thinks:
        demonstrations = [demonstration.without_text() for demonstration in demonstrations]
    latents = all_latents(variant, demonstrations)
    t, noise = noised(len(latents))
    with torch.no_grad():
        text, image = supervised_losses(model, variant, demonstrations, latents, t, noise)
    losses = []
    errors = []
    start = 0
    for demonstration in demonstrations:
        own = slice(start, start + len(demonstration.images))
        start = own.stop
        found = played(model, variant, demonstration, t[own], noise[own])
        losses += found[0]
        errors += found[1]
    expected = torch.stack(losses).mean() if thinks else torch.tensor(0.0)
    torch.testing.assert_close(text, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(image, torch.stack(errors).mean(), atol=1e-4, rtol=0)


def test_scenarios_side_by_side_are_one_batch(small_bagel):
    """The losses of a mixed batch are those of its parts, weighted by tokens and images."""
    demonstrations = []
    for name in SCENARIOS:
        demonstrations += make_variant(name).task.demonstrations(2, 0)
    demonstrations[0] = demonstrations[0].unconditional()
    demonstrations[3] = demonstrations[3].without_text()
    variant = make_variant("text_to_image")
    latents = all_latents(variant, demonstrations)
    t, noise = noised(len(latents))
    text, image = supervised_losses(small_bagel, variant, demonstrations, latents, t, noise)
    texts = []
    images = []
    tokens = 0
    start = 0
    for demonstration in demonstrations:
        own = slice(start, start + len(demonstration.images))
        start = own.stop
        found = supervised_losses(
            small_bagel, variant, [demonstration], latents[own], t[own], noise[own]
        )
        count = len(script(variant, demonstration))
        tokens += count
        texts.append(found[0] * count)
        images.append(found[1] * len(demonstration.images))
    torch.testing.assert_close(text, torch.stack(texts).sum() / tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(image, torch.stack(images).sum() / start, atol=1e-5, rtol=0)


def test_layout_of_a_dialogue():
    variant = make_variant("dialogue")
    processor = variant.processor
    prompt = Prompt("a circle", turns=("make it red",))
    demonstration = Demonstration(prompt, ("red circle", "blue"), torch.zeros(2, 3, 24, 24))
    stream = lay_out(processor, demonstration)
    assert stream.prompt == processor.encode_prompt("a circle")
    image_id = processor.image_id
    first = [*processor.encode_text("red circle"), processor.open_image_id]
    between = [image_id, *processor.encode_turn("make it red")]
    last = [*processor.encode_text("blue"), processor.open_image_id]
    assert stream.tokens == first + between + last
    chosen = [True] * len(first) + [False] * len(between) + [True] * len(last)
    assert stream.chosen == chosen
    assert stream.image_positions == [len(stream.prompt) + len(first)]


def test_layout_of_sources_and_a_system_text():
    processor = make_variant("edit").processor
    source = torch.zeros(3, 24, 24)
    prompt = Prompt("remove the circle", sources=(source, source))
    demonstration = Demonstration(prompt, ("empty",), source[None])
    stream = lay_out(processor, demonstration, "draw well")
    expected = processor.encode_prompt("remove the circle", sources=2, system="draw well")
    assert stream.prompt == expected
    positions = [at for at, token in enumerate(expected) if token == processor.image_id]
    assert len(positions) == 2
    assert stream.image_positions == positions


@pytest.mark.parametrize(
    ("last", "end_id", "closing"),
    [("red <end>", None, "<end>"), ("red", None, "<eos>"), ("red", 7, 7), ("", None, "<eos>")],
)
def test_last_text_is_closed(last, end_id, closing):
    """By its own words, or else by the token that ends such an episode."""
    processor = make_variant("reflect").processor
    marks = {"<end>": processor.end_id, "<eos>": processor.open_image_id}
    demonstration = Demonstration(Prompt("a"), ("circle", last), torch.zeros(1, 3, 24, 24))
    stream = lay_out(processor, demonstration, end_id=end_id)
    words = processor.encode_text(last.removesuffix(" <end>"))
    between = [processor.image_id, *processor.continuation_ids()]
    expected = between + words + [marks.get(closing, closing)]
    assert stream.tokens[-len(expected) :] == expected
    assert stream.chosen[-len(expected) :] == [False] * len(between) + [True] * (len(words) + 1)


@torch.no_grad()
def test_last_text_is_what_the_env_shows(small_bagel, short_variant):
    variant = short_variant("last_text", image_steps=1)
    thoughts = ("red circle", "a red")
    demonstration = Demonstration(Prompt("a circle"), thoughts, torch.rand(1, 3, 24, 24))
    latents = all_latents(variant, [demonstration])
    t, noise = noised(1)
    text, image = supervised_losses(small_bagel, variant, [demonstration], latents, t, noise)
    losses, errors = played(small_bagel, variant, demonstration, t, noise)
    assert len(losses) == 6
    torch.testing.assert_close(text, torch.stack(losses).mean(), atol=1e-4, rtol=0)
    torch.testing.assert_close(image, errors[0], atol=1e-4, rtol=0)


def test_layout_without_text_and_without_a_prompt():
    processor = make_variant("story").processor
    demonstration = Demonstration(Prompt("a circle"), ("a", "b"), torch.zeros(2, 3, 24, 24))
    silent = lay_out(processor, demonstration.without_text())
    assert silent.prompt == processor.encode_prompt("a circle", thinks=False)
    assert silent.tokens == [processor.image_id, *processor.continuation_ids(False)]
    assert not any(silent.chosen)
    assert lay_out(processor, demonstration.unconditional()) == Stream()


def test_images_stand_where_they_are_read():
    """Sources first, then the drawn images, whatever the number of sources of each row."""
    variant = make_variant("story")
    source = torch.ones(3, 24, 24)
    with_source = Prompt("a", sources=(source,))
    images = torch.rand(2, 3, 24, 24)
    demonstrations = [
        Demonstration(with_source, ("red",), images[:1]),
        Demonstration(Prompt("a"), ("red", "blue"), images),
    ]
    latents = all_latents(variant, demonstrations)
    t, noise = noised(3)
    found = as_trajectory(variant, demonstrations, latents, t, noise)
    assert found.images_drawn.tolist() == [1, 2]
    assert found.images.shape == (2, 3, 36, 48)
    expected = variant.processor.encode_images(source[None])
    torch.testing.assert_close(found.images[0, :1], expected)
    torch.testing.assert_close(found.images[1, 1:], latents[1:])
    after = int(found.prompt_length[1]) + len(variant.processor.encode_text("red")) + 1
    assert found.image_positions.tolist() == [[0, -1, -1], [-1, after, -1]]
    level = t[1:, None, None]
    noisy = (1 - level) * latents[1:] + level * noise[1:]
    torch.testing.assert_close(found.window_latents[1, :, 0], noisy)
    assert found.window_times[1, :, 0].tolist() == t[1:].tolist()


def test_times_are_shifted_towards_noise(small_bagel, monkeypatch):
    seen = []

    def note_times(model, variant, demonstrations, latents, t, noise):
        seen.append((t, noise))
        return t.sum(), t.sum()

    monkeypatch.setattr("agents.training.supervised.supervised_losses", note_times)
    variant = make_variant("text_to_image")
    demonstrations = variant.task.demonstrations(50, 0)
    for shift in (1.0, 3.0):
        generator = torch.Generator().manual_seed(0)
        sample_losses(small_bagel, variant, demonstrations, generator, shift)
    (plain, noise), (shifted, same) = seen
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert torch.equal(noise, same)
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_pad():
    assert pad([[1, 2], [3], []], fill=7).tolist() == [[1, 2], [3, 7], [7, 7]]
    assert pad([[], []]).shape == (2, 0)


def test_task_without_demonstrations():
    task = type("Silent", (), {"prompts": None})()
    variant = make_variant("text_to_image", task=task)
    with pytest.raises(ValueError, match="expected a task with demonstrations, got Silent"):
        require_demonstrations(variant)


def test_sources_get_the_size_that_the_env_gives_them():
    """And only images that are read are shown to the vision encoder, sources in one call."""
    seen = []

    class Resizing(ShapesProcessor):
        pixel_size = (12, 12)

        def fit_source(self, image):
            return interpolate(image[None], self.image_size)[0]

        def view_images(self, images):
            seen.append(len(images))
            return (interpolate(images, self.pixel_size) * 255).byte()

    variant = make_variant("edit", processor=Resizing(), task=EditTask(1), reward=lambda batch: 0)
    source = torch.rand(3, 48, 30)
    prompt = Prompt("remove the circle", sources=(source,))
    demonstrations = [Demonstration(prompt, ("none",), torch.rand(1, 3, 24, 24))] * 2
    latents = torch.randn(2, 36, 48)
    found = as_trajectory(variant, demonstrations, latents, torch.rand(2), latents)
    fitted = variant.processor.fit_source(source)
    expected = variant.processor.encode_images(fitted[None])[0]
    assert torch.equal(found.images[1, 0], expected)
    assert torch.equal(found.pixels[1, 0], variant.processor.view_images(fitted[None])[0])
    # The sources of both; what was drawn is the last of its episode, and nobody reads it.
    assert seen == [2, 1]
