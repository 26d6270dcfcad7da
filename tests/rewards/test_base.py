"""What a reward is given."""

import dataclasses

import pytest
import torch

from rewards import EpisodeBatch, Scores


def test_omitted_fields_follow_from_others():
    images = torch.rand(2, 3, 4, 4)
    batch = EpisodeBatch(["a", "b"], ["one", "two"], images, [{}, {}])
    assert len(batch) == 2
    assert batch.thoughts == [["one"], ["two"]]
    assert torch.equal(torch.cat(batch.all_images), images)
    assert [drawn.shape for drawn in batch.all_images] == [(1, 3, 4, 4)] * 2
    assert [sources.shape for sources in batch.sources] == [(0, 3, 4, 4)] * 2


def test_given_fields_are_kept():
    images = torch.rand(1, 3, 4, 4)
    drawn = [torch.rand(2, 3, 4, 4)]
    batch = EpisodeBatch(["a"], ["one two"], images, [{}], drawn, [["one", "two"]], drawn)
    assert batch.all_images is drawn
    assert batch.thoughts == [["one", "two"]]
    assert batch.sources is drawn


def test_the_callers_lists_stay_empty():
    given = []
    EpisodeBatch(["a"], ["one"], torch.zeros(1, 3, 4, 4), [{}], given, given, given)
    assert given == []


def test_a_batch_may_hold_no_episode():
    batch = EpisodeBatch([], [], torch.zeros(0, 3, 4, 4), [])
    assert len(batch) == 0
    assert batch.all_images == batch.thoughts == batch.sources == []


def test_a_batch_cannot_be_changed():
    batch = EpisodeBatch(["a"], ["one"], torch.zeros(1, 3, 4, 4), [{}])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.texts = ["two"]


def test_scores_may_have_no_components():
    assert Scores(torch.ones(2)).components == {}
