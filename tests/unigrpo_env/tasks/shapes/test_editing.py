"""Edits: instructions, what they lead to, and how they are split."""

import random

import pytest
import torch

from rewards.shapes.grid import KINDS, read
from rewards.shapes.multi_image import judge_edit
from unigrpo_env.episodes import Episodes
from unigrpo_env.tasks.shapes.editing import (
    DialogueTask,
    EditTask,
    apply_edit,
    make_edit,
    move_random_object,
)
from unigrpo_env.tasks.shapes.multi_image import StoryTask
from unigrpo_env.tasks.shapes.vocabulary import shapes_tokenizer
from unigrpo_env.variants.variant import make_variant

RED_CIRCLE = 1 + KINDS.index(("red", "circle"))
BLUE_CIRCLE = 1 + KINDS.index(("blue", "circle"))
BLUE_SQUARE = 1 + KINDS.index(("blue", "square"))
TWO_CIRCLES = [RED_CIRCLE, 0, RED_CIRCLE, 0, BLUE_SQUARE, 0, 0, 0, 0]


def instructions(layout, count=2000):
    rng = random.Random(0)
    made = [make_edit(layout, rng) for _ in range(count)]
    return {each[0] for each in made if each is not None}


def test_instructions_name_one_thing():
    texts = instructions(TWO_CIRCLES)
    assert "remove the left circle" in texts
    assert "make the square red" in texts
    assert not any("the red circle" in text or "the circle" in text for text in texts)


def test_instructions_are_as_short_as_can_be():
    texts = instructions([RED_CIRCLE, BLUE_CIRCLE, BLUE_SQUARE, 0, 0, 0, 0, 0, 0])
    assert "remove the red circle" in texts
    assert "remove the square" in texts
    assert not any("left circle" in text or "the blue square" in text for text in texts)


def test_unclear_instructions_are_not_given():
    """Two red circles in one column have no side; a full grid has no place for a new object."""
    column = [RED_CIRCLE, 0, 0, RED_CIRCLE, 0, 0, 0, 0, 0]
    assert instructions(column, 200) == set()
    full = [RED_CIRCLE] + [BLUE_SQUARE] * 8
    assert not any(text.startswith("put") for text in instructions(full, 200))


@pytest.mark.parametrize("seed", range(20))
def test_edits_are_applied_as_the_verifier_wants(seed):
    rng = random.Random(seed)
    for prompt in EditTask().prompts("train", 20, seed):
        before = prompt.metadata["before"]
        edit = prompt.metadata["edit"]
        assert judge_edit(before, apply_edit(before, edit, rng), edit).strict == 1
    assert before == read(prompt.sources[-1][None])[0].tolist()


def test_a_mistake_takes_left_for_right():
    left = {"colour": None, "shape": "circle", "side": "left"}
    edit = {"action": "remove", "thing": left}
    rng = random.Random(0)
    assert apply_edit(TWO_CIRCLES, edit, rng)[0] == 0
    after = apply_edit(TWO_CIRCLES, edit, rng, mistaken=True)
    assert (after[0], after[2]) == (RED_CIRCLE, 0)


def test_a_mistake_moves_what_should_stay():
    square = {"colour": None, "shape": "square", "side": None}
    edit = {"action": "recolour", "thing": square, "colour": "red"}
    after = apply_edit(TWO_CIRCLES, edit, random.Random(0), mistaken=True)
    assert after[4] == 1 + KINDS.index(("red", "square"))
    assert after.count(RED_CIRCLE) == 2
    assert (after[0], after[2]) != (RED_CIRCLE, RED_CIRCLE)


@pytest.mark.parametrize(
    ("relation", "place"), [("left of", 1), ("right of", 0), ("below", 0), ("above", 0)]
)
def test_a_mistake_confuses_relations(relation, place):
    """`above` is confused with nothing; with no cell in the wrong relation any other is taken."""
    circle = {"colour": None, "shape": "circle", "side": None}
    new = {"colour": "blue", "shape": "square", "side": None}
    edit = {"action": "put", "thing": circle, "new": new, "relation": relation}
    before = [0] * 9
    before[4] = RED_CIRCLE
    confused = {"left of": "right of", "right of": "left of", "below": "above", "above": "above"}
    for seed in range(20):
        after = apply_edit(before, edit, random.Random(seed), mistaken=True)
        as_read = {**edit, "relation": confused[relation]}
        assert judge_edit(before, after, as_read).strict == 1


def test_a_missing_thing_changes_nothing():
    triangle = {"colour": None, "shape": "triangle", "side": None}
    edit = {"action": "remove", "thing": triangle}
    for mistaken in (False, True):
        after = apply_edit(TWO_CIRCLES, edit, random.Random(0), mistaken)
        assert after == TWO_CIRCLES
        assert after is not TWO_CIRCLES


def test_one_object_moves():
    for seed in range(50):
        layout = list(TWO_CIRCLES)
        move_random_object(layout, random.Random(seed), keep=4)
        assert sorted(layout) == sorted(TWO_CIRCLES)
        assert layout[4] == BLUE_SQUARE
        assert sum(one != two for one, two in zip(layout, TWO_CIRCLES, strict=True)) == 2
    full = [RED_CIRCLE] * 9
    move_random_object(full, random.Random(0))
    assert full == [RED_CIRCLE] * 9


def test_the_last_source_is_the_one_to_change():
    task = EditTask(source_images=3)
    for prompt in task.prompts("train", 20, 0):
        assert len(prompt.sources) == 3
        assert read(prompt.sources[-1][None])[0].tolist() == prompt.metadata["before"]
    with pytest.raises(ValueError, match="expected source_images >= 1, got 0"):
        EditTask(0)


def test_a_change_suits_every_first_image():
    for prompt in DialogueTask().prompts("train", 100, 0):
        thing = prompt.metadata["edits"][0]["thing"]
        shapes = [wanted["shape"] for wanted in prompt.metadata["objects"]]
        assert shapes.count(thing["shape"]) == 1
        assert len(prompt.turns) == 1
        assert thing["shape"] in prompt.turns[0]


@pytest.mark.parametrize(
    ("name", "task"),
    [("edit", EditTask()), ("story", StoryTask()), ("dialogue", DialogueTask())],
)
def test_tasks_split_and_fit_their_variant(name, task):
    episodes = Episodes(make_variant(name), 1)
    unknown = shapes_tokenizer().unk_token_id
    train = task.prompts("train", 300, 0)
    test = task.prompts("test", 300, 0)
    again = task.prompts("train", 300, 0)
    assert [prompt.text for prompt in train] == [prompt.text for prompt in again]
    keys = []
    for prompts in (train, test):
        keys.append({(each.text, str(each.metadata.get("before")), each.turns) for each in prompts})
    assert not keys[0] & keys[1]
    for prompt in train + test:
        encoded = episodes.encode(prompt)
        assert len(encoded.tokens) <= episodes.rules.prompt_budget
        for ids in (encoded.tokens, *encoded.turns):
            assert unknown not in ids
        assert torch.isfinite(encoded.sources).all()
