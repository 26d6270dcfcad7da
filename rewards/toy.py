"""The reward of the toy task, whose best policy is known."""

from __future__ import annotations

import torch
from torch import Tensor

from rewards.base import EpisodeBatch

ANSWERS = ("dark", "light")
"""The words that a prompt's metadata may ask for under `answer`."""

LEVELS = (0.25, 0.75)
"""The grey that the image should have for each of `ANSWERS`."""


def toy(episodes: EpisodeBatch) -> dict[str, Tensor]:
    """Half for the right last word, half for the right grey: `0.5 word + 0.5 (1 - |grey - level|)`.

    The greatest value is 1: the thought ends with the word that the prompt asks for, and the
    image has its level on average.

    Args:
        episodes: what to score. The metadata of each prompt has `answer`, one of `ANSWERS`.

    Returns:
        `reward`, `word` and `grey`, `[N]` float32 each.
    """
    words = []
    wanted = []
    for text, metadata in zip(episodes.texts, episodes.metadata, strict=True):
        answer = str(metadata["answer"])
        wanted.append(LEVELS[ANSWERS.index(answer)])
        # A slice, so that an empty thought is wrong and no error.
        words.append(float(text.split()[-1:] == [answer]))
    word = torch.tensor(words)
    levels = torch.tensor(wanted)
    # The mean over channels and pixels, [N]; only the average grey counts.
    grey = 1 - (episodes.images.float().cpu().mean((1, 2, 3)) - levels).abs()
    return {"reward": 0.5 * word + 0.5 * grey, "word": word, "grey": grey}
