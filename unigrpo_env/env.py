"""The Gymnasium face of one episode, in NumPy."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Dict, Discrete

from unigrpo_env.episodes import Episodes, Variant
from unigrpo_env.rendering import check_render_mode, render_frame
from unigrpo_env.tasks import Prompt
from unigrpo_env.variants import make_variant

Observation = dict[str, Any]
Action = dict[str, Any]


class InterleavedGenEnv(gym.Env[Observation, Action]):
    """Writing and drawing as one Markov decision process.

    ## Description
    A prompt comes in. The agent writes a thought, token by token; the token that closes it (or the end of the budget) opens an image, which begins as
    noise at flow time t = 1 and which the agent denoises, one latent after the other, down to t = 0. Then the episode ends with its one reward, or, in
    variants of several images, the image is put in the token stream, the user may say something, and the agent writes on.

    ## Action Space
    A `Dict`; the env reads the entry of the phase it is in and ignores the other.

    | entry | space | read in | meaning |
    |---|---|---|---|
    | `token` | `Discrete(vocab_size)` | text phase | the next token |
    | `latent` | `Box(-inf, inf, (L, C), float32)` | image phase | the next latent, x at `next_t` |

    ## Observation Space
    A `Dict`:

    | entry | shape, dtype | meaning |
    |---|---|---|
    | `phase` | int | 0 text, 1 image, 2 done (`Phase`) |
    | `tokens` | `(max_tokens,)` int64 | prompt and everything said so far, padded |
    | `num_tokens`, `prompt_length` | int | how many of them count, how many are the prompt |
    | `legal_tokens` | `(vocab_size,)` int8 | 1 where a token may be sampled; all 0 outside the text phase |
    | `latent` | `(L, C)` float32 | x_t of the image being drawn; after it the last one drawn; 0 before the first |
    | `step` | int | denoising steps taken of that image |
    | `t`, `next_t` | `()` float32 in [0, 1] | flow time now and after the next step; 1 is noise, 0 the image |
    | `images` | `(M, L, C)` float32 | only where M = sources + image_budget - 1 > 0: images to be read, sources first, as clean latents |
    | `image_places` | `(M,)` int64 | where in `tokens` each of them stands; -1: not there yet; only where M > 0 |

    A token that is not legal is appended without further effect. The observation is a copy. Info: `prompt`, `metadata`; in the step that ends the episode
    also `text`, `components` (name to float) and `unscored`.

    ## Rewards
    By default 0, but for the step that ends the episode: what the variant's reward says of picture and words. NaN where it could not say.
    An episode that ends without a picture gets the lowest reward. A variant may also pay for each thought, in the step that opens its image, and for each
    picture, in the step that finishes it. In a step that pays, `info["paid"]` has the parts: `thought_reward`, `round_reward`, `reward` at the end.
    `info["unscored"]` tells at the end whether any of them was NaN.

    ## Starting State
    `reset(seed=...)` draws a training prompt from the task; `options={"prompt": "..."}` names one (a `Prompt`, where it has sources or turns). The noise x_1 depends on the seed alone.

    ## Episode End
    `terminated` when the last image is done, when `end_id` was said (in variants that have it), or when a user who speaks has no more to say. Never `truncated`: use Gymnasium's `TimeLimit`.

    ## Arguments
    `variant`: a registered name or a `Variant`. `reward`: a registered name, a callable or weights by name; the variant's own if left out; likewise `thought_reward` and `round_reward`.
    `render_mode`: `"rgb_array"` or None. Further arguments go to the variant's maker: `text_budget`, `image_steps`, `time_shift`, for most `task`, ...

    ## Version History
    v0: first release.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self, variant: str | Variant = "text_to_image", *, reward: Any = None, render_mode: str | None = None, **arguments: Any
    ) -> None:
        self.render_mode = check_render_mode(render_mode)
        self.episodes = Episodes(make_variant(variant, reward=reward, **arguments), rows=1)
        self.observation_space: Dict = self.episodes.observation_space()
        self.action_space = self.episodes.action_space()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; see Starting State.

        Raises:
            ValueError: an unknown option, a prompt or turn over its budget, or sources or turns that the variant does not take.
        """
        super().reset(seed=seed)
        options = check_options(options, {"prompt"})
        episode_seed = seed if seed is not None else int(self.np_random.integers(2**31))
        prompt = options.get("prompt")
        if prompt is None:
            prompt = self.episodes.variant.task.prompts("train", 1, episode_seed)[0]
        self.episodes.reset([0], [as_prompt(prompt)], [episode_seed])
        return self._observation(), self._info()

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One token or one denoising step.

        Raises:
            ResetNeeded: before the first reset.
            KeyError, TypeError, ValueError: an action outside the action space, or a step after the end.
        """
        token, latent = split_action(action)
        result = self.episodes.step(torch.as_tensor(token)[None], torch.as_tensor(latent)[None], torch.ones(1, dtype=torch.bool))
        info = self._info()
        ended = len(result.ended) > 0
        if ended:
            info["text"] = self.episodes.texts([0])[0]
            info["components"] = {name: float(values[0]) for name, values in result.components.items()}
            info["unscored"] = bool(result.unscored[0])
        if result.paid:
            info["paid"] = {name: float(values[0]) for name, values in result.paid.items()}
        return self._observation(), float(result.reward[0]), ended, False, info

    def render(self) -> np.ndarray | None:
        """`(height, width, 3)` uint8: the picture as it stands, the words, phase and flow time."""
        if self.render_mode is None:
            return None
        return render_frame(self.episodes, 0)

    def _observation(self) -> Observation:
        row = {name: value[0].numpy().copy() for name, value in self.episodes.observe().items()}
        row["legal_tokens"] = row["legal_tokens"].astype(np.int8)
        return {name: value[()] if isinstance(self.observation_space[name], Discrete) else value for name, value in row.items()}

    def _info(self) -> dict[str, Any]:
        prompt = self.episodes.prompts[0]
        return {"prompt": prompt.text, "metadata": copy.deepcopy(dict(prompt.metadata))} if prompt else {}


def as_prompt(prompt: str | Prompt) -> Prompt:
    """Users may name a prompt by its text alone."""
    return Prompt(prompt) if isinstance(prompt, str) else prompt


def check_options(options: dict[str, Any] | None, known: set[str]) -> dict[str, Any]:
    """Reset options, or ValueError for one that nobody reads."""
    options = options or {}
    if unknown := options.keys() - known:
        raise ValueError(f"unknown reset options {sorted(unknown)}; expected some of {sorted(known)}")
    return options


def split_action(action: Action) -> tuple[Any, Any]:
    """The two entries of an action; raises if one is missing."""
    try:
        return action["token"], action["latent"]
    except (KeyError, TypeError, IndexError) as error:
        raise KeyError(f"expected an action dict with 'token' and 'latent', got {action!r:.80}") from error
