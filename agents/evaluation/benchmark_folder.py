"""The images of a benchmark on disk, in the layout that GenEval's own scorer reads.

    00000/metadata.jsonl        the prompt and its metadata: a line of the prompt file
    00000/samples/0000.png      the first image for it
    00000/thoughts/0000.json    what the model wrote before it
    settings.json               how the images were drawn
    scores.jsonl                a line for each image and scorer

The official scorer passes over the files that it does not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from agents.storage import read_json_object, write_json
from rewards import EpisodeBatch
from rewards.image_bytes import read_image
from unigrpo_env.rendering import to_pixels
from unigrpo_env.tasks.task import Prompt, make_batch


class Slot(NamedTuple):
    """The place of one image.

    Attributes:
        sample: its number among the images of the prompt.
        prompt: the number of the prompt.
    """

    sample: int
    prompt: int


class BenchmarkFolder:
    """A folder of images that a later call can complete.

    Args:
        path: the folder; it is made when something is written.
        prompts: what is drawn.
        samples: images of each prompt.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], samples: int) -> None:
        self.path = path
        self.prompts = list(prompts)
        # All prompts once before any is drawn again: an early look then says something of each.
        self.slots = [
            Slot(sample, prompt) for sample in range(samples) for prompt in range(len(prompts))
        ]

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Note how the images are drawn, or check it against what was noted.

        Args:
            settings: by name, values of JSON. The prompts are added.

        Raises:
            ValueError: the folder holds images that were drawn otherwise.
        """
        path = self.path / "settings.json"
        # As JSON gives it back, where a tuple is a list.
        wanted = json.loads(json.dumps({**settings, "prompts": _digest(self.prompts)}))
        if path.is_file():
            noted = read_json_object(path)
            names = sorted(noted.keys() | wanted.keys())
            others = [name for name in names if noted.get(name) != wanted.get(name)]
            if others:
                name = others[0]
                raise ValueError(
                    f"expected {self.path} to hold images of the same settings, but "
                    f"{', '.join(others)} differ: {name} was {noted.get(name)!r} and is "
                    f"{wanted.get(name)!r}; choose another folder with --out, or remove that one"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for number, prompt in enumerate(self.prompts):
            self._folder(number).mkdir(exist_ok=True)
            line = {**prompt.metadata, "prompt": prompt.text}
            # One object in one line, without an end of line, as the official generator writes it.
            (self._folder(number) / "metadata.jsonl").write_text(json.dumps(line))
        # Last, so that a folder with settings has all metadata.
        write_json(wanted, path)

    def missing(self) -> list[Slot]:
        """The places that have no image yet."""
        return [slot for slot in self.slots if not self._thoughts(slot).is_file()]

    def save(self, slot: Slot, image: Tensor, thoughts: Sequence[str], drawn: int) -> None:
        """Write an image and what came before it.

        Args:
            slot: its place.
            image: `[3, height, width]` in [0, 1]; black if none was drawn.
            thoughts: the texts of the episode.
            drawn: how many images the episode drew.
        """
        path = self.image_path(slot)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        Image.fromarray(to_pixels(image)).save(part, format="PNG")
        part.replace(path)
        # Last: a place counts as done with this file.
        self._thoughts(slot).parent.mkdir(exist_ok=True)
        write_json({"thoughts": list(thoughts), "images": drawn}, self._thoughts(slot))

    def read(self, slots: Sequence[Slot]) -> tuple[EpisodeBatch, list[bool]]:
        """Episodes as a reward sees them, from what is on disk.

        Args:
            slots: places that have an image, all of one size.

        Returns:
            The episodes, and which of them drew an image.

        Raises:
            ValueError: a file that is missing or broken.
        """
        prompts = [self.prompts[slot.prompt] for slot in slots]
        notes = [read_json_object(self._thoughts(slot)) for slot in slots]
        # [1, 3, height, width] each: of several images the last is kept.
        images = [read_image(self.image_path(slot))[None] for slot in slots]
        batch = make_batch(prompts, [note["thoughts"] for note in notes], images)
        return batch, [note["images"] > 0 for note in notes]

    def scores(self, scorer: str) -> dict[Slot, dict[str, Any]]:
        """What a scorer has said so far, by place; those beyond `samples` are left out.

        Args:
            scorer: its name.
        """
        path = self.path / "scores.jsonl"
        if not path.is_file():
            return {}
        wanted = set(self.slots)
        found = {}
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            # The last line is cut off where the process was killed; its image is scored again.
            except ValueError:
                continue
            slot = Slot(line["sample"], line["index"])
            if line["scorer"] == scorer and slot in wanted:
                found[slot] = line
        return found

    def add_scores(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write what a scorer said.

        Args:
            lines: with `scorer`, `index` of the prompt and `sample` each, and what else is known.
        """
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path = self.path / "scores.jsonl"
        # A line that was cut off must not swallow the next one.
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            text = "\n" + text
        with path.open("a") as file:
            file.write(text)

    def image_path(self, slot: Slot) -> Path:
        """The file of an image.

        Args:
            slot: its place.
        """
        return self._folder(slot.prompt) / "samples" / f"{slot.sample:04}.png"

    def _thoughts(self, slot: Slot) -> Path:
        return self._folder(slot.prompt) / "thoughts" / f"{slot.sample:04}.json"

    def _folder(self, prompt: int) -> Path:
        return self.path / f"{prompt:05}"


def _digest(prompts: Sequence[Prompt]) -> str:
    """A text that is the same for the same prompts in the same order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        line = [prompt.text, dict(prompt.metadata), prompt.turns]
        digest.update(json.dumps(line, sort_keys=True).encode())
        for source in prompt.sources:
            digest.update(to_pixels(source).tobytes())
    return digest.hexdigest()[:16]
