"""The images of the shapes world: from layouts to pixels and back.

An image is a grid of 3 x 3 cells of 8 x 8 pixels each, on a light ground. A cell is empty or holds
one coloured shape. A layout is the nine cell values, row by row: 0 is empty, value v > 0 is
`KINDS[v - 1]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

GRID = 3
"""Cells on each side of an image."""

CELL = 8
"""Pixels on each side of a cell."""

SIDE = GRID * CELL
"""Pixels on each side of an image."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.60, 0.25),
    "blue": (0.15, 0.35, 0.85),
    "yellow": (0.98, 0.78, 0.10),
    "purple": (0.60, 0.22, 0.70),
}
"""RGB values in [0, 1]."""

SHAPES = ("circle", "square", "triangle", "cross")
"""The shapes that a cell may hold."""

GROUND = (0.96, 0.96, 0.94)
"""RGB of an empty cell."""

KINDS: tuple[tuple[str, str], ...] = tuple(
    (colour, shape) for colour in COLOURS for shape in SHAPES
)
"""(colour, shape) of cell value 1, 2, ..."""

PLACES = (
    "top-left",
    "top",
    "top-right",
    "left",
    "centre",
    "right",
    "bottom-left",
    "bottom",
    "bottom-right",
)
"""The names of the cells, row by row."""

UNREADABLE = -1
"""The value of a cell that looks like no template."""

TOLERANCE = 0.17
"""A cell is readable if its root mean square distance to a template is at most this."""

VERDICT_CORRECT = "right-picture"
"""The word by which a thought says that the last image is correct.

The description of that image stands before the word, the layout of a further one after it.
"""

VERDICT_WRONG = "wrong-picture"
"""The word by which a thought says that the last image is wrong."""


# The result is shared by all calls: nobody may write into it.
@cache
def templates() -> Tensor:
    """What each cell value looks like, `[1 + kinds, 3, 8, 8]` float32 in [0, 1]."""
    # [3, 1, 1] to [3, 8, 8]
    ground = torch.tensor(GROUND)[:, None, None].expand(3, CELL, CELL)
    cells = [ground]
    for colour, shape in KINDS:
        coverage = _coverage(shape)
        paint = torch.tensor(COLOURS[colour])[:, None, None]
        # Pixels at the edge of a shape are a mixture of both colours.
        cells.append(coverage * paint + (1 - coverage) * ground)
    return torch.stack(cells)


def _coverage(shape: str, oversample: int = 8) -> Tensor:
    """How much of each pixel of a cell a shape covers, `[8, 8]` float32 in [0, 1]."""
    # The middles of 8 x 8 samples in each pixel, in pixels from the middle of the cell.
    points = (torch.arange(CELL * oversample) + 0.5) / oversample - CELL / 2
    y, x = torch.meshgrid(points, points, indexing="ij")
    inside = _inside(shape, x, y).float()
    # [64, 64] samples to [8, 8, 8, 8]: pixel rows, samples, pixel columns, samples.
    samples = inside.unflatten(0, (CELL, oversample)).unflatten(2, (CELL, oversample))
    return samples.mean((1, 3))


def _inside(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Which points lie inside a shape, in pixels from the middle of its cell."""
    if shape == "circle":
        return x**2 + y**2 < 3.0**2
    if shape == "square":
        return (x.abs() < 3.4) & (y.abs() < 3.4)
    if shape == "triangle":
        return (y < 2.9) & (y > -3.1) & (x.abs() < (y + 3.3) * 0.56)
    # What is left is the cross: two bars, cut to its size.
    bars = (x.abs() < 1.1) | (y.abs() < 1.1)
    return bars & (x.abs() < 3.3) & (y.abs() < 3.3)


def draw(layouts: Tensor) -> Tensor:
    """Draw layouts.

    Args:
        layouts: `[N, 9]` int64, cell values row by row.

    Returns:
        Images `[N, 3, 24, 24]` float32 in [0, 1].
    """
    # [N, row, column, channel, y, x]
    cells = templates()[layouts].unflatten(1, (GRID, GRID))
    # [N, channel, row, y, column, x]
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(layouts), 3, SIDE, SIDE)


def read(images: Tensor) -> Tensor:
    """Read the layouts of images: the nearest template of each cell.

    Args:
        images: `[N, 3, 24, 24]` in [0, 1].

    Returns:
        `[N, 9]` int64; `UNREADABLE` where no template is within `TOLERANCE`.

    Raises:
        ValueError: another shape of images.
    """
    if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(
            f"expected images of shape [N, 3, {SIDE}, {SIDE}], got {list(images.shape)}; "
            "the shapes verifier reads no others"
        )
    # Values and indices, [N, 9] each; an index is a cell value, because 0 is the empty cell.
    nearest = distances(images).min(-1)
    return nearest.indices.masked_fill(nearest.values > TOLERANCE, UNREADABLE)


def split_cells(images: Tensor) -> Tensor:
    """Cut images `[N, 3, 24, 24]` into cells, `[N, 9, 192]` float32 on the CPU."""
    pixels = images.float().cpu()
    # [N, channel, row, y, column, x]
    cells = pixels.unflatten(2, (GRID, CELL)).unflatten(4, (GRID, CELL))
    # [N, row, column, channel, y, x], as `templates` are flattened.
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)


def distances(images: Tensor) -> Tensor:
    """Root mean square distance of each cell to each template.

    Args:
        images: `[N, 3, 24, 24]` in [0, 1].

    Returns:
        `[N, 9, 1 + kinds]` float32.
    """
    cells = split_cells(images)
    # The number of values in a cell turns the sum of squares into their mean.
    return torch.cdist(cells, templates().flatten(1)[None]) / (3 * CELL * CELL) ** 0.5


def matches(cell: int, wanted: Mapping[str, Any]) -> bool:
    """Whether a cell holds a wanted object.

    Args:
        cell: a cell value.
        wanted: `shape`, and `colour`, which may be None or missing for any.
    """
    # Neither an empty nor an unreadable cell holds an object.
    if cell <= 0:
        return False
    colour, shape = KINDS[cell - 1]
    return shape == wanted["shape"] and wanted.get("colour") in (None, colour)


def relation_holds(relation: str, one: int, other: int) -> bool:
    """Whether one cell stands in a relation to another.

    Args:
        relation: `left of`, `right of`, `above` or `below`.
        one: the index of a cell, 0 to 8.
        other: the index of the cell that it is compared with.

    Raises:
        ValueError: another relation.
    """
    row, column = divmod(one, GRID)
    other_row, other_column = divmod(other, GRID)
    if relation == "left of":
        return column < other_column
    if relation == "right of":
        return column > other_column
    if relation == "above":
        return row < other_row
    if relation == "below":
        return row > other_row
    raise ValueError(
        f"expected the relation left of, right of, above or below, got {relation!r}; "
        "correct the prompt's metadata"
    )


def relation_table(relation: str) -> Tensor:
    """`[9, 9]` float32: 1 where the first cell stands in `relation` to the second, else 0."""
    rows = []
    for one in range(GRID * GRID):
        row = []
        for other in range(GRID * GRID):
            row.append(float(relation_holds(relation, one, other)))
        rows.append(row)
    return torch.tensor(rows)
