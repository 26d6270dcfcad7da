"""N episodes as a TorchRL env, for its rollouts, collectors and transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from unigrpo_env.episodes import Episodes
from unigrpo_env.inputs import as_prompt
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import Variant, make_variant

PAID = {
    "thought_reward": "thought_reward",
    "round_reward": "round_reward",
    "final_reward": "reward",
}
"""Entries of the env for the parts of the reward, and their names in `StepResult.paid`."""


class InterleavedGenTorchRLEnv(EnvBase):
    """N episodes of one variant, with batch size [N].

    Spaces and meaning are those of `InterleavedGenEnv`, with a leading N.

    ## Action
    `token` `[N]` int64; `next_latent` `[N, L, C]` float32; `active` `[N, 1]` bool. A row with
    `active` False waits: it stays as it is, and its reward is 0. Without the entry all rows act.
    Rows that have ended are left out by the env itself, and so are those whose `_step` is False,
    as in `rollout(break_when_all_done=True)`.

    ## Observation
    The entries of `InterleavedGenEnv`: integers `[N]` int64, `legal_tokens` `[N, V]` bool, `t` and
    `next_t` `[N, 1]` float32. The env adds:

    | entry | shape, dtype | meaning |
    |---|---|---|
    | `seed` | `[N]` int64 | what the noise of the episode is drawn from |
    | `episode` | `[N]` int64 | number of the row's episode; it rises with each reset |
    | `thought_reward` | `[N, 1]` float32 | what the last step paid for a thought, or 0 |
    | `round_reward` | `[N, 1]` float32 | what it paid for an image, or 0 |
    | `final_reward` | `[N, 1]` float32 | what it paid at the end, or 0 |
    | `components` | nested, `[N, 1]` float32 each | named parts of `final_reward`, else NaN |

    ## Reward
    `reward` `[N, 1]` float32 is the sum of the three parts. NaN means that the episode could not be
    scored, which is not the same as a bad score. Leave such episodes out of every mean and every
    loss: `reward.isnan()` finds them. A plain sum over time, as that of `RewardSum`, keeps the NaN.

    ## Reset
    `set_seed(s)` and the next reset begin the episodes that the trainer's `Collector.collect`
    begins with the seed s and the prompts `task.prompts("train", groups, s)`. Each further reset
    has its own seed, which is made from s and the number of resets since. A group's rows share a
    prompt. A reset of all its rows draws a new one; a reset of some of them begins the same prompt
    anew. `reset(prompts=[...])` names one prompt a group.

    Args:
        variant: as for `InterleavedGenEnv`.
        num_envs: N.
        group_size: consecutive rows that share a prompt; N must be a multiple of it.
        components: names of reward components that are put out. A TorchRL env must know its entries
            before the first step, and only the reward knows the names.
        device: where the state and all entries live.
        arguments: further arguments of `make_variant`.

    Raises:
        ValueError: a group size that does not divide N.
    """

    def __init__(
        self,
        variant: str | Variant = "text_to_image",
        num_envs: int = 1,
        *,
        group_size: int = 1,
        components: Sequence[str] = (),
        device: torch.device | str = "cpu",
        **arguments: Any,
    ) -> None:
        if group_size < 1 or num_envs % group_size:
            raise ValueError(
                f"expected num_envs to be a multiple of group_size >= 1, got {num_envs=} and "
                f"{group_size=}"
            )
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.num_envs = num_envs
        self.group_size = group_size
        self.components = tuple(components)
        self.episodes = Episodes(make_variant(variant, **arguments), num_envs, self.device)
        self._group_prompts: list[Prompt | None] = [None] * (num_envs // group_size)
        self._seeds = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._numbers = torch.zeros_like(self._seeds)
        self._make_specs()
        self._set_seed(None)

    def _make_specs(self) -> None:
        shape = self.batch_size
        rules = self.episodes.rules
        latents = Unbounded((*shape, *rules.latent_shape), dtype=torch.float32)
        numbers = Unbounded((*shape, 1), dtype=torch.float32)
        entries = {
            "phase": Categorical(3, shape=shape),
            "tokens": self._integers(rules.vocab_size - 1, rules.max_tokens),
            "roles": self._integers(2, rules.max_tokens),
            "num_tokens": self._integers(rules.max_tokens),
            "prompt_length": self._integers(rules.prompt_budget),
            "legal_tokens": Binary(shape=(*shape, rules.vocab_size), dtype=torch.bool),
            "latent": latents.clone(),
            "step": self._integers(rules.image_steps),
            "images_drawn": self._integers(rules.image_budget),
            "t": Bounded(0.0, 1.0, (*shape, 1), dtype=torch.float32),
            "next_t": Bounded(0.0, 1.0, (*shape, 1), dtype=torch.float32),
            "seed": Unbounded(shape, dtype=torch.int64),
            "episode": Unbounded(shape, dtype=torch.int64),
        }
        stored = rules.stored_images
        if stored:
            all_latents = (*shape, stored, *rules.stored_shape)
            entries["images"] = Unbounded(all_latents, dtype=torch.float32)
            if rules.has_pixels:
                all_pixels = (*shape, stored, 3, *rules.pixel_size)
                entries["pixels"] = Bounded(0, 255, all_pixels, dtype=torch.uint8)
            entries["image_positions"] = self._integers(rules.max_tokens, stored, low=-1)
        for name in PAID:
            entries[name] = numbers.clone()
        if self.components:
            parts = {name: numbers.clone() for name in self.components}
            entries["components"] = Composite(parts, shape=shape)
        flags = Categorical(2, shape=(*shape, 1), dtype=torch.bool)
        action = {
            "token": Categorical(rules.vocab_size, shape=shape),
            "next_latent": latents.clone(),
            "active": flags.clone(),
        }
        done = {"done": flags.clone(), "terminated": flags.clone()}
        self.observation_spec = Composite(entries, shape=shape, device=self.device)
        self.action_spec = Composite(action, shape=shape, device=self.device)
        self.reward_spec = numbers.to(self.device)
        self.done_spec = Composite(done, shape=shape, device=self.device)

    def _integers(self, high: int, *inner: int, low: int = 0) -> Bounded:
        return Bounded(low, high, (*self.batch_size, *inner), dtype=torch.int64)

    def to(self, device: torch.device | str) -> InterleavedGenTorchRLEnv:
        """The env on another device, where it must be reset; returns itself.

        Args:
            device: where the state and all entries live from now on.
        """
        before = self.device
        super().to(device)
        if self.device != before:
            # A state half-way through an episode does not move with its env.
            self.episodes = Episodes(self.episodes.variant, self.num_envs, self.device)
            self._seeds = self._seeds.to(self.device)
            self._numbers = self._numbers.to(self.device)
        return self

    def _set_seed(self, seed: int | None) -> None:
        """The seed of all coming resets; drawn from torch's generator if None."""
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        self._seed = seed
        self._resets = 0

    def _next_seed(self) -> int:
        """The seed of this reset: that of `set_seed`, then others made from it."""
        number = self._resets
        self._resets += 1
        if number == 0:
            return self._seed
        return int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0] >> 1)

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        prompts: Sequence[str | Prompt] | None = None,
        **_: Any,
    ) -> TensorDict:
        begun = torch.ones(self.num_envs, dtype=torch.bool)
        if tensordict is not None:
            mask = tensordict.get("_reset", None)
            if mask is not None:
                begun = mask.view(self.num_envs).cpu()
        seed = self._next_seed()
        seeds = np.random.SeedSequence(seed).generate_state(self.num_envs).astype(np.int64)
        rows = begun.nonzero()[:, 0].tolist()
        group_prompts = self._renew_prompts(begun, seed, prompts)
        chosen = [cast(Prompt, group_prompts[row // self.group_size]) for row in rows]
        self.episodes.reset(rows, chosen, seeds[rows].tolist())
        self._group_prompts = group_prompts
        self._seeds[rows] = torch.as_tensor(seeds[rows], device=self.device)
        self._numbers[rows] += 1
        return self._output({}, {})

    def _renew_prompts(
        self, begun: Tensor, seed: int, given: Sequence[str | Prompt] | None
    ) -> list[Prompt | None]:
        """The prompt of each group, a new one where all rows begin."""
        count = len(self._group_prompts)
        if given is None:
            drawn = self.episodes.variant.task.prompts("train", count, seed)
        else:
            drawn = [as_prompt(prompt) for prompt in given]
        if len(drawn) != count:
            raise ValueError(
                f"expected {count} prompts, one for each group of {self.group_size} rows, "
                f"got {len(drawn)}"
            )
        # A copy, because no row may change before all prompts are checked.
        renewed = list(self._group_prompts)
        for group, whole in enumerate(begun.view(count, -1).all(1).tolist()):
            if whole or renewed[group] is None:
                renewed[group] = drawn[group]
        return renewed

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        acting = self.episodes.state.phase != Phase.DONE
        for name in ("active", "_step"):
            mask = tensordict.get(name, None)
            if mask is not None:
                acting = acting & mask.view(self.num_envs).cpu()
        token = tensordict["token"].cpu()
        result = self.episodes.step(token, tensordict["next_latent"], acting)
        output = self._output(result.paid, result.components)
        ended = (self.episodes.state.phase == Phase.DONE).to(self.device)
        output["reward"] = self._column(result.reward)
        output["done"] = ended[:, None].clone()
        output["terminated"] = ended[:, None].clone()
        return output

    def _output(self, paid: dict[str, Tensor], components: dict[str, Tensor]) -> TensorDict:
        """The observation, copied, with what the step paid."""
        entries: dict[str, Any] = {}
        # The env's own are views of its state, which the next step overwrites.
        for name, value in self.episodes.observe().items():
            entries[name] = value.to(self.device, copy=True)
        entries["seed"] = self._seeds.clone()
        entries["episode"] = self._numbers.clone()
        nothing = torch.zeros(self.num_envs)
        for name, part in PAID.items():
            entries[name] = self._column(paid.get(part, nothing))
        if self.components:
            # A component that this step did not bring is not a number, as in `StepResult`.
            unknown = torch.full_like(nothing, torch.nan)
            parts = {}
            for name in self.components:
                parts[name] = self._column(components.get(name, unknown))
            entries["components"] = TensorDict(parts, self.batch_size, device=self.device)
        return TensorDict(entries, self.batch_size, device=self.device)

    def _column(self, values: Tensor) -> Tensor:
        """`[N]` numbers on the CPU as `[N, 1]` float32 on the env's device."""
        return values.float().to(self.device)[:, None].clone()
