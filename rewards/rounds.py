"""Verifiers of what takes several pictures: edits, stories, dialogues. They read pixels, as `rewards.shapes` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.registry import EpisodeBatch
from rewards.shapes import GRID, KINDS, UNREADABLE, Verdict, judge, matches, read, read_words, relation_holds


def find(layout: Sequence[int], thing: Mapping[str, Any]) -> int | None:
    """The one cell that holds `thing` (`colour`, `shape`, None for any; `side`: the left or right one of several); None if none or not one does."""
    cells = [place for place, cell in enumerate(layout) if matches(cell, thing)]
    if side := thing.get("side"):
        columns = [place % GRID for place in cells]
        edge = (min if side == "left" else max)(columns, default=0)
        cells = [place for place in cells if place % GRID == edge]
    return cells[0] if len(cells) == 1 else None


def judge_edit(before: Sequence[int], after: Sequence[int], edit: Mapping[str, Any]) -> Verdict:
    """Was this one change made, and nothing else?

    Args:
        before, after: nine cell values each.
        edit: `action`: recolour, remove or put; `thing`: what it is done to; `colour`: the new one of a recolouring; `new` and `relation`: what a
            put adds, and how it stands to the thing.
    """
    target = find(before, edit["thing"])
    changed = {place for place in range(len(before)) if after[place] != before[place]}
    if target is None:
        done, touched = False, set()
    elif edit["action"] == "put":
        touched = {p for p in changed if before[p] == 0 and matches(after[p], edit["new"]) and relation_holds(edit["relation"], p, target)}
        done = len(touched) == 1
    else:
        _colour, shape = KINDS[before[target] - 1]
        wanted = 0 if edit["action"] == "remove" else 1 + KINDS.index((edit["colour"], shape))
        done, touched = after[target] == wanted != before[target], {target}
    return Verdict({"the change": done, "all else stays": changed <= touched, "legible": UNREADABLE not in after})


def judge_story(layouts: Sequence[Sequence[int]], parts: Sequence[Mapping[str, Any]]) -> Verdict:
    """Picture k must hold parts 1 to k, nothing else, and the earlier ones where they stood.

    Args:
        layouts: of each picture.
        parts: one thing a picture, `{"count": 1, "colour", "shape"}`, all different.
    """
    requirements: dict[str, bool] = {"as many pictures as parts": len(layouts) == len(parts)}
    for number in range(len(parts)):
        here = layouts[number] if number < len(layouts) else [UNREADABLE] * GRID * GRID
        stays = number == 0 or (number < len(layouts) and all(here[p] == cell for p, cell in enumerate(layouts[number - 1]) if cell > 0))
        requirements[f"picture {number + 1}"] = stays and judge(here, {"objects": parts[: number + 1]}).strict == 1
    return Verdict(requirements)


def _scored(episodes: EpisodeBatch, key: str, verdict: Callable[[int], Verdict]) -> dict[str, Tensor]:
    known = [verdict(row) if key in metadata else None for row, metadata in enumerate(episodes.metadata)]
    strict, score = (torch.tensor([getattr(v, part) if v else torch.nan for v in known]) for part in ("strict", "score"))
    return {"reward": strict, "score": score}


def _layouts(episodes: EpisodeBatch) -> list[list[list[int]]]:
    """What each picture of each episode shows, read in one call."""
    cells = iter(read(torch.cat(episodes.pictures)).tolist())
    return [[next(cells) for _ in pictures] for pictures in episodes.pictures]


def edit(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """1 if the last picture is the source with the one change that the prompt asks for; `score` is the share of requirements met.

    Logged beside it: `thought`, see `edit_thought`; `lucky`, a right picture after a thought that is not.
    """
    before = _sources(episodes)
    found, thought = _edited(episodes, before, read(episodes.images).tolist()), _edited(episodes, before, _planned(episodes))["reward"]
    return found | {"thought": thought, "lucky": found["reward"] * (1 - thought)}


def edit_thought(episodes: EpisodeBatch) -> Tensor:
    """1 if the layout that the thought describes is the source with that one change, whatever was drawn; 0 if it describes none."""
    return _edited(episodes, _sources(episodes), _planned(episodes))["reward"]


def _sources(episodes: EpisodeBatch) -> list[list[int]]:
    return read(torch.stack([sources[-1] for sources in episodes.sources])).tolist()


def _planned(episodes: EpisodeBatch) -> list[list[int]]:
    return [read_words(text) or [UNREADABLE] * GRID**2 for text in episodes.texts]


def _edited(episodes: EpisodeBatch, before: list[list[int]], after: list[list[int]]) -> dict[str, Tensor]:
    return _scored(episodes, "edit", lambda row: judge_edit(before[row], after[row], episodes.metadata[row]["edit"]))


def story(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """1 if every picture of a story is right and agrees with the one before; `score` is the share of pictures that do."""
    layouts = _layouts(episodes)
    return _scored(episodes, "parts", lambda row: judge_story(layouts[row], episodes.metadata[row]["parts"]))


def dialogue(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """1 if the first picture is what was asked for and each later one is the one before with the change that the user then asked for."""
    drawn = _layouts(episodes)

    def verdict(row: int) -> Verdict:
        layouts, metadata = drawn[row], episodes.metadata[row]
        requirements = {f"first: {name}": met for name, met in judge(layouts[0], metadata).requirements.items()}
        for number, change in enumerate(metadata["edits"], 1):
            there = number < len(layouts)
            found = judge_edit(layouts[number - 1], layouts[number], change).requirements if there else {"drawn": False}
            requirements |= {f"turn {number}: {name}": met for name, met in found.items()}
        return Verdict(requirements)

    return _scored(episodes, "edits", verdict)


def reflect(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """1 if the last picture meets every requirement.

    Logged beside it: `first`, whether the first picture does; `kept`, whether the episode ended with a first picture that does; `content`, the same of one that does not.
    """
    found = {name: torch.full((len(episodes),), torch.nan) for name in ("reward", "first", "kept", "content")}
    for row, (layouts, metadata) in enumerate(zip(_layouts(episodes), episodes.metadata, strict=True)):
        if "objects" in metadata:
            first, last = (judge(layout, metadata).strict for layout in (layouts[0], layouts[-1]))
            found["reward"][row], found["first"][row] = last, first
            found["kept"][row], found["content"][row] = (float(len(layouts) == 1 and first == right) for right in (1, 0))
    return found


def extra_pictures(episodes: EpisodeBatch) -> Tensor:
    """Pictures beyond the first: the price of trying again, to be taken with a small negative weight."""
    return torch.tensor([float(max(len(pictures) - 1, 0)) for pictures in episodes.pictures])
