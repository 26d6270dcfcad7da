"""A procedural world of coloured shapes on a 3 x 3 grid: prompts, the thought that plans a picture, and imperfect lessons to learn from.

Prompts are of eight kinds, GenEval's six and two that need thought. A thought is a layout in words: `three : red circle top , ...`.

The lessons (`ShapesTask.lessons`) are wrong in two ways. Slips are rare and random. *Habits* are wrong more often than right: for some kinds of prompt the
commonest thought is a mistake, and some objects are mostly drawn as others. Neither more of the same lessons nor greedy decoding mends a habit.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from functools import cache

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rewards.shapes import COLOURS, GRID, KINDS, PLACES, RIGHT, SHAPES, WRONG, draw
from unigrpo_env.tasks import Lesson, Prompt

NUMBERS = ("zero", "one", "two", "three", "four")
OPENINGS = ("", "draw ", "show ", "a picture of ")
RELATIONS = ("left of", "right of", "above", "below")
CONFUSED = {"left of": "right of", "right of": "left of", "below": "above"}
"""What a habit takes a relation for."""
SUMS = [
    *((first, "plus", second) for first, second in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 3))),
    *((first, "minus", second) for first, second in ((4, 1), (4, 2), (3, 1))),
]
FACTS = {"a triangle has corners": 3, "a square has sides": 4, "a line has ends": 2}
PROMPT_KINDS = ("single", "two", "counting", "colours", "position", "attribute", "sum", "corners")
FOREIGN_KINDS = ("three", "mixed", "chain")
"""Kinds that no training prompt has: three objects, two counts, and sums of three numbers."""
ROUND_WORDS = ("<end>", "make", "remove", "put", "the", "then", RIGHT, WRONG)
"""Words that only episodes of several pictures need; they stand last in the vocabulary."""
MARKS = ("<pad>", "<bos>", "<eos>", "<image>", "</image>", "<unk>")
HELD_OUT_SHARE = 5
"""One prompt in about this many is kept for evaluation and never trained on; see `is_held_out`."""

TEXT_HABIT, IMAGE_HABIT, SLIP = 0.65, 0.6, 0.06
"""How often a habit's mistake is made where it applies, in thoughts and in pictures, and how often a lesson slips at random."""

Layout = list[int]


