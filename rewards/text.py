"""Rewards that look at the words alone."""

from __future__ import annotations

import torch
from torch import Tensor

from rewards.registry import EpisodeBatch


def brevity(episodes: EpisodeBatch) -> Tensor:
    """1 / (1 + words written): a mild pull towards short thoughts, to be added with a small weight."""
    return torch.tensor([1.0 / (1 + len(text.split())) for text in episodes.texts])
