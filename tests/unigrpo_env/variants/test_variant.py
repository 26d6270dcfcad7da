"""Variants by name, finished ones, and settings that nobody knows."""

import dataclasses

import gymnasium as gym
import pytest

import unigrpo_env  # noqa: F401
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.tasks.shapes.processor import ShapesProcessor
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants import variant as module
from unigrpo_env.variants.variant import (
    VARIANTS,
    Scenario,
    Variant,
    make_variant,
    register_variant,
)


class OnePrompt:
    """A task of one prompt."""

    def prompts(self, split, count, seed):
        return [Prompt("a circle")] * count


def zero(episodes):
    return [0.0] * len(episodes)


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry that a test may change."""
    copy = type(VARIANTS)("variant")
    for name in VARIANTS:
        copy.add(name, VARIANTS[name])
    monkeypatch.setattr(module, "VARIANTS", copy)
    return copy


def test_unknown_names_have_a_proposal():
    with pytest.raises(ValueError, match="unknown variant 'text_to_imag'; did you mean 'text_to"):
        InterleavedGenEnv("text_to_imag")
    with pytest.raises(ValueError, match="did you mean 'shapes'"):
        gym.make("unigrpo/TextToImage-v0", reward="shape")
    with pytest.raises(gym.error.Error, match="TextToImage"):
        gym.make("unigrpo/TextToImages-v0")


@pytest.mark.parametrize(
    ("name", "setting", "proposal"),
    [
        ("text_to_image", "text_bugdet", "text_budget"),
        ("edit", "source_image", "source_images"),
        ("reflect", "extra_image_penalti", "extra_image_penalty"),
        ("story", "image", "images"),
        ("toy", "image_step", "image_steps"),
    ],
)
def test_unknown_settings_have_a_proposal(name, setting, proposal):
    message = f"the variant '{name}' has no setting '{setting}'; did you mean .*'{proposal}'"
    for make in (make_variant, InterleavedGenEnv):
        with pytest.raises(TypeError, match=message):
            make(name, **{setting: 3})


def test_every_field_of_a_scenario_is_a_setting():
    for field in dataclasses.fields(Scenario):
        make_variant("text_to_image", **{field.name: field.default})


def test_parts_replace_those_of_the_scenario():
    task = OnePrompt()
    variant = make_variant(
        "story", task=task, reward=zero, thought_reward="brevity", round_reward="crispness"
    )
    assert variant.task is task
    assert variant.reward is zero
    assert variant.thought_reward == "brevity"
    assert variant.round_reward == "crispness"
    assert make_variant("story").thought_reward is None


def test_a_finished_variant_stays_as_it_is():
    variant = make_variant("story")
    assert make_variant(variant) == variant
    task = OnePrompt()
    changed = make_variant(variant, task=task, reward=zero, round_reward=zero)
    assert changed == dataclasses.replace(variant, task=task, reward=zero, round_reward=zero)
    assert variant.round_reward is None


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"text_budget": 3}, r"\['text_budget'\]"),
        ({"processor": ShapesProcessor()}, r"\['processor'\]"),
        ({"processor": ShapesProcessor(), "images": 2}, r"\['images', 'processor'\]"),
    ],
)
def test_a_finished_variant_takes_no_settings(extra, named):
    with pytest.raises(TypeError, match=f"got {named} beside a finished Variant; .*replace"):
        make_variant(make_variant("story"), **extra)


def test_a_maker_of_one_s_own_is_registered(registry):
    @register_variant("mine")
    def mine(size=3):
        """Draw."""
        return make_variant("text_to_image", text_budget=size)

    assert make_variant("mine", size=5).rules.text_budget == 5
    with pytest.raises(TypeError, match="no setting 'text_budget'; Known: size"):
        make_variant("mine", text_budget=5)
    with pytest.raises(ValueError, match="variant 'mine' is already registered"):
        register_variant("mine")(mine)


def test_a_maker_need_not_take_the_parts(registry):
    registry.add("mine", lambda: make_variant("text_to_image", text_budget=3))
    task = OnePrompt()
    variant = make_variant("mine", processor=ShapesProcessor(), task=task, reward=zero)
    assert variant.task is task
    assert variant.reward is zero


def test_another_number_of_image_steps():
    variant = make_variant("text_to_image", time_shift=2.0)
    assert variant.with_image_steps(None) is variant
    changed = variant.with_image_steps(4)
    assert (
        changed.rules.times
        == make_variant("text_to_image", time_shift=2.0, image_steps=4).rules.times
    )
    assert dataclasses.replace(changed, rules=variant.rules) == variant
    with pytest.raises(ValueError, match="expected steps >= 1"):
        variant.with_image_steps(0)


def test_a_processor_s_own_schedule_is_used():
    class Quadratic(ShapesProcessor):
        def time_grid(self, steps, shift=None):
            return tuple((1 - step / steps) ** 2 for step in range(steps + 1))

    variant = make_variant("text_to_image", processor=Quadratic(), image_steps=2)
    assert variant.rules.times == (1.0, 0.25, 0.0)
    assert variant.with_image_steps(4).rules.times[1] == 0.5625


def test_explicit_times_win_over_steps():
    rules = make_variant("story", times=[1.0, 0.6, 0.0], image_steps=7, time_shift=9.0).rules
    assert rules.times == (1.0, 0.6, 0.0)
    assert rules.image_steps == 2
    with pytest.raises(ValueError, match="fall from 1 to 0"):
        make_variant("story", times=(1.0, 0.6, 0.7))


def test_the_default_grid_is_the_processor_s():
    rules = make_variant("text_to_image", image_steps=3).rules
    assert rules.time_shift == ShapesProcessor.time_shift
    assert rules.times == ShapesProcessor().time_grid(3)
    assert (
        make_variant("text_to_image", image_steps=3, time_shift=1.0).rules.times[1] < rules.times[1]
    )


def test_a_scenario_has_no_tokens():
    scenario = Scenario(system_prompt="a circle", lowest_reward=-1.0)
    variant = scenario.variant(ShapesProcessor(), ShapesTask(), "shapes")
    assert isinstance(variant, Variant)
    assert variant.system_prompt == "a circle"
    assert variant.lowest_reward == -1.0
    assert dataclasses.replace(
        variant, system_prompt="", lowest_reward=0.0
    ).rules == Scenario().rules(ShapesProcessor())
