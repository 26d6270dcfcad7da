"""One episode by random legal actions, from prompt to reward.

python examples/random_rollout.py
"""

import gymnasium as gym
import numpy as np

import unigrpo_env  # noqa: F401  (registers the envs)


def main() -> None:
    env = gym.make("unigrpo/TextToImage-v0", render_mode="rgb_array")
    observation, info = env.reset(seed=0)
    print("prompt:", info["prompt"])
    rng = np.random.default_rng(0)
    ended = False
    while not ended:
        # Read in the text phase. In the image phase padding is the one legal token.
        legal = np.flatnonzero(observation["legal_tokens"])
        # Read in the image phase: x at the next flow time, [L, C]; here it fades to grey.
        next_latent = observation["latent"] * 0.9
        action = {"token": rng.choice(legal), "next_latent": next_latent}
        observation, reward, ended, _, info = env.step(action)
    print("thought:", info["text"])
    print("reward:", reward, info["components"])


if __name__ == "__main__":
    main()
