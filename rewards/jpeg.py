"""How well an image can be compressed: the reward that needs no model."""

from __future__ import annotations

import io
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image

from rewards.base import EpisodeBatch, Failures, Scores
from rewards.image_bytes import image_bytes

Kind = Literal["incompressibility", "compressibility"]

QUALITY = 95


class Jpeg:
    """The size of an image as JPEG of quality 95, after DDPO (arXiv 2305.13301).

    With `k`, the size in units of 1000 bytes, "incompressibility" pays `k` and "compressibility"
    `-k / 500`, the scales of Flow-GRPO. An image that cannot be written, such as one with NaN in
    it, has no score.

    Args:
        kind: whether large or small files are paid.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, *, kind: Kind = "incompressibility") -> None:
        if kind not in get_args(Kind):
            raise ValueError(
                "expected the option 'kind' of reward 'jpeg' to be 'incompressibility' or "
                f"'compressibility', got {kind!r}"
            )
        self.kind = kind

    def __call__(self, episodes: EpisodeBatch) -> Scores:
        """Score a batch of episodes.

        Args:
            episodes: what to score; only `images` is used.

        Returns:
            The reward and the component `kilobytes`, `[N]` float32 each, NaN where an image could
            not be written.
        """
        kilobytes = torch.full((len(episodes),), torch.nan)
        errors: list[Exception] = []
        for index in range(len(episodes)):
            try:
                kilobytes[index] = jpeg_size(image_bytes(episodes.images[index])) / 1000
            except ValueError as error:
                errors.append(error)
        reward = kilobytes
        if self.kind == "compressibility":
            reward = -kilobytes / 500
        return Scores(reward, {"kilobytes": kilobytes}, Failures.of(errors))


def jpeg_size(pixels: np.ndarray) -> int:
    """The bytes that an image takes as JPEG of quality 95.

    Args:
        pixels: `[height, width, 3]` uint8, red first.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=QUALITY)
    return file.tell()
