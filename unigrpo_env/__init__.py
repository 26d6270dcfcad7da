"""Interleaved generation as an environment: tokens and denoising steps are the actions of one MDP.

>>> import gymnasium as gym, unigrpo_env
>>> env = gym.make("unigrpo/TextToImage-v0")
>>> observation, info = env.reset(seed=0)
>>> int(observation["phase"]), info["prompt"]
(0, 'one plus two green triangles')
"""

import gymnasium as _gym

_ENV, _VECTOR = "unigrpo_env.env:InterleavedGenEnv", "unigrpo_env.vector:InterleavedGenVectorEnv"
for _id, _variant in {"unigrpo/TextToImage-v0": "text_to_image", "unigrpo/Toy-v0": "toy"}.items():
    _gym.register(id=_id, entry_point=_ENV, vector_entry_point=_VECTOR, kwargs={"variant": _variant})
