"""What both faces of the env share: prompts in, the MDP's state, rewards out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from torch import Tensor

from rewards import EpisodeBatch, Reward, WeightedReward
from unigrpo_env.mdp import EpisodeState, Phase, Rules, check_action, transition, whose_turn
from unigrpo_env.tasks import Prompt, Task, batch_of, join_rounds


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
        reward: of a finished episode: a registered name, a callable, or weights by name.
        thought_reward: the same for a thought, paid when it opens its image, before that is drawn; None for none.
        round_reward: the same for a picture, paid when it is drawn; None for none. Both see the episode as far as it has come.
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
    thought_reward: str | Reward | Mapping[str, float] | None = None
    round_reward: str | Reward | Mapping[str, float] | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step brought, beyond the new state.

    Attributes:
        reward: `[N]` float32, all that was paid in this step: at the end, for a thought, for a picture; 0 for rows that were paid nothing, NaN for one that could
            not be scored.
        ended: the rows that ended in this step, int64 indices, on the CPU.
        unscored: `[N]` bool: of those, the ones that some reward, at the end or on the way, could not score.
        components: named parts of the reward at the end, `[N]` float32, NaN elsewhere.
        paid: the parts of `reward`, `[N]` float32 each, 0 elsewhere: `reward` at the end, `thought_reward` and `round_reward` on the way; those that paid nobody in
            this step are left out.
    """

    reward: Tensor
    ended: Tensor
    unscored: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)
    paid: dict[str, Tensor] = field(default_factory=dict)


