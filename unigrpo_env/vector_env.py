"""N episodes side by side as a Gymnasium vector env, in torch. Training steps this env."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Dict, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from unigrpo_env.env import final_info
from unigrpo_env.episodes import Episodes, StepResult
from unigrpo_env.inputs import as_prompt, check_options, split_action
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.rendering import check_render_mode, render_frame
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import Variant, make_variant

Inactive = Literal["error", "ignore"]
StepReturn = tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]


class InterleavedGenVectorEnv(VectorEnv[dict[str, Any], dict[str, Any], Any]):
    """N episodes of one variant.

    Spaces and meaning are as in `InterleavedGenEnv`, with a leading N. Rows are ragged, because
    thoughts differ in length: `step` takes an `active` mask, autoreset is off, and `reset` takes a
    mask of rows.

    By default observations are torch tensors (`legal_tokens` is bool), which Gymnasium's spaces do
    not count as their members. With `to_numpy=True` they are arrays, and with `inactive="ignore"`
    rows that have ended need no mask, so that Gymnasium's vector wrappers and a plain loop work.
    `terminated` stays True after the end, so the totals of `RecordEpisodeStatistics` count a row in
    every further step; what it reports in the step that ends a row is right.

    Args:
        variant: as for `InterleavedGenEnv`.
        num_envs: N.
        render_mode: `"rgb_array"` or None.
        inactive: what a step does to active rows that have ended: `"error"` or `"ignore"`.
        to_numpy: observations, rewards and infos as NumPy arrays, in Gymnasium's own form.
        copy: False gives views of the state as observations, which is faster, but the next step
            overwrites them. Arrays are copies in any case.
        device: where latents, images and the mask of legal tokens live; all else is on the CPU.
        arguments: as for `InterleavedGenEnv`.

    Raises:
        ValueError: another value of `inactive`.
    """

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array"],
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.DISABLED,
    }

    def __init__(
        self,
        variant: str | Variant = "text_to_image",
        num_envs: int = 1,
        *,
        render_mode: str | None = None,
        inactive: Inactive = "error",
        to_numpy: bool = False,
        copy: bool = True,
        device: torch.device | str = "cpu",
        **arguments: Any,
    ) -> None:
        if inactive not in ("error", "ignore"):
            raise ValueError(f"expected inactive 'error' or 'ignore', got {inactive!r}")
        self.num_envs = num_envs
        self.render_mode = check_render_mode(render_mode)
        self.inactive = inactive
        self.to_numpy = to_numpy
        # Arrays are always copies, see `_as_arrays`.
        self.copy = copy or to_numpy
        self.episodes = Episodes(make_variant(variant, **arguments), num_envs, device)

    # Made when they are asked for: the bounds of N large latents and images take memory and time.
    @cached_property
    def single_observation_space(self) -> Dict:  # type: ignore[override]
        """Of one row; see `InterleavedGenEnv`."""
        return self.episodes.observation_space()

    @cached_property
    def single_action_space(self) -> Dict:  # type: ignore[override]
        """Of one row; see `InterleavedGenEnv`."""
        return self.episodes.action_space()

    @cached_property
    def observation_space(self) -> Space[Any]:  # type: ignore[override]
        """Of all rows."""
        return batch_space(self.single_observation_space, self.num_envs)

    @cached_property
    def action_space(self) -> Space[Any]:  # type: ignore[override]
        """Of all rows."""
        return batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin episodes anew.

        Args:
            seed: one for each row, or a first one from which rows count up.
            options: `prompts`: one a row, words or `Prompt`; `reset_mask`: `[N]` bool, the rows to
                begin (all if left out).

        Raises:
            ValueError: an unknown option, lists of the wrong length, or a prompt that the variant
                does not take; no row has changed then.
        """
        # Gymnasium takes one number, for the generator that draws missing seeds.
        first = None
        if isinstance(seed, int):
            first = seed
        super().reset(seed=first)
        options = check_options(options, {"prompts", "reset_mask"})
        # Seeds are made for all rows, so that a row's seed does not depend on the mask.
        seeds = self._seeds(seed)
        mask = torch.as_tensor(options.get("reset_mask", [True] * self.num_envs))
        self._check_length("seed", seeds)
        self._check_length("reset_mask", mask)
        rows = mask.nonzero()[:, 0].tolist()
        prompts = self._prompts(options.get("prompts"), rows, seeds)
        self.episodes.reset(rows, prompts, [seeds[row] for row in rows])
        return self._observation(), self._info()

    def _seeds(self, seed: int | Sequence[int] | None) -> list[int]:
        if seed is None:
            return self.np_random.integers(2**31, size=self.num_envs).tolist()
        if isinstance(seed, int):
            return [seed + row for row in range(self.num_envs)]
        return [int(each) for each in seed]

    def _prompts(
        self, given: Sequence[str | Prompt] | None, rows: Sequence[int], seeds: Sequence[int]
    ) -> list[Prompt]:
        if given is not None:
            self._check_length("prompts", given)
            return [as_prompt(given[row]) for row in rows]
        task = self.episodes.variant.task
        return [task.prompts("train", 1, seeds[row])[0] for row in rows]

    def _check_length(self, name: str, entries: Any) -> None:
        if len(entries) != self.num_envs:
            raise ValueError(
                f"expected {name} of {self.num_envs} entries, one a row, got {len(entries)}"
            )

    def step(self, actions: dict[str, Any], active: Tensor | None = None) -> StepReturn:
        """Take one step of every active row.

        Args:
            actions: `token` `[N]` int64, `next_latent` `[N, L, C]` float32.
            active: `[N]` bool; the other rows stay as they are, with reward 0. All rows if left
                out.

        Returns:
            Observation; reward `[N]` float32; terminated `[N]` bool, True from the end on;
            truncated, all False; infos: `prompts`, and when rows ended their indices `ended`,
            `unscored` `[N]` bool and the reward's `components` by name, NaN elsewhere; when
            something was paid, `paid`, its parts by name, `[N]` float32; when a reward said why
            it could not score, `failures`, which arrays cannot hold. With `to_numpy` the infos
            are those of the single env but for `metadata`, joined as Gymnasium's vector envs join
            them.

        Raises:
            ResetNeeded: before the first reset.
            KeyError, TypeError, ValueError: an action outside the action space, or an active row
                that has ended.
        """
        phase = self.episodes.state.phase
        token, next_latent = split_action(actions)
        token = torch.as_tensor(token, device="cpu")
        next_latent = torch.as_tensor(next_latent, device=self.episodes.state.latent.device)
        if active is None:
            active = torch.ones(self.num_envs, dtype=torch.bool)
        active = torch.as_tensor(active, device="cpu")
        # A mask of another shape is left for `Episodes.step` to refuse.
        if self.inactive == "ignore" and active.shape == phase.shape:
            active = active & (phase != Phase.DONE)
        result = self.episodes.step(token, next_latent, active)
        terminated = self.episodes.state.phase == Phase.DONE
        if self.to_numpy:
            return self._numpy_step(result, terminated)
        infos = self._info()
        if len(result.ended):
            infos["ended"] = result.ended
            infos["unscored"] = result.unscored
            infos["components"] = result.components
        if result.paid:
            infos["paid"] = result.paid
        if result.failures:
            infos["failures"] = result.failures
        truncated = torch.zeros_like(terminated)
        return self._observation(), result.reward, terminated, truncated, infos

    def _numpy_step(self, result: StepResult, terminated: Tensor) -> StepReturn:
        infos = self._info()
        # `_add_info` is Gymnasium's: it joins the infos of single envs, with a mask beside each.
        for row in result.ended.tolist():
            infos = self._add_info(infos, final_info(self.episodes, result, row), row)
        if result.paid:
            infos["paid"] = {name: part.numpy() for name, part in result.paid.items()}
        ended = terminated.cpu().numpy()
        truncated = np.zeros_like(ended)
        return self._observation(), result.reward.numpy(), ended, truncated, infos

    def texts(self) -> list[str]:
        """What each row has written so far."""
        return self.episodes.texts(range(self.num_envs))

    def images(self) -> Tensor:
        """The image of each row as it stands, `[N, 3, height, width]` in [0, 1]."""
        return self.episodes.processor.decode_latents(self.episodes.state.latent)

    def render(self) -> Any:
        """A frame a row, or None without a render mode."""
        if self.render_mode is None:
            return None
        return tuple(render_frame(self.episodes, row) for row in range(self.num_envs))

    def _observation(self) -> dict[str, Any]:
        observation = self.episodes.observe()
        if self.to_numpy:
            return _as_arrays(observation)
        # The tensors are views of the state, which the next step overwrites.
        if self.copy:
            return {name: value.clone() for name, value in observation.items()}
        return observation

    def _info(self) -> dict[str, Any]:
        if not self.to_numpy:
            return {"prompts": list(self.episodes.prompts)}
        infos: dict[str, Any] = {}
        for row, prompt in enumerate(self.episodes.prompts):
            if prompt is not None:
                infos = self._add_info(infos, {"prompt": prompt.text}, row)
        return infos


def _as_arrays(observation: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies in NumPy, in the dtypes that the observation space declares."""
    arrays = {name: value.cpu().numpy().copy() for name, value in observation.items()}
    arrays["legal_tokens"] = arrays["legal_tokens"].astype(np.int8)
    return arrays
