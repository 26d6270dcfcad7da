"""Verifiers of episodes with several images: edits, stories, dialogues, reflection.

They read pixels, as `rewards.shapes.verifier` does. What the metadata of a prompt need is written
there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.base import EpisodeBatch
from rewards.shapes.grid import COLOURS, GRID, KINDS, UNREADABLE, matches, read, relation_holds
from rewards.shapes.verifier import Verdict, check_object, judge, read_words, strict_and_score

NOTHING_READABLE = (UNREADABLE,) * (GRID * GRID)
"""The layout of an image that is missing, or of a thought that describes none."""


def find(layout: Sequence[int], thing: Mapping[str, Any]) -> int | None:
    """The one cell that holds a thing.

    Args:
        layout: nine cell values.
        thing: `shape`; `colour`, None for any; `side`, the `left` or `right` one of several, or
            None.

    Returns:
        The index of the cell; None if there is no such cell, or more than one.
    """
    cells = [place for place, cell in enumerate(layout) if matches(cell, thing)]
    side = thing.get("side")
    if side and cells:
        # Of several that are alike, the words name one by its column.
        columns = [place % GRID for place in cells]
        edge = max(columns)
        if side == "left":
            edge = min(columns)
        cells = [place for place in cells if place % GRID == edge]
    # Two things in the same column are still two: the words name none of them.
    if len(cells) != 1:
        return None
    return cells[0]


def judge_edit(before: Sequence[int], after: Sequence[int], edit: Mapping[str, Any]) -> Verdict:
    """Check that one change was made, and nothing else.

    Args:
        before: the nine cell values of the source.
        after: the nine cell values of the result.
        edit: `action`: recolour, remove or put; `thing`: the object that it refers to; `colour`:
            the new one of a recolouring; `new` and `relation`: what a put adds, and how it stands
            to the thing.

    Raises:
        ValueError: an edit that does not describe a change in this world.
    """
    _check_edit(edit)
    target = find(before, edit["thing"])
    changed = {place for place in range(len(before)) if after[place] != before[place]}
    # `touched` are the cells that may differ.
    touched: set[int] = set()
    if target is None:
        done = False
    elif edit["action"] == "put":
        # Any free cell in the relation will do, but only one of them.
        touched = {place for place in changed if _is_put(place, target, before, after, edit)}
        done = len(touched) == 1
    else:
        # A recolouring to the colour that was there before is no change.
        done = after[target] == _new_value(before[target], edit) != before[target]
        touched = {target}
    return Verdict(
        {
            "the change": done,
            "all else stays": changed <= touched,
            "legible": UNREADABLE not in after,
        }
    )


def _check_edit(edit: Mapping[str, Any]) -> None:
    """Check what a prompt's metadata say of an edit."""
    action = edit.get("action")
    if action not in ("recolour", "remove", "put"):
        raise ValueError(
            f"expected an edit whose action is recolour, remove or put, got {edit!r}; "
            "correct the prompt's metadata"
        )
    check_object(edit.get("thing"))
    if action == "put":
        check_object(edit.get("new"))
        # The cells do not matter here: an unknown relation is an error for all of them.
        relation_holds(edit.get("relation", ""), 0, 0)
    if action == "recolour" and edit.get("colour") not in COLOURS:
        raise ValueError(
            f"expected a recolouring whose colour is one of {', '.join(COLOURS)}, got {edit!r}; "
            "correct the prompt's metadata"
        )


def _is_put(
    place: int, target: int, before: Sequence[int], after: Sequence[int], edit: Mapping[str, Any]
) -> bool:
    """Whether the new object of a put stands in this cell, which was empty before."""
    if before[place] != 0 or not matches(after[place], edit["new"]):
        return False
    return relation_holds(edit["relation"], place, target)


def _new_value(cell: int, edit: Mapping[str, Any]) -> int:
    """The value that a cell should have once its object is removed or recoloured."""
    if edit["action"] == "remove":
        return 0
    # A recolouring keeps the shape.
    _colour, shape = KINDS[cell - 1]
    return 1 + KINDS.index((edit["colour"], shape))


