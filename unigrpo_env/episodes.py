"""What all envs share: prompts in, the state of the process, rewards out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from torch import Tensor

from rewards import EpisodeBatch, Failures
from unigrpo_env.inputs import check_action, encode_prompt, encode_turn, fit_sources
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.mdp.state import EncodedPrompt, EpisodeState
from unigrpo_env.mdp.transition import ActingRows, View, split_by_phase, transition
from unigrpo_env.scoring import Payment, Scorer
from unigrpo_env.tasks.task import Prompt, join_thoughts, make_batch
from unigrpo_env.variants.variant import Variant


@dataclass(frozen=True)
class StepResult:
    """What a step brought, beyond the new state.

    Attributes:
        reward: `[N]` float32, all that was paid in this step; NaN for a row that could not be
            scored.
        ended: the rows that ended in this step, int64 indices on the CPU.
        unscored: `[N]` bool: of those, the ones that some reward could not score, at the end or on
            the way.
        components: named parts of the reward at the end, `[N]` float32, NaN elsewhere.
        paid: the parts of `reward`, see `Payment.parts`.
        failures: see `Payment.failures`.
    """

    reward: Tensor
    ended: Tensor
    unscored: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)
    paid: dict[str, Tensor] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)


class Episodes:
    """N episodes of one variant.

    Args:
        variant: the scenario and its parts.
        rows: N.
        device: where the large tensors live, see `EpisodeState`.

    Raises:
        ValueError: no rows.
    """

    def __init__(self, variant: Variant, rows: int, device: torch.device | str = "cpu") -> None:
        if rows < 1:
            raise ValueError(f"expected at least one episode, got {rows=}")
        self.variant = variant
        self.rules = variant.rules
        self.processor = variant.processor
        self.scorer = Scorer(variant)
        self.state = EpisodeState.empty(rows, self.rules, device)
        self.prompts: list[Prompt | None] = [None] * rows
        self.unscored = torch.zeros(rows, dtype=torch.bool)
        self.begun = False
        self.times = self.rules.time_tensor()
        # [image_steps + 1] like `times`; after the last step the time stays 0.
        self.next_times = torch.cat([self.times[1:], self.times[-1:]])

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """A prompt in tokens and latents; raises ValueError if the scenario does not take it."""
        return self._encode(fit_sources(self.processor, self.rules, prompt))

    def _encode(self, fitted: Prompt) -> EncodedPrompt:
        return encode_prompt(self.processor, self.rules, fitted, self.variant.system_prompt)

    def reset(self, rows: Sequence[int], prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        """Begin `rows` anew. All prompts are checked before any row changes.

        Args:
            rows: which.
            prompts: of each.
            seeds: of each episode's noise.

        Raises:
            ValueError: a prompt that the scenario does not take.
        """
        # Each prompt is encoded once, not once for every member of its group. Its sources are kept
        # in the size of the images that are drawn, so that a reward can compare the two.
        fitted: dict[int, Prompt] = {}
        for prompt in prompts:
            if id(prompt) not in fitted:
                fitted[id(prompt)] = fit_sources(self.processor, self.rules, prompt)
        encoded = {key: self._encode(prompt) for key, prompt in fitted.items()}
        if not rows:
            return
        self.begun = True
        index = torch.tensor(rows)
        in_order = [encoded[id(prompt)] for prompt in prompts]
        self.state.begin(index, self.rules, in_order, seeds)
        self.unscored[rows] = False
        for row, prompt in zip(rows, prompts, strict=True):
            self.prompts[row] = fitted[id(prompt)]

    def step(self, token: Tensor, next_latent: Tensor, active: Tensor) -> StepResult:
        """Check the action, advance the active rows, and pay what is due.

        Args:
            token: `[N]` int64, on the CPU.
            next_latent: `[N, L, C]` float32, on the device.
            active: `[N]` bool, the rows that act, on the CPU.

        Raises:
            ResetNeeded: before the first reset.
            TypeError, ValueError: an action outside the action space, or an active row that has
                ended.
            Exception: whatever the task's `reply` or a reward raised.
        """
        state = self.state
        if not self.begun:
            raise ResetNeeded("step() before reset(): call env.reset() first")
        acting = split_by_phase(state, active)
        check_action(state, self.rules, token, next_latent, acting)
        # The state changes in place. Intermediate rewards need the numbers before.
        drawn_before = state.images_drawn
        if self.scorer.intermediate:
            drawn_before = drawn_before.clone()
        ended = self._advance(token, next_latent, acting)
        payment = self._pay(acting, drawn_before, ended)
        return self._result(payment, ended)

    def _advance(self, token: Tensor, next_latent: Tensor, acting: ActingRows) -> Tensor:
        """One transition; if the user's reply fails, no row has changed."""
        state = self.state
        # A copy costs time, so it is made only in a step that finishes an image and asks the user.
        saved = None
        if self.rules.turn_budget and hasattr(self.variant.task, "reply"):
            last_step = self.rules.image_steps - 1
            if (state.step[acting.image] == last_step).any():
                saved = state.copy()
        try:
            return transition(
                state, self.rules, token.long(), next_latent, acting, self._reply, self._view
            )
        except Exception:
            if saved is not None:
                state.restore(saved)
            raise

    @property
    def _view(self) -> View | None:
        """Shows drawn images to the model's vision encoder, where it has one."""
        if not self.rules.has_pixels:
            return None
        processor = self.processor
        return lambda latents: processor.view_images(processor.decode_latents(latents))

    def _pay(self, acting: ActingRows, drawn_before: Tensor, ended: Tensor) -> Payment:
        """Score the rows that are due: their thought, their image or their episode is complete."""
        state = self.state
        # Without intermediate rewards only the rows that ended are due.
        opened = ended[:0]
        drawn = ended[:0]
        if self.scorer.intermediate:
            # A text that is closed has taken its row to the image phase.
            opens = state.phase[acting.text] == Phase.IMAGE
            opened = acting.text[opens.nonzero()[:, 0]]
            drawn = (state.images_drawn > drawn_before).nonzero()[:, 0]
        due = len(ended) + len(opened) + len(drawn)
        # Most steps pay nothing.
        if due == 0:
            return Payment(torch.zeros(len(state.phase)))
        return self.scorer.pay(self.batch, opened, drawn, ended, state.images_drawn)

    def _result(self, payment: Payment, ended: Tensor) -> StepResult:
        """Join what was paid with the rows that some reward could not score."""
        unscored = torch.zeros(len(payment.reward), dtype=torch.bool)
        if payment.parts:
            # A NaN before the end is kept until the episode ends, and reported then.
            self.unscored |= payment.reward.isnan()
            unscored[ended] = self.unscored[ended]
        return StepResult(
            payment.reward,
            ended,
            unscored,
            payment.components,
            payment.parts,
            payment.failures,
        )

    def _reply(self, rows: Tensor) -> None:
        """Ask the task for the users' turns after the image that each of `rows` just drew."""
        reply = getattr(self.variant.task, "reply", None)
        if reply is None:
            return
        indices = rows.tolist()
        answers = reply(self.batch(indices))
        if not isinstance(answers, list | tuple) or len(answers) != len(indices):
            raise TypeError(
                f"expected reply() of {type(self.variant.task).__name__} to return a list of "
                f"{len(indices)} texts or None, got {answers!r:.80}"
            )
        for row, answer in zip(indices, answers, strict=True):
            self._write_reply(row, answer)

    def _write_reply(self, row: int, answer: str | None) -> None:
        """Store a user's turn; None or an empty text ends the episode."""
        if answer is not None and not isinstance(answer, str):
            raise TypeError(
                f"expected reply() of {type(self.variant.task).__name__} to return texts or None, "
                f"got {type(answer).__name__}: {answer!r:.60}"
            )
        number = int(self.state.images_drawn[row]) - 1
        # The answer replaces the turn that came with the prompt, if there was one.
        self.state.turn_lengths[row, number] = 0
        if answer:
            turn = encode_turn(self.processor, self.rules, answer)
            self.state.write_turns(row, [turn], first=number)

    def batch(self, rows: Sequence[int]) -> EpisodeBatch:
        """The episodes `rows` as a reward sees them, as far as they have come."""
        prompts = [cast(Prompt, self.prompts[row]) for row in rows]
        return make_batch(prompts, self.thoughts(rows), self.all_images(rows))

    def all_images(self, rows: Sequence[int]) -> list[Tensor]:
        """What each row has drawn and finished, in order, `[drawn, 3, height, width]`."""
        state = self.state
        first = self.rules.source_images
        index = torch.tensor(list(rows))
        # [rows, rounds - 1] bool: the images that were put into the stream to be read.
        stored = state.image_positions[index, first:] >= 0
        drawn = state.images_drawn[index]
        # [rows, rounds, L, C]: those and, as the last, the current latent.
        latents = torch.cat([self._drawn_before(index), state.latent[index, None]], 1)
        # The current latent is an image of its own if it is finished but not stored.
        has_more = drawn > stored.sum(1)
        finished = torch.cat([stored, has_more[:, None]], 1)
        # [drawn by all rows, 3, height, width], in the order of the rows, in one call.
        decoded = latents.new_zeros(0, 3, *self.processor.image_size)
        if finished.any():
            decoded = self.processor.decode_latents(latents[finished])
        return list(decoded.split(drawn.tolist()))

    def _drawn_before(self, rows: Tensor) -> Tensor:
        """What each row has drawn and may read, `[rows, rounds - 1, L, C]`."""
        # An episode without images stores none of its own, and its sources may have no latents.
        if self.rules.rounds == 1:
            return self.state.latent[rows, None][:, :0]
        return self.state.images[rows, self.rules.source_images :]

    def thoughts(self, rows: Sequence[int]) -> list[list[str]]:
        """What the model wrote before each of its images, and after the last if it went on."""
        state = self.state
        index = list(rows)
        first = self.rules.source_images
        tokens = state.tokens[index].tolist()
        counts = state.num_tokens[index].tolist()
        starts = state.round_starts[index].tolist()
        positions = state.image_positions[index, first:].tolist()
        found = []
        for row in range(len(index)):
            # A round's text ends where its image is read, or at the end of the stream.
            ends = [*positions[row], -1]
            texts = []
            for start, end in zip(starts[row], ends, strict=True):
                if start < 0:
                    continue
                if end < 0:
                    end = counts[row]
                texts.append(self.processor.decode_text(tokens[row][start:end]))
            found.append(texts)
        return found

    def texts(self, rows: Sequence[int]) -> list[str]:
        """All that each row has written so far."""
        return [join_thoughts(thoughts) for thoughts in self.thoughts(rows)]

    def observe(self) -> dict[str, Tensor]:
        """The observation of every row: views of the state, valid until the next step."""
        state = self.state
        observation = {
            "phase": state.phase,
            "tokens": state.tokens,
            "roles": state.roles,
            "num_tokens": state.num_tokens,
            "prompt_length": state.prompt_length,
            "legal_tokens": state.legal_tokens,
            "latent": state.latent,
            "step": state.step,
            "images_drawn": state.images_drawn,
            "t": self.times.index_select(0, state.step)[:, None],
            "next_t": self.next_times.index_select(0, state.step)[:, None],
        }
        if self.rules.stored_images:
            observation["images"] = state.images
            if self.rules.has_pixels:
                observation["pixels"] = state.pixels
            observation["image_positions"] = state.image_positions
        return observation

    def observation_space(self) -> spaces.Dict:
        """Of one row."""
        rules = self.rules
        latents = _unbounded(rules.latent_shape)
        entries: dict[str, spaces.Space[Any]] = {
            "phase": spaces.Discrete(3),
            "tokens": spaces.Box(0, rules.vocab_size - 1, (rules.max_tokens,), dtype=np.int64),
            "roles": spaces.Box(0, 2, (rules.max_tokens,), dtype=np.int64),
            "num_tokens": spaces.Discrete(rules.max_tokens + 1),
            "prompt_length": spaces.Discrete(rules.prompt_budget + 1),
            "legal_tokens": spaces.MultiBinary(rules.vocab_size),
            "latent": latents,
            "step": spaces.Discrete(rules.image_steps + 1),
            "images_drawn": spaces.Discrete(rules.image_budget + 1),
            "t": spaces.Box(0.0, 1.0, (1,), dtype=np.float32),
            "next_t": spaces.Box(0.0, 1.0, (1,), dtype=np.float32),
        }
        stored = rules.stored_images
        if stored:
            entries["images"] = _unbounded((stored, *rules.stored_shape))
            if rules.has_pixels:
                shape = (stored, 3, *rules.pixel_size)
                entries["pixels"] = spaces.Box(0, 255, shape, dtype=np.uint8)
            entries["image_positions"] = spaces.Box(-1, rules.max_tokens, (stored,), dtype=np.int64)
        return spaces.Dict(entries)

    def action_space(self) -> spaces.Dict:
        """Of one row."""
        return spaces.Dict(
            {
                "token": spaces.Discrete(self.rules.vocab_size),
                "next_latent": _unbounded(self.rules.latent_shape),
            }
        )


def _unbounded(shape: tuple[int, ...]) -> spaces.Box:
    """Latents are Gaussian: they have no bounds."""
    return spaces.Box(-float("inf"), float("inf"), shape, dtype=np.float32)
