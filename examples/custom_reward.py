"""A reward of your own in a few lines, used by name.

    python examples/custom_reward.py

On the command line:

    unigrpo train --import examples/custom_reward.py env.reward="shapes + 0.2 * mostly_light" \
        trainer.iterations=5
"""

import torch

from rewards import EpisodeBatch, register_reward
from unigrpo_env.env import InterleavedGenEnv


@register_reward("mostly_light")
def mostly_light(episodes: EpisodeBatch) -> torch.Tensor:
    """How light the image is, from 0 to 1, `[N]`: it likes empty cells."""
    # [N, 3, height, width] in [0, 1]
    return episodes.images.mean((1, 2, 3))


def main() -> None:
    # Without a thought the image opens at once.
    env = InterleavedGenEnv(reward="shapes + 0.2 * mostly_light", text_budget=0)
    observation, _ = env.reset(seed=0)
    ended = False
    while not ended:
        # x at the next flow time, [L, C]: here it fades to a light grey.
        next_latent = observation["latent"] * 0.5 + 0.4
        action = {"token": 0, "next_latent": next_latent}
        observation, reward, ended, _, info = env.step(action)
    print(f"reward: {reward:.4f}")
    for name, value in info["components"].items():
        print(f"  {name}: {value:.4f}")


if __name__ == "__main__":
    main()
