"""Prompts in GenEval's form, for training that must not see the public ones."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.geneval.names import CLASSES, COLOURS, POSITIONS
from rewards.geneval.verifier import check_form
from unigrpo_env.tasks.prompt_file import read_prompts
from unigrpo_env.tasks.task import Prompt, Split

COUNTS = {2: "two", 3: "three", 4: "four"}
"""The counts of GenEval's prompts."""

# Its prompts give a person no colour.
COLOURED = tuple(name for name in CLASSES if name != "person")
"""The classes that GenEval's prompts give a colour."""

TEST_SHARE = 10
"""Without a file of public prompts, one prompt of so many is kept for evaluation."""

OPPOSITES = {"right of": "left of", "below": "above"}
"""Positions that say the same as another one, if the objects change places."""


class GenEvalPrompts:
    """A task that makes prompts from GenEval's classes and its six templates.

    The metadata of a prompt has the form of GenEval's file, which the reward `geneval` reads.

    No prompt of the given file is used for training, nor one that asks for the same: "a photo of a
    cup and a fork" is left out where the file has "a photo of a fork and a cup". GenEval's own file
    has all prompts of one object, so none of them is left to train on.

    Args:
        public: file of the prompts that are kept for evaluation, such as GenEval's
            `evaluation_metadata.jsonl`. If left out, a tenth of all prompts is kept.
        weights: how often each kind of prompt (GenEval's tag) is drawn for training, relative to
            the others; kinds that are left out are not drawn. By default all that have a prompt
            left are drawn equally often.

    Raises:
        ValueError: a file that cannot be read or has other metadata; an unknown kind, a weight that
            is not positive, or a kind of which no prompt is left.
    """

    def __init__(
        self, public: str | Path | None = None, weights: Mapping[str, float] | None = None
    ) -> None:
        self._public: list[Prompt] = []
        self._has_file = public is not None
        if public is not None:
            self._public = read_prompts(public)
        self._texts = {prompt.text for prompt in self._public}
        self._meanings = set()
        for prompt in self._public:
            # A file of texts alone says nothing of their objects.
            if prompt.metadata:
                check_form(prompt.metadata)
                self._meanings.add(_meaning(prompt.metadata))
        left = [tag for tag, template in TEMPLATES.items() if self._is_left(template)]
        if weights is None:
            weights = dict.fromkeys(left, 1.0)
        if not weights:
            raise ValueError(f"expected a weight of one of {left} or more, got none")
        for tag, weight in weights.items():
            if tag not in left or not weight > 0:
                raise ValueError(
                    f"expected weights above 0 of kinds that have prompts left, {left}, "
                    f"got {tag!r} with {weight}; leave it out"
                )
        self._weights = dict(weights)

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompt]:
        """Draw prompts; those of a file without replacement, until all are used.

        Args:
            split: `train` or `test`.
            count: how many.
            seed: of the choice.
        """
        rng = random.Random(f"{split}-{seed}")
        if split == "test" and self._has_file:
            found: list[Prompt] = []
            while len(found) < count:
                found += rng.sample(self._public, len(self._public))
            return found[:count]
        tags = rng.choices(list(self._weights), list(self._weights.values()), k=count)
        return [self._draw(TEMPLATES[tag], split, rng) for tag in tags]

    def _draw(self, template: _Template, split: Split, rng: random.Random) -> Prompt:
        """A prompt of a kind and a split."""
        # There is one, or the kind would have no weight.
        while True:
            prompt = template.prompt([rng.choice(options) for options in template.options])
            if prompt is not None and self.split_of(prompt) == split:
                return prompt

    def split_of(self, prompt: Prompt) -> Split:
        """The split that a prompt belongs to, whatever the seed.

        Args:
            prompt: with metadata in GenEval's form.
        """
        meaning = _meaning(prompt.metadata)
        if self._has_file:
            is_public = prompt.text in self._texts or meaning in self._meanings
            return "test" if is_public else "train"
        # Python's own hash of a text differs from process to process.
        number = zlib.crc32(repr(meaning).encode())
        return "train" if number % TEST_SHARE else "test"

    def _is_left(self, template: _Template) -> bool:
        """Whether a kind has a prompt for training."""
        return any(self.split_of(prompt) == "train" for prompt in template.all_prompts())


