"""The one walk along token streams in which images stand: text, image, text, ..., side by side.

Sampling reads what is new of a stream, action evaluation and supervised training read it whole. All
of them take this walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextSegment:
    """Tokens up to the next image, ragged; n rows.

    Attributes:
        rows: `[n]` int64, which rows of the batch they are.
        ids: `[n, T]` int64; T may be 0.
        mask: `[n, T]` bool, which of `ids` count.
        positions: `[n, T]` int64, where in the stream they stand.
    """

    rows: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor


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
    drop_finished: bool = False,
) -> Iterator[TextSegment | ImageSegment]:
    """Walk each row's stream from `start` to `stop`; the first and the last segment are text.

    Args:
        tokens: `[N, K]` int64.
        start: `[N]` int64, the first position of each row.
        stop: `[N]` int64, behind the last one.
        image_positions: `[N, M]` int64, where images stand; negative: nowhere.
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
        yield _text_segment(tokens, rows, position, end)
        reads = end < stop
        if not reads.any():
            return
        kept = None
        if drop_finished and not reads.all():
            kept = reads.nonzero()[:, 0]
            # From here on the walk knows the remaining rows alone.
            tokens = tokens[kept]
            rows = rows[kept]
            stop = stop[kept]
            end = end[kept]
            image_positions = image_positions[kept]
            reads = reads[kept]
        numbers = (image_positions == end[:, None]).int().argmax(1)
        yield ImageSegment(rows, kept, reads, numbers)
        # Behind the image's own token, in rows that have read one.
        position = end + reads


def _text_segment(tokens: Tensor, rows: Tensor, position: Tensor, end: Tensor) -> TextSegment:
    length = int((end - position).max())
    # [n, T]: rows whose text is shorter are masked.
    slots = torch.arange(length, device=tokens.device)
    mask = slots < (end - position)[:, None]
    positions = (position[:, None] + slots).clamp_(max=max(tokens.shape[1] - 1, 0))
    ids = tokens[:, :0]
    if length:
        ids = tokens.gather(1, positions)
    return TextSegment(rows, ids, mask, positions)
