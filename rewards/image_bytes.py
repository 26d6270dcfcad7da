"""Images as bytes, for what reads no tensors, and from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
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


def read_image(path: str | Path) -> Tensor:
    """Read an image file as `[3, height, width]` float32 in [0, 1]; white shows where it is clear.

    Args:
        path: a file of any format that PIL reads.

    Raises:
        ValueError: no file, or one that is no whole image.
    """
    try:
        image: Image.Image = Image.open(path)
        if image.mode.startswith("I"):
            # PIL would cut 16 bits of grey off at 255.
            grey = np.asarray(image).clip(0, 65535) / 257
            image = Image.fromarray(grey.round().astype(np.uint8))
        image = image.convert("RGBA")
    except (OSError, SyntaxError) as error:
        # These are PIL's errors for a missing, foreign or broken file.
        raise ValueError(
            f"expected a whole image at {path}, got: {error}; "
            "check the path, or save the image anew"
        ) from error
    # An image with transparency is laid on white.
    white = Image.new("RGBA", image.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    # [height, width, 3] to [3, height, width]; PIL's array is read-only.
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
