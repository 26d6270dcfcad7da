"""A reward of your own in ten lines, used by name in Python; on the command line:

unigrpo train --import examples.custom_reward env.reward="shapes + 0.2 * mostly_light" trainer.iterations=5
"""

import torch

from rewards import EpisodeBatch, register_reward
from unigrpo_env.env import InterleavedGenEnv


@register_reward("mostly_light")
def mostly_light(episodes: EpisodeBatch) -> torch.Tensor:
    """How light the picture is, from 0 to 1: it likes empty cells."""
    return episodes.images.mean((1, 2, 3))


if __name__ == "__main__":
    env = InterleavedGenEnv(reward="shapes + 0.2 * mostly_light", text_budget=0)
    observation, _ = env.reset(seed=0)
    ended = False
    while not ended:
        observation, reward, ended, truncated, info = env.step({"token": 0, "latent": observation["latent"] * 0.5 + 0.4})
    print("reward:", round(reward, 4), {name: round(value, 4) for name, value in info["components"].items()})
