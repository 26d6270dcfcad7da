"""What a model has read, as its callers see it."""

from __future__ import annotations

from typing import Protocol, Self

from torch import Tensor


class Context(Protocol):
    """Everything that a model has read, one row an episode. Callers see nothing else of it."""

    @property
    def batch_size(self) -> int:
        """The number of rows."""

    def select(self, rows: Tensor) -> Self:
        """Take rows by index, in a new context.

        Args:
            rows: `[M]` int64. Repeats are allowed: so the members of a group share one prompt.
        """

    def repeat_interleave(self, times: int) -> Self:
        """Repeat each row `times` times: row 0, row 0, ..., row 1, row 1, ..."""

    def detach(self) -> Self:
        """Give the same context, cut from the autograd graph."""
