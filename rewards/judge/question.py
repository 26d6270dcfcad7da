"""What a judge is asked: the words, the image, and the request that holds both."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROMPTS = Path(__file__).parent / "prompts"
"""The templates that come with the library, one for each mode of a judge."""

LONGEST_RATING = 512
"""The most tokens of an answer with a number in it."""

LIKELIEST = 20
"""So many tokens have their log-probability in an answer of one token; servers allow no more."""

_PLACE = re.compile(r"\{(prompt|question|lowest|highest)\}")


def read_template(mode: str, given: str | None) -> str:
    """The words that go with an image, with places for those of the prompt.

    Args:
        mode: of the judge; "questions" needs the place `{question}`, the others `{prompt}`.
        given: the template, or the path of a file with it; None for the library's own.

    Raises:
        ValueError: there is no such place, and no file in which it is.
    """
    place = "{prompt}"
    if mode == "questions":
        place = "{question}"
    if given is None:
        text = (PROMPTS / f"{mode}.txt").read_text(encoding="utf-8")
    elif place in given:
        text = given
    else:
        try:
            text = Path(given).read_text(encoding="utf-8")
        # A text that is no path raises either.
        except (OSError, ValueError):
            text = given
    if place not in text:
        raise ValueError(
            f"expected the option 'prompt' of reward 'judge' to be a text with {place} in it, or "
            f"a file with such a text, got {given!r}"
        )
    return text.strip()


def fill(template: str, words: Mapping[str, str]) -> str:
    """Put words into their places, and leave all other braces alone.

    Args:
        template: from `read_template`.
        words: what stands for `prompt`, `question`, `lowest` and `highest`.

    >>> fill('Is "{prompt}" shown? {"json": 1}', {"prompt": "a {question}"})
    'Is "a {question}" shown? {"json": 1}'
    """
    # In one pass: a prompt that holds the name of a place stays as it is.
    return _PLACE.sub(lambda place: words[place[1]], template)


class Picture:
    """An image that is encoded when it is first sent, and only once.

    Args:
        pixels: `[height, width, 3]` uint8.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self._url = ""
        # Several questions about one image ask for it from several threads.
        self._lock = threading.Lock()

    def url(self) -> str:
        """The image as PNG in a data URL."""
        with self._lock:
            if not self._url:
                file = io.BytesIO()
                # The lowest level takes a quarter of the time of the usual one.
                Image.fromarray(self._pixels).save(file, "PNG", compress_level=1)
                self._url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            return self._url


def chat_body(
    model: str, picture: Picture, text: str, is_rating: bool, extra: Mapping[str, Any]
) -> bytes:
    """The request for one chat completion, as JSON.

    Args:
        model: its name on the server.
        picture: what is judged.
        text: what is asked.
        is_rating: whether the answer is text with a number, or one token with its
            log-probabilities.
        extra: more entries; one that is None takes out ours.
    """
    content = [
        {"type": "image_url", "image_url": {"url": picture.url()}},
        {"type": "text", "text": text},
    ]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
    }
    if is_rating:
        body["max_tokens"] = LONGEST_RATING
    else:
        body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": LIKELIEST}
    body |= extra
    kept = {name: value for name, value in body.items() if value is not None}
    return json.dumps(kept).encode()
