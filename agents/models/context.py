"""The memory of a transformer: keys and values of everything read, one row per episode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KeyValueContext:
    """Keys and values by layer, in slots that all rows share.

    A call writes its T tokens into the next T slots of every row; `valid` says which of them a row really holds, so ragged rows need no
    scatter. With gradients a call concatenates; without, it writes into buffers that double when full, and a decoded token costs no copy.

    Attributes:
        keys, values: per layer `[N, kv_heads, capacity, head_dim]`, keys after norm and rotation.
        valid: `[N, capacity]` bool.
        position: `[N]` int64, the rotary position of the next token.
        size: slots in use.
    """

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor
    position: Tensor
    size: int = 0

    @property
    def batch_size(self) -> int:
        return len(self.position)

    @property
    def in_place(self) -> bool:
        """Whether a call may write into the buffers: never where a gradient would have to pass."""
        return not (torch.is_grad_enabled() or self.keys[0].requires_grad)

    def select(self, rows: Tensor) -> KeyValueContext:
        return self._map(lambda tensor: tensor.index_select(0, rows))

    def repeat(self, times: int) -> KeyValueContext:
        if times == 1:
            return self
        return self._map(lambda tensor: tensor.unsqueeze(1).expand(-1, times, *tensor.shape[1:]).flatten(0, 1))

    def detach(self) -> KeyValueContext:
        return self._map(lambda tensor: tensor.detach())

    def _map(self, change: Callable[[Tensor], Tensor]) -> KeyValueContext:
        used = slice(0, self.size)
        keys = [change(key[:, :, used]) for key in self.keys]
        values = [change(value[:, :, used]) for value in self.values]
        return KeyValueContext(keys, values, change(self.valid[:, used]), change(self.position), self.size)

    def reserve(self, slots: int) -> None:
        """Make room for `slots` more slots; the capacity at least doubles, so that growth costs linear time in all."""
        capacity = self.valid.shape[1]
        if self.size + slots <= capacity:
            return
        extra = max(self.size + slots, 2 * capacity) - capacity

        def grow(tensor: Tensor, dim: int) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = extra
            return torch.cat([tensor, tensor.new_zeros(shape)], dim)

        self.keys = [grow(key, 2) for key in self.keys]
        self.values = [grow(value, 2) for value in self.values]
        self.valid = grow(self.valid, 1)

    def attend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Context and new tokens of one layer side by side: `[N, kv_heads, size + T, head_dim]`.

        Without gradient the new tokens land in the reserved slots, which `advance` then claims or leaves to be overwritten.
        """
        if not self.in_place:
            used = slice(0, self.size)
            return torch.cat([self.keys[layer][:, :, used], key], 2), torch.cat([self.values[layer][:, :, used], value], 2)
        end = self.size + key.shape[2]
        self.keys[layer][:, :, self.size : end] = key
        self.values[layer][:, :, self.size : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, keys: list[Tensor], values: list[Tensor], valid: Tensor, position: Tensor) -> KeyValueContext:
        """The context after a call whose `attend` gave `keys` and `values`, with `valid` `[N, T]` for the new slots."""
        size = self.size + valid.shape[1]
        if not self.in_place:
            return KeyValueContext(keys, values, torch.cat([self.valid[:, : self.size], valid], 1), position, size)
        self.valid[:, self.size : size] = valid
        self.position, self.size = position, size
        return self
