"""The Markov decision process of interleaved generation (UniGRPO, section 4.1), batched, on tensors.

One step is one token (text phase) or one denoising step (image phase). `transition` is the only place where an episode advances; the Gymnasium
faces in `env` and `vector` are thin wraps of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from unigrpo_env.flow_time import time_grid


class Phase(IntEnum):
    """What an episode waits for."""

    TEXT = 0
    IMAGE = 1
    DONE = 2


@dataclass(frozen=True)
class Rules:
    """What an episode may do.

    Attributes:
        vocab_size: tokens are 0 ... vocab_size - 1.
        prompt_budget: tokens of the prompt with its marks, at most.
        text_budget: tokens the model may sample, the one that opens the image included; when they are spent the image opens by itself. 0 for
            no thought: the episode begins with the image.
        image_steps: denoising steps (transitions) an image.
        latent_shape: (latent tokens, values a token).
        open_image_id: the token that ends the thought and opens the image.
        time_shift: see `time_grid`.
        image_budget: images an episode; the episode ends when they are drawn. One, in this release.
        end_id: a token that ends the episode without an image, if the variant wants one.
        forbidden_ids: tokens that may never be sampled (padding, markers).
        pad_id: fills the unused end of the token buffer.
    """

    vocab_size: int
    prompt_budget: int
    text_budget: int
    image_steps: int
    latent_shape: tuple[int, int]
    open_image_id: int
    time_shift: float = 3.0
    image_budget: int = 1
    end_id: int | None = None
    forbidden_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        for name, least in {"prompt_budget": 1, "text_budget": 0, "image_steps": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} >= {least}, got {getattr(self, name)}")
        if self.image_budget != 1:
            raise ValueError(f"expected image_budget = 1, got {self.image_budget}; episodes of several images are not in this release")
        if self.open_image_id in self.forbidden_ids:
            raise ValueError(f"open_image_id {self.open_image_id} is among forbidden_ids; a thought could never end")

    @property
    def max_tokens(self) -> int:
        """Length of the token buffer: prompt, thought, and the token that may be forced after it."""
        return self.prompt_budget + self.text_budget + 1

    def legal_tokens(self) -> Tensor:
        """`[vocab_size]` bool: what may be sampled in the text phase."""
        legal = torch.ones(self.vocab_size, dtype=torch.bool)
        legal[list(self.forbidden_ids)] = False
        return legal

    def times(self) -> Tensor:
        """`[image_steps + 1]` float32, from 1 down to 0."""
        return time_grid(self.image_steps, self.time_shift)


@dataclass
class EpisodeState:
    """N episodes. All tensors have N rows.

    Attributes:
        phase: `[N]` int64, a `Phase`.
        tokens: `[N, max_tokens]` int64: prompt, then everything said, padded.
        num_tokens, prompt_length: `[N]` int64.
        sampled: `[N]` int64, tokens the model chose (a forced one is not).
        legal_tokens: `[N, vocab_size]` bool; all False outside the text phase.
        latent: `[N, L, C]` float32, x_t of the image being drawn; zero before.
        step: `[N]` int64, denoising steps taken.
        images_drawn: `[N]` int64.
        seed: `[N]` int64, what the noise of an episode is drawn from.
    """

    phase: Tensor
    tokens: Tensor
    num_tokens: Tensor
    prompt_length: Tensor
    sampled: Tensor
    legal_tokens: Tensor
    latent: Tensor
    step: Tensor
    images_drawn: Tensor
    seed: Tensor

    @classmethod
    def empty(cls, rows: int, rules: Rules, device: torch.device | str = "cpu") -> EpisodeState:
        """Rows that have not begun: every phase is DONE."""

        def whole(*shape: int, fill: int = 0) -> Tensor:
            return torch.full((rows, *shape), fill, dtype=torch.int64, device=device)

        return cls(
            phase=whole(fill=Phase.DONE),
            tokens=whole(rules.max_tokens, fill=rules.pad_id),
            num_tokens=whole(),
            prompt_length=whole(),
            sampled=whole(),
            legal_tokens=torch.zeros(rows, rules.vocab_size, dtype=torch.bool, device=device),
            latent=torch.zeros(rows, *rules.latent_shape, device=device),
            step=whole(),
            images_drawn=whole(),
            seed=whole(),
        )

    def begin(self, rows: Tensor, rules: Rules, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        """Start the episodes `rows` (int64 indices) anew, each from its prompt's tokens and its seed."""
        device = self.tokens.device
        width = self.tokens.shape[1]
        self.tokens[rows] = torch.tensor([[*prompt, *[rules.pad_id] * (width - len(prompt))] for prompt in prompts], device=device)
        self.num_tokens[rows] = self.prompt_length[rows] = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.seed[rows] = torch.tensor(seeds, dtype=torch.int64, device=device)
        for counter in (self.sampled, self.step, self.images_drawn, self.latent):
            counter[rows] = 0
        self.phase[rows] = Phase.TEXT
        self.legal_tokens[rows] = rules.legal_tokens().to(device)
        if rules.text_budget == 0:
            open_image(self, rows)


