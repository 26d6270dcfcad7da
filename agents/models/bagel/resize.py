"""The sizes at which BAGEL reads images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 14 * 14 * 9 * 1024
"""An image of more pixels is made smaller, whatever its sides are."""


@dataclass(frozen=True)
class Resize:
    """Brings an image between a shortest and a longest side, and each side to a multiple.

    Attributes:
        max_size: longest side at most, in pixels.
        min_size: shortest side at least; where both cannot be kept, `max_size` wins.
        stride: each side becomes a multiple of this.
    """

    max_size: int
    min_size: int
    stride: int

    def bounded(self, limit: int) -> Resize:
        """The same for a model whose positions end at `limit` pixels a side.

        There the shortest side is at least a quarter of that.
        """
        if limit >= self.max_size:
            return self
        return replace(self, max_size=limit, min_size=min(self.min_size, limit // 4))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image of this height and width gets, in pixels."""
        scale = min(self.max_size / max(height, width), 1.0)
        scale = max(scale, self.min_size / min(height, width))
        height, width = self._scaled(height, width, scale)
        if height * width > MAX_PIXELS:
            # The ratio of two areas scales both sides, as in the released code: the image becomes
            # smaller than it had to.
            height, width = self._scaled(height, width, MAX_PIXELS / (height * width))
        if max(height, width) > self.max_size:
            height, width = self._scaled(height, width, self.max_size / max(height, width))
        return height, width

    def _scaled(self, height: int, width: int, scale: float) -> tuple[int, int]:
        return self._multiple(round(height * scale)), self._multiple(round(width * scale))

    def _multiple(self, side: int) -> int:
        """The nearest multiple of the stride, but not 0."""
        return max(self.stride, round(side / self.stride) * self.stride)

    def resized(self, images: Tensor) -> Tensor:
        """Resize images as Pillow's bicubic filter does.

        Args:
            images: `[N, 3, height, width]` uint8.

        Returns:
            `[N, 3, *size(height, width)]` uint8, on the same device.
        """
        height, width = self.size(*images.shape[2:])
        if (height, width) == tuple(images.shape[2:]):
            return images
        resized = torch.empty(len(images), height, width, 3, dtype=torch.uint8)
        # Torch has a bicubic filter too, but its numbers differ.
        for number, pixels in enumerate(images.cpu().permute(0, 2, 3, 1).numpy()):
            image = Image.fromarray(np.ascontiguousarray(pixels))
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            resized[number] = torch.from_numpy(np.array(image))
        return resized.permute(0, 3, 1, 2).contiguous().to(images.device)
