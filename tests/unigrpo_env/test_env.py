"""The single env as Gymnasium sees it."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import unigrpo_env  # noqa: F401
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.rendering import BACKGROUND, enlarge
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.testing import random_episode


def test_entries_have_their_shapes_and_types():
    env = InterleavedGenEnv("story", images=2)
    observation, _ = env.reset(seed=0)
    assert set(observation) == {*env.observation_space}
    assert set(env.action_space) == {"token", "next_latent"}
    for name in ("t", "next_t"):
        assert observation[name].shape == (1,)
        assert observation[name].dtype == np.float32
    assert observation["legal_tokens"].dtype == np.int8
    assert observation["images_drawn"] == 0
    assert observation["images"].shape == (1, 36, 48)
    assert observation["image_positions"].tolist() == [-1]
    assert not observation["latent"].any()


def test_images_are_observed_if_they_are_read():
    observation, _ = InterleavedGenEnv("text_to_image").reset(seed=0)
    assert "images" not in observation
    assert "image_positions" not in observation


def test_observations_are_copies():
    env = InterleavedGenEnv(text_budget=0)
    first, _ = env.reset(seed=0)
    before = {name: np.copy(value) for name, value in first.items()}
    env.step({"token": 0, "next_latent": first["latent"] * 0})
    assert all(np.array_equal(before[name], first[name]) for name in first)
    seen, _ = env.reset(seed=0)
    seen["latent"][:] = 7
    assert not (env.episodes.state.latent == 7).any()


def test_the_metadata_in_info_is_a_copy():
    env = InterleavedGenEnv()
    metadata = {"objects": [{"count": 1, "colour": "red", "shape": "circle"}]}
    _, info = env.reset(options={"prompt": Prompt("a red circle", metadata)})
    assert info == {"prompt": "a red circle", "metadata": metadata}
    info["metadata"]["objects"].clear()
    assert metadata["objects"]
    assert env.episodes.prompts[0].metadata["objects"]


def test_the_last_step_has_text_and_image():
    env = InterleavedGenEnv(image_steps=2)
    episode = random_episode(env, 0)
    info = episode.info
    assert set(info) == {"prompt", "metadata", "text", "image", "components", "unscored", "paid"}
    assert info["image"].shape == (3, 24, 24)
    assert info["image"].dtype == np.float32
    latent = torch.tensor(episode.observations[-1]["latent"])[None]
    decoded = env.episodes.processor.decode_latents(latent)[0]
    assert np.array_equal(info["image"], decoded.numpy())
    assert info["components"]["shapes"] == episode.reward
    assert info["paid"] == {"reward": episode.reward}
    assert isinstance(info["text"], str)


def test_earlier_steps_have_no_image():
    env = InterleavedGenEnv("story", images=2, text_budget=0, image_steps=1)
    observation, _ = env.reset(seed=0)
    action = {"token": 0, "next_latent": observation["latent"]}
    *_, info = env.step(action)
    assert set(info) == {"prompt", "metadata"}
    *_, info = env.step({"token": 0, "next_latent": observation["latent"] * 0})
    assert np.array_equal(info["image"], np.full((3, 24, 24), 0.5, np.float32)), "the last one"


def test_a_reset_without_a_seed():
    env = InterleavedGenEnv(text_budget=0)
    env.reset(seed=1)
    one = [env.reset()[0]["latent"] for _ in range(2)]
    env.reset(seed=1)
    two = [env.reset()[0]["latent"] for _ in range(2)]
    assert np.array_equal(one, two)
    assert not np.array_equal(one[0], one[1])


@pytest.mark.parametrize("name", ["text_to_image", "edit", "reflect", "story", "dialogue", "toy"])
def test_the_seed_draws_a_training_prompt(name):
    env = InterleavedGenEnv(name)
    _, info = env.reset(seed=3)
    assert info["prompt"] == env.episodes.variant.task.prompts("train", 1, 3)[0].text


def test_gymnasium_wrappers_take_the_env(tmp_path):
    pytest.importorskip("moviepy")
    env = gym.make("unigrpo/Toy-v0", render_mode="rgb_array")
    env = gym.wrappers.RecordVideo(env, str(tmp_path), disable_logger=True)
    env = gym.wrappers.RecordEpisodeStatistics(env)
    env.reset(seed=0)
    ended = False
    length = 0
    while not ended:
        _, reward, ended, _, info = env.step(env.action_space.sample())
        length += 1
    env.close()
    assert info["episode"]["l"] == length
    assert info["episode"]["r"] == reward
    assert list(tmp_path.glob("*.mp4"))


def test_a_time_limit_truncates():
    env = gym.make("unigrpo/Story-v0", images=2, text_budget=0, image_steps=2)
    env = gym.wrappers.TimeLimit(env, 3)
    for _ in range(2):
        observation, _ = env.reset(seed=0)
        steps = []
        for _ in range(3):
            action = {"token": 0, "next_latent": observation["latent"]}
            observation, reward, *ended, _ = env.step(action)
            steps.append((reward, *ended))
        # The second image is half drawn then.
        assert steps == [(0, False, False), (0, False, False), (0, False, True)]


def test_frames_show_the_image_and_the_words():
    env = InterleavedGenEnv(render_mode="rgb_array", text_budget=3)
    env.reset(seed=0)
    thinking = env.render()
    phase = Phase.TEXT
    while phase != Phase.IMAGE:
        observation, *_ = env.step({"token": 10, "next_latent": np.zeros((36, 48), np.float32)})
        phase = observation["phase"]
    drawing = env.render()
    assert thinking.shape == drawing.shape == (272, 608, 3)
    assert thinking.dtype == "uint8"
    assert (thinking[20:250, 20:250] != drawing[20:250, 20:250]).mean() > 0.5
    assert (thinking[:, 272:] != drawing[:, 272:]).any()


@pytest.mark.parametrize("name", ["edit", "story"])
def test_frames_keep_the_last_image(name):
    env = InterleavedGenEnv(name, render_mode="rgb_array", text_budget=2, image_steps=1)
    observation, _ = env.reset(seed=0)
    shown = [env.render()[16:256, 16:256]]
    for _ in range(3):
        observation, *_ = env.step({"token": 10, "next_latent": observation["latent"] * 0})
        shown.append(env.render()[16:256, 16:256])
    first = np.full((238, 238, 3), BACKGROUND, np.uint8)
    sources = env.episodes.prompts[0].sources
    if sources:
        first = np.asarray(enlarge(sources[0], 240))[1:-1, 1:-1]
    same = [np.array_equal(frame[1:-1, 1:-1], first) for frame in shown]
    assert same == [True, True, False, False]
    assert (shown[3] == 128).all(), "grey was drawn, and is looked at"


def test_text_alone_is_rendered_too():
    env = InterleavedGenEnv(render_mode="rgb_array", image_budget=0, text_budget=2)
    env.reset(seed=0)
    empty = env.render()
    env.step({"token": 10, "next_latent": np.zeros((36, 48), np.float32)})
    assert (env.render() != empty).any()


def test_without_a_render_mode_there_is_no_frame():
    env = InterleavedGenEnv("toy")
    env.reset(seed=0)
    assert env.render() is None
    with pytest.raises(ValueError, match="expected render_mode 'rgb_array' or None, got 'human'"):
        InterleavedGenEnv("toy", render_mode="human")
