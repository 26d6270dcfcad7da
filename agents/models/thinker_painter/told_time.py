"""The time that a transformer is told, where that is not the flow time of its latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDING = 2e-3
"""Difference that a schedule of whole numbers of 1000 makes."""


class ToldTime:
    """What a pipeline tells its transformer at each flow time.

    Most tell it the flow time itself. CogView4 shifts its schedule by the size of the image, but
    tells the time before that shift.

    Args:
        times: `[S]` flow times of a long schedule, falling.
        told: `[S]` what was told at each, in [0, 1].

    Attributes:
        differs: whether the two differ by more than rounding.
    """

    def __init__(self, times: Tensor, told: Tensor) -> None:
        self.differs = bool((times - told).abs().max() > ROUNDING)
        ends = torch.tensor([0.0]), torch.tensor([1.0])
        # Rising, as a search needs it.
        self._times = torch.cat([ends[0], times.cpu().float().flip(0), ends[1]])
        self._told = torch.cat([ends[0], told.cpu().float().flip(0), ends[1]])

    def __call__(self, times: Tensor) -> Tensor:
        """What is told at these flow times, of the same shape."""
        if not self.differs:
            return times
        known, told = self._times.to(times.device), self._told.to(times.device)
        after = torch.searchsorted(known, times).clamp(1, len(known) - 1)
        before = after - 1
        gap = (known[after] - known[before]).clamp(min=1e-9)
        share = (times - known[before]) / gap
        return torch.lerp(told[before], told[after], share)

    def agrees(self, times: Any, told: Any) -> bool:
        """Whether another schedule of the pipeline tells the same at each time."""
        return bool((self(times.float()) - told).abs().max() <= ROUNDING)
