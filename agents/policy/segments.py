"""The one walk along token streams in which images stand: text, image, text, ..., side by side.

Sampling reads what is new of a stream, action evaluation and supervised training read it whole. All
of them take this walk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.models.pixels import scale_pixels


@dataclass(frozen=True)
class TextSegment:
    """Tokens up to the next image, ragged; n rows.

    Attributes:
        rows: `[n]` int64, which rows of the batch they are.
        ids: `[n, T]` int64; T may be 0.
        mask: `[n, T]` bool, which of `ids` count.
        positions: `[n, T]` int64, where in the stream they stand.
        roles: `[n, T]` int64, a `Role` each; None if the walk was given none.
    """

    rows: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor
    roles: Tensor | None = None


@dataclass(frozen=True)
class ImageSegment:
    """One image in each row that has one next; n rows.

    Attributes:
        rows: `[n]` int64, which rows of the batch they are.
        kept: `[n]` int64, which of the rows of the segment before they are; None: all of them.
        reads: `[n]` bool, the rows that read an image here.
        numbers: `[n]` int64, which image; anything where a row reads none.
    """

    rows: Tensor
    kept: Tensor | None
    reads: Tensor
    numbers: Tensor


def segments(
    tokens: Tensor,
    start: Tensor,
    stop: Tensor,
    image_positions: Tensor,
    *,
    roles: Tensor | None = None,
    drop_finished: bool = False,
) -> Iterator[TextSegment | ImageSegment]:
    """Walk each row's stream from `start` to `stop`; the first and the last segment are text.

    Args:
        tokens: `[N, K]` int64.
        start: `[N]` int64, the first position of each row.
        stop: `[N]` int64, behind the last one.
        image_positions: `[N, M]` int64, where images stand; negative: nowhere.
        roles: `[N, K]` int64, a `Role` each.
        drop_finished: leave rows out as soon as no image follows, in place of masking them.
    """
    width = tokens.shape[1]
    rows = torch.arange(len(tokens), device=tokens.device)
    position = start
    while True:
        # The next image at or behind `position`, or the end.
        ahead = image_positions.masked_fill(image_positions < position[:, None], width)
        end = stop
        if ahead.shape[1]:
            end = ahead.amin(1).minimum(stop)
        yield _text_segment(tokens, roles, rows, position, end)
        reads = end < stop
        if not reads.any():
            return
        kept = None
        if drop_finished and not reads.all():
            kept = reads.nonzero()[:, 0]
            # From here on the walk knows the remaining rows alone.
            tokens = tokens[kept]
            if roles is not None:
                roles = roles[kept]
            rows = rows[kept]
            stop = stop[kept]
            end = end[kept]
            image_positions = image_positions[kept]
            reads = reads[kept]
        numbers = (image_positions == end[:, None]).int().argmax(1)
        yield ImageSegment(rows, kept, reads, numbers)
        # Behind the image's own token, in rows that have read one.
        position = end + reads


def _text_segment(
    tokens: Tensor, roles: Tensor | None, rows: Tensor, position: Tensor, end: Tensor
) -> TextSegment:
    length = int((end - position).max())
    # [n, T]: rows whose text is shorter are masked.
    slots = torch.arange(length, device=tokens.device)
    mask = slots < (end - position)[:, None]
    positions = (position[:, None] + slots).clamp_(max=max(tokens.shape[1] - 1, 0))
    ids = tokens[:, :0]
    if length:
        ids = tokens.gather(1, positions)
    if roles is not None:
        roles = roles.gather(1, positions[:, :length])
    return TextSegment(rows, ids, mask, positions, roles)


def stored_images(observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The images of an observation that may be read: latents and pixels, M of each row.

    Args:
        observation: the vector env's. It has no `images` where none are read, and no `pixels` where
            the model has no vision encoder.

    Returns:
        `[N, M, L, C]` float32 and `[N, M, 3, height, width]` uint8, empty where there is nothing.
    """
    images = observation.get("images")
    if images is None:
        images = observation["latent"][:, None][:, :0]
    pixels = observation.get("pixels")
    if pixels is None:
        pixels = images.new_zeros(*images.shape[:2], 3, 0, 0, dtype=torch.uint8)
    return images, pixels


def image_contents(latents: Tensor, pixels: Tensor) -> Tensor:
    """`[N, M, ...]`, equal for equal images: the latents, or the pixels where there are none."""
    if latents.shape[2] == 0:
        return pixels
    return latents


def image_inputs(latents: Tensor, pixels: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Stored images as `UnifiedModel.append_image` takes them.

    Args:
        latents: `[n, L, C]` float32; no tokens where pixels alone are read.
        pixels: `[n, 3, height, width]` uint8; of size 0 x 0 for a model without a vision encoder.

    Returns:
        The latents, and the pixels as float32 in [-1, 1]; None in place of what is not there.
    """
    latent = None
    if latents.shape[1]:
        latent = latents
    if pixels.shape[-1] == 0:
        return latent, None
    return latent, scale_pixels(pixels)
