"""Reflection and stories."""

import re

import pytest
import torch

from rewards import WeightedReward
from rewards.shapes.grid import VERDICT_CORRECT, VERDICT_WRONG, read
from rewards.shapes.multi_image import judge_story
from rewards.shapes.verifier import read_words
from unigrpo_env.tasks.shapes.multi_image import ReflectTask, StoryTask
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask
from unigrpo_env.tasks.task import demonstration_batch


def reflection_parts(shown):
    return WeightedReward("reflect")(demonstration_batch(shown)).components


def test_verdicts_compare_with_the_plan():
    """The systematic error of a verdict: what was planned is called correct."""
    shown = ReflectTask().demonstrations(500, 3)
    parts = reflection_parts(shown)
    first = parts["reflect/first_correct"] == 1
    stopped_correct = parts["reflect/stopped_correct"] == 1
    stopped_wrong = parts["reflect/stopped_wrong"] == 1
    assert 0.15 < stopped_wrong.sum() / (~first).sum() < 0.4, "many wrong images are called correct"
    assert 0.8 < stopped_correct.sum() / first.sum() < 1, "and few correct ones wrong"
    as_planned = []
    for demonstration, wrong in zip(shown, stopped_wrong, strict=True):
        if wrong:
            planned = read_words(demonstration.thoughts[-2])
            as_planned.append(planned == read(demonstration.images[-1:])[0].tolist())
    assert sum(as_planned) > 0.8 * len(as_planned)
    assert parts["reflect"].mean() > parts["reflect/first_correct"].mean() + 0.15


def test_warmup_shows_correct_verdicts():
    shown = ReflectTask().warmup_demonstrations(500, 3)
    parts = reflection_parts(shown)
    assert 0.3 < parts["reflect/first_correct"].mean() < 0.7, "both kinds of image are shown"
    assert parts["reflect"].mean() == 1
    assert torch.equal(parts["reflect/stopped_correct"], parts["reflect/first_correct"])
    for demonstration in shown:
        layouts = read(demonstration.images).tolist()
        # The first thought has no image before it.
        for thought, layout in zip(demonstration.thoughts[1:], layouts, strict=False):
            described = re.split(f"{VERDICT_CORRECT}|{VERDICT_WRONG}", thought)[0].strip()
            expected = layout if any(layout) else None
            assert read_words(described) == expected


def test_a_reflection_ends_with_its_verdict():
    for shown in ReflectTask(images=3).demonstrations(200, 0):
        stopped = len(shown.thoughts) > len(shown.images)
        assert stopped == shown.thoughts[-1].endswith(f"{VERDICT_CORRECT} <end>")
        if not stopped:
            assert len(shown.images) == 3, "after the last image nothing is said"


def test_one_image_leaves_no_choice():
    for shown in ReflectTask(images=1).demonstrations(50, 0):
        assert len(shown.images) == len(shown.thoughts) == 1


def test_reflections_have_the_prompts_of_one_image():
    assert ReflectTask().prompts("test", 50, 0) == ShapesTask().prompts("test", 50, 0)


@pytest.mark.parametrize("images", [1, 3, 9])
def test_stories_grow_by_one_object(images):
    task = StoryTask(images)
    for shown in task.demonstrations(20, 0, clean=True):
        parts = shown.prompt.metadata["parts"]
        layouts = read(shown.images).tolist()
        assert len(parts) == len(shown.thoughts) == images
        assert judge_story(layouts, parts).strict == 1
        assert [read_words(thought) for thought in shown.thoughts] == layouts
        assert shown.prompt.text.count("then") == images - 1


@pytest.mark.parametrize("images", [0, 10])
def test_a_story_must_fit_the_grid(images):
    with pytest.raises(ValueError, match=f"expected 1 to 9 images, got {images}"):
        StoryTask(images)
