"""The Markov decision process of interleaved generation (UniGRPO, section 4.1), batched, on tensors.

One step is one token (text phase) or one denoising step (image phase). `transition` is the only place where an episode advances; the Gymnasium
faces in `env` and `vector` are thin wraps of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import cast

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
        text_budget: tokens the model may sample before each image, the one that opens it included; when they are spent the image opens by itself.
            0 for no thought: the image opens at once.
        image_steps: denoising steps (transitions) an image.
        latent_shape: (latent tokens, values a token).
        open_image_id: the token that ends the thought and opens the image.
        time_shift: see `time_grid`.
        image_budget: images an episode at most; the episode ends when they are drawn.
        source_images: images that come with the prompt.
        image_id: the token that stands in the token stream for an image to be read: a source, or a drawn image when the episode goes on after it.
        next_ids: what the env says after an image (and the user's turn), before the model goes on writing.
        turn_budget: tokens of the user's turn after an image; 0: the user says nothing. Where they speak, the episode ends when they have no more to say.
        end_id: a token that ends the episode, if the variant wants one.
        end_before_image: whether it is legal before the first image.
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
    source_images: int = 0
    image_id: int | None = None
    next_ids: tuple[int, ...] = ()
    turn_budget: int = 0
    end_id: int | None = None
    end_before_image: bool = True
    forbidden_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        least_values = {"prompt_budget": 1, "text_budget": 0, "image_steps": 1, "image_budget": 1, "source_images": 0, "turn_budget": 0}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} >= {least}, got {getattr(self, name)}")
        if self.stored_images and self.image_id not in self.forbidden_ids:
            raise ValueError(
                f"expected an image_id among forbidden_ids where images are read, got {self.image_id}: a model that could say it would claim an image"
            )
        if self.image_budget > 1 and self.text_budget and not self.next_ids:
            raise ValueError("expected next_ids where the model goes on writing after an image, got none: its next token must follow one")
        if self.open_image_id in self.forbidden_ids:
            raise ValueError(f"open_image_id {self.open_image_id} is among forbidden_ids; a thought could never end")

    @property
    def max_tokens(self) -> int:
        """Length of the token buffer: prompt; for each image a thought and the token that may be forced after it; what the env says between."""
        between = 1 + self.turn_budget + len(self.before_thought)
        return self.prompt_budget + self.image_budget * (self.text_budget + 1) + (self.image_budget - 1) * between

    @property
    def before_thought(self) -> tuple[int, ...]:
        """`next_ids`, where there are thoughts."""
        return self.next_ids if self.text_budget else ()

    @property
    def stored_images(self) -> int:
        """Images that may have to be read: the sources, and every drawn one but the last."""
        return self.source_images + self.image_budget - 1

    def legal_tokens(self, after_image: bool = False) -> Tensor:
        """`[vocab_size]` bool: what may be sampled in the text phase, before the first image or after one."""
        legal = torch.ones(self.vocab_size, dtype=torch.bool)
        legal[list(self.forbidden_ids)] = False
        if self.end_id is not None and not (after_image or self.end_before_image):
            legal[self.end_id] = False
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
        sampled: `[N]` int64, tokens the model chose since the last image (a forced one is not).
        legal_tokens: `[N, vocab_size]` bool; all False outside the text phase.
        latent: `[N, L, C]` float32, x_t of the image being drawn, or the last one drawn; zero before.
        images: `[N, stored_images, L, C]` float32, clean latents: the sources, then what was drawn and may be read.
        image_places: `[N, stored_images]` int64, where in `tokens` each of them is read; -1: not there yet.
        round_begins: `[N, image_budget]` int64, where in `tokens` the words before each image begin; -1: not there yet.
        turns: `[N, image_budget - 1, turn_budget]` int64, what the user will say after each image; turn_lengths: `[N, image_budget - 1]` int64.
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
    images: Tensor
    image_places: Tensor
    round_begins: Tensor
    turns: Tensor
    turn_lengths: Tensor
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
            images=torch.zeros(rows, rules.stored_images, *rules.latent_shape, device=device),
            image_places=whole(rules.stored_images, fill=-1),
            round_begins=whole(rules.image_budget, fill=-1),
            turns=whole(rules.image_budget - 1, rules.turn_budget),
            turn_lengths=whole(rules.image_budget - 1),
            step=whole(),
            images_drawn=whole(),
            seed=whole(),
        )

    def begin(
        self,
        rows: Tensor,
        rules: Rules,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sources: Tensor | None = None,
        turns: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> None:
        """Start the episodes `rows` (int64 indices) anew.

        Args:
            rows: which.
            rules: what they may do.
            prompts: tokens of each prompt; it begins with one `image_id` for each source.
            seeds: of each episode's noise.
            sources: `[rows, source_images, L, C]`, where the rules ask for some.
            turns: tokens of the user's turns of each episode.
        """
        device = self.tokens.device
        width = self.tokens.shape[1]
        self.tokens[rows] = torch.tensor([[*prompt, *[rules.pad_id] * (width - len(prompt))] for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.num_tokens[rows] = self.prompt_length[rows] = lengths
        self.seed[rows] = torch.tensor(seeds, dtype=torch.int64, device=device)
        for part in (self.sampled, self.step, self.images_drawn, self.latent, self.images, self.turn_lengths):
            part[rows] = 0
        self.round_begins[rows] = -1
        self.round_begins[rows, 0] = lengths
        self.image_places[rows] = -1
        if sources is not None and rules.source_images:
            self.images[rows, : rules.source_images] = sources.to(self.images)
            self.image_places[rows, : rules.source_images] = torch.arange(rules.source_images, device=device)
        for row, said in zip(rows.tolist(), turns or (), strict=False):
            for number, turn in enumerate(said[: rules.image_budget - 1]):
                self.turns[row, number, : len(turn)] = torch.tensor(turn, device=device)
                self.turn_lengths[row, number] = len(turn)
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
    to the next grid point; at t = 0 the image is drawn, and the episode ends or, while images are left, goes on with words.

    Args:
        state: N episodes.
        rules: what they may do.
        token: `[N]` int64, read where a row is in the text phase.
        latent: `[N, L, C]` float32, read where a row is in the image phase.
        turn: who acts; the other rows stay as they are.

    Returns:
        The rows that ended in this step, int64 indices, rising.
    """
    left = _append(state, rules, token.index_select(0, turn.text), turn.text) if len(turn.text) else turn.text
    drawn = _denoise(state, rules, latent, turn.image) if len(turn.image) else turn.image
    ended = torch.cat([left, drawn]).sort().values if len(left) else drawn
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
        ends = (token == rules.end_id) & state.legal_tokens[rows, rules.end_id]
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
    """Let the action become the latent of each of `rows`; returns those whose last image is drawn."""
    if len(rows) == len(latent):
        state.latent.copy_(latent)
    else:
        state.latent[rows] = latent[rows].to(state.latent.dtype)
    step = state.step.index_select(0, rows).add_(1)
    state.step.index_copy_(0, rows, step)
    drawn = rows[step == rules.image_steps]
    if len(drawn) == 0:
        return drawn
    state.images_drawn[drawn] += 1
    if rules.image_budget == 1:
        return drawn
    more = state.images_drawn[drawn] < rules.image_budget
    if rules.turn_budget:
        last = (state.images_drawn[drawn] - 1).clamp(max=rules.image_budget - 2)
        more &= state.turn_lengths[drawn, last] > 0
    if more.any():
        _go_on(state, rules, drawn[more])
    return drawn[~more]


def _go_on(state: EpisodeState, rules: Rules, rows: Tensor) -> None:
    """After an image of `rows`: put it in the token stream, let the user speak, and give the word back to the model."""
    number, at = state.images_drawn[rows] - 1, state.num_tokens[rows]
    place = rules.source_images + number
    state.images[rows, place] = state.latent[rows]
    state.image_places[rows, place] = at
    state.tokens[rows, at] = cast(int, rules.image_id)
    at = at + 1
    if rules.turn_budget:
        lengths = state.turn_lengths[rows, number]
        slots = torch.arange(rules.turn_budget, device=rows.device)
        said = slots < lengths[:, None]
        who, where = said.nonzero(as_tuple=True)
        state.tokens[rows[who], at[who] + where] = state.turns[rows, number][said]
        at = at + lengths
    for token in rules.before_thought:
        state.tokens[rows, at] = token
        at = at + 1
    state.num_tokens[rows] = at
    state.round_begins[rows, number + 1] = at
    state.sampled[rows] = 0
    state.phase[rows] = Phase.TEXT
    state.legal_tokens[rows] = rules.legal_tokens(after_image=True).to(rows.device)
    if rules.text_budget == 0:
        open_image(state, rows)


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
