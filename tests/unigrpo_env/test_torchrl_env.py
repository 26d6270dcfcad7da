"""The batch of episodes as a TorchRL env."""

import subprocess
import sys

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from unigrpo_env.mdp.rules import Phase
from unigrpo_env.torchrl_env import InterleavedGenTorchRLEnv
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

VARIANTS = ["text_to_image", "edit", "reflect", "story", "dialogue", "toy"]
ROWS = 4


def make_env(name="text_to_image", **arguments):
    return InterleavedGenTorchRLEnv(name, ROWS, **{"text_budget": 3, "image_steps": 3, **arguments})


def legal_policy(tensordict):
    """Some legal token, and a step towards grey."""
    legal = tensordict["legal_tokens"].float()
    tensordict["token"] = torch.multinomial(legal, 1)[:, 0]
    tensordict["next_latent"] = tensordict["latent"] * 0.9
    return tensordict


@pytest.mark.parametrize("name", VARIANTS)
def test_specs_are_right(name):
    env = make_env(name, components=["shapes/score"], group_size=2)
    check_env_specs(env, seed=0)
    check_env_specs(env, return_contiguous=False)
    check_env_specs(env, break_when_any_done=False)


def test_transformed_specs_are_right():
    env = TransformedEnv(make_env(), StepCounter())
    env.append_transform(RewardSum())
    check_env_specs(env)


@pytest.mark.parametrize("name", VARIANTS)
def test_observation_is_the_vector_envs(name):
    """The same prompts and seeds give the same observations and rewards, step by step."""
    env = make_env(name)
    env.set_seed(3)
    step = env.reset()
    seeds = step["seed"].tolist()
    vector_env = InterleavedGenVectorEnv(env.episodes.variant, ROWS, inactive="ignore")
    options = {"prompts": list(env.episodes.prompts)}
    observation, _ = vector_env.reset(seed=seeds, options=options)
    for _ in range(env.episodes.rules.max_steps):
        for entry, value in observation.items():
            assert torch.equal(step[entry], value), entry
        step = legal_policy(step)
        action = {entry: step[entry] for entry in ("token", "next_latent")}
        step = env.step(step)["next"]
        observation, reward, terminated, _, _ = vector_env.step(action)
        torch.testing.assert_close(step["reward"][:, 0], reward, equal_nan=True)
        assert torch.equal(step["terminated"][:, 0], terminated)
    assert step["done"].all()


def test_rollout_stops_when_all_are_done():
    env = make_env("reflect")
    torch.manual_seed(0)
    steps = env.rollout(100, legal_policy, break_when_any_done=False, break_when_all_done=True)
    assert steps.shape[1] < 100
    done = steps["next", "done"][..., 0]
    assert done[:, -1].all()
    assert not done.all(0)[:-1].any()
    first = done.int().argmax(1)
    assert len(first.unique()) > 1, "no row ended before another"
    for row, end in enumerate(first.tolist()):
        ended = steps[row, end:]
        assert (ended["next", "final_reward"] == ended["next", "final_reward"][0]).all()
        assert torch.equal(ended["next", "latent"][-1], ended["next", "latent"][0])


def test_rollout_begins_ended_rows_anew():
    env = make_env()
    env.set_seed(0)
    steps = env.rollout(20, legal_policy, break_when_any_done=False)
    assert steps.shape == (ROWS, 20)
    done = steps["next", "done"][:, :-1, 0]
    number = steps["episode"]
    assert done.sum() > ROWS
    assert torch.equal(number[:, 1:] - number[:, :-1], done.long())
    begun = steps[:, 1:][done]
    assert (begun["num_tokens"] == begun["prompt_length"]).all()
    assert not begun["images_drawn"].any()
    # Every episode has a seed of its own.
    assert len(steps["seed"].unique()) == number[:, -1].sum()


def test_waiting_row_stays_as_it_is():
    env = make_env()
    step = legal_policy(env.reset())
    step["active"] = torch.tensor([[True], [False], [True], [False]])
    after = env.step(step)["next"]
    assert torch.equal(after["num_tokens"] - step["num_tokens"], torch.tensor([1, 0, 1, 0]))
    assert not after["reward"].any()
    assert not after["done"].any()
    step["active"] = torch.zeros(ROWS, 1, dtype=torch.bool)
    still = env.step(step)["next"]
    assert torch.equal(still["tokens"], after["tokens"])


def test_only_masked_rows_are_reset():
    env = make_env()
    env.set_seed(0)
    step = env.step(legal_policy(env.reset()))["next"]
    step["_reset"] = torch.tensor([[False], [True], [False], [False]])
    after = env.reset(step.clone())
    for entry in ("tokens", "num_tokens", "seed", "episode"):
        kept = [0, 2, 3]
        assert torch.equal(after[entry][kept], step[entry][kept])
    assert after["seed"][1] != step["seed"][1]
    assert after["episode"].tolist() == [1, 2, 1, 1]
    assert after["num_tokens"][1] == after["prompt_length"][1]