def _meaning(wanted: Mapping[str, Any]) -> Hashable:
    """A key that is equal for prompts which ask for the same, whatever the order of objects."""
    # The number of objects at most is part of a prompt's meaning too.
    objects = [*wanted.get("include", ()), *wanted.get("exclude", ())]
    names = [(entry["class"], entry.get("count"), entry.get("color")) for entry in objects]
    position = None
    for index, entry in enumerate(objects):
        if "position" in entry:
            position, target = entry["position"]
            pair = (names[index], names[target])
            if position in OPPOSITES:
                position = OPPOSITES[position]
                pair = pair[::-1]
            position = (position, pair)
    # `None` and a text cannot be compared, so the key of the order is a text.
    return tuple(sorted(names, key=str)), position


@dataclass(frozen=True)
class _Template:
    """One kind of prompts.

    Attributes:
        tag: GenEval's name of the kind.
        options: what each of its blanks can be.
        write: makes the prompt's text and its `include` of what the blanks are; None where they
            cannot stand together.
    """

    tag: str
    options: tuple[Sequence[Any], ...]
    write: Callable[..., tuple[str, list[dict[str, Any]]] | None]

    def prompt(self, blanks: Sequence[Any]) -> Prompt | None:
        """The prompt with these blanks, if there is one."""
        written = self.write(*blanks)
        if written is None:
            return None
        text, include = written
        metadata: dict[str, Any] = {"tag": self.tag, "include": include}
        if self.tag == "counting":
            (only,) = include
            metadata["exclude"] = [{"class": only["class"], "count": only["count"] + 1}]
        return Prompt(f"a photo of {text}", metadata)

    def all_prompts(self) -> Iterator[Prompt]:
        """All prompts of the kind, one by one."""
        for blanks in itertools.product(*self.options):
            prompt = self.prompt(blanks)
            if prompt is not None:
                yield prompt


Written = tuple[str, list[dict[str, Any]]]


def _one(name: str, **more: Any) -> dict[str, Any]:
    """An entry of `include`."""
    return {"class": name, "count": 1, **more}


def _with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _single_object(name: str) -> Written:
    return _with_article(name), [_one(name)]


def _two_object(first: str, second: str) -> Written | None:
    if first == second:
        return None
    return f"{_with_article(first)} and {_with_article(second)}", [_one(first), _one(second)]


def _counting(name: str, count: int) -> Written:
    # GenEval's own rule: its file asks for "knifes" and "benchs", and a model is measured on those.
    ending = "es" if name.endswith("s") else "s"
    return f"{COUNTS[count]} {name}{ending}", [{"class": name, "count": count}]


def _colors(name: str, colour: str) -> Written:
    return _with_article(f"{colour} {name}"), [_one(name, color=colour)]


def _position(first: str, position: str, second: str) -> Written | None:
    if first == second:
        return None
    text = f"{_with_article(first)} {position} {_with_article(second)}"
    # In GenEval's file the object to which the other stands comes first.
    return text, [_one(second), _one(first, position=[position, 0])]


def _color_attr(first: str, colour: str, second: str, other: str) -> Written | None:
    if first == second or colour == other:
        return None
    text = f"{_with_article(f'{colour} {first}')} and {_with_article(f'{other} {second}')}"
    return text, [_one(first, color=colour), _one(second, color=other)]


TEMPLATES = {
    "single_object": _Template("single_object", (CLASSES,), _single_object),
    "two_object": _Template("two_object", (CLASSES, CLASSES), _two_object),
    "counting": _Template("counting", (CLASSES, tuple(COUNTS)), _counting),
    "colors": _Template("colors", (COLOURED, COLOURS), _colors),
    "position": _Template("position", (CLASSES, POSITIONS, CLASSES), _position),
    "color_attr": _Template("color_attr", (COLOURED, COLOURS, COLOURED, COLOURS), _color_attr),
}
"""The six kinds of prompts by GenEval's tags."""
