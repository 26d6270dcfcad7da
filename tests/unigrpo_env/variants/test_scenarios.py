"""The scenarios of the library, and other backbones that play them."""

import pytest
import torch

from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.processor import Processor
from unigrpo_env.tasks.shapes.processor import ShapesProcessor
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.testing import VariantContract
from unigrpo_env.variants.toy import ToyProcessor
from unigrpo_env.variants.variant import VARIANTS, make_variant

MULTI_IMAGE = ("edit", "reflect", "story", "dialogue")


class Letters(Processor):
    """The least that a backbone brings: it reads no images, and nothing ends an episode.

    0 is padding, 1 opens an image, and the others are letters.
    """

    vocab_size = 28
    pad_id = 0
    open_image_id = 1
    latent_shape = (1, 3)
    image_size = (1, 1)

    def encode_text(self, text):
        return [2 + ord(letter) - ord("a") for letter in text if letter.isalpha()]

    def decode_text(self, ids):
        return "".join(chr(ord("a") + token - 2) for token in ids if token > 1)

    def encode_prompt(self, text, *, sources=0, system="", thinks=True):
        assert self.image_id is not None or not sources
        return [*[self.image_id] * sources, *self.encode_text(system + text), self.open_image_id]

    def decode_latents(self, latents):
        return latents.reshape(-1, 3, 1, 1).clamp(0, 1)


class WithImages(Letters):
    """Reads what it has drawn."""

    vocab_size = 30
    image_id = 28

    def continuation_ids(self, thinks=True):
        return (self.open_image_id,) if thinks else ()


class WithAll(WithImages):
    """Plays every scenario."""

    end_id = 29

    def encode_images(self, images):
        return images.reshape(-1, 1, 3)

    def encode_turn(self, text, *, thinks=True):
        return [*self.encode_text(text), *self.continuation_ids(thinks)]


class LettersTask:
    """Prompts with whatever the scenario asks for."""

    def __init__(self, sources=0, turns=0):
        self.sources = (torch.zeros(3, 1, 1),) * sources
        self.turns = ("more",) * turns

    def prompts(self, split, count, seed):
        return [Prompt("draw", sources=self.sources, turns=self.turns)] * count


def brightness(episodes):
    return episodes.images.mean((1, 2, 3))


def make(name, processor, **settings):
    task = LettersTask(sources=int(name == "edit"), turns=int(name == "dialogue"))
    return make_variant(name, processor=processor, task=task, reward=brightness, **settings)


class TestPlainBackbone(VariantContract):
    """A backbone without any optional part draws one image."""

    def make_variant(self):
        return make("text_to_image", Letters())


class TestPlainBackboneWritesAlone(VariantContract):
    """And writes text alone."""

    def make_variant(self):
        return make("text_to_image", Letters(), image_budget=0)


class TestBackboneThatEnds(VariantContract):
    """A backbone with all parts ends its episodes itself."""

    def make_variant(self):
        return make("reflect", WithAll(), text_after_images=True)


class TestBackboneInDialogue(VariantContract):
    """A backbone with all parts is answered by the user."""

    def make_variant(self):
        return make("dialogue", WithAll())


class TestBackboneThatEdits(VariantContract):
    """A backbone with all parts reads a source."""

    def make_variant(self):
        return make("edit", WithAll())


@pytest.mark.parametrize("name", MULTI_IMAGE)
def test_images_to_be_read_need_an_image_id(name):
    message = r"expected a processor with an image_id, .* got Letters without one; give it one, or"
    with pytest.raises(ValueError, match=message):
        make(name, Letters())


def test_a_last_text_needs_an_image_id():
    with pytest.raises(ValueError, match="an image_id"):
        make("text_to_image", Letters(), text_after_images=True)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("edit", "encode_images, to read"), ("dialogue", "encode_turn, to"), ("reflect", "an end_id")],
)
def test_parts_that_a_scenario_needs(name, missing):
    with pytest.raises(ValueError, match=f"processor with {missing}.* got WithImages without one"):
        make(name, WithImages())
    make(name, WithAll())


def test_a_story_needs_no_more_than_an_image_id():
    variant = make("story", WithImages(), images=2)
    assert variant.rules.image_id == 28
    assert 28 in variant.rules.forbidden_ids


