"""The vector env, in torch and in NumPy, and inside Gymnasium's vector wrappers."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import vector as wrappers

import unigrpo_env  # noqa: F401
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.tasks.shapes.vocabulary import shapes_tokenizer
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

END = shapes_tokenizer().get_vocab()["<end>"]


def last(rows=3):
    return {"token": torch.zeros(rows, dtype=torch.long), "next_latent": torch.zeros(rows, 36, 48)}


def one_step_env(**settings):
    """Three rows whose only step draws the image."""
    env = InterleavedGenVectorEnv(num_envs=3, text_budget=0, image_steps=1, **settings)
    env.reset(seed=0)
    return env


def numpy_env(name="story", rows=3, **settings):
    settings = {"text_budget": 2, "image_steps": 2} | settings
    return InterleavedGenVectorEnv(name, rows, inactive="ignore", to_numpy=True, **settings)


def play_out(env, seed=0):
    """A plain loop until all rows have ended; returns what each step gave."""
    observation, infos = env.reset(seed=seed)
    env.action_space.seed(seed)
    steps = [(observation, None, None, infos)]
    ended = np.zeros(env.num_envs, bool)
    while not ended.all():
        observation, reward, ended, _, infos = env.step(env.action_space.sample())
        steps.append((observation, reward, ended, infos))
    return steps


def test_an_active_row_that_has_ended_is_an_error():
    env = one_step_env()
    env.step(last(), torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match=r"\[0\] have ended .* inactive='ignore'"):
        env.step(last())
    _, reward, terminated, _, _ = env.step(last(), torch.tensor([False, True, True]))
    assert terminated.all()
    assert reward[0] == 0


def test_a_long_list_of_ended_rows_is_shortened():
    env = InterleavedGenVectorEnv(num_envs=20, text_budget=0, image_steps=1)
    env.reset(seed=0)
    env.step(last(20))
    with pytest.raises(ValueError, match=r"episodes \[0, 1, 2, 3, 4, 5, 6, 7\] and 12 more have"):
        env.step(last(20))


def test_ended_rows_may_be_ignored():
    env = one_step_env(inactive="ignore", reward=lambda episodes: [1.0] * len(episodes))
    _, reward, terminated, _, infos = env.step(last(), torch.tensor([True, False, False]))
    assert reward.tolist() == [1, 0, 0]
    before, reward, terminated, _, infos = env.step(last())
    assert reward.tolist() == [0, 1, 1]
    assert infos["ended"].tolist() == [1, 2]
    after, reward, terminated, _, infos = env.step(last())
    assert not reward.any()
    assert terminated.all()
    assert "ended" not in infos
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rows_that_never_began_may_be_ignored():
    env = InterleavedGenVectorEnv(num_envs=3, text_budget=0, image_steps=1, inactive="ignore")
    env.reset(seed=0, options={"reset_mask": [False, True, False]})
    _, _, terminated, _, infos = env.step(last())
    assert infos["ended"].tolist() == [1]
    assert terminated.tolist() == [True, True, True]


@pytest.mark.parametrize("wrong", ["skip", None, True])
def test_other_values_of_inactive_are_refused(wrong):
    with pytest.raises(ValueError, match=f"expected inactive 'error' or 'ignore', got {wrong!r}"):
        InterleavedGenVectorEnv(inactive=wrong)


def test_render_modes_are_checked():
    with pytest.raises(ValueError, match="expected render_mode 'rgb_array' or None, got 'human'"):
        InterleavedGenVectorEnv("toy", render_mode="human")


def test_a_reset_mask_leaves_other_rows_alone():
    env = InterleavedGenVectorEnv("story", 3, images=2, text_budget=1, image_steps=1)
    before, _ = env.reset(seed=0)
    for _ in range(3):
        before, *_ = env.step(last())
    mask = torch.tensor([False, True, False])
    after, infos = env.reset(seed=[7, 8, 9], options={"reset_mask": mask})
    fresh, _ = InterleavedGenVectorEnv(env.episodes.variant, 1).reset(seed=8)
    for name in before:
        assert torch.equal(before[name][~mask], after[name][~mask]), name
        assert torch.equal(after[name][1], fresh[name][0]), name
    assert len(infos["prompts"]) == 3


@pytest.mark.parametrize(
    ("seed", "options", "message"),
    [
        ([1, 2], {}, "expected seed of 3 entries, one a row, got 2"),
        (0, {"prompts": ["a circle"]}, "expected prompts of 3 entries"),
        (0, {"reset_mask": [True]}, "expected reset_mask of 3 entries"),
    ],
)
def test_lists_of_a_reset_have_one_entry_a_row(seed, options, message):
    with pytest.raises(ValueError, match=message):
        InterleavedGenVectorEnv(num_envs=3).reset(seed=seed, options=options)


def test_one_seed_counts_up():
    env = InterleavedGenVectorEnv(num_envs=3, text_budget=0)
    counted, _ = env.reset(seed=4)
    listed, _ = env.reset(seed=[4, 5, 6])
    assert torch.equal(counted["latent"], listed["latent"])
    free, _ = env.reset()
    assert not torch.equal(free["latent"], listed["latent"])


def test_observations_are_copies_or_views():
    for copy in (True, False):
        env = one_step_env(copy=copy)
        observation = env.reset(seed=0)[0]
        before = observation["latent"].clone()
        env.step(last())
        assert torch.equal(observation["latent"], before) == copy


def test_texts_and_images_of_all_rows():
    env = InterleavedGenVectorEnv(num_envs=2, text_budget=2, render_mode="rgb_array")
    env.reset(seed=0)
    word = shapes_tokenizer().get_vocab()["circle"]
    env.step({"token": torch.tensor([word, word]), "next_latent": torch.zeros(2, 36, 48)})
    assert env.texts() == ["circle", "circle"]
    assert env.images().shape == (2, 3, 24, 24)
    assert [frame.shape for frame in env.render()] == [(272, 608, 3)] * 2
    assert InterleavedGenVectorEnv("toy").render() is None


@pytest.mark.parametrize("name", ["text_to_image", "edit", "reflect", "story", "dialogue", "toy"])
def test_numpy_observations_are_in_their_space(name):
    env = numpy_env(name)
    for observation, reward, ended, _ in play_out(env):
        assert env.observation_space.contains(observation)
        assert reward is None or isinstance(reward, np.ndarray)
        assert ended is None or ended.dtype == np.bool_


def test_numpy_and_torch_play_the_same_episodes():
    numbers = numpy_env("reflect")
    tensors = InterleavedGenVectorEnv(numbers.episodes.variant, 3, inactive="ignore")
    first, _ = tensors.reset(seed=0)
    observed, _ = numbers.reset(seed=0)
    while (observed["phase"] != Phase.DONE).any():
        assert all(np.array_equal(observed[name], first[name]) for name in first)
        actions = numbers.action_space.sample()
        observed, reward, ended, truncated, _ = numbers.step(actions)
        first, paid, terminated, _, _ = tensors.step(actions)
        assert np.array_equal(reward, paid, equal_nan=True)
        assert np.array_equal(ended, terminated)
        assert not truncated.any()


def test_numpy_observations_are_copies():
    env = InterleavedGenVectorEnv(num_envs=2, text_budget=0, to_numpy=True, copy=False)
    observation, _ = env.reset(seed=0)
    before = observation["latent"].copy()
    env.step(last(2))
    assert np.array_equal(observation["latent"], before)


def test_numpy_infos_are_those_of_the_single_env():
    env = numpy_env(
        "story",
        images=2,
        reward=lambda episodes: [2.0] * len(episodes),
        round_reward=lambda episodes: [0.5] * len(episodes),
    )
    steps = play_out(env)
    _, _, _, infos = steps[0]
    assert infos["prompt"].tolist() == [prompt.text for prompt in env.episodes.prompts]
    assert infos["_prompt"].all()
    total = np.zeros(3)
    paid = np.zeros(3)
    for _, reward, _, infos in steps[1:]:
        total += reward
        if "paid" in infos:
            paid += sum(infos["paid"].values())
    assert total.tolist() == paid.tolist() == [3, 3, 3]
    _, _, _, infos = steps[-1]
    rows = infos["_text"]
    assert rows.any()
    assert infos["image"].shape == (3, 3, 24, 24)
    assert infos["unscored"].dtype == np.bool_
    assert (infos["components"]["<lambda>"][rows] == 2).all()
    images = torch.stack([drawn[-1] for drawn in env.episodes.all_images(range(3))]).numpy()
    assert np.array_equal(infos["image"][rows], images[rows])


def test_numpy_infos_of_rows_without_an_image():
    variant = make_variant("reflect", text_budget=2, image_steps=1)
    rules = dataclasses.replace(variant.rules, end_before_image=True)
    variant = dataclasses.replace(variant, rules=rules)
    env = InterleavedGenVectorEnv(variant, 2, inactive="ignore", to_numpy=True)
    env.reset(seed=0)
    actions = {"token": np.array([END, 10]), "next_latent": np.zeros((2, 36, 48), np.float32)}
    _, reward, ended, _, infos = env.step(actions)
    assert ended.tolist() == [True, False]
    assert reward[0] == np.float32(variant.lowest_reward)
    assert "image" not in infos
    assert infos["_text"].tolist() == [True, False]


def test_episode_statistics_are_recorded():
    env = numpy_env(reward=lambda episodes: [2.0] * len(episodes))
    env = wrappers.RecordEpisodeStatistics(env)
    recorded = {}
    steps = play_out(env)
    for number, (_, _, _, infos) in enumerate(steps):
        for row in np.flatnonzero(infos.get("_text", np.zeros(3))):
            recorded[int(row)] = infos["episode"]["r"][row]
            assert infos["episode"]["l"][row] == number
    assert recorded == {0: 2.0, 1: 2.0, 2: 2.0}


def test_rewards_are_transformed():
    plain = numpy_env(reward=lambda episodes: [2.0] * len(episodes))
    env = wrappers.TransformReward(plain, lambda reward: -reward)
    total = sum(reward for _, reward, _, _ in play_out(env)[1:])
    assert total.tolist() == [-2, -2, -2]


def test_rewards_are_normalized():
    env = wrappers.NormalizeReward(numpy_env(reward=lambda episodes: [2.0] * len(episodes)))
    rewards = np.array([reward for _, reward, _, _ in play_out(env)[1:]])
    assert np.isfinite(rewards).all()
    assert (np.count_nonzero(rewards, 0) == 1).all()


def test_infos_become_a_list():
    env = wrappers.DictInfoToList(numpy_env(reward=lambda episodes: [2.0] * len(episodes)))
    found = {}
    for _, _, _, infos in play_out(env):
        assert [set(info) >= {"prompt"} for info in infos] == [True] * 3
        for row, info in enumerate(infos):
            if "text" in info:
                found[row] = info
    assert sorted(found) == [0, 1, 2]
    for info in found.values():
        assert info["image"].shape == (3, 24, 24)
        assert info["components"] == {"<lambda>": 2.0}
        assert info["paid"] == {"reward": 2.0}


def test_videos_are_recorded(tmp_path):
    pytest.importorskip("moviepy")
    env = numpy_env("toy", 2, render_mode="rgb_array")
    env = wrappers.RecordVideo(env, str(tmp_path), episode_trigger=lambda number: number == 0)
    play_out(env)
    env.close()
    assert list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("name", ["TextToImage", "Edit", "Reflect", "Story", "Dialogue", "Toy"])
def test_gymnasium_makes_it(name):
    env = gym.make_vec(f"unigrpo/{name}-v0", num_envs=3)
    observation, info = env.reset(seed=0)
    assert observation["latent"].shape[0] == 3
    assert len(info["prompts"]) == 3
    assert env.observation_space["tokens"].shape == tuple(observation["tokens"].shape)


def test_gymnasium_passes_settings_on():
    env = gym.make_vec(
        "unigrpo/Story-v0", num_envs=2, images=2, inactive="ignore", to_numpy=True, text_budget=1
    )
    assert env.unwrapped.episodes.rules.text_budget == 1
    assert len(play_out(env)) > 2
