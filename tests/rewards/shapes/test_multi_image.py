"""Edits, stories, dialogues and reflections, judged."""

import dataclasses
import random

import pytest
import torch

from rewards import EpisodeBatch
from rewards.shapes.grid import COLOURS, KINDS, UNREADABLE, draw
from rewards.shapes.multi_image import (
    dialogue,
    edit,
    edit_thought,
    extra_images,
    find,
    judge_edit,
    judge_story,
    reflect,
    story,
)
from unigrpo_env.tasks.shapes.editing import DialogueTask, EditTask
from unigrpo_env.tasks.task import demonstration_batch

RED_CIRCLE = 1 + KINDS.index(("red", "circle"))
BLUE_SQUARE = 1 + KINDS.index(("blue", "square"))
BLUE_CIRCLE = 1 + KINDS.index(("blue", "circle"))
CIRCLE = {"colour": None, "shape": "circle", "side": None}
TWO_PARTS = [
    {"count": 1, "colour": "red", "shape": "circle"},
    {"count": 1, "colour": "blue", "shape": "square"},
]


def layout(cells):
    """Nine cell values from those that are not empty."""
    values = [0] * 9
    for place, value in cells.items():
        values[place] = value
    return values


def episode(layouts, metadata):
    """One episode that drew these layouts."""
    drawn = draw(torch.tensor(layouts))
    thoughts = [""] * len(layouts)
    return EpisodeBatch([""], [""], drawn[-1:], [metadata], [drawn], [thoughts])


def solve(before, change, rng):
    """Some layout that an instruction allows."""
    for _ in range(2000):
        after = [*before]
        place = rng.randrange(9)
        after[place] = rng.randint(1, len(KINDS))
        if change["action"] == "remove":
            after[place] = 0
        if judge_edit(before, after, change).strict == 1:
            return after
    raise AssertionError(change)


def edit_prompt(seed):
    prompt = EditTask().prompts("train", 1, seed)[0]
    return prompt, prompt.metadata["before"], prompt.metadata["edit"]


def test_a_thing_is_found_by_its_description():
    cells = layout({0: RED_CIRCLE, 2: BLUE_CIRCLE, 5: BLUE_SQUARE})
    assert find(cells, {"colour": "red", "shape": "circle"}) == 0
    assert find(cells, {"colour": None, "shape": "square"}) == 5
    assert find(cells, {"colour": None, "shape": "circle"}) is None, "there are two"
    assert find(cells, {"colour": None, "shape": "circle", "side": "left"}) == 0
    assert find(cells, {"colour": None, "shape": "circle", "side": "right"}) == 2
    assert find(cells, {"colour": None, "shape": "cross", "side": "left"}) is None
    column = layout({0: RED_CIRCLE, 3: RED_CIRCLE})
    assert find(column, {"colour": None, "shape": "circle", "side": "left"}) is None


@pytest.mark.parametrize("seed", range(40))
def test_an_edit_makes_the_change(seed):
    _prompt, before, change = edit_prompt(seed)
    after = solve(before, change, random.Random(seed))
    assert judge_edit(before, after, change).strict == 1
    assert judge_edit(before, before, change).strict == 0, "nothing was done"


@pytest.mark.parametrize("seed", range(40))
def test_an_edit_changes_nothing_else(seed):
    _prompt, before, change = edit_prompt(seed)
    after = solve(before, change, random.Random(seed))
    free = [place for place in range(9) if after[place] == before[place] == 0]
    for place in free[:2]:
        more = [*after]
        more[place] = RED_CIRCLE
        assert judge_edit(before, more, change).strict == 0, "something else was added"
    unchanged = [place for place in range(9) if after[place] == before[place] != 0]
    assert unchanged
    for place in unchanged:
        colour, shape = KINDS[before[place] - 1]
        others = [1 + KINDS.index((other, shape)) for other in COLOURS if other != colour]
        for other in others:
            recoloured = [*after]
            recoloured[place] = other
            verdict = judge_edit(before, recoloured, change)
            assert not verdict.requirements["all else stays"]
        for empty in [cell for cell in range(9) if after[cell] == 0]:
            moved = [*after]
            moved[empty] = before[place]
            moved[place] = 0
            verdict = judge_edit(before, moved, change)
            assert not verdict.requirements["all else stays"]