@pytest.mark.parametrize("name", [*MULTI_IMAGE, "text_to_image"])
@pytest.mark.parametrize("part", ["task", "reward"])
def test_another_backbone_brings_task_and_reward(name, part):
    parts = {"task": LettersTask(), "reward": brightness}
    del parts[part]
    with pytest.raises(ValueError, match=f"expected a {part} .* for WithAll, got none"):
        make_variant(name, processor=WithAll(), **parts)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_without_parts_they_are_the_small_world_s(name):
    variant = make_variant(name)
    kind = ToyProcessor if name == "toy" else ShapesProcessor
    assert type(variant.processor) is kind
    assert variant.task.prompts("train", 1, 0)
    assert variant.reward


def test_the_toy_takes_other_parts():
    variant = make("toy", Letters())
    assert isinstance(variant.processor, Letters)
    assert isinstance(variant.task, LettersTask)
    assert variant.reward is brightness


def test_subclasses_of_the_shapes_processor():
    class Slower(ShapesProcessor):
        time_shift = 5.0

    variant = make_variant("text_to_image", processor=Slower())
    assert variant.rules.time_shift == 5.0
    assert variant.reward == "shapes"


@pytest.mark.parametrize("name", ["text_to_image", "edit", "story", "dialogue"])
def test_end_id_is_forbidden_unless_may_end(name):
    variant = make_variant(name)
    assert variant.rules.end_id is None
    assert variant.processor.end_id in variant.rules.forbidden_ids


@pytest.mark.parametrize("image_budget", [0, 1, 2])
def test_the_end_is_legal_where_the_model_may_end(image_budget):
    variant = make_variant("text_to_image", image_budget=image_budget, may_end=True)
    rules = variant.rules
    assert rules.end_id == variant.processor.end_id
    assert rules.end_id not in rules.forbidden_ids
    assert bool(rules.legal_tokens(0)[rules.end_id]) == (image_budget == 0)
    assert rules.legal_tokens(1)[rules.end_id]


def test_an_end_that_opens_images_is_not_forbidden():
    class Same(Letters):
        end_id = 1

    assert make("text_to_image", Same()).rules.forbidden_ids == (0,)
    text = make("text_to_image", Same(), image_budget=0, may_end=True).rules
    assert text.end_id == text.open_image_id == 1
    assert text.legal_tokens()[1]
    with pytest.raises(ValueError, match="expected an end_id other than open_image_id 1"):
        make("text_to_image", Same(), may_end=True)


def test_reflecting_pays_for_further_images():
    variant = make_variant("reflect", image_budget=4, extra_image_penalty=0.1)
    assert variant.reward == {"reflect": 1.0, "extra_images": -0.1}
    assert variant.lowest_reward == pytest.approx(-0.3)
    assert variant.rules.end_id is not None
    assert not variant.rules.end_before_image


@pytest.mark.parametrize("images", [1, 3, 5])
def test_a_longer_story_has_more_room(images):
    rules = make_variant("story", images=images).rules
    assert rules.image_budget == images
    assert rules.prompt_budget >= 4 * images + 2
    assert rules.text_budget >= 4 * images


def test_settings_win_over_the_scenario_s_own():
    rules = make_variant("edit", source_images=2, min_source_images=0, prompt_budget=40).rules
    assert (rules.min_source_images, rules.source_images, rules.prompt_budget) == (0, 2, 40)
    assert make_variant("reflect", may_end=False).rules.end_id is None


def test_round_words_are_for_many_images():
    vocabulary = ShapesProcessor().tokenizer.get_vocab()
    for name in ("then", "right-picture", "make"):
        word = vocabulary[name]
        assert word in make_variant("text_to_image").rules.forbidden_ids
        assert word not in make_variant("story").rules.forbidden_ids
    assert vocabulary["<image>"] in make_variant("story").rules.forbidden_ids


def test_a_plain_backbone_plays_an_episode():
    env = InterleavedGenEnv(make("text_to_image", Letters(), text_budget=3, image_steps=1))
    observation, _ = env.reset(seed=0)
    for letter in "ab":
        token = ord(letter) - ord("a") + 2
        observation, *_ = env.step({"token": token, "next_latent": observation["latent"]})
    observation, *_ = env.step({"token": 1, "next_latent": observation["latent"]})
    latent = observation["latent"] * 0 + 0.25
    _, reward, ended, _, info = env.step({"token": 0, "next_latent": latent})
    assert ended
    assert reward == 0.25
    assert info["text"] == "ab"
