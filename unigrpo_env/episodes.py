"""What both faces of the env share: prompts in, the MDP's state, rewards out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from torch import Tensor

from rewards import EpisodeBatch, Reward, WeightedReward
from unigrpo_env.mdp import EpisodeState, Rules, check_action, transition, whose_turn
from unigrpo_env.tasks import Prompt, Task


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the env uses."""

    bos_token_id: int
    eos_token_id: int

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> Any: ...


class Decoder(Protocol):
    """Latents `[N, L, C]` float32 to pictures `[N, 3, height, width]` float32 in [0, 1]."""

    def __call__(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Variant:
    """A scenario, as data: what an episode may do, where prompts come from, how tokens and latents are read, what is rewarded.

    Attributes:
        rules: budgets and special tokens.
        task: the source of prompts.
        tokenizer: text to tokens and back.
        decode: latents to pictures.
        reward: a registered name, a callable, or weights by name.
        lowest_reward: of an episode that ends without a picture; no picture may be worth less, or leaving becomes the exploit.
        system_prompt: a text segment of its own before every prompt.
    """

    rules: Rules
    task: Task
    tokenizer: Tokenizer
    decode: Decoder
    reward: str | Reward | Mapping[str, float]
    lowest_reward: float = 0.0
    system_prompt: str = ""


@dataclass(frozen=True)
class StepResult:
    """What a step brought, beyond the new state.

    Attributes:
        reward: `[N]` float32: 0, but for rows that ended in this step; NaN if such a row could not be scored.
        ended: the rows that ended in this step, int64 indices, on the CPU.
        components: named parts of the reward, `[N]` float32, NaN elsewhere.
    """

    reward: Tensor
    ended: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)


class Episodes:
    """N episodes of one variant.

    Args:
        variant: the scenario.
        rows: N.
        device: where the state lives.
    """

    def __init__(self, variant: Variant, rows: int, device: torch.device | str = "cpu") -> None:
        if rows < 1:
            raise ValueError(f"expected at least one episode, got {rows=}")
        self.variant, self.rules = variant, variant.rules
        self.reward = WeightedReward(variant.reward)
        self.state = EpisodeState.empty(rows, self.rules, device)
        self.prompts: list[Prompt | None] = [None] * rows
        self.begun = False
        self.times = self.rules.times().to(device)
        self.next_times = torch.cat([self.times[1:], self.times[-1:]])

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt as the model reads it: `<bos> words <eos>`, and the `<bos>` of the thought if there is to be one.

        Raises:
            ValueError: it is longer than the budget.
        """
        tokenizer, ids = self.variant.tokenizer, []
        for text in filter(None, (self.variant.system_prompt, prompt.text)):
            ids += [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        ids = (ids or [tokenizer.bos_token_id, tokenizer.eos_token_id]) + ([tokenizer.bos_token_id] if self.rules.text_budget else [])
        if len(ids) > self.rules.prompt_budget:
            raise ValueError(
                f"the prompt {prompt.text[:60]!r} takes {len(ids)} tokens with its marks; expected at most prompt_budget={self.rules.prompt_budget}: shorten it or raise the budget"
            )
        return ids

    def reset(self, rows: Sequence[int], prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        """Begin `rows` anew. All prompts are checked before any row changes."""
        encoded: dict[str, list[int]] = {}
        for prompt in prompts:
            if prompt.text not in encoded:
                encoded[prompt.text] = self.encode(prompt)
        if not rows:
            return
        self.begun = True
        index = torch.tensor(rows, device=self.state.phase.device)
        self.state.begin(index, self.rules, [encoded[prompt.text] for prompt in prompts], seeds)
        for row, prompt in zip(rows, prompts, strict=True):
            self.prompts[row] = prompt

    def step(self, token: Tensor, latent: Tensor, active: Tensor) -> StepResult:
        """Check the action, advance the active rows, score those that ended, in one call."""
        state = self.state
        if not self.begun:
            raise ResetNeeded("step() before reset(): call env.reset() first")
        turn = whose_turn(state, active)
        check_action(state, self.rules, token, latent, turn)
        ended = transition(state, self.rules, token, latent, turn).cpu()
        reward = torch.zeros(len(active))
        if len(ended) == 0:
            return StepResult(reward, ended)
        has_image = state.images_drawn.cpu()[ended] > 0
        reward[ended[~has_image]] = self.variant.lowest_reward
        rows = ended[has_image]
        if len(rows) == 0:
            return StepResult(reward, ended)
        scores = self.reward(self.finished(rows.tolist()))
        reward[rows] = scores.reward
        unknown = torch.full_like(reward, torch.nan)
        return StepResult(reward, ended, {name: unknown.index_put((rows,), values) for name, values in scores.components.items()})

    def finished(self, rows: Sequence[int]) -> EpisodeBatch:
        """The episodes `rows` as a reward sees them."""
        prompts = [self.prompts[row] for row in rows]
        return EpisodeBatch(
            prompts=[prompt.text if prompt else "" for prompt in prompts],
            texts=self.texts(rows),
            images=self.variant.decode(self.state.latent[list(rows)]),
            metadata=[prompt.metadata if prompt else {} for prompt in prompts],
        )

    def texts(self, rows: Sequence[int]) -> list[str]:
        """What the model has written so far, by row."""
        state, decode = self.state, self.variant.tokenizer.decode
        tokens, begin, end = state.tokens.tolist(), state.prompt_length.tolist(), state.num_tokens.tolist()
        return [decode(tokens[row][begin[row] : end[row]], skip_special_tokens=True) for row in rows]

    def observe(self) -> dict[str, Tensor]:
        """The observation of every row: views of the state, valid until the next step."""
        state = self.state
        return {
            "phase": state.phase,
            "tokens": state.tokens,
            "num_tokens": state.num_tokens,
            "prompt_length": state.prompt_length,
            "legal_tokens": state.legal_tokens,
            "latent": state.latent,
            "step": state.step,
            "t": self.times.index_select(0, state.step),
            "next_t": self.next_times.index_select(0, state.step),
        }

    def observation_space(self) -> spaces.Dict:
        """Of one row."""
        rules = self.rules
        return spaces.Dict(
            {
                "phase": spaces.Discrete(3),
                "tokens": spaces.Box(0, rules.vocab_size - 1, (rules.max_tokens,), dtype=np.int64),
                "num_tokens": spaces.Discrete(rules.max_tokens + 1),
                "prompt_length": spaces.Discrete(rules.prompt_budget + 1),
                "legal_tokens": spaces.MultiBinary(rules.vocab_size),
                "latent": spaces.Box(-float("inf"), float("inf"), rules.latent_shape, dtype=np.float32),
                "step": spaces.Discrete(rules.image_steps + 1),
                "t": spaces.Box(0.0, 1.0, (), dtype=np.float32),
                "next_t": spaces.Box(0.0, 1.0, (), dtype=np.float32),
            }
        )

    def action_space(self) -> spaces.Dict:
        """Of one row."""
        return spaces.Dict(
            {
                "token": spaces.Discrete(self.rules.vocab_size),
                "latent": spaces.Box(-float("inf"), float("inf"), self.rules.latent_shape, dtype=np.float32),
            }
        )
