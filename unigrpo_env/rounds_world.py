"""Tasks of several pictures in the shapes world: edits of a source, stories, dialogues."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from typing import Any, cast

import torch

from rewards.rounds import find
from rewards.shapes import COLOURS, GRID, KINDS, RIGHT, SHAPES, WRONG, draw, judge, relation_holds
from unigrpo_env.shapes_world import CONFUSED, HELD_OUT_SHARE, RELATIONS, Hand, Layout, Plan, ShapesTask, make_plan, make_prompt, rates
from unigrpo_env.tasks import Lesson, Prompt, Task

Thing = dict[str, Any]
ACTIONS = ("recolour", "remove", "put")


def _held_out(text: str) -> bool:
    return zlib.crc32(f"test {text}".encode()) % HELD_OUT_SHARE == 0


def _thing(colour: str | None, shape: str, side: str | None = None) -> Thing:
    return {"colour": colour, "shape": shape, "side": side}


def _name(thing: Thing) -> str:
    return " ".join(word for word in ("the", thing["side"], thing["colour"], thing["shape"]) if word)


def make_edit(layout: list[int], rng: random.Random) -> tuple[str, dict[str, Any]] | None:
    """An instruction for a layout, in words and as `rewards.rounds.judge_edit` takes it; None if this try found nothing clear to say."""
    cells = [place for place, cell in enumerate(layout) if cell]
    target = rng.choice(cells)
    colour, shape = KINDS[layout[target] - 1]
    alike = [place for place in cells if KINDS[layout[place] - 1][1] == shape]
    if len(alike) == 1:
        thing = _thing(None, shape)
    elif sum(layout[place] == layout[target] for place in alike) == 1:
        thing = _thing(colour, shape)
    else:
        columns = [place % GRID for place in alike]
        if columns.count(target % GRID) > 1 or target % GRID not in (min(columns), max(columns)):
            return None
        thing = _thing(None, shape, "left" if target % GRID == min(columns) else "right")
    action = rng.choice(ACTIONS)
    if action == "recolour":
        new = rng.choice([c for c in COLOURS if c != colour])
        return f"make {_name(thing)} {new}", {"action": action, "thing": thing, "colour": new}
    if action == "remove":
        return f"remove {_name(thing)}", {"action": action, "thing": thing}
    relation = rng.choice(RELATIONS)
    row, column = divmod(target, GRID)
    room = {
        "left of": [p for p in range(GRID * GRID) if p % GRID < column],
        "right of": [p for p in range(GRID * GRID) if p % GRID > column],
        "above": [p for p in range(GRID * GRID) if p // GRID < row],
        "below": [p for p in range(GRID * GRID) if p // GRID > row],
    }[relation]
    if not any(layout[place] == 0 for place in room):
        return None
    new_thing = _thing(rng.choice([None, *COLOURS]), rng.choice(SHAPES))
    described = " ".join(word for word in ("a", new_thing["colour"], new_thing["shape"]) if word)
    return f"put {described} {relation} {_name(thing)}", {"action": action, "thing": thing, "new": new_thing, "relation": relation}


def change(layout: Layout, edit: Mapping[str, Any], rng: random.Random, habit: bool = False) -> Layout:
    """The layout after an edit, as it is if the edit's thing is not there.

    With `habit` as beginners do it: they take right for left, and where there is no such word to mistake they move something that should stay.
    """
    thing, relation = dict(edit["thing"]), edit.get("relation")
    confused = habit and (relation or thing["side"])
    if confused and relation:
        relation = CONFUSED.get(relation, relation)
    elif confused:
        thing["side"] = "left" if thing["side"] == "right" else "right"
    target, after = find(layout, thing), list(layout)
    if target is None:
        return after
    if edit["action"] == "remove":
        after[target] = 0
    elif edit["action"] == "recolour":
        after[target] = 1 + KINDS.index((edit["colour"], KINDS[layout[target] - 1][1]))
    else:
        empty = [place for place, cell in enumerate(layout) if cell == 0]
        room = [place for place in empty if relation_holds(cast(str, relation), place, target)] or empty
        new = edit["new"]
        after[rng.choice(room)] = 1 + KINDS.index((new["colour"] or rng.choice(list(COLOURS)), new["shape"]))
    if habit and not confused:
        wander(after, rng, but=target)
    return after


def wander(layout: Layout, rng: random.Random, but: int | None = None) -> None:
    """Move one object, not the one at `but`, to an empty cell, in place."""
    movable = [place for place, cell in enumerate(layout) if cell and place != but]
    empty = [place for place, cell in enumerate(layout) if cell == 0 and place != but]
    if movable and empty:
        start = rng.choice(movable)
        layout[rng.choice(empty)], layout[start] = layout[start], 0


class _Lessons:
    """Lessons on a task's own prompts, one at a time."""

    def lesson(
        self, prompt: Prompt, rng: random.Random, text_habit: float, image_habit: float, slip: float
    ) -> tuple[list[str], list[Layout]]:
        """The words before each picture (and after the last), and the pictures as layouts, with these rates of error."""
        raise NotImplementedError

    def lessons(self, count: int, seed: int, *, clean: bool = False) -> list[Lesson]:
        """See `unigrpo_env.tasks.Teacher`."""
        rng = random.Random(f"lessons-{type(self).__name__}-{seed}")
        prompts = cast(Task, self).prompts("train", count, seed)
        return _drawn(prompts, [self.lesson(prompt, rng, *rates(clean)) for prompt in prompts])

    def drills(self, count: int, seed: int) -> list[Lesson]:
        """Flawless lessons."""
        return self.lessons(count, seed + 500_000, clean=True)


