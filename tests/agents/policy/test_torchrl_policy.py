"""The actor as a TorchRL policy."""

import pytest
import torch
from torchrl.collectors import Collector as StepCollector
from torchrl.envs.utils import ExplorationType, set_exploration_type

from agents.config.schema import AlgorithmSettings
from agents.objectives.loss import UniGRPOLoss
from agents.policy.actor import Actor
from agents.policy.sde import Window
from agents.policy.torchrl_policy import ActorPolicy
from agents.rollout.from_torchrl import trajectory_from_rollout
from agents.training.comparison import add_advantages
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.torchrl_env import InterleavedGenTorchRLEnv
from unigrpo_env.variants.variant import make_variant

pytestmark = pytest.mark.slow

WINDOW = Window(1, 0, 3)


def make_parts(model, name="text_to_image", window=WINDOW, size=2):
    variant = make_variant(name, text_budget=4, image_steps=4)
    env = InterleavedGenTorchRLEnv(variant, 4, group_size=size)
    env.set_seed(0)
    return env, ActorPolicy(Actor(model, window=window), variant.rules, size)


@pytest.mark.parametrize("name", ["text_to_image", "story"])
def test_entries_of_the_other_phase_are_zero(small_bagel, name):
    env, policy = make_parts(small_bagel, name)
    steps = env.rollout(60, policy, break_when_any_done=False)
    active = steps["active"][..., 0]
    writes = active & (steps["phase"] == Phase.TEXT)
    draws = active & (steps["phase"] == Phase.IMAGE)
    for entry in policy.out_keys:
        assert steps[entry].isfinite().all(), entry
    assert (steps["log_prob"][writes] < 0).all()
    assert not steps["log_prob"][~writes].any()
    assert not steps["token"][~writes].any()
    assert steps["mean"][draws].flatten(1).any(1).all()
    assert not steps["mean"][~draws].any()
    assert torch.equal(steps["next_latent"][~draws], steps["latent"][~draws])


def test_group_shares_its_window(small_bagel):
    env, policy = make_parts(small_bagel)
    starts = env.rollout(60, policy, break_when_any_done=False)["window_start"]
    assert len(starts.unique()) > 1
    assert torch.equal(starts[0::2], starts[1::2])


def test_window_follows_the_iteration(small_bagel):
    env, policy = make_parts(small_bagel, window=Window(1, 0, 3, slide_every=1))
    for iteration in range(3):
        policy.iteration = iteration
        steps = env.rollout(2, policy)
        assert (steps["window_start"] == iteration).all()


def test_partly_begun_rows_keep_their_noise(small_bagel):
    """A row that begins anew changes nothing for the others, up to rounding."""
    env, policy = make_parts(small_bagel, size=1)
    whole = env.rollout(40, policy, break_when_any_done=False, break_when_all_done=True)
    env.set_seed(0)
    step = env.reset()
    begun = torch.tensor([[False], [False], [False], [True]])
    for time in range(7):
        step = env.step(policy(step))["next"]
        if time == 1:
            step["_reset"] = begun
            step = env.reset(step)
    while not step["done"][:3].all():
        step = env.step(policy(step))["next"]
    final = whole["next"][:, -1]
    assert torch.equal(step["tokens"][:3], final["tokens"][:3])
    torch.testing.assert_close(step["latent"][:3], final["latent"][:3], atol=1e-4, rtol=0)


def test_deterministic_exploration_is_honoured(small_bagel):
    env, policy = make_parts(small_bagel)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        found = env.rollout(40, policy, break_when_any_done=False, break_when_all_done=True)
    greedy = ActorPolicy(Actor(small_bagel, temperature=0, window=None), env.episodes.rules, 2)
    env.set_seed(0)
    expected = env.rollout(40, greedy, break_when_any_done=False, break_when_all_done=True)
    for entry in ("token", "next_latent"):
        assert torch.equal(found[entry], expected[entry])
    assert policy.actor.temperature == 1
    assert policy.actor.window == WINDOW


def test_changed_weights_are_seen_in_mid_episode(small_bagel):
    env, policy = make_parts(small_bagel)
    step = env.step(policy(env.reset()))["next"]
    before = policy(step.clone())["log_prob"]
    with torch.no_grad():
        for weight in small_bagel.parameters():
            weight.mul_(1.5)
    after = policy(step.clone())["log_prob"]
    fresh = ActorPolicy(Actor(small_bagel, window=WINDOW), env.episodes.rules, 2)
    torch.testing.assert_close(after, fresh(step.clone())["log_prob"])
    assert not torch.allclose(before, after)


def test_collector_follows_the_optimiser(small_bagel):
    """The recorded log-probabilities are those of the weights that the loss sees."""
    env, policy = make_parts(small_bagel)
    variant = env.episodes.variant
    settings = AlgorithmSettings(velocity_weight=0.0)
    loss = UniGRPOLoss.for_variant(small_bagel, variant, settings)
    optimizer = torch.optim.SGD(small_bagel.parameters(), lr=1.0)
    frames = 4 * variant.rules.max_steps
    batches = StepCollector(
        env,
        policy,
        frames_per_batch=frames,
        total_frames=3 * frames,
        reset_at_each_iter=True,
        auto_register_policy_transforms=False,
    )
    torch.manual_seed(0)
    for steps in batches:
        episodes = trajectory_from_rollout(steps, variant.rules, WINDOW, 2)
        add_advantages(episodes, "episode", 1, 0.5)
        flat = episodes.flatten(0, 1)
        flat.text_advantage = torch.randn(flat.tokens.shape)
        flat.episode_weight = flat.token_weight = torch.full((4,), 0.25)
        out = loss(flat)
        assert out["text_log_ratio"] < 1e-4
        optimizer.zero_grad()
        out["loss_text"].backward()
        optimizer.step()
        with torch.no_grad():
            assert loss(flat)["text_log_ratio"] > 1e-3
    batches.shutdown()


def test_unfitting_policies_are_refused(small_bagel):
    rules = make_variant("text_to_image", image_steps=3).rules
    with pytest.raises(ValueError, match="expected the window to end before the last of 3"):
        ActorPolicy(Actor(small_bagel, window=WINDOW), rules)
    env, _ = make_parts(small_bagel)
    policy = ActorPolicy(Actor(small_bagel, window=WINDOW), env.episodes.rules, 3)
    with pytest.raises(ValueError, match="expected a multiple of group_size=3 rows, got 4"):
        policy(env.reset())


def test_ended_rows_are_left_alone(small_bagel):
    env, policy = make_parts(small_bagel)
    steps = env.rollout(60, policy, break_when_any_done=False, break_when_all_done=True)
    final = steps["next"][:, -1]
    out = policy(final.clone())
    assert not out["active"].any()
    assert torch.equal(out["next_latent"], final["latent"])
    after = env.step(out)["next"]
    assert after["done"].all()
    assert not after["reward"].any()
