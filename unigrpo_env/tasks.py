"""Where prompts come from."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from rewards import EpisodeBatch

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Prompt:
    """What an episode is asked for.

    Attributes:
        text: what the model reads.
        metadata: what only the reward may see.
        sources: pictures that the model reads before the text, `[3, height, width]` float32 in [0, 1] each.
        turns: what the user says after each picture, in variants where they speak.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Tensor, ...] = field(default=(), compare=False)
    turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lesson:
    """How a prompt is answered, well or badly: an episode to be imitated.

    Attributes:
        prompt: what was asked; None: nothing is read.
        thoughts: the words before each picture, and one more entry if words end the episode; a None is left out.
        pictures: `[R, 3, height, width]` float32 in [0, 1], at least one.
    """

    prompt: Prompt | None
    thoughts: tuple[str | None, ...]
    pictures: Tensor

    def silent(self) -> Lesson:
        """The same pictures without a word."""
        return replace(self, thoughts=(None,) * len(self.pictures))

    def unprompted(self) -> Lesson:
        """The first picture after nothing: what guidance steers away from."""
        return Lesson(None, (None,), self.pictures[:1])


def join_rounds(said: Iterable[str]) -> str:
    """The words of all rounds as one text."""
    return " ".join(filter(None, said))


def batch_of(prompts: Sequence[Prompt], rounds: list[list[str]], pictures: list[Tensor]) -> EpisodeBatch:
    """Episodes as a reward sees them: what was asked, said and drawn so far."""
    return EpisodeBatch(
        prompts=[prompt.text for prompt in prompts],
        texts=[join_rounds(said) for said in rounds],
        images=torch.stack([drawn[-1] if len(drawn) else drawn.new_zeros(drawn.shape[1:]) for drawn in pictures]),
        metadata=[prompt.metadata for prompt in prompts],
        pictures=pictures,
        rounds=rounds,
        sources=[
            torch.stack(list(prompt.sources)) if prompt.sources else drawn[:0] for prompt, drawn in zip(prompts, pictures, strict=True)
        ],
    )


def episodes_of(lessons: Sequence[Lesson]) -> EpisodeBatch:
    """Lessons as a reward would see them, had a model played them."""
    rounds = [[thought or "" for thought in lesson.thoughts] for lesson in lessons]
    return batch_of([cast(Prompt, lesson.prompt) for lesson in lessons], rounds, [lesson.pictures for lesson in lessons])


class Task(Protocol):
    """A source of prompts. One that can also teach has `lessons`; see `Teacher`."""

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompt]:
        """`count` prompts of a split; the same arguments give the same prompts, and the two splits share none."""


class Teacher(Task, Protocol):
    """A task that can also show how it is done."""

    def lessons(self, count: int, seed: int, *, clean: bool = False) -> list[Lesson]:
        """`count` lessons on training prompts; `clean` for flawless ones."""

    def drills(self, count: int, seed: int) -> list[Lesson]:
        """Flawless lessons to begin with."""


class PromptFile:
    """Prompts from a text file, one a line, or a `.jsonl` file of `{"prompt": ..., ...}` whose other keys become metadata.

    Args:
        path: the file.
        test_share: the share of different lines, taken evenly, that is kept for evaluation (at least one; a file of one line serves both).

    Raises:
        ValueError: no such file, an empty file, or a line that is no prompt.
    """

    def __init__(self, path: str | Path, test_share: float = 0.1) -> None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"expected a prompt file, found none at {path}; check the path")
        lines = [line.strip() for line in path.read_text().splitlines()]
        numbered = {line: number for number, line in reversed(list(enumerate(lines, 1))) if line}
        prompts = [self._parse(line, path, number) for line, number in sorted(numbered.items(), key=lambda entry: entry[1])]
        if not prompts:
            raise ValueError(f"expected at least one prompt in {path}, got an empty file; write one prompt a line")
        every = max(2, round(1 / test_share))
        held_out = prompts[::every]
        self._splits = {"train": [p for i, p in enumerate(prompts) if i % every] or held_out, "test": held_out}

    @staticmethod
    def _parse(line: str, path: Path, number: int) -> Prompt:
        if path.suffix != ".jsonl":
            return Prompt(line)
        try:
            fields = json.loads(line)
            text = fields.pop("prompt")
            if not isinstance(text, str):
                raise TypeError
            return Prompt(text, fields)
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f'{path} line {number}: expected a JSON object with a "prompt", got {line[:60]!r}') from error

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompt]:
        known = self._splits[split]
        rng = random.Random(f"{split}-{seed}")
        rounds = -(-count // len(known))
        return [prompt for _ in range(rounds) for prompt in rng.sample(known, len(known))][:count]
