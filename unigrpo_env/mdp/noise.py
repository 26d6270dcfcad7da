"""Noise that is drawn by key, so that no episode depends on its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 2**64 - 1
"""64-bit arithmetic: sums and products are taken modulo 2^64."""


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A generator for one purpose of one episode.

    Args:
        seed: of the episode.
        key: what the numbers are for.
    """
    word = 0
    # SplitMix64 over the parts: torch's CPU generator takes 32 bits of its seed, so those must
    # depend on all bits of every part.
    for part in (seed, *key):
        word = (word + part + 0x9E3779B97F4A7C15) & _MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
        word ^= word >> 31
    return torch.Generator().manual_seed(word & 0xFFFFFFFF)


def keyed_noise(keys: Sequence[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """Standard normal noise `[len(keys), *shape]` float32 on the CPU, each row from its own key.

    This is the one Python loop over a batch: torch has no kernel for keyed noise on the CPU.

    Args:
        keys: a key for each row.
        shape: of a row.
    """
    noise = torch.empty(len(keys), *shape)
    # Each row is a view, which is filled in place.
    for row, key in zip(noise.unbind(), keys, strict=True):
        row.normal_(generator=keyed_generator(*key))
    return noise
