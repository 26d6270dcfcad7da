"""Tasks of several pictures in the shapes world: edits of a source, stories, dialogues."""

from __future__ import annotations

import random
import zlib
from typing import Any

import torch

from rewards.shapes import COLOURS, GRID, KINDS, SHAPES, draw
from unigrpo_env.shapes_world import HELD_OUT_SHARE, RELATIONS, make_prompt
from unigrpo_env.tasks import Prompt

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


class _Tries:
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


class EditTask(_Tries):
    """A picture of two to four objects, and one change to it. Held out are pairs of picture and change."""

    def attempt(self, rng: random.Random) -> tuple[str, Prompt] | None:
        layout = [0] * (GRID * GRID)
        for place in rng.sample(range(GRID * GRID), rng.choice([2, 3, 4])):
            layout[place] = rng.randint(1, len(KINDS))
        made = make_edit(layout, rng)
        if made is None:
            return None
        text, change = made
        source = draw(torch.tensor([layout]))[0]
        return f"{text} {layout}", Prompt(text, {"kind": change["action"], "edit": change, "before": layout}, sources=(source,))


class StoryTask(_Tries):
    """`a red circle then a blue square then ...`: each picture adds one object to the last. Held out are sets of parts, by their words.

    Args:
        pictures: parts of a story.
    """

    def __init__(self, pictures: int = 3) -> None:
        self.pictures = pictures

    def attempt(self, rng: random.Random) -> tuple[str, Prompt]:
        parts = [{"count": 1, "colour": colour, "shape": shape} for colour, shape in rng.sample(KINDS, self.pictures)]
        text = " then ".join(f"a {part['colour']} {part['shape']}" for part in parts)
        return text, Prompt(text, {"kind": f"{self.pictures} pictures", "parts": parts})


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
            turn, change = f"make {_name(thing)} {new}", {"action": "recolour", "thing": thing, "colour": new}
        else:
            turn, change = f"remove {_name(thing)}", {"action": "remove", "thing": thing}
        metadata = dict(prompt.metadata) | {"kind": change["action"], "edits": [change]}
        return f"{prompt.text} {turn}", Prompt(prompt.text, metadata, turns=(turn,))
