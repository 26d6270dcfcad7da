"""From latent tokens to pictures. The env knows no model: all it needs is a `decode: latents -> images`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PixelDecoder:
    """Pixels are the latents: each token is a `patch x patch` square of RGB values in [-1, 1], features ordered (row, column, channel).

    Attributes:
        height, width: the picture, in pixels.
        patch: side of a token's square.
    """

    height: int
    width: int
    patch: int

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents `[N, L, patch * patch * 3]` to pictures `[N, 3, height, width]` in [0, 1]."""
        rows, columns = self.height // self.patch, self.width // self.patch
        squares = latents.reshape(-1, rows, columns, self.patch, self.patch, 3)
        pixels = squares.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, self.height, self.width)
        return (pixels * 0.5 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """The way back, exact for values that `__call__` does not clamp."""
        squares = images.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        return (squares * 2 - 1).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