@pytest.mark.parametrize("seed", range(40))
def test_edits_are_scored_from_pixels(seed):
    prompt, before, change = edit_prompt(seed)
    drawn = draw(torch.tensor([solve(before, change, random.Random(seed))]))
    sources = [torch.stack(prompt.sources)]
    batch = EpisodeBatch([prompt.text], [""], drawn, [prompt.metadata], [drawn], [[""]], sources)
    assert edit(batch)["reward"].tolist() == [1]
    assert edit(batch)["score"].tolist() == [1]
    undone = dataclasses.replace(batch, images=prompt.sources[0][None])
    assert edit(undone)["reward"].tolist() == [0]


def test_an_edit_of_a_missing_thing_fails():
    change = {"action": "remove", "thing": CIRCLE}
    empty = [0] * 9
    assert judge_edit(empty, empty, change).requirements == {
        "the change": False,
        "all else stays": True,
        "legible": True,
    }


def test_one_object_is_put():
    new = {"colour": "blue", "shape": "square"}
    change = {"action": "put", "thing": CIRCLE, "new": new, "relation": "right of"}
    before = layout({0: RED_CIRCLE})
    once = layout({0: RED_CIRCLE, 5: BLUE_SQUARE})
    twice = layout({0: RED_CIRCLE, 5: BLUE_SQUARE, 8: BLUE_SQUARE})
    left = layout({0: RED_CIRCLE, 3: BLUE_SQUARE})
    assert judge_edit(before, once, change).strict == 1
    assert not judge_edit(before, twice, change).requirements["the change"]
    assert not judge_edit(before, left, change).requirements["the change"]
    assert not judge_edit(before, left, change).requirements["all else stays"]


def test_the_same_colour_is_no_change():
    change = {"action": "recolour", "thing": CIRCLE, "colour": "red"}
    before = layout({0: RED_CIRCLE})
    assert judge_edit(before, before, change).strict == 0


def test_an_unreadable_edit_fails():
    change = {"action": "remove", "thing": CIRCLE}
    verdict = judge_edit(layout({0: RED_CIRCLE}), layout({0: UNREADABLE}), change)
    assert verdict.strict == 0
    assert not verdict.requirements["legible"]


@pytest.mark.parametrize(
    "change",
    [
        {"action": "paint", "thing": CIRCLE},
        {"thing": CIRCLE},
        {"action": "remove"},
        {"action": "remove", "thing": {"shape": "star"}},
        {"action": "recolour", "thing": CIRCLE},
        {"action": "recolour", "thing": CIRCLE, "colour": "pink"},
        {"action": "put", "thing": CIRCLE, "relation": "above"},
        {"action": "put", "thing": CIRCLE, "new": CIRCLE},
        {"action": "put", "thing": CIRCLE, "new": CIRCLE, "relation": "near"},
    ],
)
def test_edits_of_another_world_are_refused(change):
    with pytest.raises(ValueError, match="correct the prompt's metadata"):
        judge_edit([0] * 9, [0] * 9, change)


def test_an_edit_needs_a_source():
    batch = episode([[0] * 9], {"edit": {"action": "remove", "thing": CIRCLE}})
    with pytest.raises(ValueError, match="expected a source image with the prompt ''"):
        edit(batch)


def test_thoughts_and_images_of_edits_are_apart():
    batch = demonstration_batch(EditTask().warmup_demonstrations(50, 0))
    assert edit_thought(batch).sum() == 50
    sources = torch.stack([images[-1] for images in batch.sources])
    undrawn = dataclasses.replace(batch, images=sources)
    parts = ("reward", "thought", "correct_despite_plan")
    assert [edit(undrawn)[part].sum() for part in parts] == [0, 50, 0]
    assert edit_thought(undrawn).sum() == 50
    unplanned = dataclasses.replace(batch, texts=["nonsense"] * 50)
    assert edit_thought(unplanned).sum() == 0
    assert edit(unplanned)["correct_despite_plan"].sum() == 50


