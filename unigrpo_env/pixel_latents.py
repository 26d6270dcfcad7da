"""Latents that are pixels: no auto-encoder stands between a small world and its model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PixelLatents:
    """Each token is a `patch x patch` square of RGB values in [-1, 1].

    The features of a token are ordered (row, column, channel).

    Attributes:
        height: of the image, in pixels.
        width: of the image, in pixels.
        patch: side of a token's square, in pixels.
    """

    height: int
    width: int
    patch: int

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, values a token)."""
        tokens = (self.height // self.patch) * (self.width // self.patch)
        return tokens, self.patch * self.patch * 3

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[N, L, C]` to images `[N, 3, height, width]` in [0, 1]."""
        rows = self.height // self.patch
        columns = self.width // self.patch
        squares = latents.reshape(-1, rows, columns, self.patch, self.patch, 3)
        # [N, 3, rows, patch, columns, patch]: height and width are pairs of neighbouring axes.
        ordered = squares.permute(0, 5, 1, 3, 2, 4)
        pixels = ordered.reshape(-1, 3, self.height, self.width)
        return (pixels * 0.5 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images `[N, 3, height, width]` in [0, 1] to latents `[N, L, C]`; undoes `decode`."""
        # [N, 3, rows, patch, columns, patch]
        squares = images.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        # [N, rows, columns, patch, patch, 3]
        ordered = (squares * 2 - 1).permute(0, 2, 4, 3, 5, 1)
        # The values of a square become C, and rows x columns become L.
        return ordered.flatten(3).flatten(1, 2)
