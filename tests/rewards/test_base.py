"""What a reward is given."""

import dataclasses

import pytest
import torch

from rewards import EpisodeBatch, Failures, Scores


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
    assert not Scores(torch.ones(2)).failures


class Refused(OSError):
    """An error that says how it is counted."""

    kind = "HTTP 500"


def test_failures_are_counted_by_kind():
    errors = [Refused("out of memory"), TimeoutError("late"), Refused("again")]
    failures = Failures.of(errors)
    assert failures.counts == {"HTTP 500": 2, "TimeoutError": 1}
    assert failures.first is errors[0]
    assert str(failures) == "2 x HTTP 500, 1 x TimeoutError; the first: out of memory"
    assert Failures.of(errors, kind=lambda error: "server").counts == {"server": 3}


def test_no_failures_are_false():
    assert not Failures.of([])
    assert str(Failures()) == ""
    assert Failures.of([TimeoutError()])
    assert str(Failures.of([TimeoutError()])) == "1 x TimeoutError; the first: TimeoutError"
    assert str(Failures({"unparsed": 2})) == "2 x unparsed"


def test_failures_of_several_rewards_add_up():
    first = Failures({"timeout": 1})
    second = Failures({"timeout": 2, "unparsed": 1}, TimeoutError("late"))
    third = Failures({}, OSError())
    merged = first.merged(second).merged(third)
    assert merged == Failures({"timeout": 3, "unparsed": 1}, second.first)
    assert first.counts == {"timeout": 1}, "the parts stay as they are"
    under = merged.under("ocr")
    assert under == Failures({"ocr: timeout": 3, "ocr: unparsed": 1}, second.first)
