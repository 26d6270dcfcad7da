"""Rewards of the text."""

import torch

from rewards import EpisodeBatch
from rewards.text import brevity


def test_brevity_prefers_short_thoughts():
    texts = ["", "one", "one two  three"]
    batch = EpisodeBatch(["a"] * 3, texts, torch.zeros(3, 3, 4, 4), [{}] * 3)
    assert brevity(batch).tolist() == [1, 0.5, 0.25]
