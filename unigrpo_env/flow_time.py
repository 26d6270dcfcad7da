"""The grid of flow times.

t = 1 is pure noise, t = 0 is the image. Sampling goes from 1 down to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move flow times towards noise: `s t / (1 + (s - 1) t)` (UniGRPO, table 3: s = 3).

    Args:
        t: times in [0, 1], any shape, float.
        shift: s > 0; 1 changes nothing.

    Returns:
        Times of the same shape and dtype.
    """
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """`[steps + 1]` float32 times from 1 to 0, moved towards noise by `shift_time`.

    Args:
        steps: the number of transitions, at least 1.
        shift: s > 0; with 1 all steps are of the same length.

    Raises:
        ValueError: no step, or a shift that is not positive.

    >>> time_grid(4, shift=3.0)
    tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000])
    """
    if steps < 1 or not shift > 0:
        raise ValueError(f"expected steps >= 1 and shift > 0, got {steps=} and {shift=}")
    # In double precision, so that a time is rounded once.
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_time(even, shift).float()
