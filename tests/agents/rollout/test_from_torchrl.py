"""Step records of TorchRL become the trajectories that the trainer's collector records."""

import dataclasses

import pytest
import torch
from torchrl.collectors import Collector as StepCollector

from agents.models.registry import load_model
from agents.policy.actor import Actor
from agents.policy.sde import Window
from agents.policy.torchrl_policy import ActorPolicy
from agents.rollout.collector import Collector
from agents.rollout.from_torchrl import trajectory_from_rollout
from unigrpo_env.torchrl_env import InterleavedGenTorchRLEnv
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

pytestmark = pytest.mark.slow

ROWS = 4
SIZE = 2
SEED = 11
IMAGES = {"text_to_image": 1, "edit": 1, "reflect": 3, "story": 3, "dialogue": 2}
"""Scenarios and the images that an episode may draw."""


def short(name, **settings):
    return make_variant(name, text_budget=4, image_steps=4, **settings)


def make_actor(model):
    return Actor(model, window=Window(2, 0, 3), noise_level=0.7)


def collected(model, variant, seed=SEED):
    """What the trainer's collector records."""
    env = InterleavedGenVectorEnv(variant, ROWS)
    prompts = variant.task.prompts("train", ROWS // SIZE, seed)
    return Collector(env, make_actor(model), SIZE).collect(prompts, seed)


def torchrl_parts(model, variant, components=()):
    env = InterleavedGenTorchRLEnv(variant, ROWS, group_size=SIZE, components=components)
    env.set_seed(SEED)
    return env, ActorPolicy(make_actor(model), variant.rules, SIZE)


def to_trajectory(steps, variant, **arguments):
    return trajectory_from_rollout(steps, variant.rules, Window(2, 0, 3), SIZE, **arguments)


def assert_equal(found, expected):
    assert found.batch_size == expected.batch_size
    for field in dataclasses.fields(type(expected)):
        if field.name == "components":
            continue
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if other is None:
            assert one is None
            continue
        assert one.dtype == other.dtype, field.name
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=field.name)
    assert set(found.components.keys()) == set(expected.components.keys())
    for name, values in expected.components.items():
        torch.testing.assert_close(found.components[name], values, rtol=0, atol=0, equal_nan=True)


def assert_rollout_equals_collector(model, variant):
    expected = collected(model, variant)
    env, policy = torchrl_parts(model, variant, list(expected.components.keys()))
    steps = env.rollout(
        200, policy, break_when_any_done=False, break_when_all_done=True, auto_reset=True
    )
    assert steps.shape[1] < 200
    assert_equal(to_trajectory(steps, variant), expected)
    return expected


@pytest.mark.parametrize(("name", "images"), list(IMAGES.items()))
def test_rollout_equals_collector(small_bagel, name, images):
    variant = short(name)
    assert variant.rules.image_budget == images
    episodes = assert_rollout_equals_collector(small_bagel, variant)
    assert episodes.images_drawn.max() == images
    assert episodes.chosen_mask.any()
    assert episodes.window_means.any()
    assert len(episodes.components.keys()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_to_image", "story", "dialogue"])
def test_shipped_weights_equal_collector(name):
    episodes = assert_rollout_equals_collector(load_model("tiny"), make_variant(name))
    assert episodes.reward.isfinite().all()


@pytest.mark.parametrize("name", ["edit", "story"])
def test_rewards_on_the_way_are_kept_apart(small_bagel, name):
    variant = make_variant(
        name,
        text_budget=4,
        image_steps=4,
        thought_reward=lambda episodes: torch.full((len(episodes),), 0.25),
        round_reward=lambda episodes: torch.full((len(episodes),), 0.5),
    )
    episodes = assert_rollout_equals_collector(small_bagel, variant)
    assert (episodes.thought_reward == 0.25).all()
    assert (episodes.round_reward == 0.5).all()


def test_unscored_reward_stays_nan(small_bagel):
    def unscored(episodes):
        score = torch.ones(len(episodes))
        score[0] = torch.nan
        return score

    variant = short("text_to_image", reward=unscored, thought_reward=unscored)
    episodes = assert_rollout_equals_collector(small_bagel, variant)
    assert episodes.reward.isnan().any()
    assert episodes.thought_reward.isnan().any()
    assert not episodes.reward.isnan().all()


@pytest.mark.parametrize("name", ["text_to_image", "reflect", "dialogue"])
def test_collector_batches_equal_collector(small_bagel, name):
    """A row that ends early begins anew while others play on; its first episode is the same."""
    variant = short(name)
    env, policy = torchrl_parts(small_bagel, variant)
    steps_a_batch = 2 * variant.rules.max_steps
    batches = StepCollector(
        env,
        policy,
        frames_per_batch=ROWS * steps_a_batch,
        reset_at_each_iter=True,
        auto_register_policy_transforms=False,
    )
    # The constructor has reset the env, so the first batch would be of the second seed.
    batches.set_seed(SEED)
    steps = next(iter(batches))
    assert steps.shape == (ROWS, steps_a_batch)
    assert steps["next", "done"].sum() > ROWS
    found = to_trajectory(steps, variant)
    expected = collected(small_bagel, variant)
    batches.shutdown()
    assert_close(found, expected)


def assert_close(found, expected):
    """As `assert_equal`, up to rounding: a row that begins anew makes the actor read all again."""
    for field in dataclasses.fields(type(expected)):
        if field.name == "components" or getattr(expected, field.name) is None:
            continue
        one, other = getattr(found, field.name), getattr(expected, field.name)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4, equal_nan=True, msg=field.name)


