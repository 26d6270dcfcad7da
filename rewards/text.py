"""Rewards that look at the text alone."""

from __future__ import annotations

import torch
from torch import Tensor

from rewards.base import EpisodeBatch


def brevity(episodes: EpisodeBatch) -> Tensor:
    """`1 / (1 + words)`: a small preference for short thoughts, to be added with a small weight.

    Args:
        episodes: what to score.

    Returns:
        `[N]` float32 in (0, 1].
    """
    scores = []
    for text in episodes.texts:
        # One word more, so that an empty thought gets 1 and no division by zero.
        scores.append(1.0 / (1 + len(text.split())))
    return torch.tensor(scores)
