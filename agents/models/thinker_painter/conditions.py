"""What a pipeline's `encode_prompt` gave, row by row, whatever its form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Rows(Enum):
    """How one part of the conditions has a row for each text."""

    TENSOR = "the first axis of a tensor"
    LIST = "the entries of a list"
    SHARED = "it has none: one value for all texts"


Layout = Rows | tuple["Layout", ...]
"""The same for nested tuples of parts."""


@dataclass(frozen=True)
class Conditions:
    """What the painter is told, one text a row.

    Attributes:
        value: as `encode_prompt` returned it: tensors, lists of tensors, None, and tuples of them.
        layout: which parts of it have a row for each text, see `find_layout`.
        rows: the number of texts.
    """

    value: Any
    layout: Layout
    rows: int

    def select(self, rows: Tensor) -> Conditions:
        """Take rows by index `[M]` int64; repeats are allowed."""
        indices = rows.tolist()
        if indices == list(range(self.rows)):
            return self
        return Conditions(_select(self.value, self.layout, rows, indices), self.layout, len(rows))

    def fits(self, other: Conditions) -> bool:
        """Whether the two can be joined: texts of other lengths may give other shapes."""
        return _shapes(self.value, self.layout) == _shapes(other.value, self.layout)

    @classmethod
    def join(cls, parts: Sequence[Conditions]) -> Conditions:
        """The rows of all parts, one after the other; each `fits` the first."""
        if len(parts) == 1:
            return parts[0]
        layout = parts[0].layout
        value = _join([part.value for part in parts], layout)
        return cls(value, layout, sum(part.rows for part in parts))


def find_layout(one: Any, two: Any) -> Layout:
    """Which parts have a row for each text, told from the conditions of one text and of two.

    Args:
        one: what `encode_prompt` gave for one text.
        two: what it gave for that text twice.
    """
    if isinstance(two, list) and (len(one), len(two)) == (1, 2):
        return Rows.LIST
    if isinstance(two, tuple | list):
        return tuple(find_layout(first, second) for first, second in zip(one, two, strict=True))
    if isinstance(two, Tensor) and one.shape[:1] == two.shape[:1]:
        return Rows.SHARED
    # None too: another text may bring a mask where these two needed none.
    return Rows.TENSOR


def layout_of_one(value: Any) -> Layout:
    """A guess from one text alone, for a pipeline that takes no more: what has one row has its row.

    Args:
        value: what `encode_prompt` gave for it.
    """
    if isinstance(value, list) and len(value) == 1:
        return Rows.LIST
    if isinstance(value, tuple | list):
        return tuple(layout_of_one(part) for part in value)
    if isinstance(value, Tensor) and value.shape[:1] != (1,):
        return Rows.SHARED
    return Rows.TENSOR


def _select(value: Any, layout: Layout, rows: Tensor, indices: list[int]) -> Any:
    if isinstance(layout, tuple):
        parts = [_select(*part, rows, indices) for part in zip(value, layout, strict=True)]
        return type(value)(parts)
    if value is None or layout is Rows.SHARED:
        return value
    if layout is Rows.LIST:
        return [value[index] for index in indices]
    return value.index_select(0, rows.to(value.device))


def _join(values: list[Any], layout: Layout) -> Any:
    first = values[0]
    if isinstance(layout, tuple):
        members = zip(*values, strict=True)
        return type(first)([_join(list(v), part) for v, part in zip(members, layout, strict=True)])
    if first is None or layout is Rows.SHARED:
        return first
    if layout is Rows.LIST:
        return [entry for value in values for entry in value]
    return torch.cat(values)


def _shapes(value: Any, layout: Layout) -> Any:
    """What must be equal for two values to be joined."""
    if isinstance(layout, tuple):
        return [_shapes(*part) for part in zip(value, layout, strict=True)]
    if value is None or layout is Rows.LIST:
        return value is None
    return value.shape if layout is Rows.SHARED else value.shape[1:]