@pytest.mark.parametrize("named", [True, False])
def test_time_may_come_first(small_bagel, named):
    variant = short("text_to_image")
    env, policy = torchrl_parts(small_bagel, variant)
    steps = env.rollout(40, policy, break_when_any_done=False)
    expected = to_trajectory(steps, variant)
    if named:
        assert_equal(to_trajectory(steps.transpose(0, 1), variant), expected)
        return
    steps.names = None
    assert_equal(to_trajectory(steps.transpose(0, 1), variant, time_dim=0), expected)
    assert_equal(to_trajectory(steps, variant), expected)


def test_first_episode_may_begin_later(small_bagel):
    """The end of an episode that began before the records is passed over."""
    variant = short("text_to_image")
    env, policy = torchrl_parts(small_bagel, variant)
    steps = env.rollout(60, policy, break_when_any_done=False)
    later = to_trajectory(steps[:, 1:], variant)
    first = to_trajectory(steps, variant)
    assert not torch.equal(later.seed, first.seed)
    numbers = steps["episode"][:, 1:]
    begun = (numbers == numbers.min() + 1).int().argmax(1)
    assert torch.equal(later.seed.flatten(), steps["seed"][:, 1:].gather(1, begun[:, None])[:, 0])


def test_cut_episode_is_refused(small_bagel):
    variant = short("text_to_image")
    env, policy = torchrl_parts(small_bagel, variant)
    steps = env.rollout(3, policy)
    with pytest.raises(ValueError, match="expected a whole episode of each row, got none of rows"):
        to_trajectory(steps, variant)
    with pytest.raises(ValueError, match="expected a multiple of group_size=3 rows, got 4"):
        trajectory_from_rollout(steps, variant.rules, Window(2, 0, 3), 3)
    with pytest.raises(ValueError, match=r"expected steps of batch size \[N, T\]"):
        to_trajectory(steps[:, 0], variant)
    with pytest.raises(ValueError, match=r"some without \['log_prob'\]"):
        to_trajectory(steps.exclude("log_prob"), variant)
    with pytest.raises(ValueError, match=r"next\.final_reward"):
        to_trajectory(steps.exclude(("next", "final_reward")), variant)


def test_different_prompts_in_a_group_are_refused(small_bagel):
    variant = short("text_to_image")
    env = InterleavedGenTorchRLEnv(variant, ROWS, group_size=1)
    env.set_seed(SEED)
    policy = ActorPolicy(make_actor(small_bagel), variant.rules, SIZE)
    steps = env.rollout(40, policy, break_when_any_done=False)
    with pytest.raises(ValueError, match="expected the same prompt in each group of 2 rows"):
        to_trajectory(steps, variant)
