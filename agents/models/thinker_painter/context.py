"""What a thinker has read, and what its painter was told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from agents.models.thinker_painter.asked import Source
from agents.models.thinker_painter.cache import grown_from
from agents.models.thinker_painter.conditions import Conditions

TextKey = tuple[str, int, bool]
"""A text, the source that goes with it (by its `id`), and whether gradients may flow."""


@dataclass
class Told:
    """What the painter was told since a context was empty; all contexts that grew from it share it.

    Attributes:
        words: the text of a row, by the tokens and roles that it is made of.
        texts: the conditions that hold a text, and in which row.
        sources: images by their content, so that equal ones are encoded once.
    """

    words: dict[bytes, str] = field(default_factory=dict)
    texts: dict[TextKey, tuple[Conditions, int]] = field(default_factory=dict)
    sources: dict[bytes, Source] = field(default_factory=dict)


@dataclass
class Reading:
    """M rows that were read side by side, S slots each.

    Attributes:
        cache: the thinker's keys and values; more than S slots once another reading has grown it.
        ids: `[M, S]` int64; a slot of an image holds the thinker's placeholder.
        roles: `[M, S]` int64, a `Role` each; that of an image is the system's.
        valid: `[M, S]` bool, False where a slot is padding.
        position: `[M]` int64, of the next token.
        dense: whether all slots are known to be valid.
        sources: the last image that each row has read, if the painter edits.
        told: see there.
    """

    cache: Cache
    ids: Tensor
    roles: Tensor
    valid: Tensor
    position: Tensor
    dense: bool
    sources: list[Source | None]
    told: Told


@dataclass
class ThinkerContext:
    """Rows of a reading. It is a `Context`.

    To pick rows copies nothing: keys and values are gathered when something more is read, and never
    to paint.

    Attributes:
        reading: shared by all contexts that pick from it.
        rows: `[N]` int64; None for all rows of the reading in their order.
        is_cut: whether no gradient may pass.
        briefs: what the painter is told of these rows, by whether gradients may flow.
    """

    reading: Reading
    rows: Tensor | None = None
    is_cut: bool = False
    briefs: dict[bool, Any] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return len(self.reading.ids) if self.rows is None else len(self.rows)

    def select(self, rows: Tensor) -> ThinkerContext:
        """Take rows by index `[M]` int64; repeats are allowed."""
        return ThinkerContext(self.reading, self.all_rows()[rows], self.is_cut)

    def repeat_interleave(self, times: int) -> ThinkerContext:
        """Repeat each row `times` times: row 0, row 0, ..., row 1, row 1, ..."""
        rows = self.all_rows().repeat_interleave(times)
        return ThinkerContext(self.reading, rows, self.is_cut)

    def detach(self) -> ThinkerContext:
        """Give the same context, cut from the autograd graph."""
        return ThinkerContext(self.reading, self.rows, is_cut=True)

    def all_rows(self) -> Tensor:
        """`[N]` int64, the rows of the reading that this context holds."""
        if self.rows is not None:
            return self.rows
        return torch.arange(len(self.reading.ids), device=self.reading.ids.device)


def growable(context: ThinkerContext, *, repeatable: bool) -> Reading:
    """The rows of a context as a reading of their own, whose cache may grow.

    Args:
        context: with gradient it stays as it is.
        repeatable: whether a call with gradient that grows the cache may run twice.
    """
    reading = context.reading
    rows = context.rows
    with_grad = torch.is_grad_enabled()
    length = reading.ids.shape[1]
    is_newest = reading.cache.get_seq_length() == length
    if rows is None and is_newest and not (with_grad or context.is_cut):
        # In place, because a copy would double the memory. Other contexts keep the first slots.
        return replace(reading)
    cache = grown_from(
        reading.cache, length, rows, detach=context.is_cut, repeatable=repeatable and with_grad
    )
    own = replace(reading, cache=cache)
    if rows is None:
        return own
    own.ids = reading.ids[rows]
    own.roles = reading.roles[rows]
    own.valid = reading.valid[rows]
    own.position = reading.position[rows]
    if reading.sources:
        own.sources = [reading.sources[row] for row in rows.tolist()]
    return own


def longer(
    before: Reading, ids: Tensor, roles: Tensor, mask: Tensor, position: Tensor, dense: bool
) -> Reading:
    """A reading with more slots, `[M, T]` each, whose keys are still to be read."""
    return replace(
        before,
        ids=torch.cat([before.ids, ids], 1),
        roles=torch.cat([before.roles, roles], 1),
        valid=torch.cat([before.valid, mask], 1),
        position=position,
        dense=before.dense and dense,
    )
