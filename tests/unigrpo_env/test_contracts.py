"""Every registered variant keeps the contract that users inherit."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

import unigrpo_env  # noqa: F401
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.rendering import PAPER, enlarge
from unigrpo_env.testing import VariantContract
from unigrpo_env.variants import VARIANTS
from unigrpo_env.vector import InterleavedGenVectorEnv

IDS = sorted(name for name in gym.registry if name.startswith("unigrpo/"))


class TestTextToImage(VariantContract):
    def make_variant(self):
        return VARIANTS["text_to_image"]()


class TestToy(VariantContract):
    def make_variant(self):
        return VARIANTS["toy"]()


class TestWithoutThought(VariantContract):
    def make_variant(self):
        return VARIANTS["text_to_image"](text_budget=0)


class TestEdit(VariantContract):
    def make_variant(self):
        return VARIANTS["edit"]()


class TestEditWithTwoSources(VariantContract):
    def make_variant(self):
        return VARIANTS["edit"](source_images=2)


class TestReflect(VariantContract):
    def make_variant(self):
        return VARIANTS["reflect"]()


class TestStory(VariantContract):
    def make_variant(self):
        return VARIANTS["story"]()


class TestStoryWithoutThought(VariantContract):
    def make_variant(self):
        return VARIANTS["story"](text_budget=0)


class TestLongStory(VariantContract):
    def make_variant(self):
        return VARIANTS["story"](pictures=5, image_steps=2)


class TestPaidOnTheWay(VariantContract):
    def make_variant(self):
        brightness = lambda episodes: episodes.images.mean((1, 2, 3))  # noqa: E731
        return dataclasses.replace(
            VARIANTS["story"](image_steps=4), thought_reward=lambda episodes: [0.5] * len(episodes), round_reward=brightness
        )


class TestDialogue(VariantContract):
    def make_variant(self):
        return VARIANTS["dialogue"]()


def test_every_variant_is_tested_here():
    assert set(VARIANTS) == {"text_to_image", "edit", "reflect", "story", "dialogue", "toy"}
    assert len(IDS) == len(list(VARIANTS))


@pytest.mark.parametrize("env_id", IDS)
def test_torchrl_takes_the_single_env(env_id):
    check_env_specs(GymWrapper(gym.make(env_id), categorical_action_encoding=True))


@pytest.mark.parametrize("env_id", IDS)
def test_make_vec(env_id):
    env = gym.make_vec(env_id, num_envs=3)
    observation, info = env.reset(seed=0)
    assert observation["latent"].shape[0] == 3
    assert len(info["prompts"]) == 3
    assert env.observation_space.spaces["tokens"].shape == tuple(observation["tokens"].shape)


def test_wrappers(tmp_path):
    env = gym.make("unigrpo/TextToImage-v0", render_mode="rgb_array")
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.RecordVideo(env, str(tmp_path), disable_logger=True))
    env.reset(seed=0)
    ended, length = False, 0
    while not ended:
        _, reward, ended, _, info = env.step(env.action_space.sample())
        length += 1
    env.close()
    assert info["episode"]["l"] == length
    assert info["episode"]["r"] == reward
    assert list(tmp_path.glob("*.mp4"))


def test_a_time_limit_truncates_what_is_not_finished():
    env = gym.wrappers.TimeLimit(gym.make("unigrpo/Story-v0", pictures=2, text_budget=0, image_steps=2), 3)
    for _ in range(2):
        observation, _ = env.reset(seed=0)
        told = []
        for _ in range(3):
            observation, reward, *ended, _ = env.step({"token": 0, "latent": observation["latent"]})
            told.append((reward, *ended))
        assert told == [(0, False, False), (0, False, False), (0, False, True)], "the second picture is half drawn"


def test_frames_show_the_picture_and_the_words():
    for kind in (InterleavedGenEnv, InterleavedGenVectorEnv):
        with pytest.raises(ValueError, match="expected render_mode 'rgb_array' or None, got 'human'"):
            kind("toy", render_mode="human")
    env = gym.make("unigrpo/TextToImage-v0", render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    thinking = env.render()
    while True:
        (
            observation,
            *_,
        ) = env.step(env.action_space.sample())
        if observation["phase"] == 1:
            break
    drawing = env.render()
    assert thinking.shape == drawing.shape == (272, 608, 3)
    assert thinking.dtype == "uint8"
    assert (thinking[20:250, 20:250] != drawing[20:250, 20:250]).mean() > 0.5


@pytest.mark.parametrize("name", ["edit", "story"])
def test_frames_show_the_last_picture_while_words_are_said(name):
    env = InterleavedGenEnv(name, render_mode="rgb_array", text_budget=2, image_steps=1)
    observation, _ = env.reset(seed=0)
    shown = [env.render()[16:256, 16:256]]
    for _ in range(3):
        observation, *_ = env.step({"token": 10, "latent": observation["latent"] * 0})
        shown.append(env.render()[16:256, 16:256])
    (source,) = env.episodes.prompts[0].sources or (None,)
    empty = np.full((238, 238, 3), PAPER, np.uint8)
    first = empty if source is None else np.asarray(enlarge(source, 240))[1:-1, 1:-1]
    assert [np.array_equal(frame[1:-1, 1:-1], first) for frame in shown] == [True, True, False, False]
    assert (shown[3] == 128).all(), "grey was drawn, and is looked at"