def test_prompts_without_requirements_are_unscored():
    batch = demonstration_batch(EditTask().warmup_demonstrations(5, 0))
    batch = dataclasses.replace(batch, metadata=[{}] * 5)
    assert edit_thought(batch).isnan().all()
    for reward in (edit, story, dialogue, reflect):
        found = reward(batch)
        assert all(values.isnan().all() for values in found.values())


def test_stories_are_judged_image_by_image():
    first = layout({1: RED_CIRCLE})
    both = layout({1: RED_CIRCLE, 3: BLUE_SQUARE})
    moved = layout({2: RED_CIRCLE, 3: BLUE_SQUARE})
    assert judge_story([first, both], TWO_PARTS).strict == 1
    assert judge_story([first, moved], TWO_PARTS).requirements == {
        "as many images as parts": True,
        "image 1": True,
        "image 2": False,
    }
    assert judge_story([first], TWO_PARTS).strict == 0
    assert judge_story([both, both], TWO_PARTS).strict == 0
    assert judge_story([first, both, both], TWO_PARTS).strict == 0
    batch = episode([first, both], {"parts": TWO_PARTS})
    assert story(batch)["reward"].tolist() == [1]
    assert story(batch)["score"].tolist() == [1]


def test_a_story_of_one_image():
    batch = episode([layout({1: RED_CIRCLE})], {"parts": TWO_PARTS[:1]})
    assert story(batch)["reward"].tolist() == [1]


def test_extra_images_are_counted():
    cells = layout({1: RED_CIRCLE})
    assert extra_images(episode([cells], {})).tolist() == [0]
    assert extra_images(episode([cells] * 3, {})).tolist() == [2]
    none = EpisodeBatch([""], [""], torch.zeros(1, 3, 24, 24), [{}], [torch.zeros(0, 3, 24, 24)])
    assert extra_images(none).tolist() == [0]


@pytest.mark.parametrize("seed", range(10))
def test_dialogues_are_judged_turn_by_turn(seed):
    prompt = DialogueTask().prompts("test", 1, seed)[0]
    one, two = (1 + KINDS.index((o["colour"], o["shape"])) for o in prompt.metadata["objects"])
    first = layout({0: one, 8: two})
    second = solve(first, prompt.metadata["edits"][0], random.Random(seed))

    def scored(*layouts):
        return dialogue(episode(list(layouts), prompt.metadata))["reward"].tolist()

    assert scored(first, second) == [1]
    assert scored(first, first) == [0]
    assert scored(second, second) == [0]
    assert scored(first) == [0]


def test_reflection_tells_where_it_stopped():
    wanted = {"objects": TWO_PARTS[:1]}
    correct = layout({1: RED_CIRCLE})
    wrong = layout({1: BLUE_SQUARE})
    names = ("reward", "first_correct", "stopped_correct", "stopped_wrong")

    def scored(*layouts):
        found = reflect(episode(list(layouts), wanted))
        assert tuple(found) == names
        return [found[name].item() for name in names]

    assert scored(correct) == [1, 1, 1, 0]
    assert scored(wrong) == [0, 0, 0, 1]
    assert scored(wrong, correct) == [1, 0, 0, 0]
    assert scored(correct, wrong) == [0, 1, 0, 0]
    assert scored(wrong, wrong, correct) == [1, 0, 0, 0]


def test_an_episode_without_an_image_fails():
    wanted = {"objects": TWO_PARTS[:1], "parts": TWO_PARTS[:1], "edits": []}
    blank = torch.zeros(1, 3, 24, 24)
    batch = EpisodeBatch([""], [""], blank, [wanted], [blank[:0]])
    for reward in (reflect, story, dialogue):
        assert reward(batch)["reward"].tolist() == [0]


def test_ragged_episodes_are_read_apart():
    correct = layout({1: RED_CIRCLE})
    wrong = layout({1: BLUE_SQUARE})
    drawn = [draw(torch.tensor(rows)) for rows in ([wrong, correct], [wrong], [correct, wrong])]
    last = torch.stack([images[-1] for images in drawn])
    metadata = [{"objects": TWO_PARTS[:1]}] * 3
    batch = EpisodeBatch([""] * 3, [""] * 3, last, metadata, drawn)
    assert reflect(batch)["reward"].tolist() == [1, 0, 0]
    assert reflect(batch)["first_correct"].tolist() == [0, 0, 1]
