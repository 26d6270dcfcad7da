"""Bad actions, prompts and options end in a clear error and change nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

from rewards.shapes.grid import draw
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.inputs import as_prompt
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

ZEROS = np.zeros((36, 48), np.float32)
GOOD = draw(torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 0]]))[0]


def action(**change):
    return {"token": np.int64(10), "next_latent": ZEROS} | change


def same(one, two):
    return all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("text_budget", "change", "error", "message"),
    [
        (24, {"token": np.int64(64)}, ValueError, r"expected tokens in \[0, 64\)"),
        (24, {"token": np.int64(-1)}, ValueError, r"expected tokens in \[0, 64\)"),
        (24, {"token": np.float32(3)}, TypeError, "an integer dtype"),
        (24, {"token": np.bool_(True)}, TypeError, "an integer dtype"),
        (24, {"token": np.array([1, 2])}, ValueError, r"'token'\] of shape \[1\]"),
        (0, {"next_latent": ZEROS[:, :47]}, ValueError, r"shape \[1, 36, 48\]"),
        (0, {"next_latent": ZEROS.astype(np.int64)}, TypeError, "a floating dtype"),
        (0, {"next_latent": ZEROS * np.nan}, ValueError, "expected a finite"),
        (0, {"next_latent": ZEROS + np.inf}, ValueError, "expected a finite"),
    ],
)
def test_bad_actions_change_nothing(text_budget, change, error, message):
    env = InterleavedGenEnv(text_budget=text_budget)
    before, _ = env.reset(seed=0)
    with pytest.raises(error, match=message):
        env.step(action(**change))
    assert same(before, env._observation())


@pytest.mark.parametrize(
    "wrong", [3, None, {"token": 3}, {"token": 3, "latent": ZEROS}, (3, ZEROS)]
)
def test_an_action_has_both_entries(wrong):
    env = InterleavedGenEnv()
    env.reset(seed=0)
    with pytest.raises(KeyError, match="'token' and 'next_latent'"):
        env.step(wrong)


def test_a_large_finite_latent_is_taken():
    env = InterleavedGenEnv(text_budget=0)
    env.reset(seed=0)
    observation, *_ = env.step(action(next_latent=ZEROS + np.float32(3e38)))
    assert observation["step"] == 1, "the sum of its values overflows"


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_any_integer_is_a_token(dtype):
    env = InterleavedGenEnv()
    env.reset(seed=0)
    observation, *_ = env.step(action(token=dtype(10)))
    assert observation["tokens"][observation["num_tokens"] - 1] == 10


def test_only_the_entry_of_the_phase_is_read():
    env = InterleavedGenEnv(text_budget=1)
    env.reset(seed=0)
    observation, *_ = env.step(action(next_latent=ZEROS * np.nan))
    assert observation["phase"] == 1
    observation, *_ = env.step(action(token=np.int64(99)))
    assert observation["step"] == 1


@pytest.mark.parametrize(
    ("change", "active", "message"),
    [
        ({"token": torch.tensor([10, 64])}, None, r"\[0, 64\)"),
        ({"next_latent": torch.zeros(2, 36, 40)}, None, r"\[2, 36, 48\]"),
        ({}, torch.tensor([True]), "expected active of shape"),
        ({}, torch.tensor([1, 0]), "dtype bool"),
    ],
)
@pytest.mark.parametrize("inactive", ["error", "ignore"])
def test_bad_actions_of_many(inactive, change, active, message):
    env = InterleavedGenVectorEnv(num_envs=2, inactive=inactive)
    env.reset(seed=0)
    actions = {"token": torch.tensor([10, 10]), "next_latent": torch.zeros(2, 36, 48)}
    with pytest.raises(ValueError, match=message):
        env.step(actions | change, active)


@pytest.mark.parametrize("inactive", ["error", "ignore"])
def test_a_step_before_the_reset(inactive):
    with pytest.raises(ResetNeeded, match=r"call env\.reset\(\) first"):
        InterleavedGenEnv().step(action())
    many = InterleavedGenVectorEnv(num_envs=2, inactive=inactive)
    with pytest.raises(ResetNeeded, match=r"call env\.reset\(\) first"):
        many.step({"token": torch.tensor([0, 0]), "next_latent": torch.zeros(2, 36, 48)})


@pytest.mark.parametrize("name", ["text_to_image", "edit", "reflect", "story", "dialogue"])
def test_a_step_after_the_end(name):
    env = InterleavedGenEnv(name, text_budget=1, image_steps=1)
    env.reset(seed=0)
    ended = False
    while not ended:
        after, _, ended, *_ = env.step(action())
    with pytest.raises(ValueError, match=r"episodes \[0\] have ended"):
        env.step(action())
    assert same(after, env._observation())


def test_unknown_reset_options_are_refused():
    for env in (InterleavedGenEnv(), InterleavedGenVectorEnv()):
        with pytest.raises(
            ValueError, match=r"unknown reset options \['promt'\]; expected some of"
        ):
            env.reset(options={"promt": "a circle"})


def test_words_alone_are_a_prompt():
    prompt = Prompt("a circle", {"key": 1})
    assert as_prompt("a circle") == Prompt("a circle")
    assert as_prompt(prompt) is prompt


REMOVE = "remove the circle"


@pytest.mark.parametrize(
    ("variant", "prompt", "message"),
    [
        ("edit", Prompt(REMOVE), "expected 1 source images .* got 0"),
        ("edit", Prompt(REMOVE, sources=(GOOD, GOOD)), "got 2"),
        ("text_to_image", Prompt("a circle", sources=(GOOD,)), "expected 0 source images"),
        ("edit", Prompt(REMOVE, sources=(GOOD[:, :16],)), r"\(RGB\), got \[3, 16, 24\]"),
        ("edit", Prompt(REMOVE, sources=(GOOD[:1],)), r"got \[1, 24, 24\]"),
        ("edit", Prompt(REMOVE, sources=((GOOD * 255).byte(),)), "torch.uint8"),
        ("edit", Prompt(REMOVE, sources=(torch.cat([GOOD, GOOD[:1]]),)), r"got \[4, 24, 24\]"),
        ("edit", Prompt(REMOVE, sources=(GOOD * 255,)), "divide bytes by 255"),
        ("edit", Prompt(REMOVE, sources=(GOOD * 2 - 1,)), r"values in \[0, 1\], got \[-"),
        ("edit", Prompt(REMOVE, sources=(GOOD * torch.nan,)), r"values in \[0, 1\]"),
        ("edit", Prompt(REMOVE, sources=("image.png",)), "got str"),
        ("story", Prompt("a circle then a square", turns=("blue",)), "expected at most 0 turns"),
        ("dialogue", Prompt("a circle", turns=("blue", "red")), "expected at most 1 turns"),
        ("dialogue", Prompt("a circle", turns=("make the circle blue " * 4,)), "turn_budget=10"),
        ("dialogue", Prompt("a circle", turns=("<image>",)), "token '<image>'; take it out"),
        ("dialogue", Prompt("a red circle<eos>"), "control token '<eos>'"),
        ("text_to_image", Prompt("<bos> a circle"), "control token '<bos>'"),
        ("edit", Prompt("remove the <image>", sources=(GOOD,)), "control token '<image>'"),
        ("reflect", Prompt("a circle <end>"), "control token '<end>'"),
        ("text_to_image", Prompt("a circle and " * 9), "takes 30 tokens .* prompt_budget=16"),
    ],
)
def test_prompts_that_a_variant_cannot_take(variant, prompt, message):
    env = InterleavedGenVectorEnv(variant, 2)
    before, _ = env.reset(seed=0)
    good = env.episodes.prompts[0]
    with pytest.raises(ValueError, match=message):
        env.reset(seed=1, options={"prompts": [good, prompt]})
    after = env.episodes.observe()
    assert all(torch.equal(before[name], after[name]) for name in before), "no row has changed"


def test_a_turn_keeps_exactly_its_budget():
    variant = make_variant("dialogue", turn_budget=6)
    env = InterleavedGenEnv(variant)
    env.reset(options={"prompt": Prompt("a circle", turns=("make the circle blue",))})
    with pytest.raises(ValueError, match="takes 7 tokens with its marks; expected at most turn_b"):
        env.reset(options={"prompt": Prompt("a circle", turns=("make the red circle blue",))})


def test_a_system_prompt_has_no_control_tokens():
    variant = dataclasses.replace(make_variant("story"), system_prompt="draw <image>")
    with pytest.raises(ValueError, match="'draw <image>', got the control token '<image>'"):
        InterleavedGenVectorEnv(variant, 2).reset(seed=0)


def test_a_processor_writes_each_source_once():
    variant = make_variant("edit")

    class Forgetful(type(variant.processor)):
        def encode_prompt(self, text, *, sources=0, system="", thinks=True):
            return super().encode_prompt(text, sources=0, system=system, thinks=thinks)

    variant = dataclasses.replace(variant, processor=Forgetful())
    message = "encode_prompt of Forgetful to write image_id 3 once for each of 1 sources, got 0"
    with pytest.raises(ValueError, match=message):
        InterleavedGenEnv(variant).reset(seed=0)
