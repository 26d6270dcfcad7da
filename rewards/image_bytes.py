"""Images as bytes, for what reads no tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def image_bytes(image: Tensor) -> np.ndarray:
    """An image as most libraries take it.

    Args:
        image: `[3, height, width]` float in [0, 1]; numbers beyond are cut off.

    Returns:
        `[height, width, 3]` uint8, red first, rounded to the nearest of 256 levels.

    Raises:
        ValueError: the image has another shape, no pixel, or pixels that are not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(
            f"expected an image [3, height, width] with at least one pixel, got {image.shape=}"
        )
    # A NaN would become black, and some rewards pay most for a plain image.
    if not bool(image.isfinite().all()):
        wrong = int((~image.isfinite()).sum())
        raise ValueError(f"expected an image of finite numbers, got {wrong} that are NaN or inf")
    levels = (image.detach().float().clamp(0, 1) * 255).round()
    pixels: np.ndarray = levels.to("cpu", torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return pixels
