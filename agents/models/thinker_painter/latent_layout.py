"""How a pipeline's latents become tokens, and how its auto-encoder's values become latents.

No pipeline says how it lays out the values of its auto-encoder, but each shows it when it decodes:
it may scale and shift them and put them in another order. So the way back is found by asking.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

DIGIT = 16
"""Base in which the places of values are asked for: each digit is exact in bfloat16."""


def to_tokens(latents: Tensor) -> Tensor:
    """Latents `[N, L, C]` or `[N, C, height, width]` as tokens `[N, L, C]`."""
    if latents.ndim == 3:
        return latents
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The way back: tokens `[N, L, C]` in the pipeline's own shape (without N)."""
    if len(shape) == 2:
        return tokens
    return tokens.transpose(1, 2).unflatten(2, shape[1:])


def token_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(L, C) of latents of this shape (without N)."""
    if len(shape) == 2:
        return shape[0], shape[1]
    return math.prod(shape[1:]), shape[0]


class LatentLayout:
    """The values of the auto-encoder as latents, found by asking for the way back.

    Each value of the auto-encoder must be `scale * latent + shift` of one value of the latent.

    Args:
        decoder_input: what the auto-encoder would decode, `[1, ...]`, of latents `[1, ...]`.
        shape: of the latents (without N).
        device: where to ask.

    Raises:
        ValueError: the two are related in another way.
    """

    def __init__(
        self,
        decoder_input: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self._shape = shape
        count = math.prod(shape)

        def _ask(values: Tensor) -> Tensor:
            latents = values.float().reshape(1, *shape).to(device)
            return decoder_input(latents)[0].flatten().double().cpu()

        with torch.no_grad():
            self._shift = _ask(torch.zeros(count))
            if len(self._shift) != count:
                raise ValueError(
                    f"expected an auto-encoder of {count} values, as many as a latent has, got "
                    f"{len(self._shift)}; images cannot be encoded for this pipeline"
                )
            self._scale = _ask(torch.ones(count)) - self._shift
            self._place = self._find_places(_ask, count)
            self._check(_ask, count)

    def _find_places(self, ask: Callable[[Tensor], Tensor], count: int) -> Tensor:
        """Which value of the latent stands at each value of the auto-encoder, `[count]` int64."""
        place = torch.zeros(count, dtype=torch.int64)
        index = torch.arange(count)
        weight = 1
        while weight < count:
            digit = ask(index // weight % DIGIT)
            place += ((digit - self._shift) / self._scale).round().long() * weight
            weight *= DIGIT
        return place.clamp(0, count - 1)

    def _check(self, ask: Callable[[Tensor], Tensor], count: int) -> None:
        # Small whole numbers, because they are exact in any dtype.
        probe = torch.randint(-8, 8, (count,), generator=torch.Generator().manual_seed(0))
        expected = self._scale * probe[self._place] + self._shift
        close = torch.isclose(ask(probe), expected, rtol=2e-2, atol=2e-2)
        if not close.all() or len(self._place.unique()) != count:
            raise ValueError(
                "expected a pipeline that scales, shifts and orders its latents for the "
                "auto-encoder, got one that does something else; images cannot be encoded for it"
            )

    def latents(self, values: Tensor) -> Tensor:
        """Latents `[N, *shape]` float32 of the auto-encoder's values `[N, ...]`."""
        flat = values.flatten(1).float()
        scale = self._scale.float().to(flat.device)
        shift = self._shift.float().to(flat.device)
        latents = torch.empty_like(flat)
        latents[:, self._place.to(flat.device)] = (flat - shift) / scale
        return latents.reshape(len(values), *self._shape)
