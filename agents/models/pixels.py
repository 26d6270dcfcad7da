"""Images as the models take them."""

from __future__ import annotations

from torch import Tensor


def scale_pixels(levels: Tensor) -> Tensor:
    """Pixels `[...]` uint8 as float32 in [-1, 1], as `UnifiedModel.append_image` takes them."""
    return levels.float() / 127.5 - 1
