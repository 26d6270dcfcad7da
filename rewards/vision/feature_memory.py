"""Features that are computed once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class FeatureMemory:
    """Features by key; those that were asked for last are kept.

    All members of a group have one prompt, and a prompt comes again in later epochs: its features
    need not be computed again.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        # The key that was asked for last is at the end.
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        """How many are kept now."""
        return len(self._kept)

    def __call__(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """The features of some keys.

        Args:
            keys: what the features belong to; a key may stand there several times.
            compute: gives the features `[M, D]` of M positions in `keys`. It is called once, with
                one position of each key that is not kept, or not at all.

        Returns:
            `[len(keys), D]` on the CPU, without a gradient.
        """
        known = {key: self._kept[key] for key in keys if key in self._kept}
        # One position of each.
        missing = {key: position for position, key in enumerate(keys) if key not in known}
        if missing:
            with torch.no_grad():
                computed = compute(list(missing.values())).cpu()
            known |= zip(missing, computed, strict=True)
        for key in keys:
            self._kept[key] = known[key]
            self._kept.move_to_end(key)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        # A copy, so that it may have been computed in an inference mode.
        return torch.stack([known[key] for key in keys])
