"""The toy reward, against numbers that were computed without it."""

import pytest
import torch

from rewards import EpisodeBatch
from rewards.toy import LEVELS, toy


def scored(text, grey, answer):
    images = torch.full((1, 3, 4, 4), grey)
    return toy(EpisodeBatch(["a"], [text], images, [{"answer": answer}]))


def test_the_best_episode_earns_one():
    assert scored("so light", LEVELS[1], "light")["reward"].tolist() == [1]
    assert scored("dark", LEVELS[0], "dark")["reward"].tolist() == [1]


def test_word_and_grey_count_half_each():
    found = scored("dark light", 0.5, "dark")
    assert found["word"].tolist() == [0]
    assert found["grey"].tolist() == pytest.approx([0.75])
    assert found["reward"].tolist() == pytest.approx([0.375])
    assert scored("", 0.75, "light")["reward"].tolist() == [0.5]


def test_only_the_mean_grey_counts():
    images = torch.tensor([0.0, 0.5]).repeat(1, 3, 4, 2)
    found = toy(EpisodeBatch(["a"], ["dark"], images, [{"answer": "dark"}]))
    assert found["reward"].tolist() == [1]
