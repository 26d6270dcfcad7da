"""The vector face: N episodes side by side, in torch. Training steps this env, and so can you."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from unigrpo_env.env import as_prompt, check_options, split_action
from unigrpo_env.episodes import Episodes, Variant
from unigrpo_env.mdp import Phase
from unigrpo_env.rendering import check_render_mode, render_frame
from unigrpo_env.variants import make_variant


class InterleavedGenVectorEnv(VectorEnv[dict[str, Tensor], dict[str, Tensor], Tensor]):
    """N episodes of one variant, as tensors; spaces and meaning as in `InterleavedGenEnv`, with a leading N; `legal_tokens` is bool here.

    Rows are ragged: thoughts differ in length, so `step` takes an `active` mask, autoreset is off, and `reset` takes a mask of rows.

    Args:
        variant, reward, arguments: as for `InterleavedGenEnv`.
        num_envs: N.
        copy: False gives views of the state as observations, which the next step overwrites: faster, for those who read at once.
        device: where state, observations and `terminated` live; rewards and their components are on the CPU.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 8, "autoreset_mode": AutoresetMode.DISABLED}

    def __init__(
        self,
        variant: str | Variant = "text_to_image",
        num_envs: int = 1,
        *,
        reward: Any = None,
        render_mode: str | None = None,
        copy: bool = True,
        device: torch.device | str = "cpu",
        **arguments: Any,
    ) -> None:
        self.num_envs, self.render_mode, self.copy = num_envs, check_render_mode(render_mode), copy
        self.episodes = Episodes(make_variant(variant, reward=reward, **arguments), num_envs, device)
        self.single_observation_space = self.episodes.observation_space()
        self.single_action_space = self.episodes.action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Begin episodes anew.

        Args:
            seed: one for each row, or a first one from which rows count up.
            options: `prompts`: one a row, text or `Prompt`; `reset_mask`: `[N]` bool, the rows to begin (all if left out).

        Raises:
            ValueError: an unknown option, lists of the wrong length, a prompt or turn over its budget, or sources or turns that the variant does not take; no row
                has changed then.
        """
        first = seed if isinstance(seed, int) else None
        super().reset(seed=first)
        options = check_options(options, {"prompts", "reset_mask"})
        if seed is None:
            seeds = self.np_random.integers(2**31, size=self.num_envs).tolist()
        else:
            seeds = [seed + row for row in range(self.num_envs)] if isinstance(seed, int) else [int(s) for s in seed]
        mask = torch.as_tensor(options.get("reset_mask", [True] * self.num_envs))
        prompts = options.get("prompts")
        for name, length in (
            ("seed", len(seeds)),
            ("reset_mask", len(mask)),
            ("prompts", len(prompts) if prompts is not None else self.num_envs),
        ):
            if length != self.num_envs:
                raise ValueError(f"expected {name} of {self.num_envs} entries, one a row, got {length}")
        rows = mask.nonzero()[:, 0].tolist()
        task = self.episodes.variant.task
        chosen = [as_prompt(prompts[row]) if prompts is not None else task.prompts("train", 1, seeds[row])[0] for row in rows]
        self.episodes.reset(rows, chosen, [seeds[row] for row in rows])
        return self._observation(), self._info()

    def step(
        self, actions: dict[str, Tensor], active: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every active row.

        Args:
            actions: `token` `[N]` int64, `latent` `[N, L, C]` float32.
            active: `[N]` bool; the other rows stay as they are, with reward 0. All rows if left out.

        Returns:
            Observation; reward `[N]` float32, paid in the step that ends a row (and on the way, in variants that do); terminated `[N]` bool, True from then on; truncated, all False; infos: `prompts`, and
            when rows ended their indices `ended`, `unscored` `[N]` bool (any of their rewards was NaN, on the way or at the end) and the reward's `components` by name, NaN elsewhere;
            when something was paid, `paid`, the parts of the reward by name, `[N]` float32 each: `thought_reward`, `round_reward`, `reward` at the end.

        Raises:
            ResetNeeded: before the first reset.
            KeyError, TypeError, ValueError: an action outside the action space, or an active row that has ended.
        """
        device = self.episodes.state.phase.device
        token, latent = (torch.as_tensor(part, device=device) for part in split_action(actions))
        if active is None:
            active = torch.ones(self.num_envs, dtype=torch.bool)
        result = self.episodes.step(token, latent, torch.as_tensor(active, device=device))
        infos = self._info()
        if len(result.ended):
            infos |= {"ended": result.ended, "unscored": result.unscored, "components": result.components}
        if result.paid:
            infos["paid"] = result.paid
        terminated = self.episodes.state.phase == Phase.DONE
        return self._observation(), result.reward, terminated, torch.zeros_like(terminated), infos

    def texts(self) -> list[str]:
        """What each row has written so far."""
        return self.episodes.texts(range(self.num_envs))

    def images(self) -> Tensor:
        """The picture of each row as it stands, `[N, 3, height, width]` in [0, 1]."""
        return self.episodes.variant.decode(self.episodes.state.latent)

    def render(self) -> Any:
        """A frame a row, or None without a render mode."""
        if self.render_mode is None:
            return None
        return tuple(render_frame(self.episodes, row) for row in range(self.num_envs))

    def _observation(self) -> dict[str, Tensor]:
        observation = self.episodes.observe()
        return {name: value.clone() for name, value in observation.items()} if self.copy else observation

    def _info(self) -> dict[str, Any]:
        return {"prompts": list(self.episodes.prompts)}
