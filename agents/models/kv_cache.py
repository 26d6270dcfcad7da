"""The context of a transformer: keys and values of everything that was read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

KeysAndValues = tuple[Tensor, Tensor]
Extend = Callable[[Tensor, Tensor], KeysAndValues]
"""Puts keys and values of new tokens, `[N, kv_heads, T, head_dim]`, after those of the context."""


@dataclass
class KeyValueContext:
    """Keys and values of each layer, in slots that all rows share. It is a `Context`.

    A call writes its T tokens into the next T slots of every row. `valid` says which slots a row
    really holds, so ragged rows need no scatter. With gradients a call concatenates. Without, it
    writes into buffers that double when they are full, and a decoded token costs no copy.

    Attributes:
        keys: of each layer, `[N, kv_heads, capacity, head_dim]`, after norm and rotation; in the
            dtype of the weights.
        values: of each layer, of the same shape and dtype.
        valid: `[N, capacity]` bool.
        position: `[N]` int64, the rotary position of the next token.
        size: the number of slots in use.
        dense: whether every row holds all slots in use; None: not known, ask `is_dense`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor
    position: Tensor
    size: int = 0
    dense: bool | None = None

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return len(self.position)

    @property
    def capacity(self) -> int:
        """The number of slots that there is room for."""
        return self.valid.shape[1]

    @property
    def in_place(self) -> bool:
        """Whether a call may write into the buffers: never where a gradient would have to pass."""
        return not (torch.is_grad_enabled() or self.keys[0].requires_grad)

    @property
    def is_dense(self) -> bool:
        """Whether every row holds all slots in use.

        A GPU must be waited for to know it, so the answer is kept until the context grows.
        """
        if self.dense is None:
            self.dense = bool(self.valid[:, : self.size].all())
        return self.dense

    def select(self, rows: Tensor) -> KeyValueContext:
        """Take rows by index `[M]` int64; repeats are allowed."""
        selected = self._map(lambda tensor: tensor.index_select(0, rows))
        # Rows of a context that is not dense may be.
        selected.dense = self.dense or None
        return selected

    def repeat_interleave(self, times: int) -> KeyValueContext:
        """Repeat each row `times` times: row 0, row 0, ..., row 1, row 1, ..."""
        if times == 1:
            return self

        def _repeat(tensor: Tensor) -> Tensor:
            # [N, ...] -> [N, times, ...] -> [N * times, ...]
            repeated = tensor.unsqueeze(1).expand(-1, times, *tensor.shape[1:])
            return repeated.flatten(0, 1)

        return self._map(_repeat)

    def detach(self) -> KeyValueContext:
        """Give the same context, cut from the autograd graph."""
        return self._map(lambda tensor: tensor.detach())

    def _map(self, change: Callable[[Tensor], Tensor]) -> KeyValueContext:
        # Slots after `size` are not in use, so they are not copied.
        keys = [change(key[:, :, : self.size]) for key in self.keys]
        values = [change(value[:, :, : self.size]) for value in self.values]
        valid = change(self.valid[:, : self.size])
        position = change(self.position)
        return KeyValueContext(keys, values, valid, position, self.size, self.dense)

    def reserve(self, slots: int, *, exact: bool = False) -> None:
        """Make room for `slots` more slots, in place.

        Args:
            slots: so many more than are in use.
            exact: make room for no more than these, for a caller that knows how many will come.
                Otherwise the capacity at least doubles, so that growth costs linear time in all.
        """
        needed = self.size + slots
        if needed <= self.capacity:
            return
        capacity = needed if exact else max(needed, 2 * self.capacity)
        # One tensor after the other: the old one is freed before the next grows.
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = _grow(buffer, 2, capacity)
        self.valid = _grow(self.valid, 1, capacity)

    def extend(self, layer: int, *, keep: bool = True) -> Extend:
        """Give a function that puts the new tokens of one layer after its context.

        Args:
            layer: the index of the layer.
            keep: whether `advance` will keep the new tokens. Without gradient they then go into the
                reserved slots, which the next call overwrites if there is no `advance`. All other
                new tokens go into new tensors, and the context stays as it is.

        Returns:
            A function of keys and values `[N, kv_heads, T, head_dim]`, which gives all keys and all
            values, each `[N, kv_heads, size + T, head_dim]`.
        """
        if keep and self.in_place:
            return partial(self._write, layer)
        # The slots in use, taken now: the function may be called again after the context has grown.
        key = self.keys[layer][:, :, : self.size]
        value = self.values[layer][:, :, : self.size]
        return partial(_join, key, value)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> KeysAndValues:
        end = self.size + key.shape[2]
        self.keys[layer][:, :, self.size : end] = key
        self.values[layer][:, :, self.size : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        valid: Tensor,
        position: Tensor,
        *,
        all_valid: bool = False,
    ) -> KeyValueContext:
        """Give the context after a call, in place if there is no gradient.

        Args:
            keys: of each layer, as the functions of `extend` gave them.
            values: likewise.
            valid: `[N, T]` bool, for the new slots.
            position: `[N]` int64, the rotary position of the next token.
            all_valid: whether `valid` is known to be True throughout.
        """
        size = self.size + valid.shape[1]
        dense = self.dense
        if dense and not all_valid:
            dense = None
        if not self.in_place:
            # [N, size + T]
            joined = torch.cat([self.valid[:, : self.size], valid], 1)
            return KeyValueContext(keys, values, joined, position, size, dense)
        # The functions of `extend` have written keys and values already.
        self.valid[:, self.size : size] = valid
        self.position = position
        self.size = size
        self.dense = dense
        return self

    def with_later_slots(self, grown: KeyValueContext) -> KeyValueContext:
        """Give `grown`, a detached copy that has read more, but with this context's own slots.

        So these keep their gradient, and the later slots have none.

        Args:
            grown: what a copy has become.
        """
        keys = []
        values = []
        for layer, (key, value) in enumerate(zip(grown.keys, grown.values, strict=True)):
            later = slice(self.size, grown.size)
            old_key = self.keys[layer][:, :, : self.size]
            old_value = self.values[layer][:, :, : self.size]
            keys.append(torch.cat([old_key, key[:, :, later]], 2))
            values.append(torch.cat([old_value, value[:, :, later]], 2))
        valid = grown.valid[:, : grown.size]
        return KeyValueContext(keys, values, valid, grown.position, grown.size, grown.dense)


def _join(old_key: Tensor, old_value: Tensor, new_key: Tensor, new_value: Tensor) -> KeysAndValues:
    return torch.cat([old_key, new_key], 2), torch.cat([old_value, new_value], 2)


def _grow(tensor: Tensor, dim: int, capacity: int) -> Tensor:
    """A copy that has `capacity` slots along `dim`; the further ones are zero, or False."""
    shape = list(tensor.shape)
    shape[dim] = capacity
    grown = tensor.new_zeros(shape)
    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return grown
