"""What a model says of recorded episodes, teacher-forced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.models.base import Context, UnifiedModel
from agents.policy.chunks import predict_velocity
from agents.policy.guidance import Guidance, guided
from agents.policy.prefill import Sources, read_prompts
from agents.policy.sde import KERNELS
from agents.policy.segments import ImageSegment, TextSegment, image_inputs, segments
from agents.policy.tokens import (
    Head,
    chosen_log_probs,
    fits_at_once,
    token_entropy,
    token_log_probs,
)
from agents.trajectory import Trajectory


@dataclass
class ActionEvaluation:
    """Log-probabilities and velocities of recorded actions; shapes as in `Trajectory`.

    Attributes:
        log_prob: `[N, K]` float32, of each token; zeros if not asked for.
        entropy: `[N, K]` float32, of the distribution it was drawn from, in nats; without gradient.
        velocity: `[N, R, W, L, C]` float32, at the stochastic steps; None if not asked for.
    """

    log_prob: Tensor
    entropy: Tensor
    velocity: Tensor | None


def evaluate_actions(
    model: UnifiedModel[Any],
    episodes: Trajectory,
    legal_tokens: Tensor,
    *,
    temperature: float = 1.0,
    image_grad_to_text: bool = True,
    grad_through_read_images: bool = False,
    with_log_probs: bool = True,
    with_velocity: bool = True,
    guidance: Guidance | None = None,
) -> ActionEvaluation:
    """Read recorded episodes once: all tokens and all stochastic steps from one context.

    Args:
        model: see `agents.models.base.UnifiedModel`.
        episodes: N trajectories.
        legal_tokens: `[rounds, V]` bool, as in the rollout: of each round's text. A further round
            has the mask of the last.
        temperature: as in the rollout.
        image_grad_to_text: whether the velocities' gradient reaches the text before them.
        grad_through_read_images: whether any gradient reaches the reading of images.
        with_log_probs: False leaves log-probabilities and entropy out.
        with_velocity: False leaves velocities out, where text alone is learnt.
        guidance: as in the rollout.
    """
    options = _Options(
        legal_tokens, temperature, image_grad_to_text, grad_through_read_images, with_log_probs
    )
    walk = _Walk(guided(model, guidance), episodes, options, with_velocity)
    walk.read_prompts()
    walk.read_episodes()
    return walk.found


@dataclass(frozen=True)
class _Options:
    """The arguments of `evaluate_actions`."""

    legal_tokens: Tensor
    temperature: float
    image_grad_to_text: bool
    grad_through_read_images: bool
    with_log_probs: bool


class _Walk:
    """One walk over N episodes: what was read so far, and where all results are written.

    Args:
        model: reads and predicts.
        episodes: N trajectories.
        options: what to evaluate.
        with_velocity: see `evaluate_actions`.
    """

    def __init__(
        self,
        model: UnifiedModel[Any],
        episodes: Trajectory,
        options: _Options,
        with_velocity: bool,
    ) -> None:
        self.model = model
        self.episodes = episodes
        self.options = options
        self.found = _empty_evaluation(episodes, with_velocity)

    def read_prompts(self) -> None:
        """Read the prompts; members of a group share theirs and its sources, read once a group."""
        episodes = self.episodes
        sources = Sources.of(
            episodes.images, episodes.pixels, episodes.image_positions, episodes.prompt_length
        )
        # `logits` [n, 1, V] are those of the token after the prompt. What stands first after an
        # image is the env's, so no logits are needed there.
        self.logits, self.context = read_prompts(
            self.model,
            episodes.prompt_tokens,
            episodes.prompt_length,
            episodes.prompt_roles,
            sources,
            with_grad=self.options.grad_through_read_images,
        )

    def read_episodes(self) -> None:
        """Read what follows the prompts, and evaluate the actions on the way."""
        episodes = self.episodes
        start = torch.zeros_like(episodes.prompt_length)
        stop = episodes.text_mask.sum(1)
        # Positions after the prompt; those of sources become negative and count for nothing.
        positions = episodes.image_positions - episodes.prompt_length[:, None]
        number = 0
        walk = segments(
            episodes.tokens, start, stop, positions, roles=episodes.roles, drop_finished=True
        )
        for part in walk:
            if isinstance(part, ImageSegment):
                self._read_image(part)
                number += 1
                continue
            if part.ids.shape[1]:
                self._read_text(part, number)
            # Before the next text: without gradient the context grows in place.
            self._predict(part.rows, number)

    def _read_image(self, part: ImageSegment) -> None:
        if part.kept is not None:
            # Episodes that have ended are left out, so that no forward is spent on them.
            self.context = self.context.select(part.kept)
            self.logits = self.logits[part.kept]
        place = part.rows, part.numbers
        latent, pixels = image_inputs(self.episodes.images[place], self.episodes.pixels[place])
        self.context = self.model.append_image(
            self.context, latent, pixels, with_grad=self.options.grad_through_read_images
        )

    def _read_text(self, part: TextSegment, number: int) -> None:
        """Read a text, and write the log-probabilities of its tokens to their place.

        The first tokens after an image come from the env, and a forced token was never a choice.
        Their log-probabilities are written too, but `chosen_mask` leaves them out.
        """
        states, self.context = self.model.append_hidden(
            self.context, part.ids, part.mask, roles=part.roles
        )
        if not self.options.with_log_probs:
            return
        legal_tokens = self.options.legal_tokens
        legal = legal_tokens[min(number, len(legal_tokens) - 1)]
        if fits_at_once(part.ids.numel(), len(legal)):
            self._evaluate_at_once(part, states, legal)
        else:
            self._evaluate_in_parts(part, states, legal)

    def _evaluate_at_once(self, part: TextSegment, states: Tensor, legal: Tensor) -> None:
        # [n, T, V]
        later = self.model.compute_logits(states)
        # The logits before the first token come from the prompt.
        before_each = torch.cat([self.logits, later[:, :-1]], 1)
        log_probs = token_log_probs(before_each, legal, self.options.temperature)
        row, position = part.mask.nonzero(as_tuple=True)
        log_prob = log_probs[row, position, part.ids[row, position]]
        entropy = token_entropy(log_probs, legal)[row, position]
        self._write(part, row, position, log_prob, entropy)

    def _evaluate_in_parts(self, part: TextSegment, states: Tensor, legal: Tensor) -> None:
        """The same, but the logits of a few tokens at a time."""
        row = part.mask[:, 0].nonzero()[:, 0]
        first = torch.zeros_like(row)
        self._write_chosen(part, row, first, lambda logits: logits, self.logits[row, 0], legal)
        # The state before each further token, [tokens, H].
        row, before = part.mask[:, 1:].nonzero(as_tuple=True)
        head = self.model.compute_logits
        self._write_chosen(part, row, before + 1, head, states[row, before], legal)

    def _write_chosen(
        self,
        part: TextSegment,
        row: Tensor,
        position: Tensor,
        head: Head,
        states: Tensor,
        legal: Tensor,
    ) -> None:
        """Evaluate some tokens of a text, given the states `[tokens, H]` before them."""
        chosen = part.ids[row, position]
        found = chosen_log_probs(head, states, chosen, legal, self.options.temperature)
        self._write(part, row, position, *found)

    def _write(
        self, part: TextSegment, row: Tensor, position: Tensor, log_prob: Tensor, entropy: Tensor
    ) -> None:
        slot = part.rows[row], part.positions[row, position]
        self.found.log_prob = self.found.log_prob.index_put(slot, log_prob)
        self.found.entropy[slot] = entropy

    def _predict(self, rows: Tensor, number: int) -> None:
        """Predict the stochastic steps of image `number` in those of `rows` that drew it."""
        velocity = self.found.velocity
        if velocity is None or number >= velocity.shape[1]:
            return
        episodes = self.episodes
        context = self.context
        if not self.options.image_grad_to_text:
            context = context.detach()
        draws = episodes.images_drawn[rows] > number
        if len(draws) == len(velocity) and draws.all():
            # All rows draw, as in episodes of one image: no row has to be copied.
            x = episodes.window_latents[:, number]
            t = episodes.window_times[:, number]
            velocity[:, number] = window_velocities(self.model, context, x, t)
        elif draws.any():
            kept = draws.nonzero()[:, 0]
            index = rows[kept]
            x = episodes.window_latents[index, number]
            t = episodes.window_times[index, number]
            selected = context.select(kept)
            velocity[index, number] = window_velocities(self.model, selected, x, t)


def _empty_evaluation(episodes: Trajectory, with_velocity: bool) -> ActionEvaluation:
    """Where all results are written, [N, K] and [N, R, W, L, C]."""
    shape = episodes.text_mask.shape
    device = episodes.tokens.device
    velocity = None
    if with_velocity:
        velocity = torch.zeros_like(episodes.window_means)
    return ActionEvaluation(
        torch.zeros(shape, device=device), torch.zeros(shape, device=device), velocity
    )


def window_velocities(
    model: UnifiedModel[Any], context: Context, latents: Tensor, times: Tensor
) -> Tensor:
    """Velocities `[n, W, L, C]` at the stochastic steps of one image.

    Args:
        model: the model.
        context: that at which the image opened, n rows.
        latents: `[n, W + 1, L, C]`, x before each step and after the last.
        times: `[n, W + 1]`, their flow times.
    """
    x = latents[:, :-1]
    t = times[:, :-1]
    # The W steps of a row are W rows side by side, each with the same context.
    velocity = predict_velocity(model, context, x.flatten(0, 1), t.flatten(), repeats=t.shape[1])
    return velocity.unflatten(0, t.shape)


def window_means(
    episodes: Trajectory, velocity: Tensor, noise_level: float, kernel: str = "flow_sde"
) -> tuple[Tensor, Tensor]:
    """Means `[N, R, W, L, C]` and stds `[N, R, W]` of the stochastic steps under a velocity.

    Args:
        episodes: N trajectories.
        velocity: `[N, R, W, L, C]`.
        noise_level: a of the kernel.
        kernel: one of `agents.policy.sde.KERNELS`.
    """
    shape = velocity.shape[:3]
    # [N R W, L, C] and [N R W]: a kernel knows no rounds.
    latents = episodes.window_latents[:, :, :-1].flatten(0, 2)
    t = episodes.window_times[:, :, :-1].flatten()
    next_t = episodes.window_times[:, :, 1:].flatten()
    step = KERNELS[kernel](latents, velocity.flatten(0, 2), t, next_t, noise_level)
    return step.mean.unflatten(0, shape), step.std.unflatten(0, shape)
