"""The reward of the toy task, whose best policy is known."""

from __future__ import annotations

import torch
from torch import Tensor

from rewards.registry import EpisodeBatch

LEVELS = (0.25, 0.75)
"""The grey that a toy picture should have after the answer `dark` or `light`."""


def toy(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """Half for ending on the right word, half for a grey near the one asked for: `0.5 [word] + 0.5 (1 - |grey - level|)`.

    The greatest value is 1: the word of the prompt, and every pixel at its level.
    """
    answers = [str(metadata["answer"]) for metadata in episodes.metadata]
    levels = torch.tensor([LEVELS[("dark", "light").index(answer)] for answer in answers])
    word = torch.tensor([float(text.split()[-1:] == [answer]) for text, answer in zip(episodes.texts, answers, strict=True)])
    grey = 1 - (episodes.images.float().cpu().mean((1, 2, 3)) - levels).abs()
    return {"reward": 0.5 * word + 0.5 * grey, "word": word, "grey": grey}
