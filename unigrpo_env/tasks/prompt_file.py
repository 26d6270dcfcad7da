"""Prompts from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from torch import Tensor

from rewards.image_bytes import read_image
from unigrpo_env.tasks.task import Prompt, Split


class PromptFile:
    """A task whose prompts are the lines of a file.

    In a text file each line is a prompt. In a `.jsonl` file each line is a JSON object with
    `prompt`, the text; `sources`, a list of image files, whose paths are relative to the prompt
    file; and `turns`, what the user says after each image. Both lists may be left out. All other
    keys become metadata. Empty lines are left out, and equal lines count once.

    Args:
        path: the file.
        test_path: a second file whose prompts are kept for evaluation. A line that stands in both
            files is left out of training.
        test_share: without a second file, the share of the lines that is kept for evaluation. They
            are taken evenly, at least one. The only line of a file serves both splits.

    Raises:
        ValueError: a missing or empty file, a line that is no prompt, a source that cannot be read,
            or a share that is not between 0 and 1.
    """

    def __init__(
        self,
        path: str | Path,
        test_path: str | Path | None = None,
        test_share: float = 0.1,
    ) -> None:
        if not 0 < test_share < 1:
            raise ValueError(f"expected test_share between 0 and 1, got {test_share}")
        # Everything is read and checked now, before a long run begins.
        self._splits: dict[Split, list[Prompt]]
        if test_path is None:
            self._splits = _split_evenly(read_prompts(path), test_share)
        else:
            self._splits = _split_by_file(Path(path), Path(test_path))

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompt]:
        """Sample without replacement, and begin again when all prompts of the split are used.

        Args:
            split: `train` or `test`.
            count: how many.
            seed: of the order.
        """
        known = self._splits[split]
        # Each pass over the prompts has its own order.
        rng = random.Random(f"{split}-{seed}")
        found: list[Prompt] = []
        while len(found) < count:
            found += rng.sample(known, len(known))
        return found[:count]


def read_prompts(path: str | Path) -> list[Prompt]:
    """All different prompts of a file, in its order; `PromptFile` says what it may contain.

    Raises:
        ValueError: as for `PromptFile`.
    """
    return list(_prompts_by_key(Path(path)).values())


def _split_evenly(prompts: list[Prompt], test_share: float) -> dict[Split, list[Prompt]]:
    """Every n-th prompt for evaluation, the others for training."""
    # With every prompt for evaluation there would be none to train on.
    every = max(2, round(1 / test_share))
    test = prompts[::every]
    train = [prompt for number, prompt in enumerate(prompts) if number % every]
    return {"train": train or test, "test": test}


def _split_by_file(path: Path, test_path: Path) -> dict[Split, list[Prompt]]:
    """One file for each split; what stands in both is for evaluation alone."""
    test = _prompts_by_key(test_path)
    train = []
    for key, prompt in _prompts_by_key(path).items():
        if key not in test:
            train.append(prompt)
    if not train:
        raise ValueError(
            f"expected prompts in {path} that are not in {test_path}, got none; "
            "leave test_path out, or give two different files"
        )
    return {"train": train, "test": list(test.values())}


def _prompts_by_key(path: Path) -> dict[Hashable, Prompt]:
    """The prompts of a file under keys that are equal for equal prompts, in its order."""
    if not path.is_file():
        raise ValueError(f"expected a prompt file, found none at {path}; check the path")
    try:
        # Some editors write a byte order mark, which is no part of the first prompt.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a text file in UTF-8 at {path}, got: {error}") from error
    reader = _LineReader(path)
    seen: set[str] = set()
    found: dict[Hashable, Prompt] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        # An equal line needs no second reading of its images.
        if not line or line in seen:
            continue
        seen.add(line)
        prompt = reader.read(line, number)
        # The same path in two folders names two images.
        folder = None
        if prompt.sources:
            folder = path.parent.resolve()
        found[line, folder] = prompt
    if not found:
        raise ValueError(
            f"expected at least one prompt in {path}, got an empty file; write one prompt a line"
        )
    return found


class _LineReader:
    """Turns the lines of a file into prompts. An image that several lines name is read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._images: dict[str, Tensor] = {}

    def read(self, line: str, number: int) -> Prompt:
        """The prompt in a line; its number is for error messages."""
        if self._path.suffix != ".jsonl":
            return Prompt(line)
        where = f"{self._path} line {number}"
        # Whatever is not taken out of the object is metadata for the reward.
        fields = _parse_object(line, where)
        text = fields.pop("prompt")
        turns = _pop_texts(fields, "turns", "what the user says after each image", where)
        sources = _pop_texts(fields, "sources", "paths of image files", where)
        images = [self._read_source(source, where) for source in sources]
        return Prompt(text, fields, sources=tuple(images), turns=tuple(turns))

    def _read_source(self, source: str, where: str) -> Tensor:
        """An image file, relative to the prompt file, as `[3, height, width]` float32."""
        if source not in self._images:
            try:
                self._images[source] = read_image(self._path.parent / source)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        return self._images[source]


def _parse_object(line: str, where: str) -> dict[str, Any]:
    """A line as a JSON object whose `prompt` is a text."""
    message = f'{where}: expected a JSON object with a "prompt", a text; got {line[:60]!r}'
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{message} ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ValueError(message)
    return fields


def _pop_texts(fields: dict[str, Any], key: str, meaning: str, where: str) -> list[str]:
    """Take a list of texts out of an object; an empty one if the key is missing."""
    texts = fields.pop(key, [])
    if not isinstance(texts, list):
        raise ValueError(
            f'{where}: expected "{key}" to be a list, {meaning}; '
            f"got {type(texts).__name__}: {texts!r:.60}"
        )
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f'{where}: expected texts in "{key}", {meaning}; '
                f"got {type(text).__name__}: {text!r:.60}"
            )
    return texts
