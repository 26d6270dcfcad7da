"""The verifier, against layouts and prompts whose answer is known."""

import dataclasses
import random

import pytest
import torch

from rewards import EpisodeBatch
from rewards.shapes.grid import GRID, KINDS, UNREADABLE, draw
from rewards.shapes.verifier import (
    Verdict,
    crispness,
    judge,
    read_words,
    shapes,
    shapes_score,
    shapes_thought,
    verdicts,
)
from unigrpo_env.tasks.shapes.demonstrations import make_plan
from unigrpo_env.tasks.shapes.prompts import PROMPT_KINDS, make_prompt
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask
from unigrpo_env.tasks.task import demonstration_batch

RED_CIRCLE = 1 + KINDS.index(("red", "circle"))
BLUE_SQUARE = 1 + KINDS.index(("blue", "square"))
RED_CIRCLE_WANTED = {"objects": [{"count": 1, "colour": "red", "shape": "circle"}]}


def demonstrations(seed, clean=True):
    return demonstration_batch(ShapesTask().demonstrations(200, seed, clean=clean))


def episode(layout, metadata, text=""):
    return EpisodeBatch([""], [text], draw(torch.tensor([layout])), [metadata])


@pytest.mark.parametrize("kind", PROMPT_KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_correct_layouts_pass_and_changes_fail(kind, seed):
    rng = random.Random(seed)
    prompt = make_prompt(kind, rng)
    layout = make_plan(prompt, rng).layout()
    assert judge(layout, prompt.metadata).strict == 1
    assert judge(layout, prompt.metadata).score == 1
    filled = next(place for place, cell in enumerate(layout) if cell)
    empty = next(place for place, cell in enumerate(layout) if not cell)
    changes = [(filled, 0), (filled, UNREADABLE), (empty, layout[filled]), (empty, UNREADABLE)]
    for place, cell in changes:
        changed = [*layout]
        changed[place] = cell
        verdict = judge(changed, prompt.metadata)
        assert verdict.strict == 0, (prompt.text, layout, changed)
        assert verdict.score < 1


def test_relations_are_required():
    wanted = [
        {"count": 1, "colour": "red", "shape": "circle"},
        {"count": 1, "colour": "blue", "shape": "square"},
    ]
    layout = [0] * 9
    layout[0] = RED_CIRCLE
    layout[GRID + 1] = BLUE_SQUARE
    met = {}
    for relation in ("left of", "right of", "above", "below"):
        met[relation] = judge(layout, {"objects": wanted, "relation": relation}).strict
    assert met == {"left of": 1, "right of": 0, "above": 1, "below": 0}
    missing = judge([0] * 9, {"objects": wanted, "relation": "above"})
    assert not missing.requirements["above"]


def test_a_verdict_counts_requirements():
    verdict = Verdict({"a": True, "b": False, "c": False, "d": False})
    assert verdict.strict == 0
    assert verdict.score == 0.25


def test_requirements_have_names():
    layout = [RED_CIRCLE, RED_CIRCLE, BLUE_SQUARE, UNREADABLE, 0, 0, 0, 0, 0]
    wanted = {"objects": [{"count": 2, "colour": None, "shape": "circle"}]}
    assert judge(layout, wanted).requirements == {
        "2 any circle": True,
        "nothing else": False,
        "legible": False,
    }


def test_kind_and_colour_may_be_left_out():
    wanted = {"objects": [{"count": 1, "shape": "circle"}]}
    assert judge([RED_CIRCLE] + [0] * 8, wanted).strict == 1


@pytest.mark.parametrize(
    "metadata",
    [
        {"objects": [{"count": 1, "shape": "star"}]},
        {"objects": [{"count": 1, "shape": "circle", "colour": "pink"}]},
        {"objects": [{"shape": "circle"}]},
        {"objects": ["circle"]},
        {"objects": [{"count": 0, "shape": "circle"}], "relation": "above"},
        {
            "objects": [{"count": 1, "shape": "circle"}, {"count": 0, "shape": "cross"}],
            "relation": "near",
        },
    ],
)
def test_metadata_of_another_world_are_refused(metadata):
    metadata.setdefault("relation", None)
    layout = [RED_CIRCLE, 1 + KINDS.index(("red", "cross"))] + [0] * 7
    with pytest.raises(ValueError, match="correct the prompt's metadata"):
        judge(layout, metadata)


def test_rewards_are_strict_or_a_share():
    layout = [RED_CIRCLE, BLUE_SQUARE] + [0] * 7
    batch = episode(layout, RED_CIRCLE_WANTED)
    share = pytest.approx([2 / 3])
    assert shapes(batch)["reward"].tolist() == [0]
    assert shapes(batch)["score"].tolist() == share
    assert shapes_score(batch)["reward"].tolist() == share
    assert shapes_score(batch)["strict"].tolist() == [0]


def test_the_pixels_count_and_not_the_words():
    correct = episode([0, 0, RED_CIRCLE] + [0] * 6, RED_CIRCLE_WANTED, text="blue square top")
    assert shapes(correct)["reward"].tolist() == [1]
    assert shapes_thought(correct).tolist() == [0]


def test_a_prompt_without_objects_is_unscored():
    one = EpisodeBatch(["anything"], [""], torch.rand(1, 3, 24, 24), [{}])
    assert verdicts(one) == [None]
    assert shapes(one)["reward"].isnan().all()
    assert shapes_score(one)["strict"].isnan().all()
    assert shapes_thought(one).isnan().all()


def test_thoughts_are_read_as_layouts():
    batch = demonstrations(3)
    for text, metadata in zip(batch.texts, batch.metadata, strict=True):
        assert judge(read_words(text), metadata).strict == 1
        assert read_words(f"red circle top wrong-picture {text}") == read_words(text)
    assert shapes_thought(batch).sum() == 200
    wrong = dataclasses.replace(batch, texts=["red"] * 200, thoughts=[])
    assert shapes_thought(wrong).sum() == 0


def test_the_last_plan_counts():
    batch = demonstrations(3)
    several = [["nonsense", text, "red circle top right-picture"] for text in batch.texts]
    assert shapes_thought(dataclasses.replace(batch, thoughts=several)).sum() == 200
    last = [[text, "nonsense"] for text in batch.texts]
    assert shapes_thought(dataclasses.replace(batch, thoughts=last)).sum() == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red circle",
        "red circle top , blue square top",
        "two : red",
        "circle red top",
        "red circle middle",
    ],
)
def test_nonsense_is_no_layout(text):
    assert read_words(text) is None


def test_a_count_may_stand_before_the_list():
    layout = [0, RED_CIRCLE, 0, RED_CIRCLE, 0, 0, 0, 0, 0]
    assert read_words("two : red circle top , red circle left") == layout
    assert read_words("red circle top , red circle left") == layout


def test_crispness_is_one_for_clean_images():
    layout = [RED_CIRCLE] + [0] * 8
    clean = episode(layout, {})
    torch.testing.assert_close(crispness(clean), torch.ones(1), atol=5e-3, rtol=0)
    noise = 0.05 * torch.randn(clean.images.shape, generator=torch.Generator().manual_seed(0))
    noisy = dataclasses.replace(clean, images=clean.images + noise)
    assert 0 < crispness(noisy) < 0.9
