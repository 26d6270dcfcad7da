"""What a model says of recorded episodes, teacher-forced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.models.base import Context, UnifiedModel
from agents.policy.guidance import Guidance, guided
from agents.policy.prefill import prompt_images, read_prompts
from agents.policy.sde import KERNELS
from agents.policy.segments import ImageSegment, TextSegment, segments
from agents.policy.tokens import token_entropy, token_log_probs
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
    reader = guided(model, guidance)
    found = _empty_evaluation(episodes, with_velocity)
    # Members of a group share their prompt and its sources, so those are read once a group.
    sources, source_positions = prompt_images(
        episodes.images, episodes.image_positions, episodes.prompt_length
    )
    logits, context = read_prompts(
        reader,
        episodes.prompt_tokens,
        episodes.prompt_length,
        sources,
        source_positions,
        with_grad=grad_through_read_images,
    )
    start = torch.zeros_like(episodes.prompt_length)
    stop = episodes.text_mask.sum(1)
    # Positions after the prompt; those of sources become negative and count for nothing.
    positions = episodes.image_positions - episodes.prompt_length[:, None]
    number = 0
    for part in segments(episodes.tokens, start, stop, positions, drop_finished=True):
        if isinstance(part, ImageSegment):
            if part.kept is not None:
                context = context.select(part.kept)
                # Episodes that have ended are left out, so that no forward is spent on them.
                logits = logits[part.kept]
            latents = episodes.images[part.rows, part.numbers]
            context = reader.append_image(context, latents, with_grad=grad_through_read_images)
            number += 1
            continue
        if part.ids.shape[1]:
            later, context = reader.append_text(context, part.ids, part.mask)
            if with_log_probs:
                legal = legal_tokens[min(number, len(legal_tokens) - 1)]
                # The logits before the first token come from what was read before it.
                before_each = torch.cat([logits, later[:, :-1]], 1)
                log_probs = token_log_probs(before_each, legal, temperature)
                _write_text(found, episodes, part, log_probs, legal)
            logits = later[:, -1:]
        if found.velocity is not None and number < found.velocity.shape[1]:
            # Before the next text: without gradient the context grows in place.
            before = context if image_grad_to_text else context.detach()
            _write_velocities(found.velocity, reader, before, episodes, part.rows, number)
    return found


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


def _write_text(
    found: ActionEvaluation,
    episodes: Trajectory,
    part: TextSegment,
    log_probs: Tensor,
    legal: Tensor,
) -> None:
    """Put the log-probabilities of one text segment, `[n, T, V]`, in their place.

    The first tokens after an image come from the env, and a forced token was never a choice. Their
    log-probabilities are written too, but `chosen_mask` leaves them out.
    """
    row, position = part.mask.nonzero(as_tuple=True)
    slot = part.rows[row], part.positions[row, position]
    chosen = log_probs[row, position, episodes.tokens[slot]]
    found.log_prob = found.log_prob.index_put(slot, chosen)
    found.entropy[slot] = token_entropy(log_probs, legal)[row, position]


def _write_velocities(
    velocity: Tensor,
    model: UnifiedModel[Any],
    context: Context,
    episodes: Trajectory,
    rows: Tensor,
    number: int,
) -> None:
    """Evaluate the stochastic steps of image `number` in those of `rows` that drew it."""
    draws = episodes.images_drawn[rows] > number
    if len(draws) == len(velocity) and draws.all():
        # All rows draw, as in episodes of one image: no row has to be copied.
        x = episodes.window_latents[:, number]
        t = episodes.window_times[:, number]
        velocity[:, number] = window_velocities(model, context, x, t)
    elif draws.any():
        kept = draws.nonzero()[:, 0]
        index = rows[kept]
        x = episodes.window_latents[index, number]
        t = episodes.window_times[index, number]
        selected = context.select(kept)
        velocity[index, number] = window_velocities(model, selected, x, t)


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
    repeated = context.repeat_interleave(t.shape[1])
    velocity = model.predict_velocity(repeated, x.flatten(0, 1), t.flatten())
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
