"""Work on many rows or tokens in parts, so that the activations of one part alone are held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.models.base import Context, UnifiedModel
from agents.models.recompute import run_again_in_backward

FREE_SHARE = 0.8
"""Share of a device's free memory that a forward may take; the rest is left to fragmentation."""


def predict_velocity(
    model: UnifiedModel[Any], context: Context, x: Tensor, t: Tensor, repeats: int = 1
) -> Tensor:
    """Predict v(x_t, t) as the model does, `rows_at_once` rows at a time.

    If `model.checkpointing` is set and there are several parts, a part keeps no activations for the
    backward pass and runs again there. So an episode can be trained whose steps together do not
    fit.

    Args:
        model: see `agents.models.base.UnifiedModel`.
        context: what was read so far, n rows.
        x: `[n repeats, L, C]` float32, the noisy latents.
        t: `[n repeats]` float32; 1 is noise.
        repeats: latents of each row of the context: row 0, row 0, ..., row 1, row 1, ...

    Returns:
        `[n repeats, L, C]` float32.
    """
    parts = -(-len(x) // rows_at_once(model, context, x))
    if parts <= 1:
        if repeats > 1:
            context = context.repeat_interleave(repeats)
        return model.predict_velocity(context, x, t)

    # Here, because a part may run again in the backward pass.
    model.prepare_velocity(context)

    def _predict(rows: Tensor) -> Tensor:
        # Of the context as it is: so no copy of it is repeated for all latents at once.
        own = context.select(rows // repeats)
        return model.predict_velocity(own, x[rows], t[rows])

    velocity = []
    # Parts of equal size, so that the last one is no small remainder.
    for rows in torch.arange(len(x), device=x.device).tensor_split(parts):
        velocity.append(run_again_in_backward(_predict, rows, active=model.checkpointing))
    return torch.cat(velocity)


def rows_at_once(model: UnifiedModel[Any], context: Context, x: Tensor) -> int:
    """Rows of one velocity forward: `model.max_rows`, or else as many as fit.

    What fits is known on a CUDA device alone, from its free memory and `model.velocity_bytes`. It
    may differ from call to call, and with it the rounding; `max_rows` makes it the same.

    Args:
        model: the model.
        context: what was read so far.
        x: `[N, L, C]`, all latents.

    Returns:
        At least 1.
    """
    if model.max_rows is not None:
        return model.max_rows
    every = max(len(x), 1)
    if not x.is_cuda:
        return every
    each = model.velocity_bytes(context)
    if each == 0:
        return every
    return min(max(int(FREE_SHARE * _free_memory(x.device)) // each, 1), every)


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a CUDA device."""
    free, _ = torch.cuda.mem_get_info(device)
    # Torch keeps what it once took, also where no tensor lies in it any more.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused
