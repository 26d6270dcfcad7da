"""Bad input ends in an error that says what was expected, and changes nothing."""

import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from PIL import Image

import unigrpo_env  # noqa: F401
from rewards import EpisodeBatch
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.rendering import read_picture
from unigrpo_env.tasks import PromptFile
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv


def action(env, **change):
    return {"token": np.int64(10), "latent": np.zeros((36, 48), np.float32)} | change


def env_in_image_phase():
    env = InterleavedGenEnv(text_budget=0)
    env.reset(seed=0)
    return env


@pytest.mark.parametrize(
    ("make", "change", "error", "message"),
    [
        (lambda: InterleavedGenEnv(), {"token": np.int64(64)}, ValueError, r"expected tokens in \[0, 64\)"),
        (lambda: InterleavedGenEnv(), {"token": np.int64(-1)}, ValueError, r"expected tokens in \[0, 64\)"),
        (lambda: InterleavedGenEnv(), {"token": np.float32(3)}, TypeError, "integer dtype"),
        (lambda: InterleavedGenEnv(), {"token": np.array([1, 2])}, ValueError, "shape"),
        (env_in_image_phase, {"latent": np.zeros((36, 47), np.float32)}, ValueError, r"\[1, 36, 48\]"),
        (env_in_image_phase, {"latent": np.zeros((36, 48), np.int64)}, TypeError, "floating dtype"),
        (env_in_image_phase, {"latent": np.full((36, 48), np.nan, np.float32)}, ValueError, "finite"),
        (env_in_image_phase, {"latent": np.full((36, 48), np.inf, np.float32)}, ValueError, "finite"),
    ],
)
def test_bad_actions(make, change, error, message):
    env = make()
    before, _ = env.reset(seed=0)
    with pytest.raises(error, match=message):
        env.step(action(env, **change))
    after = env._observation()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_an_action_that_is_no_dict():
    env = InterleavedGenEnv()
    env.reset(seed=0)
    with pytest.raises(KeyError, match="'token' and 'latent'"):
        env.step(3)


def test_step_before_reset():
    with pytest.raises(ResetNeeded, match="reset"):
        InterleavedGenEnv().step(action(None))
    with pytest.raises(ResetNeeded, match="reset"):
        InterleavedGenVectorEnv(num_envs=2).step({"token": torch.zeros(2, dtype=torch.long), "latent": torch.zeros(2, 36, 48)})


@pytest.mark.parametrize("name", ["text_to_image", "edit", "reflect", "story", "dialogue"])
def test_step_after_the_end(name):
    env = InterleavedGenEnv(name, text_budget=1, image_steps=1)
    env.reset(seed=0)
    ended = False
    while not ended:
        after, _, ended, *_ = env.step(action(env))
    with pytest.raises(ValueError, match="ended"):
        env.step(action(env))
    again = env._observation()
    assert all(np.array_equal(after[name], again[name]) for name in after)


@pytest.mark.parametrize(
    ("change", "active", "message"),
    [
        ({"token": torch.tensor([10, 64])}, None, r"\[0, 64\)"),
        ({"latent": torch.zeros(2, 36, 40)}, None, r"\[2, 36, 48\]"),
        ({}, torch.tensor([True]), "expected active of shape"),
        ({}, torch.tensor([1, 0]), "dtype bool"),
    ],
)
def test_bad_actions_of_many(change, active, message):
    env = InterleavedGenVectorEnv(num_envs=2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step({"token": torch.tensor([10, 10]), "latent": torch.zeros(2, 36, 48)} | change, active)


def test_an_active_row_that_has_ended():
    env = InterleavedGenVectorEnv(num_envs=3, text_budget=0, image_steps=1)
    env.reset(seed=0)
    env.step(LAST, torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match=r"\[0\] have ended"):
        env.step(LAST)
    _, reward, terminated, _, _ = env.step(LAST, torch.tensor([False, True, True]))
    assert terminated.all()
    assert reward[0] == 0


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'shapes'"):
        gym.make("unigrpo/TextToImage-v0", reward="shape")
    with pytest.raises(gym.error.Error, match="TextToImage"):
        gym.make("unigrpo/TextToImages-v0")
    with pytest.raises(ValueError, match="did you mean 'text_to_image'"):
        InterleavedGenEnv("text_to_imag")
    with pytest.raises(ValueError, match="unknown reset options"):
        InterleavedGenEnv().reset(options={"promt": "a circle"})


def test_a_prompt_beyond_the_budget_changes_no_row():
    env = InterleavedGenVectorEnv(num_envs=2)
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match="prompt_budget=16"):
        env.reset(seed=1, options={"prompts": ["a circle", "a circle and " * 9]})
    after = env._observation()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "text", "message"), [("p.txt", "\n \n", "empty"), ("p.jsonl", '{"text": 1}\n', "line 1"), ("p.jsonl", "circle\n", "line 1")]
)
def test_prompt_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        PromptFile(tmp_path / name)
    with pytest.raises(ValueError, match="found none"):
        PromptFile(tmp_path / "other.txt")


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("L", (3, 2), 102), (0.4, 0.4, 0.4)),
        (Image.new("P", (3, 2), 0), (0.0, 0.0, 0.0)),
        (Image.new("RGB", (3, 2), (255, 102, 0)).quantize(2), (1.0, 0.4, 0.0)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 51)), (1.0, 0.8, 0.8)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 0)), (1.0, 1.0, 1.0)),
        (Image.fromarray(np.full((2, 3), 102 * 257, np.uint16)), (0.4, 0.4, 0.4)),
    ],
)
def test_picture_files_of_any_mode_are_rgb(tmp_path, picture, expected):
    picture.save(tmp_path / "p.png")
    found = read_picture(tmp_path / "p.png")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected)[:, None, None].expand(3, 2, 3))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_picture_files_that_are_none(tmp_path, suffix):
    path = tmp_path / f"p.{suffix}"
    with pytest.raises(ValueError, match=f"whole picture at .*p.{suffix}, got"):
        read_picture(path)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for broken in (b"", b"no picture", whole[:20], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"whole picture at .*p.{suffix}, got"):
            read_picture(path)


