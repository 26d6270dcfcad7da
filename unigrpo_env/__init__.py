"""Interleaved generation as an environment: tokens and denoising steps are the actions of one MDP.

>>> import gymnasium as gym, unigrpo_env
>>> env = gym.make("unigrpo/TextToImage-v0")
>>> observation, info = env.reset(seed=0)
>>> int(observation["phase"]), info["prompt"]
(0, 'one plus two green triangles')
"""

import gymnasium as _gym

# Named, not imported: `import unigrpo_env` stays fast, and loads no torch.
_ENV = "unigrpo_env.env:InterleavedGenEnv"
_VECTOR_ENV = "unigrpo_env.vector_env:InterleavedGenVectorEnv"
_IDS = {
    "TextToImage": "text_to_image",
    "Edit": "edit",
    "Reflect": "reflect",
    "Story": "story",
    "Dialogue": "dialogue",
    "Toy": "toy",
}
for _id, _variant in _IDS.items():
    _gym.register(
        id=f"unigrpo/{_id}-v0",
        entry_point=_ENV,
        vector_entry_point=_VECTOR_ENV,
        kwargs={"variant": _variant},
    )