def _drawn(prompts: list[Prompt], told: list[tuple[list[str], list[Layout]]]) -> list[Lesson]:
    """Prompts and what `lesson` tells of them, as lessons."""
    return [Lesson(prompt, tuple(words), draw(torch.tensor(cells))) for prompt, (words, cells) in zip(prompts, told, strict=True)]


class _Tries(_Lessons):
    """Prompts by drawing until one falls into the split."""

    def attempt(self, rng: random.Random) -> tuple[str, Prompt] | None:
        """A key that the split goes by, and a prompt; None to try again."""
        raise NotImplementedError

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """See `unigrpo_env.tasks.Task`."""
        rng = random.Random(f"{type(self).__name__}-{split}-{seed}")
        found: list[Prompt] = []
        while len(found) < count:
            tried = self.attempt(rng)
            if tried is not None and _held_out(tried[0]) == (split == "test"):
                found.append(tried[1])
        return found


def _scattered(rng: random.Random) -> Layout:
    """Two to four objects anywhere."""
    layout = [0] * (GRID * GRID)
    for place in rng.sample(range(GRID * GRID), rng.choice([2, 3, 4])):
        layout[place] = rng.randint(1, len(KINDS))
    return layout


class EditTask(_Tries):
    """A picture of two to four objects, and one change to it. Held out are pairs of picture and change.

    Args:
        source_images: how many pictures come with an instruction; the last is the one to change, those before it only stand there.
    """

    def __init__(self, source_images: int = 1) -> None:
        if source_images < 1:
            raise ValueError(f"expected source_images >= 1, got {source_images}: there is nothing to change")
        self.source_images = source_images

    def attempt(self, rng: random.Random) -> tuple[str, Prompt] | None:
        layout = _scattered(rng)
        made = make_edit(layout, rng)
        if made is None:
            return None
        text, edit = made
        sources = draw(torch.tensor([*(_scattered(rng) for _ in range(self.source_images - 1)), layout]))
        return f"{text} {layout}", Prompt(text, {"kind": edit["action"], "edit": edit, "before": layout}, sources=tuple(sources))

    def lesson(
        self, prompt: Prompt, rng: random.Random, text_habit: float, image_habit: float, slip: float
    ) -> tuple[list[str], list[Layout]]:
        plan = Plan.of(change(prompt.metadata["before"], prompt.metadata["edit"], rng, rng.random() < text_habit))
        return [plan.words()], [Hand.of(rng, image_habit, slip).paint(plan, rng)]


