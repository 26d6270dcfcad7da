"""Keys and values of what the thinker has read, in the cache class of transformers."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class KeyValues(DynamicLayer):
    """One layer, which grows by concatenation.

    Attributes:
        past: keys and values from before a call that may run twice, as one under activation
            checkpointing does; None: the call runs once.
    """

    past: tuple[Tensor | None, Tensor | None] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[N, heads, T, head_dim]`; returns all of them."""
        if self.past is None:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # From the past, whatever an earlier run of the same call has appended.
        self.keys, self.values = key_states, value_states
        before_keys, before_values = self.past
        if before_keys is not None and before_values is not None:
            self.keys = torch.cat([before_keys, key_states], -2)
            self.values = torch.cat([before_values, value_states], -2)
        return self.keys, self.values


class _FirstKeyValues(KeyValues):
    """A layer before which nothing stands, in a call that may run twice."""

    past = (None, None)


def empty_cache() -> Cache:
    """A cache without keys; layers are added by the first forward.

    All layers keep all keys. Those of a sliding window could be shorter, but the mask of the window
    is applied all the same.
    """
    return Cache(layer_class_to_replicate=KeyValues)


def grown_from(
    cache: Cache,
    length: int,
    rows: Tensor | None = None,
    *,
    detach: bool = False,
    repeatable: bool = False,
) -> Cache:
    """A cache that can grow while the given one stays; tensors are shared where nothing changes.

    Args:
        cache: stays as it is.
        length: the first slots of it, which are taken.
        rows: `[M]` int64, the rows to take; None for all in their order.
        detach: cut from the autograd graph.
        repeatable: the call that grows it may run twice.
    """
    if not cache.layers:
        return Cache(layer_class_to_replicate=_FirstKeyValues if repeatable else KeyValues)
    layers: list[Any] = []
    for layer in cast(list[KeyValues], cache.layers):
        # A layer that has read something has both.
        assert layer.keys is not None
        assert layer.values is not None
        grown = copy.copy(layer)
        keys = layer.keys[..., :length, :]
        values = layer.values[..., :length, :]
        if rows is not None:
            keys = keys.index_select(0, rows)
            values = values.index_select(0, rows)
        grown.keys = keys.detach() if detach else keys
        grown.values = values.detach() if detach else values
        grown.past = (grown.keys, grown.values) if repeatable else None
        layers.append(grown)
    return Cache(layers=layers)


def with_later_slots(before: Cache, after: Cache) -> Cache:
    """A cache whose first slots are those of `before`, with their gradient, and the rest `after`'s.

    Args:
        before: B slots.
        after: the same rows, B slots and more.
    """
    if not before.layers:
        return after
    joined = grown_from(after, after.get_seq_length())
    pairs: Any = zip(before.layers, joined.layers, strict=True)
    for old, new in pairs:
        length = old.keys.shape[-2]
        new.keys = torch.cat([old.keys, new.keys[..., length:, :]], -2)
        new.values = torch.cat([old.values, new.values[..., length:, :]], -2)
    return joined
