"""Prompts of the shapes world.

There are eight kinds: the six of GenEval (Ghosh et al. 2023, arXiv 2310.11513), and two that need
thought, because the number of objects must be worked out. Three more kinds are never trained on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.shapes.grid import COLOURS, KINDS, SHAPES
from unigrpo_env.tasks.task import Prompt, Split

NUMBERS = ("zero", "one", "two", "three", "four")
"""The words for 0 to 4."""

OPENINGS = ("", "draw ", "show ", "a picture of ")
"""What may stand before a request."""

RELATIONS = ("left of", "right of", "above", "below")
"""How the first object may stand to the second."""

SUMS = (
    (1, "plus", 1),
    (1, "plus", 2),
    (2, "plus", 1),
    (2, "plus", 2),
    (3, "plus", 1),
    (1, "plus", 3),
    (4, "minus", 1),
    (4, "minus", 2),
    (3, "minus", 1),
)
"""The sums of the kind `sum`."""

CHAINS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))
"""The sums of three numbers of the kind `chain`."""

FACTS = {"a triangle has corners": 3, "a square has sides": 4, "a line has ends": 2}
"""The numbers that the kind `corners` asks for."""

PROMPT_KINDS = (
    "single",
    "two",
    "counting",
    "colours",
    "position",
    "attribute",
    "sum",
    "corners",
)
"""The kinds of the training prompts."""

FOREIGN_KINDS = ("three", "mixed", "chain")
"""Kinds that no training prompt has: three objects, two counts, and sums of three numbers."""

HELD_OUT_SHARE = 5
"""One prompt in about this many is kept for evaluation and never trained on."""

Wanted = dict[str, Any]
"""An object that a prompt asks for: `count`, `colour` (None for any) and `shape`."""


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    if shape.endswith("s"):
        return shape + "es"
    return shape + "s"


def name_one(colour: str | None, shape: str) -> str:
    """One object in words, such as `a red circle`; without a colour, `a circle`."""
    if colour is None:
        return f"a {shape}"
    return f"a {colour} {shape}"


def name_many(colour: str | None, shape: str) -> str:
    """Several objects in words, such as `red circles`; without a colour, `circles`."""
    if colour is None:
        return plural(shape)
    return f"{colour} {plural(shape)}"


def want(colour: str | None, shape: str, count: int = 1) -> Wanted:
    """An object as the metadata of a prompt list it; see `Wanted`."""
    return {"count": count, "colour": colour, "shape": shape}


def checksum_is_held_out(key: str) -> bool:
    """Whether a key belongs to evaluation, by checksum: about one in `HELD_OUT_SHARE` does."""
    return zlib.crc32(f"test {key}".encode()) % HELD_OUT_SHARE == 0


def is_held_out(text: str) -> bool:
    """Whether the prompt `text` belongs to evaluation.

    A request that names a colour or a number is held out under every opening. Of the others there
    are only sixteen (`a circle and a cross`). Those are split by opening, so that each of them is
    in the training prompts with another opening.
    """
    # One of the openings is empty, so the shortest remainder is the one without an opening.
    request = min((text.removeprefix(opening) for opening in OPENINGS), key=len)
    for word in request.split():
        if word in COLOURS or word in NUMBERS or word == "many":
            return checksum_is_held_out(request)
    return checksum_is_held_out(text)


@dataclass(frozen=True)
class _Choices:
    """What is drawn at random for each prompt, whether its kind uses it or not.

    Attributes:
        colour: of the first object.
        shape: of the first object.
        other_colour: of the second, different from the first.
        other_shape: likewise.
        maybe_colour: `colour`, or None for any.
    """

    colour: str
    shape: str
    other_colour: str
    other_shape: str
    maybe_colour: str | None

    @classmethod
    def sample(cls, rng: random.Random) -> _Choices:
        """Draw them; the order of the draws is a part of every seed's meaning."""
        colour = rng.choice(list(COLOURS))
        shape = rng.choice(SHAPES)
        other_colour = rng.choice([other for other in COLOURS if other != colour])
        other_shape = rng.choice([other for other in SHAPES if other != shape])
        maybe_colour = rng.choice([None, colour])
        return cls(colour, shape, other_colour, other_shape, maybe_colour)


@dataclass(frozen=True)
class _Request:
    """What a prompt asks for, in words without an opening, and as a reward takes it."""

    text: str
    objects: list[Wanted]
    extra: dict[str, Any] = field(default_factory=dict)


def _single(chosen: _Choices, rng: random.Random) -> _Request:
    """`a circle`."""
    return _Request(name_one(None, chosen.shape), [want(None, chosen.shape)])


def _colours(chosen: _Choices, rng: random.Random) -> _Request:
    """`a red circle`."""
    text = name_one(chosen.colour, chosen.shape)
    return _Request(text, [want(chosen.colour, chosen.shape)])


def _two(chosen: _Choices, rng: random.Random) -> _Request:
    """`a circle and a square`."""
    text = f"{name_one(None, chosen.shape)} and {name_one(None, chosen.other_shape)}"
    return _Request(text, [want(None, chosen.shape), want(None, chosen.other_shape)])


def _attribute(chosen: _Choices, rng: random.Random) -> _Request:
    """`a red circle and a blue square`."""
    return _two_coloured(chosen, "and", {})


def _position(chosen: _Choices, rng: random.Random) -> _Request:
    """`a red circle left of a blue square`."""
    # A reward reads the relation from the metadata, not from the text.
    relation = rng.choice(RELATIONS)
    return _two_coloured(chosen, relation, {"relation": relation})


