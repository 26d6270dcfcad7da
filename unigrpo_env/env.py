"""One episode as a Gymnasium env, in NumPy."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Dict, Discrete
from torch import Tensor

from unigrpo_env.episodes import Episodes, StepResult
from unigrpo_env.inputs import as_prompt, check_options, split_action
from unigrpo_env.rendering import check_render_mode, render_frame
from unigrpo_env.variants.variant import Variant, make_variant

Observation = dict[str, Any]
Action = dict[str, Any]


class InterleavedGenEnv(gym.Env[Observation, Action]):
    """Writing and drawing as one Markov decision process.

    ## Description
    A prompt comes in. The agent writes a thought, token by token. The token that closes it (or the
    end of the budget) opens an image, which begins as noise at flow time t = 1 and which the agent
    denoises, one latent after the other, down to t = 0. Then the episode ends with its one reward.
    In variants of several images the image is put into the token stream, the user may say
    something, and the agent writes on.

    ## Action Space
    A `Dict`; the env reads the entry of the phase it is in and ignores the other.

    | entry | space | read in | meaning |
    |---|---|---|---|
    | `token` | `Discrete(vocab_size)` | text phase | the next token |
    | `next_latent` | `Box(-inf, inf, (L, C), float32)` | image phase | x at `next_t` |

    ## Observation Space
    A `Dict`:

    | entry | shape, dtype | meaning |
    |---|---|---|
    | `phase` | int | 0 text, 1 image, 2 done (`Phase`) |
    | `tokens` | `(max_tokens,)` int64 | the prompt and all that follows it, padded |
    | `roles` | `(max_tokens,)` int64 | who wrote each token: 0 system, 1 user, 2 model (`Role`) |
    | `num_tokens`, `prompt_length` | int | how many of them count; how many are the prompt |
    | `legal_tokens` | `(vocab_size,)` int8 | 1: may be sampled; padding outside the text phase |
    | `latent` | `(L, C)` float32 | x_t of the image; after it the last one drawn; 0 before |
    | `step` | int | denoising steps taken of that image |
    | `images_drawn` | int | finished images |
    | `t`, `next_t` | `(1,)` float32 in [0, 1] | flow time now and after the next step; 1 is noise |
    | `images` | `(M, L, C)` float32 | clean latents to be read, sources first; only where M > 0 |
    | `pixels` | `(M, 3, h, w)` uint8 | what a vision encoder sees of them, where there is one |
    | `image_positions` | `(M,)` int64 | where in `tokens` each stands, -1: not there; likewise |

    M is the number of sources and of drawn images that text may follow. A token that is not legal
    is appended without further effect. The observation is a copy. Info: `prompt`, `metadata`; in
    the step that ends the episode also `text`, `image` (`(3, height, width)` float32 in [0, 1], the
    last one drawn), `components` (name to float) and `unscored`.

    ## Rewards
    By default 0 in all steps but the last, which pays the variant's reward of images and text, or
    NaN if they could not be scored. An episode that ends without an image gets the lowest reward. A
    variant may also pay for each thought, in the step that opens its image, and for each image, in
    the step that finishes it. In a step that pays, `info["paid"]` has the parts: `thought_reward`,
    `round_reward`, and `reward` at the end. `info["unscored"]` is True at the end if any of them
    was NaN.

    ## Starting State
    `reset(seed=...)` draws a training prompt from the task; `options={"prompt": "..."}` names one
    (a `Prompt`, where it has sources or turns). The noise x_1 depends on the seed alone.

    ## Episode End
    `terminated` when the last image is done (in variants with a last text: when that is closed),
    when `end_id` is sampled in variants that have it, or when a user who speaks has no more to say.
    Never `truncated`: use Gymnasium's `TimeLimit`.

    ## Arguments
    `variant`: a registered name or a `Variant`. `processor`, `task`, `reward`, `thought_reward`,
    `round_reward`, `reward_options` replace the variant's own; see `make_variant`. `render_mode`:
    `"rgb_array"` or None. Further arguments are the variant's settings: `text_budget`,
    `image_steps`, ...

    ## Version History
    v0: first release.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self,
        variant: str | Variant = "text_to_image",
        *,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        self.render_mode = check_render_mode(render_mode)
        self.episodes = Episodes(make_variant(variant, **arguments), rows=1)

    # Made when they are asked for: the bounds of large latents and images take memory and time.
    @cached_property
    def observation_space(self) -> Dict:  # type: ignore[override]
        """See the class."""
        return self.episodes.observation_space()

    @cached_property
    def action_space(self) -> Dict:  # type: ignore[override]
        """See the class."""
        return self.episodes.action_space()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; see Starting State.

        Args:
            seed: of prompt and noise; drawn if left out.
            options: `prompt`, words or a `Prompt`.

        Raises:
            ValueError: an unknown option, or a prompt that the variant does not take.
        """
        super().reset(seed=seed)
        options = check_options(options, {"prompt"})
        episode_seed = seed
        if episode_seed is None:
            episode_seed = int(self.np_random.integers(2**31))
        prompt = options.get("prompt")
        if prompt is None:
            prompt = self.episodes.variant.task.prompts("train", 1, episode_seed)[0]
        self.episodes.reset([0], [as_prompt(prompt)], [episode_seed])
        return self._observation(), self._info()

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one token or one denoising step.

        Args:
            action: `token` and `next_latent`.

        Raises:
            ResetNeeded: before the first reset.
            KeyError, TypeError, ValueError: an action outside the action space, or a step after the
                end.
        """
        token, next_latent = split_action(action)
        active = torch.ones(1, dtype=torch.bool)
        result = self.episodes.step(
            torch.as_tensor(token)[None], torch.as_tensor(next_latent)[None], active
        )
        ended = len(result.ended) > 0
        info = self._info()
        if ended:
            info |= final_info(self.episodes, result, 0)
        if result.paid:
            info["paid"] = _first_of_each(result.paid)
        return self._observation(), float(result.reward[0]), ended, False, info

    def render(self) -> np.ndarray | None:
        """`(height, width, 3)` uint8: the image as it stands, the text, phase and flow time."""
        if self.render_mode is None:
            return None
        return render_frame(self.episodes, 0)

    def _observation(self) -> Observation:
        observation: Observation = {}
        for name, value in self.episodes.observe().items():
            row = value[0].numpy().copy()
            # A member of `Discrete` is a NumPy integer, not an array without axes.
            if isinstance(self.observation_space[name], Discrete):
                row = row[()]
            observation[name] = row
        observation["legal_tokens"] = observation["legal_tokens"].astype(np.int8)
        return observation

    def _info(self) -> dict[str, Any]:
        prompt = self.episodes.prompts[0]
        if prompt is None:
            return {}
        # A copy, because the reward still reads the original.
        metadata = copy.deepcopy(dict(prompt.metadata))
        return {"prompt": prompt.text, "metadata": metadata}


def final_info(episodes: Episodes, result: StepResult, row: int) -> dict[str, Any]:
    """The info of a row in the step that ends it; `episodes` and `result` are those after it."""
    info: dict[str, Any] = {
        "text": episodes.texts([row])[0],
        "components": _first_of_each(result.components, row),
        "unscored": bool(result.unscored[row]),
    }
    # [drawn, 3, height, width]
    images = episodes.all_images([row])[0]
    if len(images):
        info["image"] = images[-1].float().cpu().numpy()
    return info


def _first_of_each(values: dict[str, Tensor], row: int = 0) -> dict[str, float]:
    return {name: float(value[row]) for name, value in values.items()}
