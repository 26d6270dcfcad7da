"""The shapes world's picture alphabet and its verifier, which reads pixels and never the model's words.

A picture is a 3 x 3 grid of cells, 8 x 8 pixels each, on a light ground; a cell is empty or holds one coloured shape. `draw` makes pictures from
layouts; `read` turns pixels back into layouts; `judge` sets them against what a prompt asks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rewards.registry import EpisodeBatch

GRID, CELL = 3, 8
SIDE = GRID * CELL
"""Cells a side, pixels a cell, pixels a picture's side."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.60, 0.25),
    "blue": (0.15, 0.35, 0.85),
    "yellow": (0.98, 0.78, 0.10),
    "purple": (0.60, 0.22, 0.70),
}
SHAPES = ("circle", "square", "triangle", "cross")
GROUND = (0.96, 0.96, 0.94)
KINDS: tuple[tuple[str, str], ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
"""(colour, shape) of cell value 1, 2, ...; cell value 0 is empty."""
PLACES = ("top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right")
"""The cells by name, row by row."""
RIGHT, WRONG = "right-picture", "wrong-picture"
"""What a thought may say of the last picture. Before it stands what was seen there, after it the plan of a further one."""
UNREADABLE = -1
TOLERANCE = 0.17
"""A cell is legible if its nearest template is within this root mean square distance (pixel values in [0, 1])."""


def _coverage(shape: str, oversample: int = 8) -> Tensor:
    """How much of each pixel of a cell a shape covers, `[8, 8]` in [0, 1]."""
    places = (torch.arange(CELL * oversample) + 0.5) / oversample - CELL / 2
    y, x = torch.meshgrid(places, places, indexing="ij")
    inside = {
        "circle": x**2 + y**2 < 3.0**2,
        "square": (x.abs() < 3.4) & (y.abs() < 3.4),
        "triangle": (y < 2.9) & (y > -3.1) & (x.abs() < (y + 3.3) * 0.56),
        "cross": ((x.abs() < 1.1) | (y.abs() < 1.1)) & (x.abs() < 3.3) & (y.abs() < 3.3),
    }[shape]
    return inside.float().unflatten(0, (CELL, oversample)).unflatten(2, (CELL, oversample)).mean((1, 3))


@cache
def templates() -> Tensor:
    """What each cell value looks like, `[1 + kinds, 3, 8, 8]` in [0, 1]."""
    ground = torch.tensor(GROUND)[:, None, None].expand(3, CELL, CELL)
    cells = [ground]
    for colour, shape in KINDS:
        cover = _coverage(shape)
        cells.append(cover * torch.tensor(COLOURS[colour])[:, None, None] + (1 - cover) * ground)
    return torch.stack(cells)


def draw(layouts: Tensor) -> Tensor:
    """Pictures `[N, 3, 24, 24]` in [0, 1] of layouts `[N, 9]` (cell values, row by row)."""
    cells = templates()[layouts].unflatten(1, (GRID, GRID))
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(layouts), 3, SIDE, SIDE)


def read(images: Tensor) -> Tensor:
    """Layouts `[N, 9]` of pictures `[N, 3, 24, 24]` in [0, 1]: each cell's nearest template, `UNREADABLE` beyond `TOLERANCE`.

    Raises:
        ValueError: another shape of picture.
    """
    if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(
            f"expected pictures of shape [N, 3, {SIDE}, {SIDE}], got {list(images.shape)}; the shapes verifier reads no others"
        )
    nearest = _distances(images).min(-1)
    return nearest.indices.masked_fill(nearest.values > TOLERANCE, UNREADABLE)