def different(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, each object once."""
    return list({id(prompt): prompt for prompt in prompts}.values())


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
        on_the_way = {"thought_reward": variant.thought_reward, "round_reward": variant.round_reward}
        self.on_the_way = {name: WeightedReward(reward) for name, reward in on_the_way.items() if reward is not None}
        self.state = EpisodeState.empty(rows, self.rules, device)
        self.prompts: list[Prompt | None] = [None] * rows
        self.unscored = torch.zeros(rows, dtype=torch.bool)
        self.begun = False
        self.times = self.rules.times().to(device)
        self.next_times = torch.cat([self.times[1:], self.times[-1:]])

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt as the model reads it: `<bos> words <eos>`, and the `<bos>` of the thought if there is to be one.

        Raises:
            ValueError: it is longer than the budget, or has a control token typed in it.
        """
        tokenizer = self.variant.tokenizer
        ids = [cast(int, self.rules.image_id)] * self.rules.source_images
        for text in filter(None, (self.variant.system_prompt, prompt.text)):
            ids += self._segment(text)
        ids = (ids or [tokenizer.bos_token_id, tokenizer.eos_token_id]) + ([tokenizer.bos_token_id] if self.rules.text_budget else [])
        if len(ids) > self.rules.prompt_budget:
            raise ValueError(
                f"the prompt {prompt.text[:60]!r} takes {len(ids)} tokens with its marks; expected at most prompt_budget={self.rules.prompt_budget}: shorten it or raise the budget"
            )
        return ids

    def _segment(self, text: str) -> list[int]:
        tokenizer, rules = self.variant.tokenizer, self.rules
        words = tokenizer.encode(text, add_special_tokens=False)
        # Typed, they would claim a picture that has no place, or an end that nobody came to.
        marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, rules.open_image_id, rules.image_id, rules.end_id}
        if typed := [token for token in words if token in marks]:
            raise ValueError(
                f"expected words in {text[:60]!r}, got the control token {tokenizer.decode(typed[:1])!r}; "
                "take it out: the env sets its marks itself, and pictures come with `Prompt(sources=...)`"
            )
        return [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]

    def encode_sources(self, prompt: Prompt) -> Tensor:
        """A prompt's pictures as latents, `[source_images, L, C]`.

        Raises:
            ValueError: another number, shape, type or range than the variant reads.
        """
        rules, asked = self.rules, self.rules.source_images
        if len(prompt.sources) != asked:
            raise ValueError(
                f"expected {asked} source pictures with the prompt {prompt.text[:60]!r}, got {len(prompt.sources)}; give `Prompt(sources=...)`"
            )
        if not asked:
            return torch.zeros(0, *rules.latent_shape)
        encode = getattr(self.variant.decode, "encode", None)
        if encode is None:
            raise ValueError(f"expected a decoder that encodes sources too, got {type(self.variant.decode).__name__} without `encode`")
        expected = tuple(self.variant.decode(torch.zeros(1, *rules.latent_shape)).shape[1:])
        for picture in prompt.sources:
            if not isinstance(picture, Tensor) or not picture.is_floating_point() or tuple(picture.shape) != expected:
                got = f"{list(picture.shape)} of {picture.dtype}" if isinstance(picture, Tensor) else type(picture).__name__
                raise ValueError(
                    f"expected source pictures as float tensors of shape {list(expected)} (RGB), got {got}; resize or convert them first"
                )
            if not (picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1):
                raise ValueError(
                    f"expected source pictures with values in [0, 1], got [{float(picture.min()):g}, {float(picture.max()):g}]; divide bytes by 255"
                )
        return encode(torch.stack(list(prompt.sources)).float())

    def encode_turns(self, prompt: Prompt) -> list[list[int]]:
        """What the user will say, as tokens.

        Raises:
            ValueError: turns in a variant where the user does not speak, more of them than images to follow, or one over the budget or with a control token.
        """
        rules = self.rules
        if len(prompt.turns) > (rules.image_budget - 1 if rules.turn_budget else 0):
            raise ValueError(
                f"expected at most {rules.image_budget - 1 if rules.turn_budget else 0} turns after the prompt {prompt.text[:60]!r}, got {len(prompt.turns)}; "
                "raise image_budget, or use a variant in which the user speaks"
            )
        encoded = [self._segment(turn) for turn in prompt.turns]
        for turn, ids in zip(prompt.turns, encoded, strict=True):
            if len(ids) > rules.turn_budget:
                raise ValueError(
                    f"the turn {turn[:60]!r} takes {len(ids)} tokens with its marks; expected at most turn_budget={rules.turn_budget}"
                )
        return encoded

    def reset(self, rows: Sequence[int], prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        """Begin `rows` anew. All prompts are checked before any row changes."""
        # Each different prompt once, not once a member of its group.
        encoded = {
            id(prompt): (self.encode(prompt), self.encode_sources(prompt), self.encode_turns(prompt)) for prompt in different(prompts)
        }
        if not rows:
            return
        self.begun = True
        index = torch.tensor(rows, device=self.state.phase.device)
        ids, sources, turns = zip(*(encoded[id(prompt)] for prompt in prompts), strict=True)
        self.state.begin(index, self.rules, ids, seeds, torch.stack(sources) if self.rules.source_images else None, turns)
        self.unscored[rows] = False
        for row, prompt in zip(rows, prompts, strict=True):
            self.prompts[row] = prompt

    def step(self, token: Tensor, latent: Tensor, active: Tensor) -> StepResult:
        """Check the action, advance the active rows, score those that ended, in one call."""
        state = self.state
        if not self.begun:
            raise ResetNeeded("step() before reset(): call env.reset() first")
        turn = whose_turn(state, active)
        check_action(state, self.rules, token, latent, turn)
        drawn_before = state.images_drawn.clone() if self.on_the_way else state.images_drawn
        ended = transition(state, self.rules, token, latent, turn).cpu()
        nothing = torch.zeros(len(active))
        paid: dict[str, Tensor] = {}
        components: dict[str, Tensor] = {}
        if self.on_the_way:
            opened = turn.text[(state.phase[turn.text] == Phase.IMAGE).nonzero()[:, 0]]
            drawn = (state.images_drawn > drawn_before).nonzero()[:, 0]
            for name, rows in (("thought_reward", opened.cpu()), ("round_reward", drawn.cpu())):
                if name in self.on_the_way and len(rows):
                    paid[name] = nothing.index_put((rows,), self.on_the_way[name](self.batch(rows.tolist())).reward)
        if len(ended):
            has_image = state.images_drawn.cpu()[ended] > 0
            rows = ended[has_image]
            paid["reward"] = nothing.index_put((ended[~has_image],), torch.tensor(self.variant.lowest_reward))
            if len(rows):
                scores = self.reward(self.batch(rows.tolist()))
                paid["reward"][rows] = scores.reward
                unknown = torch.full_like(nothing, torch.nan)
                components = {name: unknown.index_put((rows,), values) for name, values in scores.components.items()}
        reward, unscored = sum(paid.values(), nothing), nothing.bool()
        if paid:
            self.unscored |= reward.isnan()
            unscored[ended] = self.unscored[ended]
        return StepResult(reward, ended, unscored, components, paid)

    def batch(self, rows: Sequence[int]) -> EpisodeBatch:
        """The episodes `rows` as a reward sees them, as far as they have come."""
        prompts = [cast(Prompt, self.prompts[row]) for row in rows]
        return batch_of(prompts, self.rounds(rows), self.pictures(rows))

    def pictures(self, rows: Sequence[int]) -> list[Tensor]:
        """What each row has drawn and finished, in order, `[drawn, 3, height, width]`; decoded in one call."""
        state, first = self.state, self.rules.source_images
        index = torch.tensor(list(rows), device=state.phase.device)
        # Those that were put away to be read, and the last one, which was not.
        put_away, drawn = state.image_places[index, first:] >= 0, state.images_drawn[index]
        latents = torch.cat([state.images[index, first:], state.latent[index, None]], 1)
        finished = torch.cat([put_away, (drawn > put_away.sum(1))[:, None]], 1)
        return list(self.variant.decode(latents[finished]).split(drawn.tolist()))

    def rounds(self, rows: Sequence[int]) -> list[list[str]]:
        """What the model said before each of its pictures, and after the last if it went on; a user's words are not among it."""
        state, index, decode = self.state, list(rows), self.variant.tokenizer.decode
        said = zip(
            state.tokens[index].tolist(),
            state.num_tokens[index].tolist(),
            state.round_begins[index].tolist(),
            state.image_places[index, self.rules.source_images :].tolist(),
            strict=True,
        )
        return [
            [
                decode(tokens[begin : place if place >= 0 else count], skip_special_tokens=True)
                for begin, place in zip(begins, [*places, -1], strict=True)
                if begin >= 0
            ]
            for tokens, count, begins, places in said
        ]

    def texts(self, rows: Sequence[int]) -> list[str]:
        """All that each row has written so far."""
        return [join_rounds(said) for said in self.rounds(rows)]

    def observe(self) -> dict[str, Tensor]:
        """The observation of every row: views of the state, valid until the next step."""
        state = self.state
        read = {"images": state.images, "image_places": state.image_places} if self.rules.stored_images else {}
        return read | {
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
        stored, endless = rules.stored_images, float("inf")
        read: dict[str, spaces.Space[Any]] = {}
        if stored:
            read["images"] = spaces.Box(-endless, endless, (stored, *rules.latent_shape), dtype=np.float32)
            read["image_places"] = spaces.Box(-1, rules.max_tokens, (stored,), dtype=np.int64)
        return spaces.Dict(
            read
            | {
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
