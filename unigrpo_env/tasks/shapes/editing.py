"""Tasks of changing an image in the shapes world: one that is given, or one just drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch

from rewards.shapes.grid import COLOURS, GRID, KINDS, SHAPES, draw, relation_holds
from rewards.shapes.multi_image import find
from unigrpo_env.tasks.shapes.demonstrations import (
    CELLS,
    CONFUSED_RELATIONS,
    Answer,
    DrawingErrors,
    ErrorRates,
    Layout,
    LayoutPlan,
    RejectionSampledTask,
    cell_value,
    empty_cells,
    filled_cells,
    make_plan,
)
from unigrpo_env.tasks.shapes.prompts import RELATIONS, make_prompt
from unigrpo_env.tasks.task import Prompt

Thing = dict[str, Any]
"""An object as an instruction names it: `colour` (None for any), `shape`, `side` (of several)."""

Edit = dict[str, Any]
"""A change as `rewards.shapes.multi_image.judge_edit` takes it."""

ACTIONS = ("recolour", "remove", "put")
"""What an instruction may ask for."""


def _thing(colour: str | None, shape: str, side: str | None = None) -> Thing:
    return {"colour": colour, "shape": shape, "side": side}


def _name(thing: Thing) -> str:
    """A thing in words, such as `the left red circle`."""
    return _join("the", thing["side"], thing["colour"], thing["shape"])


def _join(*words: str | None) -> str:
    """Words with spaces between them; those that are None are left out."""
    return " ".join(filter(None, words))


def make_edit(layout: Layout, rng: random.Random) -> tuple[str, Edit] | None:
    """Make an instruction for a layout.

    Args:
        layout: nine cell values, at least one object.
        rng: the source of randomness.

    Returns:
        The instruction in words, and as a reward takes it; None if this attempt found no clear one.
    """
    target = rng.choice(filled_cells(layout))
    # An instruction that could mean two objects cannot be judged.
    thing = _describe(layout, target)
    if thing is None:
        return None
    action = rng.choice(ACTIONS)
    if action == "recolour":
        colour, _shape = KINDS[layout[target] - 1]
        return _recolouring(thing, colour, rng)
    if action == "remove":
        return _removal(thing)
    return _addition(layout, target, thing, rng)


def _describe(layout: Layout, target: int) -> Thing | None:
    """The shortest words that name one object and no other; None if there are none."""
    colour, shape = KINDS[layout[target] - 1]
    alike = [place for place in filled_cells(layout) if KINDS[layout[place] - 1][1] == shape]
    # The shape alone is enough if no other object has it.
    if len(alike) == 1:
        return _thing(None, shape)
    if layout.count(layout[target]) == 1:
        return _thing(colour, shape)
    # The colour does not tell them apart, so only the side can.
    columns = [place % GRID for place in alike]
    column = target % GRID
    # Of two in the same column neither is the left one.
    if columns.count(column) > 1:
        return None
    if column == min(columns):
        return _thing(None, shape, "left")
    if column == max(columns):
        return _thing(None, shape, "right")
    return None


def _recolouring(thing: Thing, colour: str, rng: random.Random) -> tuple[str, Edit]:
    """Another colour for a thing that has `colour`."""
    new = rng.choice([other for other in COLOURS if other != colour])
    return f"make {_name(thing)} {new}", {"action": "recolour", "thing": thing, "colour": new}


def _removal(thing: Thing) -> tuple[str, Edit]:
    return f"remove {_name(thing)}", {"action": "remove", "thing": thing}


def _addition(
    layout: Layout, target: int, thing: Thing, rng: random.Random
) -> tuple[str, Edit] | None:
    """A new object that stands in some relation to the target; None if there is no free cell."""
    relation = rng.choice(RELATIONS)
    # A new object may not stand on an old one.
    if not any(relation_holds(relation, place, target) for place in empty_cells(layout)):
        return None
    # None leaves the colour open.
    colour = rng.choice([None, *COLOURS])
    shape = rng.choice(SHAPES)
    text = f"put {_join('a', colour, shape)} {relation} {_name(thing)}"
    edit = {"action": "put", "thing": thing, "new": _thing(colour, shape), "relation": relation}
    return text, edit


def apply_edit(
    layout: Layout, edit: Mapping[str, Any], rng: random.Random, mistaken: bool = False
) -> Layout:
    """The layout after an edit; the same layout if the edit's thing is not in it.

    Args:
        layout: nine cell values.
        edit: the change.
        rng: the source of randomness, for what the edit leaves open.
        mistaken: whether to make a systematic error. Left is then taken for right and the reverse;
            where the edit has no such word, an object that should stay is moved.
    """
    thing = edit["thing"]
    # Only a put has one.
    relation = edit.get("relation", "")
    moves_another = mistaken and not (relation or thing["side"])
    if mistaken and relation:
        relation = CONFUSED_RELATIONS.get(relation, relation)
    elif mistaken and thing["side"]:
        thing = _other_side(thing)
    after = list(layout)
    # None if the image was drawn without the thing, or with several of them.
    target = find(layout, thing)
    if target is None:
        return after
    if edit["action"] == "remove":
        after[target] = 0
    elif edit["action"] == "recolour":
        _colour, shape = KINDS[layout[target] - 1]
        after[target] = cell_value(edit["colour"], shape)
    else:
        _put(after, edit["new"], relation, target, rng)
    if moves_another:
        move_random_object(after, rng, keep=target)
    return after


def _other_side(thing: Mapping[str, Any]) -> Thing:
    """The thing on the left in place of the one on the right, and the reverse."""
    side = "right"
    if thing["side"] == "right":
        side = "left"
    return {**thing, "side": side}


def _put(
    layout: Layout,
    new: Mapping[str, Any],
    relation: str,
    target: int,
    rng: random.Random,
) -> None:
    """Put an object into a free cell, in place; into any if none stands in the relation."""
    colour = new["colour"]
    if colour is None:
        colour = rng.choice(list(COLOURS))
    empty = empty_cells(layout)
    # Something is drawn in any case: a demonstration needs an image.
    suitable = [place for place in empty if relation_holds(relation, place, target)]
    layout[rng.choice(suitable or empty)] = cell_value(colour, new["shape"])


def move_random_object(layout: Layout, rng: random.Random, keep: int | None = None) -> None:
    """Move one object to an empty cell, in place. Nothing happens if none can move.

    Args:
        layout: nine cell values.
        rng: the source of randomness.
        keep: a cell that stays as it is.
    """
    movable = [place for place in filled_cells(layout) if place != keep]
    empty = [place for place in empty_cells(layout) if place != keep]
    if not movable or not empty:
        return
    # The start is drawn before the end; the order is a part of every seed's meaning.
    start = rng.choice(movable)
    layout[rng.choice(empty)] = layout[start]
    layout[start] = 0


def _random_layout(rng: random.Random) -> Layout:
    """Two to four objects anywhere."""
    layout = [0] * CELLS
    count = rng.choice([2, 3, 4])
    for place in rng.sample(range(CELLS), count):
        layout[place] = rng.randint(1, len(KINDS))
    return layout


class EditTask(RejectionSampledTask):
    """An image of two to four objects, and one change to it.

    Pairs of an image and a change are held out.

    Args:
        source_images: how many images come with an instruction. The last is the one to be changed;
            those before it have no meaning.

    Raises:
        ValueError: no image that could be changed.
    """

    def __init__(self, source_images: int = 1) -> None:
        if source_images < 1:
            raise ValueError(
                f"expected source_images >= 1, got {source_images}: there is nothing to change"
            )
        self.source_images = source_images

    def propose(self, rng: random.Random) -> tuple[str, Prompt] | None:
        """See `RejectionSampledTask`."""
        layout = _random_layout(rng)
        made = make_edit(layout, rng)
        if made is None:
            return None
        text, edit = made
        layouts = [_random_layout(rng) for _ in range(self.source_images - 1)]
        # [source_images, 3, 24, 24]
        sources = draw(torch.tensor([*layouts, layout]))
        metadata = {"kind": edit["action"], "edit": edit, "before": layout}
        # The same instruction for another image is another prompt, so the key has both.
        return f"{text} {layout}", Prompt(text, metadata, sources=tuple(sources))

    def answer(self, prompt: Prompt, rng: random.Random, rates: ErrorRates) -> Answer:
        """See `DemonstratedTask`."""
        # The thought describes the whole result, not the change alone.
        before = prompt.metadata["before"]
        mistaken = rng.random() < rates.text
        after = apply_edit(before, prompt.metadata["edit"], rng, mistaken)
        plan = LayoutPlan.from_layout(after)
        errors = DrawingErrors.sample(rng, rates)
        return Answer([plan.words()], [errors.apply(plan, rng)])


class DialogueTask(RejectionSampledTask):
    """A prompt of two objects, and after its image a change to it.

    The change suits every correct image, wherever the objects stand in it. Pairs of a prompt and a
    change are held out.
    """

    def propose(self, rng: random.Random) -> tuple[str, Prompt]:
        """See `RejectionSampledTask`."""
        prompt = make_prompt("attribute", rng)
        first = rng.choice(prompt.metadata["objects"])
        # The two shapes of such a prompt differ, so the shape names one of them.
        thing = _thing(None, first["shape"])
        if rng.random() < 0.5:
            turn, edit = _recolouring(thing, first["colour"], rng)
        else:
            turn, edit = _removal(thing)
        metadata = {**prompt.metadata, "kind": edit["action"], "edits": [edit]}
        return f"{prompt.text} {turn}", Prompt(prompt.text, metadata, turns=(turn,))

    def answer(self, prompt: Prompt, rng: random.Random, rates: ErrorRates) -> Answer:
        """See `DemonstratedTask`. The second thought errs half as often as the first."""
        # Both images have errors of the same kinds.
        errors = DrawingErrors.sample(rng, rates)
        # The metadata name the kind of the change; the first image answers one of `attribute`.
        request = Prompt(prompt.text, {**prompt.metadata, "kind": "attribute"})
        first = make_plan(request, rng, rates)
        drawn = errors.apply(first, rng)
        mistaken = rng.random() < rates.text / 2
        # What is changed is the image as it was drawn, not as it was planned.
        after = apply_edit(drawn, prompt.metadata["edits"][0], rng, mistaken)
        second = LayoutPlan.from_layout(after)
        thoughts = [first.words(), second.words()]
        return Answer(thoughts, [drawn, errors.apply(second, rng)])