def test_a_prompt_file_keeps_its_splits_apart(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {n}" for n in range(30)))
    task = PromptFile(tmp_path / "p.txt")
    train, test = ({p.text for p in task.prompts(split, 60, 0)} for split in ("train", "test"))
    assert len(train) == 27
    assert len(test) == 3
    assert not train & test


def reward_env(reward):
    env = InterleavedGenVectorEnv(num_envs=3, reward=reward, text_budget=0, image_steps=1)
    env.reset(seed=0)
    return env


LAST = {"token": torch.zeros(3, dtype=torch.long), "latent": torch.zeros(3, 36, 48)}


def test_a_reward_that_raises_keeps_its_own_text():
    def broken(episodes: EpisodeBatch):
        raise ZeroDivisionError("the scorer's own words")

    with pytest.raises(ZeroDivisionError, match="the scorer's own words") as caught:
        reward_env(broken).step(LAST)
    assert any("'broken'" in note for note in caught.value.__notes__)


def test_a_reward_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"shape \[2\]; expected one number an episode, \[3\]"):
        reward_env(lambda episodes: [0.0, 1.0]).step(LAST)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unscorable_is_not_zero(bad):
    _, reward, terminated, _, infos = reward_env(lambda episodes: [1.0, bad, 0.5]).step(LAST)
    assert reward[0] == 1
    assert reward[1].isnan()
    assert infos["unscored"].tolist() == [False, True, False]
    assert terminated.all()


@pytest.mark.parametrize("name", ["thought_reward", "round_reward"])
def test_an_unscorable_reward_on_the_way_is_told_at_the_end(name):
    def no_circles(episodes):
        """NaN for the first thought or picture of a circle's episode."""
        first = [len(drawn) == (name == "round_reward") for drawn in episodes.pictures]
        return [math.nan if here and "circle" in prompt else 1.0 for here, prompt in zip(first, episodes.prompts, strict=True)]

    variant = make_variant("story", pictures=2, text_budget=1, image_steps=1, reward="extra_pictures", **{name: no_circles})
    one, two = InterleavedGenEnv(variant), InterleavedGenVectorEnv(variant, 2)
    for prompts in (["a circle", "a square"], ["a square", "a circle"]):
        one.reset(seed=0, options={"prompt": prompts[0]})
        *_, info = [one.step(action(one))[-1] for _ in range(4)]
        assert info["unscored"] == ("circle" in prompts[0])
        two.reset(seed=0, options={"prompts": prompts})
        told = []
        for active in ([True, False], [True, True], [True, True], [True, True], [False, True]):  # row 1 is a step behind
            infos = two.step({name: value[:2] for name, value in LAST.items()}, torch.tensor(active))[-1]
            told += [infos["unscored"].tolist()] if "unscored" in infos else []
        assert told == [["circle" in prompts[0], False], [False, "circle" in prompts[1]]]


def test_leaving_without_a_picture_gets_the_lowest_reward_and_never_nan():
    variant = make_variant("text_to_image", reward=lambda episodes: [math.nan] * len(episodes))
    env = InterleavedGenEnv(dataclasses.replace(variant, rules=dataclasses.replace(variant.rules, end_id=10)))
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(action(env))
    assert terminated
    assert reward == 0.0
    assert not info["unscored"]
