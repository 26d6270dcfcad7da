"""Every registered variant keeps the contract that users inherit."""

import dataclasses

import pytest

from unigrpo_env.testing import VariantContract
from unigrpo_env.variants.variant import VARIANTS, make_variant

pytestmark = pytest.mark.slow


def made_from(name, **settings):
    """A class of tests for one variant."""

    class Contract(VariantContract):
        def make_variant(self):
            return make_variant(name, **settings)

    return Contract


def brightness(episodes):
    return episodes.images.mean((1, 2, 3))


def half(episodes):
    return [0.5] * len(episodes)


class Replying(type(make_variant("dialogue").task)):
    """Asks for a change of colour, until the second image."""

    def reply(self, episodes):
        return ["make" if len(drawn) < 2 else None for drawn in episodes.all_images]


TestTextToImage = made_from("text_to_image")
TestToy = made_from("toy")
TestEdit = made_from("edit")
TestReflect = made_from("reflect")
TestStory = made_from("story")
TestDialogue = made_from("dialogue")
TestWithoutThought = made_from("text_to_image", text_budget=0)
TestTextAlone = made_from("text_to_image", image_budget=0, reward="brevity")
TestTextAloneThatEnds = made_from("text_to_image", image_budget=0, may_end=True, reward=half)
TestLastText = made_from("story", images=2, text_after_images=True)
TestLastTextThatEnds = made_from("reflect", text_after_images=True)
TestLeaving = made_from("text_to_image", may_end=True, end_before_image=True, lowest_reward=-1.0)
TestEditOfTwo = made_from("edit", source_images=2)
TestEditOfUpToTwo = made_from("edit", source_images=2, min_source_images=0)
TestStoryWithoutThought = made_from("story", text_budget=0)
TestLongStory = made_from("story", images=5, image_steps=2)
TestSystemText = made_from("edit", system_prompt="a circle", prompt_budget=24)
TestExplicitTimes = made_from("text_to_image", times=(1.0, 0.6, 0.0))
TestReplies = made_from("dialogue", image_budget=3, task=Replying(), reward="extra_images")
TestPaidOnTheWay = made_from("story", image_steps=4, thought_reward=half, round_reward=brightness)


def test_every_variant_is_tested_here():
    tested = {"text_to_image", "edit", "reflect", "story", "dialogue", "toy"}
    assert {*VARIANTS} == tested


def test_a_broken_variant_breaks_its_contract():
    variant = make_variant("text_to_image", image_steps=2)

    class Dim(type(variant.processor)):
        def decode_latents(self, latents):
            self.calls = getattr(self, "calls", 0) + 1
            return super().decode_latents(latents) * 0 + self.calls / 100

    dim = dataclasses.replace(variant, processor=Dim(), reward=brightness)
    contract = VariantContract()
    contract.make_variant = lambda: dim
    try:
        contract.test_same_seed_same_episode()
    except AssertionError:
        return
    raise AssertionError("an env that is not reproducible passed")
