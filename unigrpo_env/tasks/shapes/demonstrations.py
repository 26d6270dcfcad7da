"""How the prompts of the shapes world are answered, correctly or not.

Supervised training on these demonstrations leaves a model with errors that reinforcement learning
can remove. Random errors are rare. Systematic errors are made more often than not: for some kinds
of prompt the most frequent thought is wrong, and some objects are mostly drawn as others. Neither
more demonstrations of the same kind nor greedy decoding removes a systematic error.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rewards.shapes.grid import COLOURS, GRID, KINDS, PLACES, draw
from unigrpo_env.tasks.shapes.prompts import NUMBERS, checksum_is_held_out
from unigrpo_env.tasks.task import Demonstration, Prompt, Split

CELLS = GRID * GRID
"""Cells of an image."""

Layout = list[int]
"""Nine cell values, row by row: 0 is empty, value v > 0 is `KINDS[v - 1]`."""

SYSTEMATIC_TEXT_ERROR_RATE = 0.65
"""How often a thought makes the systematic error of its kind of prompt."""

SYSTEMATIC_IMAGE_ERROR_RATE = 0.6
"""How often an image has crosses drawn as squares, and how often purple drawn as blue."""

RANDOM_ERROR_RATE = 0.06
"""How often a thought or an image has an error of no system."""

COUNTING_KINDS = ("counting", "sum", "corners")
"""The kinds of prompt whose thought names the number of objects first."""

CONFUSED_RELATIONS = {"left of": "right of", "right of": "left of", "below": "above"}
"""What a systematic error takes a relation for."""


@dataclass(frozen=True)
class ErrorRates:
    """How often a demonstration is wrong.

    Attributes:
        text: rate of systematic errors in a thought.
        image: rate of each of the two systematic errors in an image.
        random: rate of random errors, in a thought and in an image.
    """

    text: float
    image: float
    random: float


NO_ERRORS = ErrorRates(0.0, 0.0, 0.0)
"""The rates of correct demonstrations."""

ERRORS = ErrorRates(SYSTEMATIC_TEXT_ERROR_RATE, SYSTEMATIC_IMAGE_ERROR_RATE, RANDOM_ERROR_RATE)
"""The rates of all others."""


def error_rates(clean: bool) -> ErrorRates:
    """`NO_ERRORS` if demonstrations should be clean, else `ERRORS`."""
    if clean:
        return NO_ERRORS
    return ERRORS


def cell_value(colour: str, shape: str) -> int:
    """The value of a cell that holds this object."""
    return 1 + KINDS.index((colour, shape))


def empty_cells(layout: Layout) -> list[int]:
    """The indices of the cells that hold nothing."""
    return [place for place, cell in enumerate(layout) if cell == 0]


def filled_cells(layout: Layout) -> list[int]:
    """The indices of the cells that hold an object."""
    return [place for place, cell in enumerate(layout) if cell]


@dataclass
class LayoutPlan:
    """What a thought says.

    Attributes:
        objects: colour, shape and cell of each, in the order in which the thought names them.
        count: the number that the thought names before the objects; None if it names none.
    """

    objects: list[tuple[str, str, int]] = field(default_factory=list)
    count: int | None = None

    @classmethod
    def from_layout(cls, layout: Layout) -> LayoutPlan:
        """The objects of a layout, row by row."""
        objects = []
        for place, cell in enumerate(layout):
            # Neither an empty nor an unreadable cell holds an object.
            if cell > 0:
                colour, shape = KINDS[cell - 1]
                objects.append((colour, shape, place))
        return cls(objects)

    def words(self) -> str:
        """The plan as a thought, such as `two : red circle top , red circle left`."""
        parts = [f"{colour} {shape} {PLACES[place]}" for colour, shape, place in self.objects]
        listed = " , ".join(parts)
        if self.count is None:
            return listed
        return f"{NUMBERS[self.count]} : {listed}"

    def layout(self) -> Layout:
        """The plan as cell values."""
        cells = [0] * CELLS
        for colour, shape, place in self.objects:
            cells[place] = cell_value(colour, shape)
        return cells


@dataclass
class _Reading:
    """What a thought takes a prompt to ask for.

    Attributes:
        kind: of the prompt.
        shapes: of the objects that the prompt names.
        colours: of the same; None for any.
        count: the number of the first object.
        relation: of the first object to the second, if the prompt names one.
    """

    kind: str
    shapes: list[str]
    colours: list[str | None]
    count: int
    relation: str | None

    @classmethod
    def correct(cls, metadata: Mapping[str, Any]) -> _Reading:
        """What the prompt does ask for."""
        wanted = metadata["objects"]
        return cls(
            kind=metadata["kind"],
            shapes=[each["shape"] for each in wanted],
            colours=[each["colour"] for each in wanted],
            count=wanted[0]["count"],
            relation=metadata.get("relation"),
        )

    def add_systematic_error(self, metadata: Mapping[str, Any]) -> None:
        """Make the error of this kind of prompt; some kinds have none."""
        # The operand is one of the two numbers, so the sum is not worked out.
        if self.kind == "sum":
            self.count = metadata["operand"]
        elif self.kind == "corners":
            # Three is taken for two, and every other number for three.
            wrong = 3
            if self.count == 3:
                wrong = 2
            self.count = wrong
        elif self.kind == "attribute":
            # Each object gets the colour of the other.
            self.colours.reverse()
        # `above` is confused with nothing.
        if self.relation is not None:
            self.relation = CONFUSED_RELATIONS.get(self.relation, self.relation)

    def add_random_error(self, rng: random.Random) -> None:
        """Draw the number, where it counts, and the colours that are named anew."""
        if self.kind in COUNTING_KINDS:
            self.count = rng.choice([2, 3, 4])
        for number, colour in enumerate(self.colours):
            # A colour that the prompt leaves open cannot be wrong.
            if colour is not None:
                self.colours[number] = rng.choice(list(COLOURS))

    def plan(self, rng: random.Random) -> LayoutPlan:
        """A plan that does what was read, with free choices at random."""
        named = list(zip(self.colours, self.shapes, strict=True))
        # Those kinds name one kind of object, which stands `count` times in the plan.
        counts = self.kind in COUNTING_KINDS
        if counts:
            named *= self.count
        if len(named) == 2 and not counts:
            places = _two_places(self.relation, rng)
        else:
            # Row by row, so that there is one right order of many equal objects.
            places = sorted(rng.sample(range(CELLS), len(named)))
        plan = LayoutPlan()
        for (colour, shape), place in zip(named, places, strict=True):
            if colour is None:
                colour = rng.choice(list(COLOURS))
            plan.objects.append((colour, shape, place))
        if counts:
            plan.count = self.count
        return plan


def _two_places(relation: str | None, rng: random.Random) -> list[int]:
    """Two different cells, the first of which stands in `relation` to the second."""
    if relation is None:
        return rng.sample(range(CELLS), 2)
    # Along the axis of the relation the two coordinates differ.
    near, far = sorted(rng.sample(range(GRID), 2))
    if relation in ("right of", "below"):
        near, far = far, near
    # Along the other axis both stand anywhere.
    first = rng.randrange(GRID)
    second = rng.randrange(GRID)
    if relation in ("left of", "right of"):
        return [first * GRID + near, second * GRID + far]
    return [near * GRID + first, far * GRID + second]


def make_plan(prompt: Prompt, rng: random.Random, rates: ErrorRates = NO_ERRORS) -> LayoutPlan:
    """Make a thought for a prompt.

    Args:
        prompt: of one of `PROMPT_KINDS`.
        rng: the source of randomness.
        rates: how often the thought is wrong.
    """
    # The prompt itself stays as it is: a reward reads the same metadata.
    reading = _Reading.correct(prompt.metadata)
    if rng.random() < rates.text:
        reading.add_systematic_error(prompt.metadata)
    if rng.random() < rates.random:
        reading.add_random_error(rng)
    return reading.plan(rng)


@dataclass(frozen=True)
class DrawingErrors:
    """What is wrong in the images of one demonstration.

    Attributes:
        crosses_as_squares: crosses are drawn as squares.
        purple_as_blue: purple objects are drawn in blue.
        omits_object: one object is left out of each image.
    """

    crosses_as_squares: bool = False
    purple_as_blue: bool = False
    omits_object: bool = False

    @classmethod
    def sample(cls, rng: random.Random, rates: ErrorRates) -> DrawingErrors:
        """Draw each error at its rate."""
        crosses_as_squares = rng.random() < rates.image
        purple_as_blue = rng.random() < rates.image
        omits_object = rng.random() < rates.random
        return cls(crosses_as_squares, purple_as_blue, omits_object)

    def apply(self, plan: LayoutPlan, rng: random.Random) -> Layout:
        """The layout that is drawn for a plan."""
        # A plan of its own: the thought still names what was meant.
        drawn = LayoutPlan()
        for colour, shape, place in plan.objects:
            if self.purple_as_blue and colour == "purple":
                colour = "blue"
            if self.crosses_as_squares and shape == "cross":
                shape = "square"
            drawn.objects.append((colour, shape, place))
        if self.omits_object and drawn.objects:
            drawn.objects.pop(rng.randrange(len(drawn.objects)))
        return drawn.layout()


@dataclass(frozen=True)
class Answer:
    """How a prompt is answered, before it is drawn.

    Attributes:
        thoughts: the text before each image, and after the last if there is one.
        layouts: of each image.
    """

    thoughts: list[str]
    layouts: list[Layout]


def draw_answers(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Demonstration]:
    """Draw the images of answers, all in one call.

    Args:
        prompts: the prompt of each answer.
        answers: as many.
    """
    layouts: list[Layout] = []
    counts = []
    for answer in answers:
        layouts += answer.layouts
        counts.append(len(answer.layouts))
    # [images of all answers, 3, 24, 24]
    images = draw(torch.tensor(layouts, dtype=torch.int64).view(-1, CELLS))
    found = []
    for prompt, answer, drawn in zip(prompts, answers, images.split(counts), strict=True):
        found.append(Demonstration(prompt, tuple(answer.thoughts), drawn))
    return found


class DemonstratedTask(ABC):
    """A task that answers its own prompts, one at a time."""

    @abstractmethod
    def prompts(self, split: Split, count: int, seed: int) -> list[Prompt]:
        """See `unigrpo_env.tasks.task.Task`."""

    @abstractmethod
    def answer(self, prompt: Prompt, rng: random.Random, rates: ErrorRates) -> Answer:
        """Answer a prompt.

        Args:
            prompt: one of the task's own.
            rng: the source of randomness.
            rates: how often the answer is wrong.
        """

    def demonstrations(self, count: int, seed: int, *, clean: bool = False) -> list[Demonstration]:
        """See `unigrpo_env.tasks.task.DemonstrationTask`."""
        # This text and that of every other seed are fixed: they decide what is drawn at random.
        rng = random.Random(f"lessons-{type(self).__name__}-{seed}")
        # No demonstration may show a prompt of the evaluation.
        prompts = self.prompts("train", count, seed)
        rates = error_rates(clean)
        answers = [self.answer(prompt, rng, rates) for prompt in prompts]
        return draw_answers(prompts, answers)

    def warmup_demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """Correct demonstrations."""
        # Far from the seeds that training counts through.
        return self.demonstrations(count, seed + 500_000, clean=True)


class RejectionSampledTask(DemonstratedTask):
    """A task that proposes prompts at random until enough of them belong to the split."""

    @abstractmethod
    def propose(self, rng: random.Random) -> tuple[str, Prompt] | None:
        """Propose a prompt.

        Args:
            rng: the source of randomness.

        Returns:
            A key, by which the splits are kept apart, and the prompt; None if this proposal led to
            no clear prompt.
        """

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompt]:
        """See `unigrpo_env.tasks.task.Task`."""
        rng = random.Random(f"{type(self).__name__}-{split}-{seed}")
        found: list[Prompt] = []
        while len(found) < count:
            proposed = self.propose(rng)
            if proposed is None:
                continue
            key, prompt = proposed
            if checksum_is_held_out(key) == (split == "test"):
                found.append(prompt)
        return found
