"""A running average of the weights that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """An average in float32, which begins as the weights and follows them after each update.

    Args:
        weights: the parameters of the model that are trained, by their names.
        values: what the optimiser changes, by the same names: a float32 copy of each parameter, or
            the parameter itself.
        decay: share of the old average in the new one.

    Attributes:
        averages: the average of each weight, float32.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], decay: float
    ) -> None:
        self._weights = dict(weights)
        self._values = dict(values)
        self._update = get_ema_multi_avg_fn(decay)
        self.averages: dict[str, Tensor] = {}
        for name, value in self._values.items():
            self.averages[name] = value.detach().clone()

    def update(self) -> None:
        """Take the weights after an update into the average."""
        # Without a weight there is nothing to average, and torch refuses empty lists.
        if self.averages:
            self._update(list(self.averages.values()), list(self._values.values()), 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for the time of a `with` block."""
        kept = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                # Another tensor in place of the values: nothing is copied where all are float32.
                weight.data = self.averages[name].to(weight.dtype)
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = kept[name]

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take averages from a checkpoint.

        Args:
            averages: of the same weights, by their names.
        """
        for name, average in self.averages.items():
            average.copy_(averages[name])