_WORD = 2**64 - 1


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A generator for one purpose of one episode, so that no episode depends on its batch."""
    word = 0
    for part in (seed, *key):  # SplitMix64 over the parts: torch's CPU generator takes 32 bits of its seed, so these must be well mixed
        word = (word + part + 0x9E3779B97F4A7C15) & _WORD
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
        word ^= word >> 31
    return torch.Generator().manual_seed(word & 0xFFFFFFFF)


def keyed_noise(keys: Sequence[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """Standard normal noise `[len(keys), *shape]` float32 on the CPU, each row from its own key.

    The one Python loop over a batch: torch has no kernel for keyed noise on the CPU.
    """
    noise = torch.empty(len(keys), *shape)
    for row, key in zip(noise.unbind(), keys, strict=True):
        row.normal_(generator=keyed_generator(*key))
    return noise


def open_image(state: EpisodeState, rows: Tensor) -> None:
    """Turn `rows` (int64 indices) to the image phase with noise x_1 drawn from (seed, images drawn)."""
    shape = state.latent.shape[1:]
    keys = torch.stack([state.seed[rows], state.images_drawn[rows]], 1).tolist()
    state.latent.index_copy_(0, rows, keyed_noise(keys, shape).to(state.latent.device))
    state.phase[rows] = Phase.IMAGE
    state.legal_tokens[rows] = False
    state.step[rows] = 0


@dataclass(frozen=True)
class Turn:
    """The rows that act in a step, as int64 indices: those that say a token, and those that take a denoising step."""

    text: Tensor
    image: Tensor


def whose_turn(state: EpisodeState, active: Tensor) -> Turn:
    """Split the `active` rows (`[N]` bool) by what they wait for.

    Raises:
        ValueError: no such mask, or an active row that has ended.
    """
    if active.shape != state.phase.shape or active.dtype != torch.bool:
        raise ValueError(f"expected active of shape {list(state.phase.shape)} and dtype bool, got {list(active.shape)} and {active.dtype}")
    acting = int(active.count_nonzero())
    text = (active & (state.phase == Phase.TEXT)).nonzero()[:, 0]
    image = text[:0] if len(text) == acting else (active & (state.phase == Phase.IMAGE)).nonzero()[:, 0]
    if len(text) + len(image) != acting:
        ended = (active & (state.phase == Phase.DONE)).nonzero()[:, 0].tolist()
        raise ValueError(f"episodes {ended} have ended or not begun; reset them, or leave them out with the `active` mask")
    return Turn(text, image)


def transition(state: EpisodeState, rules: Rules, token: Tensor, latent: Tensor, turn: Turn) -> Tensor:
    """Advance every row whose turn it is by one step, in place; the action must fit (`check_action`).

    Text: append the token; an opening token, or the last of the budget, opens the image. Image: the latent becomes the action and t moves
    to the next grid point; at t = 0 the image is drawn.

    Args:
        state: N episodes.
        rules: what they may do.
        token: `[N]` int64, read where a row is in the text phase.
        latent: `[N, L, C]` float32, read where a row is in the image phase.
        turn: who acts; the other rows stay as they are.

    Returns:
        The rows that ended in this step, int64 indices.
    """
    left = _append(state, rules, token.index_select(0, turn.text), turn.text) if len(turn.text) else turn.text
    drawn = _denoise(state, rules, latent, turn.image) if len(turn.image) else turn.image
    ended = torch.cat([left, drawn]) if len(left) else drawn
    if len(ended):
        state.phase[ended] = Phase.DONE
        state.legal_tokens[ended] = False
    return ended


def _append(state: EpisodeState, rules: Rules, token: Tensor, rows: Tensor) -> Tensor:
    """Add a token to each of `rows`; returns those that it ended."""
    at = state.num_tokens.index_select(0, rows)
    sampled = state.sampled.index_select(0, rows).add_(1)
    state.tokens[rows, at] = token
    state.num_tokens.index_copy_(0, rows, at + 1)
    state.sampled.index_copy_(0, rows, sampled)
    opens = token == rules.open_image_id
    spent = (sampled >= rules.text_budget) & ~opens
    ended = rows[:0]
    if rules.end_id is not None:
        ends = token == rules.end_id
        ended, spent = rows[ends], spent & ~ends
    if spent.any():
        forced = rows[spent]
        state.tokens[forced, at[spent] + 1] = rules.open_image_id
        state.num_tokens[forced] += 1
        opens |= spent
    if opens.any():
        open_image(state, rows[opens])
    return ended


def _denoise(state: EpisodeState, rules: Rules, latent: Tensor, rows: Tensor) -> Tensor:
    """Let the action become the latent of each of `rows`; returns those whose image is drawn."""
    if len(rows) == len(latent):
        state.latent.copy_(latent)
    else:
        state.latent[rows] = latent[rows].to(state.latent.dtype)
    step = state.step.index_select(0, rows).add_(1)
    state.step.index_copy_(0, rows, step)
    drawn = rows[step == rules.image_steps]
    if len(drawn):
        state.images_drawn[drawn] += 1
    return drawn


def check_action(state: EpisodeState, rules: Rules, token: Tensor, latent: Tensor, turn: Turn) -> None:
    """Raise TypeError or ValueError, with the remedy, unless `transition` can take this action.

    A token in range that is not legal passes: as in Gymnasium's own masked envs the mask is advice. It is appended and does nothing else.
    """
    rows = len(state.phase)
    for name, value, shape, integral in (("token", token, (rows,), True), ("latent", latent, (rows, *rules.latent_shape), False)):
        if tuple(value.shape) != shape:
            raise ValueError(f"expected action[{name!r}] of shape {list(shape)}, got {list(value.shape)}; keep to env.action_space")
        if value.is_floating_point() == integral or value.dtype == torch.bool:
            kind = "an integer" if integral else "a floating"
            raise TypeError(f"expected action[{name!r}] of {kind} dtype, got {value.dtype}; keep to env.action_space")
    # One look at all rows first, which costs little; only if it finds something do the acting rows matter.
    if len(turn.text):
        low, high = map(int, token.aminmax())
        if low < 0 or high >= rules.vocab_size:
            chosen = token[turn.text]
            if int(chosen.min()) < 0 or int(chosen.max()) >= rules.vocab_size:
                raise ValueError(f"expected tokens in [0, {rules.vocab_size}), got {chosen.tolist()}")
    # A sum is finite only if all its terms are (or it overflows, which the second look clears up).
    if len(turn.image) and not latent.sum().isfinite() and not latent[turn.image].isfinite().all():
        raise ValueError(
            "expected a finite action['latent'], got NaN or infinity; look at the velocity that made it, and at the learning rate"
        )