def test_group_shares_a_prompt():
    """A reset of the whole group draws a new one; a reset of a part of it does not."""
    env = make_env(group_size=2)
    env.set_seed(0)
    step = env.reset()
    before = [prompt.text for prompt in env.episodes.prompts]
    assert before[0] == before[1] != before[2] == before[3]
    assert len(step["seed"].unique()) == ROWS
    step["_reset"] = torch.tensor([[True], [True], [True], [False]])
    env.reset(step)
    after = [prompt.text for prompt in env.episodes.prompts]
    assert after[0] == after[1] != before[0]
    assert after[2:] == before[2:]


def test_prompts_may_be_named():
    env = make_env(group_size=2)
    env.reset(prompts=["two red circles", "one blue square"])
    words = [prompt.text for prompt in env.episodes.prompts]
    assert words == ["two red circles"] * 2 + ["one blue square"] * 2
    with pytest.raises(ValueError, match="expected 2 prompts, one for each group of 2 rows, got 1"):
        env.reset(prompts=["two red circles"])


def test_seed_decides_all_that_the_env_draws():
    first = make_env()
    second = make_env()
    for env in (first, second):
        env.set_seed(7)
    for _ in range(3):
        one = first.reset()
        other = second.reset()
        assert (one == other).all()
    assert (make_env().reset()["seed"] != one["seed"]).all()


def test_first_prompts_are_the_tasks():
    env = make_env("story", group_size=2)
    env.set_seed(5)
    env.reset()
    expected = env.episodes.variant.task.prompts("train", 2, 5)
    assert [prompt.text for prompt in env.episodes.prompts[::2]] == [each.text for each in expected]


def test_rewards_are_told_apart():
    variant = make_variant(
        "story",
        text_budget=2,
        image_steps=2,
        reward=lambda episodes: torch.full((len(episodes),), torch.nan),
        thought_reward=lambda episodes: torch.full((len(episodes),), 0.25),
        round_reward=lambda episodes: torch.full((len(episodes),), 0.5),
    )
    env = InterleavedGenTorchRLEnv(variant, ROWS)
    steps = env.rollout(40, legal_policy, break_when_any_done=False, break_when_all_done=True)
    images = variant.rules.image_budget
    final = steps["next"][:, -1]
    assert final["reward"].isnan().all()
    assert final["final_reward"].isnan().all()
    assert (final["round_reward"] == 0.5).all()
    thoughts = steps["next", "thought_reward"]
    done = steps["next", "done"]
    assert not thoughts[done].any()
    before = steps["next", "reward"].nan_to_num(0.5).sum()
    assert before >= ROWS * images * 0.75 - 1e-6
    on_the_way = thoughts + steps["next", "round_reward"]
    assert torch.equal(steps["next", "reward"][~done], on_the_way[~done])


def test_components_are_put_out():
    env = make_env("edit", components=["edit/thought", "unknown"])
    steps = env.rollout(30, legal_policy, break_when_any_done=False, break_when_all_done=True)
    parts = steps["next", "components"]
    assert parts["edit/thought"][:, -1].isfinite().all()
    assert parts["unknown"].isnan().all()
    assert parts["edit/thought"][~steps["next", "done"]].isnan().all()


def test_collector_runs():
    collector = Collector(
        make_env(group_size=2),
        legal_policy,
        frames_per_batch=ROWS * 8,
        total_frames=ROWS * 24,
        auto_register_policy_transforms=False,
    )
    batches = list(collector)
    collector.shutdown()
    assert [steps.shape for steps in batches] == [(ROWS, 8)] * 3
    scored = torch.cat([steps["next", "reward"][steps["next", "done"]] for steps in batches])
    assert len(scored) >= ROWS
    assert scored.isfinite().all()


def test_random_policy_runs():
    steps = make_env("reflect").rollout(30, break_when_any_done=False)
    assert steps.shape == (ROWS, 30)
    assert (steps["phase"] != Phase.DONE).all()


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match="multiple of group_size >= 1, got num_envs=4"):
        make_env(group_size=3)
    env = make_env()
    with pytest.raises(RuntimeError, match="batch_size"):
        env.step(TensorDict({"token": torch.zeros(2, dtype=torch.int64)}, [2]))
    step = legal_policy(env.reset())
    step["token"] = torch.full((ROWS,), 10_000)
    with pytest.raises(ValueError, match="expected tokens in"):
        env.step(step)


@pytest.mark.slow
def test_torchrl_is_imported_here_alone():
    code = (
        "import sys, unigrpo_env.env, unigrpo_env.vector_env; assert 'torchrl' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