class ReflectTask(_Lessons, ShapesTask):
    """The prompts of one picture, with lessons that look at what was drawn, say what they see and whether it is right, and draw again or stop.

    Each further try has its habits half as often as the one before. The verdict's own habit is to ask whether the picture is what was planned, not what was asked for.

    Args:
        pictures: how many there may be.
    """

    def __init__(self, pictures: int = 3) -> None:
        super().__init__()
        self.pictures = pictures

    def lesson(
        self, prompt: Prompt, rng: random.Random, text_habit: float, image_habit: float, slip: float
    ) -> tuple[list[str], list[Layout]]:
        errors = [(text_habit / 2**n, image_habit / 2**n, slip) for n in range(self.pictures)]
        return self._told(prompt, rng, errors, text_habit, slip)

    def drills(self, count: int, seed: int) -> list[Lesson]:
        """Lessons whose first picture errs as others do, and nothing else: they teach to tell right from wrong."""
        rng = random.Random(f"drills-{type(self).__name__}-{seed}")
        errors = [rates(clean=False), *[rates(clean=True)] * (self.pictures - 1)]
        prompts = self.prompts("train", count, seed + 500_000)
        return _drawn(prompts, [self._told(prompt, rng, errors, 0.0, 0.0) for prompt in prompts])

    def _told(
        self, prompt: Prompt, rng: random.Random, errors: list[tuple[float, float, float]], content: float, misjudged: float
    ) -> tuple[list[str], list[Layout]]:
        """Words and pictures with each picture's rates of error, and how often verdicts go by the plan, and slip."""
        words, layouts, seen = list[str](), list[Layout](), ""
        for text_habit, image_habit, slip in errors:
            plan = make_plan(prompt, rng, text_habit, slip)
            words.append(f"{seen} {plan.words()}".strip())
            layouts.append(Hand.of(rng, image_habit, slip).paint(plan, rng))
            planned, asked = layouts[-1] == plan.layout(), judge(layouts[-1], prompt.metadata).strict == 1
            found = planned if rng.random() < content else asked
            verdict = RIGHT if found != (rng.random() < misjudged) else WRONG
            there = Plan.of(layouts[-1])
            if plan.count is not None:
                there.count = len(there.objects)
            seen = f"{there.words()} {verdict}".strip()
            if verdict == RIGHT and len(layouts) < self.pictures:
                words.append(f"{seen} <end>")
                break
        return words, layouts


class StoryTask(_Tries):
    """`a red circle then a blue square then ...`: each picture adds one object to the last. Held out are sets of parts, by their words.

    Args:
        pictures: parts of a story.
    """

    def __init__(self, pictures: int = 3) -> None:
        if not 1 <= pictures <= GRID * GRID:
            raise ValueError(f"expected 1 to {GRID * GRID} pictures, got {pictures}: each puts one more object on the grid")
        self.pictures = pictures

    def attempt(self, rng: random.Random) -> tuple[str, Prompt]:
        parts = [{"count": 1, "colour": colour, "shape": shape} for colour, shape in rng.sample(KINDS, self.pictures)]
        text = " then ".join(f"a {part['colour']} {part['shape']}" for part in parts)
        return text, Prompt(text, {"kind": f"{self.pictures} pictures", "parts": parts})

    def lesson(
        self, prompt: Prompt, rng: random.Random, text_habit: float, image_habit: float, slip: float
    ) -> tuple[list[str], list[Layout]]:
        hand, habit = Hand.of(rng, image_habit, slip), rng.random() < text_habit
        layout, words, layouts = [0] * (GRID * GRID), list[str](), list[Layout]()
        for part in prompt.metadata["parts"]:
            if habit:
                wander(layout, rng)
            place = rng.choice([place for place, cell in enumerate(layout) if cell == 0])
            layout[place] = 1 + KINDS.index((part["colour"], part["shape"]))
            words.append(Plan.of(layout).words())
            layouts.append(hand.paint(Plan.of(layout), rng))
        return words, layouts


class DialogueTask(_Tries):
    """A prompt of two named objects, and after the picture a change to it. Held out are pairs of prompt and change.

    The change is one that suits every right picture, wherever things stand in it.
    """

    def attempt(self, rng: random.Random) -> tuple[str, Prompt] | None:
        prompt = make_prompt("attribute", rng)
        first = rng.choice(prompt.metadata["objects"])
        thing = _thing(None, first["shape"])
        if rng.random() < 0.5:
            new = rng.choice([c for c in COLOURS if c != first["colour"]])
            turn, edit = f"make {_name(thing)} {new}", {"action": "recolour", "thing": thing, "colour": new}
        else:
            turn, edit = f"remove {_name(thing)}", {"action": "remove", "thing": thing}
        metadata = dict(prompt.metadata) | {"kind": edit["action"], "edits": [edit]}
        return f"{prompt.text} {turn}", Prompt(prompt.text, metadata, turns=(turn,))

    def lesson(
        self, prompt: Prompt, rng: random.Random, text_habit: float, image_habit: float, slip: float
    ) -> tuple[list[str], list[Layout]]:
        hand = Hand.of(rng, image_habit, slip)
        first = make_plan(Prompt(prompt.text, {**prompt.metadata, "kind": "attribute"}), rng, text_habit, slip)
        drawn = hand.paint(first, rng)
        second = Plan.of(change(drawn, prompt.metadata["edits"][0], rng, rng.random() < text_habit / 2))
        return [first.words(), second.words()], [drawn, hand.paint(second, rng)]