@cache
def shapes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, made on the spot from the world's vocabulary."""
    text = [
        *NUMBERS,
        *PLACES,
        *COLOURS,
        *SHAPES,
        *(shape + "s" for shape in SHAPES if shape != "cross"),
        "crosses",
        *OPENINGS,
        *RELATIONS,
        *FACTS,
    ]
    words = dict.fromkeys(word for phrase in text for word in phrase.split())
    words |= dict.fromkeys(["and", "plus", "minus", "as", "many", ":", ","])
    vocabulary = {word: index for index, word in enumerate([*MARKS, *words, *ROUND_WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "</image>", "<end>"],
    )


def is_held_out(text: str) -> bool:
    """Whether a prompt belongs to evaluation, by checksum.

    A request that names a colour or a number is held out under every opening. Of the others there are only sixteen ("a circle and a cross"): those are
    split by opening, so that each is known from training in other words.
    """
    request = min((text.removeprefix(opening) for opening in OPENINGS), key=len)
    plain = not any(word in COLOURS or word in NUMBERS or word == "many" for word in request.split())
    return zlib.crc32(f"test {text if plain else request}".encode()) % HELD_OUT_SHARE == 0


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _name(colour: str | None, shape: str) -> str:
    return f"a {colour} {shape}" if colour else f"a {shape}"


def _many(colour: str | None, shape: str) -> str:
    return f"{colour} {_plural(shape)}" if colour else _plural(shape)


def _one(colour: str | None, shape: str) -> dict:
    return {"count": 1, "colour": colour, "shape": shape}


def make_prompt(kind: str, rng: random.Random) -> Prompt:
    """A random prompt of one of `PROMPT_KINDS` or `FOREIGN_KINDS`, held out or not."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    other_colour = rng.choice([c for c in COLOURS if c != colour])
    other_shape = rng.choice([s for s in SHAPES if s != shape])
    maybe = rng.choice([None, colour])
    extra: dict = {}
    if kind == "single":
        text, objects = _name(None, shape), [_one(None, shape)]
    elif kind == "colours":
        text, objects = _name(colour, shape), [_one(colour, shape)]
    elif kind == "two":
        text, objects = f"{_name(None, shape)} and {_name(None, other_shape)}", [_one(None, shape), _one(None, other_shape)]
    elif kind in ("attribute", "position"):
        between = "and"
        if kind == "position":
            between = extra["relation"] = rng.choice(RELATIONS)
        text = f"{_name(colour, shape)} {between} {_name(other_colour, other_shape)}"
        objects = [_one(colour, shape), _one(other_colour, other_shape)]
    elif kind == "counting":
        count = rng.choice([2, 3, 4])
        text, objects = f"{NUMBERS[count]} {_many(maybe, shape)}", [{"count": count, "colour": maybe, "shape": shape}]
    elif kind == "sum":
        first, sign, second = rng.choice(SUMS)
        count = first + second if sign == "plus" else first - second
        text, objects = (
            f"{NUMBERS[first]} {sign} {NUMBERS[second]} {_many(maybe, shape)}",
            [{"count": count, "colour": maybe, "shape": shape}],
        )
        extra["operand"] = first if sign == "plus" else second
    elif kind == "corners":
        fact = rng.choice(list(FACTS))
        text, objects = f"as many {_many(maybe, shape)} as {fact}", [{"count": FACTS[fact], "colour": maybe, "shape": shape}]
    elif kind == "three":
        named = rng.sample(KINDS, 3)
        return Prompt(" and ".join(_name(*thing) for thing in named), {"kind": kind, "objects": [_one(*thing) for thing in named]})
    elif kind == "mixed":
        objects = [
            {"count": rng.choice([2, 3]), "colour": colour, "shape": shape},
            {"count": rng.choice([1, 2]), "colour": other_colour, "shape": other_shape},
        ]
        text = " and ".join(
            _name(o["colour"], o["shape"]) if o["count"] == 1 else f"{NUMBERS[o['count']]} {_many(o['colour'], o['shape'])}"
            for o in objects
        )
    elif kind == "chain":
        parts = rng.choice([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
        text = f"{' plus '.join(NUMBERS[part] for part in parts)} {_many(colour, shape)}"
        objects = [{"count": sum(parts), "colour": colour, "shape": shape}]
    else:
        raise ValueError(f"unknown prompt kind {kind!r}; expected one of {PROMPT_KINDS + FOREIGN_KINDS}")
    return Prompt(rng.choice(OPENINGS) + text, {"kind": kind, "objects": objects, **extra})


@dataclass
class Plan:
    """What a thought says: objects in order, each at a place of its own, and the count that it names first, if it does."""

    objects: list[tuple[str, str, int]] = field(default_factory=list)
    count: int | None = None

    def words(self) -> str:
        listed = " , ".join(f"{colour} {shape} {PLACES[place]}" for colour, shape, place in self.objects)
        return listed if self.count is None else f"{NUMBERS[self.count]} : {listed}"

    @classmethod
    def of(cls, layout: Layout) -> Plan:
        """The objects of a layout, row by row."""
        return cls([(*KINDS[cell - 1], place) for place, cell in enumerate(layout) if cell > 0])

    def layout(self) -> Layout:
        cells = [0] * (GRID * GRID)
        for colour, shape, place in self.objects:
            cells[place] = 1 + KINDS.index((colour, shape))
        return cells


def _two_places(relation: str | None, rng: random.Random) -> list[int]:
    """Two different cells, the first standing in `relation` to the second."""
    axis = {"left of": 0, "right of": 0, "above": 1, "below": 1}.get(relation or "")
    if axis is None:
        return rng.sample(range(GRID * GRID), 2)
    near, far = sorted(rng.sample(range(GRID), 2))
    if relation in ("right of", "below"):
        near, far = far, near
    one, two = rng.randrange(GRID), rng.randrange(GRID)
    return [one * GRID + near, two * GRID + far] if axis == 0 else [near * GRID + one, far * GRID + two]


def make_plan(prompt: Prompt, rng: random.Random, text_habit: float = 0.0, slip: float = 0.0) -> Plan:
    """A thought for a prompt: right with the default rates, else as wrong as they say."""
    metadata = prompt.metadata
    kind, wanted, relation = metadata["kind"], metadata["objects"], metadata.get("relation")
    habit = rng.random() < text_habit
    counts = kind in ("counting", "sum", "corners")
    count = wanted[0]["count"]
    if habit and kind == "sum":
        count = metadata["operand"]
    if habit and kind == "corners":
        count = 3 if count != 3 else 2
    if habit and relation:
        relation = CONFUSED.get(relation, relation)
    colours = [w["colour"] for w in wanted]
    if habit and kind == "attribute":
        colours.reverse()
    if rng.random() < slip:
        count = rng.choice([2, 3, 4]) if counts else count
        colours = [c and rng.choice(list(COLOURS)) for c in colours]
    named = [(colour, w["shape"]) for colour, w in zip(colours, wanted, strict=True)]
    if counts:
        named *= count
    places = _two_places(relation, rng) if len(named) == 2 and not counts else sorted(rng.sample(range(GRID * GRID), len(named)))
    objects = [(colour or rng.choice(list(COLOURS)), shape, place) for (colour, shape), place in zip(named, places, strict=True)]
    return Plan(objects, count if counts else None)


@dataclass(frozen=True)
class Hand:
    """How one lesson's pictures are painted: a careless hand paints crosses as squares or purple as blue, or leaves an object out."""

    crosses: bool = True
    purples: bool = True
    forgets: bool = False

    @classmethod
    def of(cls, rng: random.Random, image_habit: float, slip: float) -> Hand:
        crosses, purples, forgets = rng.random() >= image_habit, rng.random() >= image_habit, rng.random() < slip
        return cls(crosses, purples, forgets)

    def paint(self, plan: Plan, rng: random.Random) -> Layout:
        """The layout that a plan becomes."""
        objects = [
            (colour if self.purples or colour != "purple" else "blue", shape if self.crosses or shape != "cross" else "square", place)
            for colour, shape, place in plan.objects
        ]
        if self.forgets and objects:
            objects.pop(rng.randrange(len(objects)))
        return Plan(objects).layout()


def rates(clean: bool) -> tuple[float, float, float]:
    """How often lessons err, by habit in words, by habit in pictures, and at random."""
    return (0.0, 0.0, 0.0) if clean else (TEXT_HABIT, IMAGE_HABIT, SLIP)


class ShapesTask:
    """Prompts of the shapes world; see `unigrpo_env.tasks.Task`.

    Args:
        kinds: the kinds of prompt to draw from, each equally often.
    """

    def __init__(self, kinds: tuple[str, ...] = PROMPT_KINDS) -> None:
        self.kinds = tuple(kinds)

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        rng = random.Random(f"{split}-{seed}")
        found: list[Prompt] = []
        while len(found) < count:
            prompt = make_prompt(self.kinds[len(found) % len(self.kinds)] if split == "test" else rng.choice(self.kinds), rng)
            if is_held_out(prompt.text) == (split == "test"):
                found.append(prompt)
        return found

    def drills(self, count: int, seed: int) -> list[Lesson]:
        """Flawless free layouts of two to four objects under an open prompt: they teach the hand to follow the words."""
        rng = random.Random(f"drills-{seed}")
        plans = []
        for _ in range(count):
            places = sorted(rng.sample(range(GRID * GRID), rng.choice([2, 3, 4])))
            plans.append(Plan([(*rng.choice(KINDS), place) for place in places]))
        prompts = [Prompt(rng.choice(OPENINGS[1:]).strip()) for _ in plans]
        pictures = draw(torch.tensor([plan.layout() for plan in plans]).view(count, GRID * GRID))
        return [Lesson(prompt, (plan.words(),), picture[None]) for prompt, plan, picture in zip(prompts, plans, pictures, strict=True)]

    def lessons(self, count: int, seed: int, *, clean: bool = False) -> list[Lesson]:
        """See `unigrpo_env.tasks.Teacher`."""
        rng = random.Random(f"lessons-{seed}")
        text_habit, image_habit, slip = rates(clean)
        prompts = self.prompts("train", count, seed)
        plans = [make_plan(prompt, rng, text_habit, slip) for prompt in prompts]
        layouts = [Hand.of(rng, image_habit, slip).paint(plan, rng) for plan in plans]
        pictures = draw(torch.tensor(layouts).view(count, GRID * GRID))
        return [Lesson(prompt, (plan.words(),), picture[None]) for prompt, plan, picture in zip(prompts, plans, pictures, strict=True)]
