"""Is the text that a prompt asks for legible in its image?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.base import EpisodeBatch, Failures, Scores
from rewards.image_bytes import image_bytes
from rewards.scorer import LazyReward

# Each pair of quotation marks. A straight mark after a digit is an inch. The mark that closes
# ‘...’ is also the apostrophe, which stands before a letter.
_QUOTED = re.compile(
    r'(?<!\d)"([^"]*)"'
    r'|(?<!\d)[“”]([^“”"]*)[”"]'
    r"|„([^„“”]*)[“”]"
    r"|«([^«»]*)»"
    r"|‘((?:[^‘’]|’(?=\w))*)’"
    r"|「([^「」]*)」"
)


class NoTargetError(ValueError):
    """Nothing says which text an image must show.

    Args:
        message: what was expected and what there is.
        kind: by which it is counted.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Ocr(LazyReward):
    """Reads each image and compares the reading with the text that the prompt asks for.

    The score is that of Flow-GRPO (arXiv 2505.05470), see `legibility`. Because a target inside a
    longer reading counts as read, look at `exact` and `read_length` too. Text upside down is not
    read. An episode without a target, or whose image cannot be read, has no score.

    The models are those in the wheel of `rapidocr` 3.10 (PP-OCRv6 small), so nothing is
    downloaded.

    Args:
        target: the key of the metadata that holds the text; None takes the first quoted text of
            the prompt.
        side: an image whose shorter side has fewer pixels is enlarged to it before text is
            looked for.
        line_width: each line of text, scaled to a height of 48, is padded to at least this
            width. 96 halves the time of short words and reads disturbed ones a little worse.
        confidence: a line is left out if the model is less sure of it, in [0, 1].
        threads: images that are read at the same time, one thread each.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        *,
        target: str | None = None,
        side: int = 160,
        line_width: int = 320,
        confidence: float = 0.5,
        threads: int = 1,
    ) -> None:
        _check_least("side", side, 32)
        _check_least("line_width", line_width, 48)
        _check_least("threads", threads, 1)
        if not isinstance(confidence, (int, float)) or not 0 <= confidence <= 1:
            raise ValueError(
                "expected the option 'confidence' of reward 'ocr' to be a number from 0 to 1, "
                f"got {confidence!r}"
            )
        self.target = target
        self.side = side
        self.line_width = line_width
        self.confidence = confidence
        self.threads = threads

    def load(self) -> Any:
        """Build the engine and let it read one image, so that all its models are there.

        Raises:
            ImportError: rapidocr or onnxruntime is missing.
        """
        try:
            # rapidocr asks for it only when it reads.
            import onnxruntime  # noqa: F401
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                f"reward 'ocr' needs {error.name}; install it with: pip install 'unigrpo[ocr]'"
            ) from error
        params = {
            "Global.log_level": "critical",
            "Global.text_score": self.confidence,
            # It turns lines that are upside down, which the prompts do not ask for.
            "Global.use_cls": False,
            "Det.limit_side_len": self.side,
            "Rec.rec_img_shape": [3, 48, self.line_width],
            # Of its own accord it takes all cores.
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        engine = RapidOCR(params=params)
        engine(_sample())
        return engine

    def read(self, image: Tensor) -> str:
        """The text in an image, its lines from top to bottom with blanks between them.

        Args:
            image: `[3, height, width]` float in [0, 1].

        Raises:
            ValueError: the image has another shape, no pixel, or pixels that are not finite.
            ImportError: rapidocr or onnxruntime is missing.
        """
        # The engine takes blue first.
        pixels = np.ascontiguousarray(image_bytes(image)[:, :, ::-1])
        lines = self.loaded(pixels).txts
        if lines is None:
            return ""
        return " ".join(lines)

    def __call__(self, episodes: EpisodeBatch) -> Scores:
        """Score a batch of episodes.

        Args:
            episodes: what to score; `images`, and `prompts` or `metadata`, are used.

        Returns:
            The reward, and the components `exact`, 1 where the reading is the target and nothing
            else, and `read_length`, the characters of the reading. `[N]` float32 each, NaN where
            there is no target or the image could not be read.

        Raises:
            ImportError: rapidocr or onnxruntime is missing.
        """
        # Before the samples, whose errors are theirs alone: without an engine none has a score.
        _ = self.loaded
        samples = (episodes.prompts, episodes.metadata, episodes.images)
        if self.threads == 1:
            outcomes = list(map(self._outcome, *samples))
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                outcomes = list(pool.map(self._outcome, *samples))
        # [N, 3]
        table = torch.full((len(episodes), 3), torch.nan)
        errors = []
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, Exception):
                errors.append(outcome)
            else:
                table[index] = torch.tensor(outcome)
        reward, exact, read_length = table.unbind(1)
        components = {"exact": exact, "read_length": read_length}
        return Scores(reward, components, Failures.of(errors))

    def _outcome(
        self, prompt: str, metadata: Mapping[str, Any], image: Tensor
    ) -> tuple[float, float, float] | Exception:
        """Score, exactness and length of one reading, or what kept it from being scored."""
        try:
            target = plain(self._target_text(prompt, metadata))
            reading = plain(self.read(image))
        # Whatever the engine raises on one image says nothing of the others.
        except Exception as error:
            return error
        return legibility(reading, target), float(reading == target), float(len(reading))

    def _target_text(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """The text that the image must show."""
        if self.target is None:
            text = quoted_text(prompt)
            if text is None:
                raise NoTargetError(
                    f'expected a quoted text in the prompt, such as a sign that says "tea", got '
                    f"{prompt!r}; or name the key of the metadata that holds the text with the "
                    "option 'target' of reward 'ocr'",
                    kind="no quoted text",
                )
            return text
        text = metadata.get(self.target)
        if text is None or not plain(str(text)):
            raise NoTargetError(
                f"expected the text for reward 'ocr' in the metadata under {self.target!r}, got "
                f"{dict(metadata)!r} for the prompt {prompt!r}",
                kind=f"no {self.target!r} in metadata",
            )
        return str(text)


def quoted_text(prompt: str) -> str | None:
    """The first text in quotation marks that is not blank, or None.

    Straight double marks and the typographic ones count. A straight single mark does not, for it
    is an apostrophe as well.

    Args:
        prompt: where to look.

    >>> quoted_text('a 5" card that says "tea"')
    'tea'
    >>> quoted_text("the dogs' owner isn't here") is None
    True
    """
    for match in _QUOTED.finditer(prompt):
        # One group for each pair of marks; those of the other pairs are None.
        text = "".join(group for group in match.groups() if group is not None)
        if plain(text):
            return text
    return None


def plain(text: str) -> str:
    """A text without blanks and line ends, in lower case.

    Args:
        text: what is read or asked for.
    """
    return "".join(text.split()).lower()


def legibility(reading: str, target: str) -> float:
    """How much of a target was read: 1 if the reading holds it, else by the letters to change.

    That is `1 - min(distance, length) / length`, where `length` is that of the target and
    `distance` the edits between it and the whole reading.

    Args:
        reading: what was read, after `plain`.
        target: what was asked for, after `plain`; not empty.

    >>> legibility("helpworld", "helloworld")
    0.8
    """
    if target in reading:
        return 1.0
    return 1 - min(edit_distance(reading, target), len(target)) / len(target)


def edit_distance(first: str, second: str) -> int:
    """The fewest letters to insert, delete or replace to make one text of another (Levenshtein).

    Args:
        first: one text.
        second: the other one.
    """
    # The distances between the letters of `first` so far and each beginning of `second`.
    distances = list(range(len(second) + 1))
    for count, letter in enumerate(first, start=1):
        row = [count]
        for index, other in enumerate(second):
            replaced = distances[index] + int(letter != other)
            row.append(min(replaced, distances[index + 1] + 1, row[index] + 1))
        distances = row
    return distances[-1]


def _check_least(option: str, number: Any, least: int) -> None:
    """Refuse an option that is no whole number, or too small."""
    if not isinstance(number, int) or number < least:
        raise ValueError(
            f"expected the option {option!r} of reward 'ocr' to be a whole number from {least} on, "
            f"got {number!r}"
        )


def _sample() -> np.ndarray:
    """A black picture with a word in white, `[64, 128, 3]` uint8."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (128, 64))
    ImageDraw.Draw(picture).text((16, 16), "word", fill="white", font=ImageFont.load_default(32))
    return np.asarray(picture)
