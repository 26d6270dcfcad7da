"""One episode by random legal actions, from prompt to reward.

python examples/random_rollout.py
"""

import gymnasium as gym
import numpy as np

import unigrpo_env  # noqa: F401  (registers the envs)

env = gym.make("unigrpo/TextToImage-v0", render_mode="rgb_array")
observation, info = env.reset(seed=0)
print("prompt:", info["prompt"])

rng = np.random.default_rng(0)
ended = False
while not ended:
    legal = np.flatnonzero(observation["legal_tokens"])  # empty while the image is drawn
    token = rng.choice(legal) if len(legal) else 0
    latent = observation["latent"] * 0.9  # what the env takes in the image phase: the next x, here a fade to grey
    observation, reward, ended, _, info = env.step({"token": token, "latent": latent})

print("thought:", info["text"])
print("reward:", reward, info["components"])
