"""Images as the models of transformers want them, prepared on tensors.

The image processors of transformers work on bytes, through which no gradient flows. What they do is
done here on tensors, with the sizes and the mean of the model's own processor. Without a gradient
the values are rounded to bytes where theirs are, so that a score is the same to about 1e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FILTERS = {2: "bilinear", 3: "bicubic"}
"""The filters that tensors can be resized with as PIL does it, by PIL's number."""


def has_gradient(images: Tensor) -> bool:
    """Whether what is computed from these images is to have a gradient to them.

    Args:
        images: any images.
    """
    return torch.is_grad_enabled() and images.requires_grad


def as_levels(levels: Tensor) -> Tensor:
    """Values in [0, 255]; those of images without a gradient are rounded, halves up as PIL does it.

    Args:
        levels: `[..., height, width]` float32.
    """
    if not has_gradient(levels):
        levels = (levels + 0.5).floor()
    return levels.clamp(0, 255)


def centered(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of images; where an image is too small, black is put around it.

    Args:
        images: `[..., rows, columns]`.
        height: rows of the result.
        width: columns of the result.
    """
    rows, columns = images.shape[-2:]
    # Of an odd rest, the greater half is at the end; `int` rounds both signs towards zero.
    top = int((height - rows) / 2)
    left = int((width - columns) / 2)
    # A negative margin cuts off.
    margins = (left, width - columns - left, top, height - rows - top)
    return functional.pad(images, margins)


@dataclass(frozen=True)
class Preparation:
    """How a model wants its images.

    Attributes:
        resized: `(height, width)` whatever the image's shape, or the length of one side, which
            keeps the shape; None keeps the size.
        cropped: `(height, width)` of the middle that the model sees; None for everything.
        mean: of each channel; it is subtracted.
        std: of each channel; what is left is divided by it.
        filter: "bilinear" or "bicubic".
        is_longer_side: `resized` is the longer side, so that no part of the image is cut off; else
            it is the shorter one.
    """

    resized: tuple[int, int] | int | None
    cropped: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: str = "bicubic"
    is_longer_side: bool = False

    @classmethod
    def of(cls, processor: Any) -> Preparation:
        """Read what an image processor of transformers does.

        Args:
            processor: for CLIP, SigLIP, DINOv2 or a model that prepares images as they do.

        Raises:
            ValueError: it does what is not done here.
        """
        number = int(processor.resample)
        if number not in FILTERS:
            raise ValueError(
                f"expected an image processor that resizes with one of {sorted(FILTERS.values())}, "
                f"got resample={number} in {type(processor).__name__}"
            )
        resized = None
        if processor.do_resize:
            resized = _resized(processor)
        cropped = None
        # SigLIP's processor has no crop at all.
        if getattr(processor, "do_center_crop", False):
            cropped = (processor.crop_size["height"], processor.crop_size["width"])
        mean = tuple(processor.image_mean)
        std = tuple(processor.image_std)
        return cls(resized, cropped, mean, std, FILTERS[number])

    def size(self, height: int, width: int) -> tuple[int, int]:
        """What an image is resized to, `(height, width)`.

        Args:
            height: of the image.
            width: of the image.
        """
        if self.resized is None:
            return height, width
        if not isinstance(self.resized, int):
            return self.resized
        if self.is_longer_side:
            scale = self.resized / max(height, width)
            return round(height * scale), round(width * scale)
        # The other side is rounded down, as transformers does it.
        longer = int(self.resized * max(height, width) / min(height, width))
        if height <= width:
            return self.resized, longer
        return longer, self.resized

    def __call__(self, images: Tensor) -> Tensor:
        """Resize, crop and normalise, with a gradient if the images have one.

        Args:
            images: `[N, 3, height, width]` in [0, 1].

        Returns:
            `[N, 3, rows, columns]` float32.
        """
        pixels = as_levels(images.float() * 255)
        height, width = self.size(*pixels.shape[-2:])
        # Rows, then columns, with bytes in between: so does PIL.
        for size in ((pixels.shape[-2], width), (height, width)):
            if size != tuple(pixels.shape[-2:]):
                # Without antialias a fine texture would give quite another image.
                pixels = functional.interpolate(pixels, size, mode=self.filter, antialias=True)
                pixels = as_levels(pixels)
        if self.cropped is not None:
            pixels = centered(pixels, *self.cropped)
        mean = pixels.new_tensor(self.mean)[:, None, None]
        std = pixels.new_tensor(self.std)[:, None, None]
        return (pixels / 255 - mean) / std


def _resized(processor: Any) -> tuple[int, int] | int:
    """What a processor resizes to: `(height, width)` or the shorter side."""
    size = dict(processor.size)
    # Kinds of sizes that are not used have the value None in some versions.
    given = {name: value for name, value in size.items() if value is not None}
    if set(given) == {"shortest_edge"}:
        return int(given["shortest_edge"])
    if set(given) == {"height", "width"}:
        return int(given["height"]), int(given["width"])
    raise ValueError(
        "expected an image processor whose size has a shortest_edge, or a height and a width, "
        f"got {given} in {type(processor).__name__}"
    )
