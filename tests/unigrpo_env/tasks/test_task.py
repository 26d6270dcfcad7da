"""Prompts, demonstrations, and episodes in the form that a reward takes."""

import pytest
import torch

from unigrpo_env.tasks.task import (
    Demonstration,
    Prompt,
    demonstration_batch,
    join_thoughts,
    make_batch,
)


def images(count):
    return torch.arange(count).add(1).view(count, 1, 1, 1).expand(count, 3, 2, 2) / 8


def test_thoughts_are_joined():
    assert join_thoughts(["", "a circle", "", "a square"]) == "a circle a square"
    assert join_thoughts([]) == ""


def test_a_batch_holds_ragged_episodes():
    source = torch.rand(3, 2, 2)
    prompts = [
        Prompt("one", {"answer": 1}, sources=(source, source)),
        Prompt("two"),
        Prompt("three"),
    ]
    drawn = [images(2), images(0), images(1)]
    thoughts = [["a", "", "b"], ["c"], [""]]
    batch = make_batch(prompts, thoughts, drawn)
    assert batch.prompts == ["one", "two", "three"]
    assert batch.texts == ["a b", "c", ""]
    assert batch.thoughts == thoughts
    assert batch.metadata == [{"answer": 1}, {}, {}]
    assert [len(each) for each in batch.all_images] == [2, 0, 1]
    assert [len(each) for each in batch.sources] == [2, 0, 0]
    torch.testing.assert_close(batch.sources[0], torch.stack([source, source]))
    assert batch.images[:, 0, 0, 0].tolist() == [0.25, 0, 0.125], "black before the first image"


def test_demonstrations_become_a_batch():
    shown = [
        Demonstration(Prompt("one"), ("a", None, "b"), images(2)),
        Demonstration(Prompt("two"), (None,), images(1)),
    ]
    batch = demonstration_batch(shown)
    assert batch.thoughts == [["a", "", "b"], [""]]
    assert batch.texts == ["a b", ""]
    assert [len(each) for each in batch.all_images] == [2, 1]


def test_parts_of_a_demonstration_are_dropped():
    shown = Demonstration(Prompt("one"), ("a", "b", "c"), images(2))
    silent = shown.without_text()
    assert silent.prompt == shown.prompt
    assert silent.thoughts == (None, None)
    assert torch.equal(silent.images, shown.images)
    unconditional = shown.unconditional()
    assert unconditional.prompt is None
    assert unconditional.thoughts == (None,)
    assert torch.equal(unconditional.images, shown.images[:1])


def test_unconditional_ones_cannot_be_scored():
    shown = Demonstration(Prompt("one"), ("a",), images(1)).unconditional()
    with pytest.raises(ValueError, match="expected demonstrations with a prompt"):
        demonstration_batch([shown])