def _distances(images: Tensor) -> Tensor:
    """Root mean square distance of each cell to each template, `[N, 9, 1 + kinds]`."""
    cells = images.float().cpu().unflatten(2, (GRID, CELL)).unflatten(4, (GRID, CELL)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cdist(cells.flatten(2), templates().flatten(1)[None]) / (3 * CELL * CELL) ** 0.5


@dataclass(frozen=True)
class Verdict:
    """One picture against one prompt: the requirements by name, each met or not."""

    requirements: dict[str, bool]

    @property
    def strict(self) -> float:
        """1 if every requirement is met, else 0."""
        return float(all(self.requirements.values()))

    @property
    def score(self) -> float:
        """Share of the requirements that are met."""
        return sum(self.requirements.values()) / len(self.requirements)


def matches(cell: int, wanted: Mapping[str, Any]) -> bool:
    """Does a cell value show the `shape`, and the `colour` unless that is None?"""
    if cell <= 0:
        return False
    colour, shape = KINDS[cell - 1]
    return shape == wanted["shape"] and wanted["colour"] in (None, colour)


_RELATIONS = {
    "left of": lambda a, b: a % GRID < b % GRID,
    "right of": lambda a, b: a % GRID > b % GRID,
    "above": lambda a, b: a // GRID < b // GRID,
    "below": lambda a, b: a // GRID > b // GRID,
}


def relation_holds(relation: str, one: int, other: int) -> bool:
    """Does cell `one` stand in `relation` to cell `other`?"""
    return _RELATIONS[relation](one, other)


def relation_table(relation: str) -> Tensor:
    """`[9, 9]` float32: 1 where the first cell stands in `relation` to the second."""
    return torch.tensor([[float(_RELATIONS[relation](a, b)) for b in range(GRID * GRID)] for a in range(GRID * GRID)])


def judge(layout: Sequence[int], metadata: Mapping[str, Any]) -> Verdict:
    """Set a layout that was read against a prompt's `metadata`.

    Args:
        layout: nine cell values, `UNREADABLE` included.
        metadata: `objects`: list of `{"count", "colour" (None for any), "shape"}`; optional `relation`, how the first object stands to the second.
    """
    found = [[place for place, cell in enumerate(layout) if matches(cell, wanted)] for wanted in metadata["objects"]]
    requirements = {
        f"{wanted['count']} {wanted['colour'] or 'any'} {wanted['shape']}": len(places) == wanted["count"]
        for wanted, places in zip(metadata["objects"], found, strict=True)
    }
    matched = {place for places in found for place in places}
    requirements["nothing else"] = all(cell <= 0 or place in matched for place, cell in enumerate(layout))
    requirements["legible"] = UNREADABLE not in layout
    if relation := metadata.get("relation"):
        pairs = [(a, b) for a in found[0] for b in found[1]]
        requirements[relation] = bool(pairs) and all(_RELATIONS[relation](a, b) for a, b in pairs)
    return Verdict(requirements)


def verdicts(episodes: EpisodeBatch) -> list[Verdict | None]:
    """A verdict an episode, on its last picture; None for a prompt that says nothing of what is required."""
    layouts = read(episodes.images).tolist()
    return [judge(layout, known) if "objects" in known else None for layout, known in zip(layouts, episodes.metadata, strict=True)]


def _plan(thought: str) -> str:
    """What a thought says after its verdict."""
    return re.split(f"{RIGHT}|{WRONG}", thought)[-1].strip()


def read_words(text: str) -> list[int] | None:
    """The layout that a plan such as `two : red circle top , red circle left` describes, in a thought that may judge the last picture first; None: none."""
    layout, text = [0] * (GRID * GRID), _plan(text)
    for part in text.partition(" : ")[2].split(" , ") if " : " in text else text.split(" , "):
        words = part.split()
        if len(words) != 3 or (words[0], words[1]) not in KINDS or words[2] not in PLACES or layout[PLACES.index(words[2])]:
            return None
        layout[PLACES.index(words[2])] = 1 + KINDS.index((words[0], words[1]))
    return layout


def shapes_thought(episodes: EpisodeBatch) -> Tensor:
    """1 if the layout that the thought (of several: the last with a plan) describes meets every requirement, whatever was drawn; 0 if it describes none."""
    thoughts = episodes.texts
    if episodes.rounds:
        thoughts = [next(filter(_plan, reversed(said)), "") for said in episodes.rounds]
    layouts = [read_words(text) for text in thoughts]
    return torch.tensor(
        [
            judge(layout or [UNREADABLE], known).strict if "objects" in known else torch.nan
            for layout, known in zip(layouts, episodes.metadata, strict=True)
        ]
    )


def crispness(episodes: EpisodeBatch) -> Tensor:
    """1 less the mean distance of a cell to its nearest template, in units of the verifier's tolerance: what no task reward looks at."""
    return 1 - _distances(episodes.images).min(-1).values.mean(1) / TOLERANCE


def _strict_and_score(episodes: EpisodeBatch) -> tuple[Tensor, Tensor]:
    found = verdicts(episodes)
    return tuple(torch.tensor([getattr(v, part) if v else torch.nan for v in found]) for part in ("strict", "score"))  # type: ignore[return-value]


def shapes(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """1 if the picture meets every requirement of the prompt, else 0; `score` (share of requirements met) is logged beside it."""
    strict, score = _strict_and_score(episodes)
    return {"reward": strict, "score": score}


def shapes_score(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """The share of the prompt's requirements that the picture meets; `strict` (all of them) is logged beside it."""
    strict, score = _strict_and_score(episodes)
    return {"reward": score, "strict": strict}
