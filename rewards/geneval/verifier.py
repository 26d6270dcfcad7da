"""GenEval's verdict: what was found in an image, set against what a prompt asks for.

A prompt's metadata has GenEval's form (Ghosh et al. 2023, arXiv 2310.11513):

    {"tag": "position", "include": [{"class": "cup", "count": 1},
     {"class": "fork", "count": 1, "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "cup", "count": 3}]}

`color`, `position` and `exclude` may be left out. The number in `position` is that of an earlier
entry of `include`. `exclude` asks for fewer objects than its `count`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rewards.geneval.names import POSITIONS

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels; y grows downwards."""

MOST_OBJECTS = 16
"""Of each class only so many objects count, the most certain ones."""

MARGIN = 0.1
"""Share of the objects' sizes by which two centres must differ before a position is seen."""

DIRECTION = 0.5
"""How much of the distance must lie in a direction: half of it, within 60 degrees."""


@dataclass(frozen=True)
class Detection:
    """An object that was found in an image.

    Attributes:
        name: its class, as in `rewards.geneval.names.CLASSES`.
        score: how certain it is, in [0, 1].
        box: around it.
        mask: `[height, width]` bool of the image, True on the object; None if it is not known.
    """

    name: str
    score: float
    box: Box
    # A tensor has no truth value when it is compared.
    mask: Tensor | None = field(default=None, compare=False)


Found = Mapping[str, Sequence[Detection]]
"""Objects by class, the most certain first."""

ColourNamer = Callable[[Sequence[Detection]], Sequence[str]]
"""Names the colour of each of some objects of one class."""


@dataclass(frozen=True)
class Verdict:
    """What an image is worth.

    Attributes:
        correct: GenEval's verdict: everything that the prompt asks for is there.
        soft: a number between the verdicts, at most 1; see `soft_score`.
        reasons: what is wrong, a sentence each; empty if the image is correct.
    """

    correct: bool
    soft: float
    reasons: tuple[str, ...]


def group(
    detections: Iterable[Detection], threshold: float, most: int = MOST_OBJECTS
) -> dict[str, list[Detection]]:
    """Objects by class, the most certain first.

    Args:
        detections: objects of an image, in any order.
        threshold: objects that are not more certain than this are left out.
        most: of each class so many are kept.
    """
    found: dict[str, list[Detection]] = {}
    # Sorting is stable, so of equally certain objects the one that was found first stays first.
    for detection in sorted(detections, key=lambda each: -each.score):
        here = found.setdefault(detection.name, [])
        if detection.score > threshold and len(here) < most:
            here.append(detection)
    return {name: objects for name, objects in found.items() if objects}


def verify(found: Found, wanted: Mapping[str, Any], colours: ColourNamer) -> Verdict:
    """Judge an image.

    Args:
        found: its objects.
        wanted: a prompt's metadata.
        colours: names the colours of objects. It is asked only where a colour matters.

    Raises:
        ValueError: metadata that does not have GenEval's form.
    """
    check_form(wanted)
    # Both scores ask for the colours of the same objects.
    known = _Colours(colours)
    reasons = _find_faults(found, wanted, known)
    return Verdict(not reasons, soft_score(found, wanted, known), tuple(reasons))


class _Colours:
    """Colours of objects, each asked for once."""

    def __init__(self, namer: ColourNamer) -> None:
        self._namer = namer
        self._known: dict[int, str] = {}

    def __call__(self, objects: Sequence[Detection]) -> list[str]:
        # By identity: two objects may be equal in everything but their masks.
        unknown = [each for each in objects if id(each) not in self._known]
        if unknown:
            for each, colour in zip(unknown, self._namer(unknown), strict=True):
                self._known[id(each)] = colour
        return [self._known[id(each)] for each in objects]


def _find_faults(found: Found, wanted: Mapping[str, Any], colours: ColourNamer) -> list[str]:
    """What an image lacks; empty if it is correct."""
    reasons = []
    # The objects that stand for each entry, None for an entry that is not met.
    groups: list[Sequence[Detection] | None] = []
    for entry in wanted.get("include", ()):
        # The most certain objects stand for the entry. More of them are no fault here.
        here = found.get(entry["class"], ())[: entry["count"]]
        fault = _find_fault(here, entry, groups, colours)
        if fault:
            reasons.append(fault)
        groups.append(None if fault else here)
    for entry in wanted.get("exclude", ()):
        name = entry["class"]
        count = len(found.get(name, ()))
        if count >= entry["count"]:
            reasons.append(f"expected fewer than {entry['count']} {name}, found {count}")
    return reasons


def _find_fault(
    here: Sequence[Detection],
    entry: Mapping[str, Any],
    groups: Sequence[Sequence[Detection] | None],
    colours: ColourNamer,
) -> str:
    """What the objects of one entry lack; an empty text if nothing."""
    name = entry["class"]
    if len(here) < entry["count"]:
        return f"expected {entry['count']} {name}, found {len(here)}"
    if "color" in entry:
        seen = list(colours(here))
        if seen.count(entry["color"]) < entry["count"]:
            return f"expected {entry['count']} {entry['color']} {name}, found {', '.join(seen)}"
    if "position" in entry:
        position, target = entry["position"]
        others = groups[target]
        if others is None:
            return f"expected {name} {position} another object, which is not there as asked for"
        wrong = _wrong_positions(here, position, others)
        if wrong is not None:
            seen_at = " and ".join(sorted(wrong)) or "no clear position"
            return f"expected {name} {position} {others[0].name}, found {seen_at}"
    return ""


