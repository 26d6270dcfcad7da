"""TorchRL takes the single env as it is."""

import gymnasium as gym
import pytest
import torch
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

import unigrpo_env  # noqa: F401

IDS = sorted(name for name in gym.registry if name.startswith("unigrpo/"))


def wrap(env_id, **settings):
    return GymWrapper(gym.make(env_id, **settings), categorical_action_encoding=True)


@pytest.mark.parametrize("env_id", IDS)
def test_the_specs_are_right(env_id):
    check_env_specs(wrap(env_id))


@pytest.mark.parametrize("env_id", IDS)
def test_a_rollout_keeps_latent_and_action_apart(env_id):
    env = wrap(env_id, text_budget=1, image_steps=3)
    env.set_seed(0)
    steps = env.rollout(100)
    assert steps["next", "terminated"][-1].all()
    drawing = steps["phase"].flatten() == 1
    assert drawing.sum() >= 3
    taken = steps["next_latent"][drawing]
    assert torch.equal(steps["next", "latent"][drawing], taken), "the latent becomes the action"
    assert not torch.equal(steps["latent"][drawing], taken)
    assert steps["latent"].shape == steps["next_latent"].shape
    assert steps["t"].shape == (len(steps), 1)
