"""The verifier of the shapes world: it reads an image's pixels and checks a prompt's requirements.

What a prompt's `metadata` needs so that the rewards of the shapes world can score it; a prompt
without the key of a reward gets NaN from it, "could not be scored":

- `objects`, for `shapes`, `shapes_score`, `shapes_thought`, `soft_shapes`, `reflect`: a list of
  `{"count": 2, "colour": "red", "shape": "circle"}`. `colour` may be None or missing for any.
  The image must hold just as many of each, and nothing else.
- `relation`, optional beside `objects`: how the first object stands to the second, one of
  `left of`, `right of`, `above`, `below`.
- `edit`, for `edit` and `edit_thought`: one change to the last source image,
  `{"action": "recolour", "thing": {...}, "colour": "blue"}`, `{"action": "remove", "thing": {...}}`
  or `{"action": "put", "thing": {...}, "new": {...}, "relation": "above"}`. `thing` and `new` are
  `{"colour", "shape"}` as above; a `thing` may also have `side`, `left` or `right`, where several
  objects are alike.
- `parts`, for `story`: a list of objects, all different. Image k holds the first k of them.
- `edits`, for `dialogue`, beside `objects`: a list of changes as for `edit`, one for each user's
  turn.
- `kind`, optional: no reward reads it; reports group their figures by it.

Colours and shapes are the words of `COLOURS` and `SHAPES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.base import EpisodeBatch
from rewards.shapes.grid import (
    COLOURS,
    GRID,
    KINDS,
    PLACES,
    SHAPES,
    TOLERANCE,
    UNREADABLE,
    VERDICT_CORRECT,
    VERDICT_WRONG,
    distances,
    matches,
    read,
    relation_holds,
)


@dataclass(frozen=True)
class Verdict:
    """How an episode meets its prompt.

    Attributes:
        requirements: each requirement by name, met or not.
    """

    requirements: dict[str, bool]

    @property
    def strict(self) -> float:
        """1 if every requirement is met, else 0."""
        return float(all(self.requirements.values()))

    @property
    def score(self) -> float:
        """The share of the requirements that are met."""
        return sum(self.requirements.values()) / len(self.requirements)


def check_object(described: object) -> None:
    """Check the description of an object in a prompt's metadata.

    Args:
        described: `{"colour", "shape"}`; other entries do not matter.

    Raises:
        ValueError: it has no known shape, or an unknown colour.
    """
    # Without this check an unknown word would match no cell, and the reward would always be 0.
    if isinstance(described, Mapping) and described.get("shape") in SHAPES:
        colour = described.get("colour")
        if colour is None or colour in COLOURS:
            return
    raise ValueError(
        f"expected an object with a shape of {', '.join(SHAPES)} and a colour of "
        f"{', '.join(COLOURS)} (or None for any), got {described!r}; correct the prompt's metadata"
    )


def judge(layout: Sequence[int], metadata: Mapping[str, Any]) -> Verdict:
    """Check a layout that was read from an image against a prompt.

    Args:
        layout: nine cell values, `UNREADABLE` included.
        metadata: `objects` and, if there is one, `relation`; see the top of this module.

    Raises:
        ValueError: metadata that describe no objects of this world.
    """
    requirements: dict[str, bool] = {}
    found = []
    for wanted in metadata["objects"]:
        check_object(wanted)
        if "count" not in wanted:
            raise ValueError(
                f"expected an object with a count, got {wanted!r}; correct the prompt's metadata"
            )
        # The cells that hold such an object, by their index.
        cells = [place for place, cell in enumerate(layout) if matches(cell, wanted)]
        name = f"{wanted['count']} {wanted.get('colour') or 'any'} {wanted['shape']}"
        # Two objects of one description are one requirement.
        requirements[name] = len(cells) == wanted["count"]
        found.append(cells)
    # A cell may belong to two descriptions: "a circle" and "a red circle".
    matched = {place for cells in found for place in cells}
    requirements["nothing else"] = _only(layout, matched)
    requirements["legible"] = UNREADABLE not in layout
    relation = metadata.get("relation")
    if relation:
        requirements[relation] = _all_related(relation, found)
    return Verdict(requirements)


def _only(layout: Sequence[int], matched: set[int]) -> bool:
    """Whether no other cell than these holds an object."""
    # Unreadable cells are negative. They are a requirement of their own.
    return all(cell <= 0 or place in matched for place, cell in enumerate(layout))


def _all_related(relation: str, found: Sequence[Sequence[int]]) -> bool:
    """Whether there are cells of the first two objects, and all of them stand in the relation."""
    if len(found) < 2:
        raise ValueError(
            f"expected two objects for the relation {relation!r}, got {len(found)}; "
            "correct the prompt's metadata"
        )
    ones, others = found[:2]
    # `all` of no pair would be true, but what is missing stands in no relation.
    if not ones or not others:
        return False
    return all(relation_holds(relation, one, other) for one in ones for other in others)


def verdicts(episodes: EpisodeBatch) -> list[Verdict | None]:
    """A verdict on the last image of each episode.

    Args:
        episodes: what to judge.

    Returns:
        One entry an episode; None where the metadata require nothing.
    """
    return _judge_all(read(episodes.images).tolist(), episodes)


def _judge_all(layouts: Sequence[Sequence[int]], episodes: EpisodeBatch) -> list[Verdict | None]:
    """A verdict on one layout an episode; None where the metadata require nothing."""
    found: list[Verdict | None] = []
    for layout, metadata in zip(layouts, episodes.metadata, strict=True):
        if "objects" in metadata:
            found.append(judge(layout, metadata))
        else:
            found.append(None)
    return found


def strict_and_score(found: Sequence[Verdict | None]) -> tuple[Tensor, Tensor]:
    """`strict` and `score` of each verdict, `[N]` float32 each; NaN where there is none."""
    strict = []
    score = []
    for verdict in found:
        # NaN: nobody knows what is required, which is not the same as a failure.
        if verdict is None:
            strict.append(torch.nan)
            score.append(torch.nan)
        else:
            strict.append(verdict.strict)
            score.append(verdict.score)
    return torch.tensor(strict), torch.tensor(score)


def shapes(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """1 if the last image meets every requirement of the prompt, else 0.

    Args:
        episodes: what to score.

    Returns:
        `reward`, and `score`, the share of requirements that are met; `[N]` float32 each.
    """
    strict, score = strict_and_score(verdicts(episodes))
    return {"reward": strict, "score": score}


def shapes_score(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """The share of the prompt's requirements that the last image meets.

    Args:
        episodes: what to score.

    Returns:
        `reward`, and `strict`, 1 if all of them are met; `[N]` float32 each.
    """
    strict, score = strict_and_score(verdicts(episodes))
    return {"reward": score, "strict": strict}


def _planned_part(thought: str) -> str:
    """What a thought says after its verdict on the last image."""
    return re.split(f"{VERDICT_CORRECT}|{VERDICT_WRONG}", thought)[-1].strip()


def read_words(text: str) -> list[int] | None:
    """The layout that a thought such as `two : red circle top , red circle left` describes.

    Args:
        text: a thought. It may judge the last image first, see `VERDICT_CORRECT`.

    Returns:
        Nine cell values; None if the thought describes no layout.
    """
    listed = _planned_part(text)
    # The number before the colon is part of the reasoning; the layout is the list after it.
    if " : " in listed:
        listed = listed.partition(" : ")[2]
    layout = [0] * (GRID * GRID)
    for item in listed.split(" , "):
        words = item.split()
        if len(words) != 3:
            return None
        colour, shape, name = words
        if (colour, shape) not in KINDS or name not in PLACES:
            return None
        place = PLACES.index(name)
        # Two objects in one cell cannot be drawn.
        if layout[place]:
            return None
        layout[place] = 1 + KINDS.index((colour, shape))
    return layout


def shapes_thought(episodes: EpisodeBatch) -> Tensor:
    """1 if the layout that the thought describes meets every requirement, else 0.

    The image does not matter. Of several thoughts, the last that describes a layout counts. A
    thought that describes none gets 0.

    Args:
        episodes: what to score.

    Returns:
        `[N]` float32.
    """
    layouts = []
    for thoughts in episodes.thoughts:
        # After the last image a thought may only judge it, and describe no further one.
        last = next(filter(_planned_part, reversed(thoughts)), "")
        # One unreadable cell is enough to fail every requirement of an object.
        layouts.append(read_words(last) or [UNREADABLE])
    strict, _score = strict_and_score(_judge_all(layouts, episodes))
    return strict


def crispness(episodes: EpisodeBatch) -> Tensor:
    """1 - (mean distance of a cell to its nearest template) / `TOLERANCE`.

    It tells how clean the drawing is, which no reward of a task looks at.

    Args:
        episodes: what to score.

    Returns:
        `[N]` float32, at most 1.
    """
    # [N, 9]
    nearest = distances(episodes.images).min(-1).values
    return 1 - nearest.mean(1) / TOLERANCE
