"""Reading prompts: each different one once, however many episodes share it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.models.base import Context, UnifiedModel
from agents.policy.segments import ImageSegment, segments


def prompt_images(
    images: Tensor, image_positions: Tensor, prompt_length: Tensor
) -> tuple[Tensor, Tensor]:
    """The images that stand inside the prompt, `[N, S, L, C]`, and where, `[N, S]`.

    Args:
        images: `[N, M, L, C]`, sources first.
        image_positions: `[N, M]`, where in the stream each stands; -1: nowhere.
        prompt_length: `[N]`.
    """
    if images.shape[1] == 0:
        return images, image_positions
    # Drawn images stand behind the prompt, sources inside it.
    within = (image_positions >= 0) & (image_positions < prompt_length[:, None])
    most = int(within.sum(1).max())
    return images[:, :most], image_positions[:, :most].masked_fill(~within[:, :most], -1)


def read_prompts(
    model: UnifiedModel[Any],
    ids: Tensor,
    lengths: Tensor,
    sources: Tensor | None = None,
    source_positions: Tensor | None = None,
    *,
    with_grad: bool = True,
) -> tuple[Tensor, Context]:
    """Read each different prompt once, and hand its context to all rows that share it.

    Args:
        model: the model.
        ids: `[N, P]` int64, equal beyond `lengths` for equal prompts.
        lengths: `[N]` int64.
        sources: `[N, S, L, C]`, clean latents of the images in the prompt; none if left out.
        source_positions: `[N, S]` int64, where in `ids` each stands; -1: nowhere.
        with_grad: whether gradients reach the reading of images.

    Returns:
        Logits after the prompt, `[N, 1, V]`, and a context of N rows.
    """
    key = ids
    if sources is None or source_positions is None or sources.shape[1] == 0:
        source_positions = ids[:, :0]
    else:
        # Which sources a prompt has is a part of what it is.
        _, which = torch.unique(sources.flatten(1), dim=0, return_inverse=True)
        key = torch.cat([which[:, None], ids], 1)
    key = torch.cat([lengths[:, None], key], 1)
    # Length, sources and tokens together say which prompts are the same.
    unique, inverse = torch.unique(key, dim=0, return_inverse=True)
    # Some row of each group stands for all of it.
    rows = torch.arange(len(ids), device=ids.device)
    chosen = torch.zeros(len(unique), dtype=torch.int64, device=ids.device)
    chosen = chosen.scatter(0, inverse, rows)
    context = model.empty_context(len(unique))
    logits: Tensor | None = None
    start = torch.zeros_like(chosen)
    for part in segments(ids[chosen], start, lengths[chosen], source_positions[chosen]):
        if isinstance(part, ImageSegment):
            assert sources is not None
            # [prompts, L, C]
            latents = sources[chosen, part.numbers]
            context = model.append_image(
                context, latents, mask=_partial(part.reads), with_grad=with_grad
            )
        elif part.ids.shape[1]:
            found, context = model.append_text(context, part.ids, part.mask, last_only=True)
            logits = keep_logits(found, part.mask, logits)
    if logits is None:
        # No prompt has a word: nothing can be sampled from it, an image can only follow.
        logits = torch.zeros(len(unique), 1, model.vocab_size, device=ids.device)
    return logits[inverse], context.select(inverse)


def keep_logits(found: Tensor, mask: Tensor, before: Tensor | None) -> Tensor:
    """The logits after a ragged text: those of before in rows that read nothing.

    Args:
        found: `[N, 1, V]`.
        mask: `[N, T]` bool, which tokens were read.
        before: `[N, 1, V]`, or None.
    """
    if before is None:
        return found
    return torch.where(mask[:, :1, None], found, before)


def _partial(mask: Tensor) -> Tensor | None:
    """None where all rows are meant."""
    if mask.all():
        return None
    return mask