def _two_coloured(chosen: _Choices, between: str, extra: dict[str, Any]) -> _Request:
    """Both objects with their colours, and a word between them."""
    first = name_one(chosen.colour, chosen.shape)
    second = name_one(chosen.other_colour, chosen.other_shape)
    objects = [
        want(chosen.colour, chosen.shape),
        want(chosen.other_colour, chosen.other_shape),
    ]
    return _Request(f"{first} {between} {second}", objects, extra)


def _counting(chosen: _Choices, rng: random.Random) -> _Request:
    """`three red circles`."""
    # `NUMBERS` end at four, and one object would be another kind.
    count = rng.choice([2, 3, 4])
    text = f"{NUMBERS[count]} {name_many(chosen.maybe_colour, chosen.shape)}"
    return _Request(text, [want(chosen.maybe_colour, chosen.shape, count)])


def _sum(chosen: _Choices, rng: random.Random) -> _Request:
    """`two plus one red circles`."""
    first, sign, second = rng.choice(SUMS)
    # The operand is the number that a thought names if it does not work out the sum.
    if sign == "plus":
        count = first + second
        operand = first
    else:
        count = first - second
        operand = second
    objects_in_words = name_many(chosen.maybe_colour, chosen.shape)
    text = f"{NUMBERS[first]} {sign} {NUMBERS[second]} {objects_in_words}"
    objects = [want(chosen.maybe_colour, chosen.shape, count)]
    return _Request(text, objects, {"operand": operand})


def _corners(chosen: _Choices, rng: random.Random) -> _Request:
    """`as many red circles as a triangle has corners`."""
    fact = rng.choice(list(FACTS))
    text = f"as many {name_many(chosen.maybe_colour, chosen.shape)} as {fact}"
    return _Request(text, [want(chosen.maybe_colour, chosen.shape, FACTS[fact])])


def _three(chosen: _Choices, rng: random.Random) -> _Request:
    """`a red circle and a blue square and a green cross`."""
    # No kind of object twice: each is asked for once.
    named = rng.sample(KINDS, 3)
    text = " and ".join(name_one(colour, shape) for colour, shape in named)
    return _Request(text, [want(colour, shape) for colour, shape in named])


def _mixed(chosen: _Choices, rng: random.Random) -> _Request:
    """`three red circles and two blue squares`; of the second there may be one."""
    count = rng.choice([2, 3])
    other_count = rng.choice([1, 2])
    first = f"{NUMBERS[count]} {name_many(chosen.colour, chosen.shape)}"
    second = name_one(chosen.other_colour, chosen.other_shape)
    if other_count > 1:
        several = name_many(chosen.other_colour, chosen.other_shape)
        second = f"{NUMBERS[other_count]} {several}"
    objects = [
        want(chosen.colour, chosen.shape, count),
        want(chosen.other_colour, chosen.other_shape, other_count),
    ]
    return _Request(f"{first} and {second}", objects)


def _chain(chosen: _Choices, rng: random.Random) -> _Request:
    """`one plus two plus one red circles`."""
    parts = rng.choice(CHAINS)
    sum_in_words = " plus ".join(NUMBERS[part] for part in parts)
    text = f"{sum_in_words} {name_many(chosen.colour, chosen.shape)}"
    return _Request(text, [want(chosen.colour, chosen.shape, sum(parts))])


_MAKERS: dict[str, Callable[[_Choices, random.Random], _Request]] = {
    "single": _single,
    "two": _two,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "attribute": _attribute,
    "sum": _sum,
    "corners": _corners,
    "three": _three,
    "mixed": _mixed,
    "chain": _chain,
}


def make_prompt(kind: str, rng: random.Random) -> Prompt:
    """Make a random prompt, held out or not.

    Args:
        kind: one of `PROMPT_KINDS` or `FOREIGN_KINDS`.
        rng: the source of randomness.

    Returns:
        A prompt whose metadata are `kind`, `objects` (a list of `Wanted`), for the kind `position`
        the `relation`, and for the kind `sum` the `operand`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in _MAKERS:
        raise ValueError(
            f"unknown prompt kind {kind!r}; expected one of {PROMPT_KINDS + FOREIGN_KINDS}"
        )
    # The common choices come first for every kind, and the opening last.
    chosen = _Choices.sample(rng)
    request = _MAKERS[kind](chosen, rng)
    opening = ""
    # Three objects with an opening would not fit into 16 tokens, the usual prompt budget.
    if kind != "three":
        opening = rng.choice(OPENINGS)
    metadata = {"kind": kind, "objects": request.objects, **request.extra}
    return Prompt(opening + request.text, metadata)


def sample_prompts(kinds: Sequence[str], split: Split, count: int, seed: int) -> list[Prompt]:
    """Sample prompts of a split.

    Args:
        kinds: the kinds to draw from. The training split draws each prompt's kind at random, the
            test split takes them in turn.
        split: `train` or `test`.
        count: how many.
        seed: of all draws.
    """
    rng = random.Random(f"{split}-{seed}")
    found: list[Prompt] = []
    while len(found) < count:
        # Each kind is equally frequent in an evaluation, so that its accuracy can be compared.
        kind = kinds[len(found) % len(kinds)]
        if split != "test":
            kind = rng.choice(kinds)
        prompt = make_prompt(kind, rng)
        # About four of five proposals are training prompts.
        if is_held_out(prompt.text) == (split == "test"):
            found.append(prompt)
    return found
