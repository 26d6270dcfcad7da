"""Plans, errors, and what demonstrations of every scenario show."""

import random

import pytest
import torch

from rewards import WeightedReward
from rewards.shapes.grid import KINDS, read
from rewards.shapes.verifier import read_words, shapes
from unigrpo_env.tasks.shapes.demonstrations import (
    ERRORS,
    NO_ERRORS,
    Answer,
    DrawingErrors,
    ErrorRates,
    LayoutPlan,
    draw_answers,
    error_rates,
    make_plan,
)
from unigrpo_env.tasks.shapes.prompts import PROMPT_KINDS, is_held_out, make_prompt
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask
from unigrpo_env.tasks.shapes.vocabulary import shapes_tokenizer
from unigrpo_env.tasks.task import Prompt, demonstration_batch
from unigrpo_env.variants.variant import make_variant

pytestmark = pytest.mark.slow

SCENARIOS = ["text_to_image", "edit", "reflect", "story", "dialogue"]


def strict_share(kind, clean):
    task = ShapesTask((kind,))
    shown = task.demonstrations(600, 1, clean=clean)
    return shapes(demonstration_batch(shown))["reward"].mean()


def test_a_plan_is_a_layout_in_words():
    plan = LayoutPlan([("red", "circle", 1), ("blue", "square", 8)], count=2)
    assert plan.words() == "two : red circle top , blue square bottom-right"
    layout = plan.layout()
    assert read_words(plan.words()) == layout
    again = LayoutPlan.from_layout(layout)
    assert again.words() == "red circle top , blue square bottom-right"
    assert LayoutPlan().words() == ""


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_clean_demonstrations_are_correct(kind):
    assert strict_share(kind, clean=True) == 1


@pytest.mark.parametrize("kind", ["attribute", "sum", "position"])
def test_systematic_errors_are_more_frequent(kind):
    assert 0.1 < strict_share(kind, clean=False) < 0.4


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"kind": "sum", "operand": 1, "count": 3}, "one :"),
        ({"kind": "corners", "count": 3}, "two :"),
        ({"kind": "corners", "count": 4}, "three :"),
        ({"kind": "counting", "count": 3}, "three :"),
    ],
)
def test_systematic_errors_of_numbers(metadata, expected):
    wanted = {"count": metadata.pop("count"), "colour": "red", "shape": "circle"}
    prompt = Prompt("", {**metadata, "objects": [wanted]})
    plan = make_plan(prompt, random.Random(0), ErrorRates(text=1.0, image=0.0, random=0.0))
    assert plan.words().startswith(expected)
    assert len(plan.objects) == plan.count


@pytest.mark.parametrize("seed", range(10))
def test_a_systematic_error_swaps_colours(seed):
    rng = random.Random(seed)
    prompt = make_prompt("attribute", rng)
    plan = make_plan(prompt, rng, ErrorRates(text=1.0, image=0.0, random=0.0))
    wanted = prompt.metadata["objects"]
    assert [colour for colour, _, _ in plan.objects] == [each["colour"] for each in wanted][::-1]
    assert [shape for _, shape, _ in plan.objects] == [each["shape"] for each in wanted]


def test_errors_of_drawing():
    plan = LayoutPlan([("purple", "cross", 0), ("red", "circle", 4)])
    rng = random.Random(0)
    assert DrawingErrors().apply(plan, rng) == plan.layout()
    both = DrawingErrors(crosses_as_squares=True, purple_as_blue=True).apply(plan, rng)
    assert KINDS[both[0] - 1] == ("blue", "square")
    assert KINDS[both[4] - 1] == ("red", "circle")
    fewer = DrawingErrors(omits_object=True).apply(plan, rng)
    assert sum(cell > 0 for cell in fewer) == 1
    assert DrawingErrors(omits_object=True).apply(LayoutPlan(), rng) == [0] * 9
    assert plan.objects[0] == ("purple", "cross", 0), "the plan itself stays"


def test_errors_are_drawn_at_their_rates():
    assert error_rates(clean=True) == NO_ERRORS
    assert error_rates(clean=False) == ERRORS
    rng = random.Random(0)
    sampled = [DrawingErrors.sample(rng, ERRORS) for _ in range(2000)]
    assert sum(each.crosses_as_squares for each in sampled) / 2000 == pytest.approx(0.6, abs=0.04)
    assert sum(each.purple_as_blue for each in sampled) / 2000 == pytest.approx(0.6, abs=0.04)
    assert sum(each.omits_object for each in sampled) / 2000 == pytest.approx(0.06, abs=0.02)
    assert DrawingErrors.sample(rng, NO_ERRORS) == DrawingErrors()


def test_ragged_answers_are_drawn_together():
    layouts = [[[1] + [0] * 8, [2] + [0] * 8], [[0] * 8 + [3]]]
    answers = [Answer(["a", "b", "c"], layouts[0]), Answer(["d"], layouts[1])]
    shown = draw_answers([Prompt("one"), Prompt("two")], answers)
    assert [read(each.images).tolist() for each in shown] == layouts
    assert [each.thoughts for each in shown] == [("a", "b", "c"), ("d",)]
    assert [each.prompt.text for each in shown] == ["one", "two"]
    assert draw_answers([], []) == []


def test_demonstrations_show_training_prompts():
    shown = ShapesTask().demonstrations(300, 0)
    assert not any(is_held_out(each.prompt.text) for each in shown)


def test_demonstrations_depend_on_the_seed_alone():
    task = ShapesTask()
    first, again, other = (task.demonstrations(20, seed) for seed in (3, 3, 4))
    assert [each.thoughts for each in first] == [each.thoughts for each in again]
    assert [each.thoughts for each in first] != [each.thoughts for each in other]
    assert all(torch.equal(one.images, two.images) for one, two in zip(first, again, strict=True))


@pytest.mark.parametrize("name", SCENARIOS)
def test_clean_demonstrations_get_the_reward(name):
    variant = make_variant(name)
    # What further images of a reflection cost is left out.
    reward = WeightedReward("reflect" if name == "reflect" else variant.reward)

    def score(shown):
        return reward(demonstration_batch(shown)).reward.mean()

    assert score(variant.task.demonstrations(300, 7, clean=True)) == 1
    highest = 0.95 if name == "reflect" else 0.55
    assert 0.05 < score(variant.task.demonstrations(300, 7)) < highest
    # In text_to_image they answer a prompt that asks for nothing in particular.
    if name != "text_to_image":
        assert score(variant.task.warmup_demonstrations(50, 7)) == 1


def test_free_layouts_follow_their_thoughts():
    for shown in ShapesTask().warmup_demonstrations(200, 7):
        layout = read(shown.images)[0].tolist()
        assert read_words(shown.thoughts[0]) == layout
        assert 2 <= sum(cell > 0 for cell in layout) <= 4
        assert shown.prompt.text in ("draw", "show", "a picture of")


@pytest.mark.parametrize("name", SCENARIOS)
def test_demonstrations_fit_the_budgets(name):
    variant = make_variant(name)
    rules = variant.rules
    tokenizer = shapes_tokenizer()
    for shown in variant.task.demonstrations(200, 1):
        assert 1 <= len(shown.images) <= rules.image_budget
        last_texts = (0, 1) if rules.end_id else (0,)
        assert len(shown.thoughts) - len(shown.images) in last_texts
        for text in (shown.prompt.text, *shown.prompt.turns, *shown.thoughts):
            assert tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False)
        for text in shown.thoughts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert len(ids) < rules.text_budget
            assert not set(ids) & set(rules.forbidden_ids)