def judge_story(layouts: Sequence[Sequence[int]], parts: Sequence[Mapping[str, Any]]) -> Verdict:
    """Check that image k holds parts 1 to k, nothing else, and the earlier ones where they were.

    Args:
        layouts: nine cell values for each image.
        parts: one object an image, `{"count": 1, "colour", "shape"}`, all different.
    """
    requirements = {"as many images as parts": len(layouts) == len(parts)}
    for number in range(len(parts)):
        layout = _layout(layouts, number)
        correct = judge(layout, {"objects": parts[: number + 1]}).strict == 1
        # The first image has none before it that it must agree with.
        if number > 0:
            correct = correct and _keeps(_layout(layouts, number - 1), layout)
        requirements[f"image {number + 1}"] = correct
    return Verdict(requirements)


def _layout(layouts: Sequence[Sequence[int]], number: int) -> Sequence[int]:
    """The layout of one image of an episode; an unreadable one if it was not drawn."""
    if number < len(layouts):
        return layouts[number]
    return NOTHING_READABLE


def _keeps(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether all objects of one image are in the same cells of the next."""
    # What could not be read cannot be compared; the image before fails on its own.
    return all(cell <= 0 or after[place] == cell for place, cell in enumerate(before))


def _layouts(episodes: EpisodeBatch) -> list[list[list[int]]]:
    """The layout of each image of each episode, read in one call."""
    counts = [len(images) for images in episodes.all_images]
    # [images of all episodes, 9]
    layouts = read(torch.cat(episodes.all_images))
    return [rows.tolist() for rows in layouts.split(counts)]


def _scored(verdicts: Sequence[Verdict | None]) -> dict[str, Tensor]:
    """Verdicts as a strict reward with the share of requirements beside it."""
    strict, score = strict_and_score(verdicts)
    return {"reward": strict, "score": score}


def edit(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """1 if the last image is the source with the one change that the prompt asks for, else 0.

    Args:
        episodes: what to score.

    Returns:
        `reward`; `score`, the share of requirements that are met; `thought`, see `edit_thought`;
        `correct_despite_plan`, 1 for a correct image after a thought that is not. `[N]` float32
        each.
    """
    before = _source_layouts(episodes)
    found = _scored(_judge_edits(episodes, before, read(episodes.images).tolist()))
    planned = _judge_edits(episodes, before, _planned_layouts(episodes))
    thought, _score = strict_and_score(planned)
    found["thought"] = thought
    # Such an image earns a reward that the thought before it does not deserve.
    found["correct_despite_plan"] = found["reward"] * (1 - thought)
    return found


def edit_thought(episodes: EpisodeBatch) -> Tensor:
    """1 if the layout that the thought describes is the source with that one change, else 0.

    The image does not matter. A thought that describes no layout gets 0.

    Args:
        episodes: what to score.

    Returns:
        `[N]` float32.
    """
    before = _source_layouts(episodes)
    planned = _judge_edits(episodes, before, _planned_layouts(episodes))
    strict, _score = strict_and_score(planned)
    return strict


def _source_layouts(episodes: EpisodeBatch) -> dict[int, list[int]]:
    """The layout of the last source of each episode that is asked for an edit, by its row."""
    rows = [row for row, metadata in enumerate(episodes.metadata) if "edit" in metadata]
    if not rows:
        return {}
    sources = []
    for row in rows:
        # The change is judged against the source, so there must be one.
        if not len(episodes.sources[row]):
            raise ValueError(
                f"expected a source image with the prompt {episodes.prompts[row]!r}, because its "
                "metadata describe an edit; got none"
            )
        # Sources before the last only stand there.
        sources.append(episodes.sources[row][-1])
    layouts = read(torch.stack(sources)).tolist()
    return dict(zip(rows, layouts, strict=True))


def _planned_layouts(episodes: EpisodeBatch) -> list[Sequence[int]]:
    """The layout that the text of each episode describes."""
    return [read_words(text) or NOTHING_READABLE for text in episodes.texts]


def _judge_edits(
    episodes: EpisodeBatch, before: Mapping[int, Sequence[int]], after: Sequence[Sequence[int]]
) -> list[Verdict | None]:
    """A verdict on each episode that is asked for an edit."""
    verdicts: list[Verdict | None] = [None] * len(episodes)
    for row, source in before.items():
        verdicts[row] = judge_edit(source, after[row], episodes.metadata[row]["edit"])
    return verdicts


def story(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """1 if every image of a story is correct and agrees with the one before, else 0.

    Args:
        episodes: what to score.

    Returns:
        `reward`, and `score`, the share of requirements that are met; `[N]` float32 each.
    """
    verdicts: list[Verdict | None] = []
    for layouts, metadata in zip(_layouts(episodes), episodes.metadata, strict=True):
        if "parts" in metadata:
            verdicts.append(judge_story(layouts, metadata["parts"]))
        else:
            verdicts.append(None)
    return _scored(verdicts)


def dialogue(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """1 if the first image meets the prompt, and each later one makes the change of its turn.

    Args:
        episodes: what to score.

    Returns:
        `reward`, and `score`, the share of requirements that are met; `[N]` float32 each.
    """
    verdicts: list[Verdict | None] = []
    for layouts, metadata in zip(_layouts(episodes), episodes.metadata, strict=True):
        if "edits" in metadata:
            verdicts.append(_judge_dialogue(layouts, metadata))
        else:
            verdicts.append(None)
    return _scored(verdicts)


def _judge_dialogue(layouts: Sequence[Sequence[int]], metadata: Mapping[str, Any]) -> Verdict:
    """Check the first image against the prompt, and each turn against the image before it."""
    requirements = {}
    first = judge(_layout(layouts, 0), metadata)
    for name, met in first.requirements.items():
        requirements[f"first: {name}"] = met
    for number, change in enumerate(metadata["edits"], 1):
        if number >= len(layouts):
            requirements[f"turn {number}: drawn"] = False
            continue
        # Each turn changes what was really drawn, correct or not.
        turn = judge_edit(layouts[number - 1], layouts[number], change)
        for name, met in turn.requirements.items():
            requirements[f"turn {number}: {name}"] = met
    return Verdict(requirements)


def reflect(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """1 if the last image meets every requirement, else 0.

    Args:
        episodes: what to score.

    Returns:
        `reward`; `first_correct`, 1 if the first image meets every requirement; `stopped_correct`,
        1 if the episode stopped after a correct first image; `stopped_wrong`, 1 if it stopped
        after a wrong one. `[N]` float32 each.
    """
    names = ("reward", "first_correct", "stopped_correct", "stopped_wrong")
    found = {name: torch.full((len(episodes),), torch.nan) for name in names}
    for row, (layouts, metadata) in enumerate(
        zip(_layouts(episodes), episodes.metadata, strict=True)
    ):
        if "objects" not in metadata:
            continue
        first = judge(_layout(layouts, 0), metadata).strict
        # An episode without any image is judged by an unreadable one.
        last = judge(_layout(layouts, max(len(layouts) - 1, 0)), metadata).strict
        # The episode ended with its first image.
        stopped = len(layouts) == 1
        found["reward"][row] = last
        found["first_correct"][row] = first
        found["stopped_correct"][row] = float(stopped and first == 1)
        found["stopped_wrong"][row] = float(stopped and first == 0)
    return found


def extra_images(episodes: EpisodeBatch) -> Tensor:
    """The number of images beyond the first.

    Give it a small negative weight, so that further attempts have a price.

    Args:
        episodes: what to score.

    Returns:
        `[N]` float32.
    """
    counts = [float(max(len(images) - 1, 0)) for images in episodes.all_images]
    return torch.tensor(counts)
