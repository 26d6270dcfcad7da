"""The context of a transformer: keys and values of everything that was read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor
    position: Tensor
    size: int = 0

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return len(self.position)

    @property
    def in_place(self) -> bool:
        """Whether a call may write into the buffers: never where a gradient would have to pass."""
        return not (torch.is_grad_enabled() or self.keys[0].requires_grad)

    def select(self, rows: Tensor) -> KeyValueContext:
        """Take rows by index `[M]` int64; repeats are allowed."""
        return self._map(lambda tensor: tensor.index_select(0, rows))

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
        return KeyValueContext(keys, values, valid, change(self.position), self.size)

    def reserve(self, slots: int) -> None:
        """Make room for `slots` more slots, in place.

        The capacity at least doubles, so that growth costs linear time in all.
        """
        capacity = self.valid.shape[1]
        if self.size + slots <= capacity:
            return
        # `extra` slots make the capacity the larger of what is needed and twice the old one.
        extra = max(self.size + slots, 2 * capacity) - capacity
        self.keys = [_grow(key, 2, extra) for key in self.keys]
        self.values = [_grow(value, 2, extra) for value in self.values]
        self.valid = _grow(self.valid, 1, extra)

    def attend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new tokens of one layer after its context.

        Without gradient the new tokens go into the reserved slots. `advance` then keeps them; if it
        is not called, the next call overwrites them.

        Args:
            layer: the index of the layer.
            key: `[N, kv_heads, T, head_dim]`.
            value: of the same shape.

        Returns:
            Keys and values, each `[N, kv_heads, size + T, head_dim]`.
        """
        # With gradient: new tensors, because autograd needs the old ones unchanged.
        if not self.in_place:
            old_key = self.keys[layer][:, :, : self.size]
            old_value = self.values[layer][:, :, : self.size]
            return torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        # Without: into the slots that `reserve` made room for.
        end = self.size + key.shape[2]
        self.keys[layer][:, :, self.size : end] = key
        self.values[layer][:, :, self.size : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(
        self, keys: list[Tensor], values: list[Tensor], valid: Tensor, position: Tensor
    ) -> KeyValueContext:
        """Give the context after a call, in place if there is no gradient.

        Args:
            keys: of each layer, as `attend` gave them.
            values: likewise.
            valid: `[N, T]` bool, for the new slots.
            position: `[N]` int64, the rotary position of the next token.
        """
        size = self.size + valid.shape[1]
        if not self.in_place:
            # [N, size + T]
            all_valid = torch.cat([self.valid[:, : self.size], valid], 1)
            return KeyValueContext(keys, values, all_valid, position, size)
        # `attend` has written keys and values already.
        self.valid[:, self.size : size] = valid
        self.position = position
        self.size = size
        return self


def _grow(tensor: Tensor, dim: int, extra: int) -> Tensor:
    # Zeros at the end of one axis; `valid` marks them as unused, because False is zero.
    shape = list(tensor.shape)
    shape[dim] = extra
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