def _wrong_positions(
    here: Sequence[Detection], position: str, others: Sequence[Detection]
) -> set[str] | None:
    """Where the first object stands that does not stand as asked for to each other; else None."""
    for each in here:
        for other in others:
            seen = positions(each.box, other.box)
            if position not in seen:
                return seen
    return None


def positions(box: Box, other: Box) -> set[str]:
    """Where an object stands to another: none, one or two of `POSITIONS`.

    The offset of the centres, less `MARGIN` of both sizes, is divided by the distance of the
    centres; a direction counts if it has more than `DIRECTION` of it.

    Args:
        box: of the object.
        other: of the other.
    """
    offset = []
    beyond = []
    for low, high in ((0, 2), (1, 3)):
        difference = (box[low] + box[high]) / 2 - (other[low] + other[high]) / 2
        sizes = abs(box[high] - box[low]) + abs(other[high] - other[low])
        offset.append(difference)
        beyond.append(math.copysign(max(abs(difference) - MARGIN * sizes, 0.0), difference))
    # The centres of such objects may coincide, and then there is no direction.
    if max(abs(beyond[0]), abs(beyond[1])) < 1e-3:
        return set()
    distance = math.hypot(*offset)
    x = beyond[0] / distance
    y = beyond[1] / distance
    holds = (x < -DIRECTION, x > DIRECTION, y < -DIRECTION, y > DIRECTION)
    return {name for name, is_so in zip(POSITIONS, holds, strict=True) if is_so}


def soft_score(found: Found, wanted: Mapping[str, Any], colours: ColourNamer) -> float:
    """A score between the verdicts, as UniRL and Flow-GRPO's reward server compute it.

    The mean of several numbers. For each entry of `include`: `1 - |count - found| / count`, which
    is below 0 for more than twice the count. If the count is exact, the same of the objects of the
    right colour where one is asked for, and 1 or 0 for a position unless the colour is wrong; if it
    is not exact, one 0 where a colour or a position is asked for. `exclude` counts for nothing,
    because too many objects already lower the first number. Flow-GRPO's server adds a 1 after the 0
    of a wrong position, which looks like an oversight and is left out here.

    Args:
        found: the objects of the image. All count, not only the most certain.
        wanted: a prompt's metadata.
        colours: names the colours of objects.
    """
    scores = []
    groups: list[Sequence[Detection] | None] = []
    for entry in wanted.get("include", ()):
        here = found.get(entry["class"], ())
        matched, parts = _score_entry(here, entry, groups, colours)
        scores += parts
        groups.append(here if matched else None)
    if not scores:
        return 0.0
    return math.fsum(scores) / len(scores)


def _score_entry(
    here: Sequence[Detection],
    entry: Mapping[str, Any],
    groups: Sequence[Sequence[Detection] | None],
    colours: ColourNamer,
) -> tuple[bool, list[float]]:
    """Whether the objects of one entry are as asked for, and its numbers."""
    count = entry["count"]
    scores = [_nearness(count, len(here))]
    if len(here) != count:
        if "color" in entry or "position" in entry:
            scores.append(0.0)
        return False, scores
    if "color" in entry:
        right = list(colours(here)).count(entry["color"])
        scores.append(_nearness(count, right))
        if right != count:
            return False, scores
    if "position" in entry:
        position, target = entry["position"]
        others = groups[target]
        stands = others is not None and _wrong_positions(here, position, others) is None
        scores.append(float(stands))
        return stands, scores
    return True, scores


def _nearness(wanted: int, found: int) -> float:
    """1 where a count is exact; below 0 for more than twice of what is wanted."""
    return 1 - abs(wanted - found) / wanted


def check_form(wanted: Mapping[str, Any]) -> None:
    """Refuse metadata that does not have GenEval's form.

    Args:
        wanted: a prompt's metadata.

    Raises:
        ValueError: it names nothing, a field is missing, or a value cannot be.
    """
    if not wanted.get("include") and not wanted.get("exclude"):
        raise ValueError(
            "expected metadata in GenEval's form, with 'include' or 'exclude', got the keys "
            f"{sorted(wanted)}; take prompts from GenEval's file, or from the task 'geneval'"
        )
    for part in ("include", "exclude"):
        for number, entry in enumerate(wanted.get(part) or ()):
            problem = _find_problem(entry, number)
            if problem:
                raise ValueError(f"expected {problem} in {part!r}, entry {number}, got {entry!r}")


def _find_problem(entry: Any, number: int) -> str:
    """What an entry should have but does not; an empty text if nothing."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str):
        return "an object with a 'class', a text,"
    count = entry.get("count")
    # True is an int too.
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return "a 'count' of at least 1"
    if "position" in entry and not _is_position(entry["position"], number):
        return f"a 'position' such as ['{POSITIONS[0]}', number of an earlier entry]"
    return ""


def _is_position(value: Any, number: int) -> bool:
    """Whether a value is a position relative to an entry before that of this number."""
    if not isinstance(value, Sequence) or len(value) != 2:
        return False
    position, target = value
    return position in POSITIONS and isinstance(target, int) and 0 <= target < number
