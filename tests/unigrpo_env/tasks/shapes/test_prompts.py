"""Prompts of the shapes world and how they are split."""

import random
from collections import Counter

import pytest

from rewards.shapes.grid import COLOURS, SHAPES
from unigrpo_env.tasks.shapes.prompts import (
    FOREIGN_KINDS,
    NUMBERS,
    OPENINGS,
    PROMPT_KINDS,
    is_held_out,
    make_prompt,
    name_many,
    name_one,
    plural,
)
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask


def request(text):
    """A prompt without its opening."""
    return min((text.removeprefix(opening) for opening in OPENINGS), key=len)


def test_objects_in_words():
    assert name_one(None, "circle") == "a circle"
    assert name_one("red", "circle") == "a red circle"
    assert name_many(None, "circle") == "circles"
    assert name_many("red", "cross") == "red crosses"
    assert [plural(shape) for shape in SHAPES] == ["circles", "squares", "triangles", "crosses"]


@pytest.mark.parametrize("kind", PROMPT_KINDS + FOREIGN_KINDS)
def test_the_metadata_say_what_the_text_says(kind):
    rng = random.Random(0)
    for _ in range(200):
        prompt = make_prompt(kind, rng)
        words = request(prompt.text).split()
        assert prompt.metadata["kind"] == kind
        objects = prompt.metadata["objects"]
        for wanted in objects:
            names = {wanted["shape"], plural(wanted["shape"])}
            assert names & set(words)
            assert wanted["colour"] is None or wanted["colour"] in words
        colours = [word for word in words if word in COLOURS]
        assert colours == [wanted["colour"] for wanted in objects if wanted["colour"]]
        if "relation" in prompt.metadata:
            assert f" {prompt.metadata['relation']} " in prompt.text
        if kind == "counting":
            assert NUMBERS[objects[0]["count"]] == words[0]


@pytest.mark.parametrize(
    ("text", "count", "operand"), [("three plus one", 4, 3), ("four minus one", 3, 1)]
)
def test_sums_are_worked_out(text, count, operand):
    rng = random.Random(0)
    prompts = [make_prompt("sum", rng) for _ in range(500)]
    found = [prompt.metadata for prompt in prompts if request(prompt.text).startswith(text)]
    assert {metadata["objects"][0]["count"] for metadata in found} == {count}
    assert {metadata["operand"] for metadata in found} == {operand}


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown prompt kind 'colour'; expected one of"):
        make_prompt("colour", random.Random(0))


def test_the_splits_share_no_prompt():
    task = ShapesTask()
    train = {prompt.text: prompt for prompt in task.prompts("train", 4000, 0)}
    test = {prompt.text: prompt for prompt in task.prompts("test", 4000, 0)}
    assert not train.keys() & test.keys()
    requests = []
    for split in (train, test):
        requests.append(
            {
                request(text)
                for text, prompt in split.items()
                if prompt.metadata["kind"] not in ("single", "two")
            }
        )
    assert not requests[0] & requests[1], "no other opening makes a held-out request known"
    kinds = [{prompt.metadata["kind"] for prompt in split.values()} for split in (train, test)]
    assert kinds == [set(PROMPT_KINDS)] * 2
    assert not any(is_held_out(text) for text in train)


def test_evaluation_has_all_kinds_equally_often():
    task = ShapesTask()
    prompts = task.prompts("test", 256, 0)
    counts = Counter(prompt.metadata["kind"] for prompt in prompts)
    assert counts == dict.fromkeys(PROMPT_KINDS, 32)
    assert task.prompts("test", 256, 0) == prompts


def test_the_first_prompts_of_a_seed_are_fixed():
    """Numbers that were reported depend on them."""
    task = ShapesTask()
    train = [prompt.text for prompt in task.prompts("train", 3, 0)]
    test = [prompt.text for prompt in task.prompts("test", 3, 0)]
    assert train == [
        "one plus two green triangles",
        "draw three circles",
        "draw a yellow triangle and a green cross",
    ]
    assert test == ["a triangle", "a picture of a square and a cross", "draw four crosses"]
