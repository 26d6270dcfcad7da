"""The proxy: differentiable, roughly right, and open to being fooled."""

import dataclasses

import torch

from rewards.registry import EpisodeBatch, WeightedReward
from rewards.shapes import draw, judge, read_words, shapes, shapes_thought
from rewards.soft_shapes import recognise, soft_shapes
from unigrpo_env.shapes_world import ShapesTask
from unigrpo_env.tasks import episodes_of


def batch(images, task_seed=1, clean=True):
    episodes = episodes_of(ShapesTask().lessons(200, task_seed, clean=clean))
    return dataclasses.replace(episodes, images=images(episodes.images))


def test_clean_cells_are_recognised():
    kinds = torch.arange(21)[:, None].expand(-1, 9)
    assert torch.equal(recognise(draw(kinds)).argmax(-1), kinds)


def test_it_prefers_right_pictures():
    lessons = batch(lambda pictures: pictures, clean=False)
    right = shapes(lessons)["reward"] == 1
    soft = soft_shapes(lessons)
    assert soft[right].mean() > soft[~right].mean() + 0.2


def test_its_loophole_is_contrast():
    """More contrast than any object has is worth more than the object, although the picture moves away from what it should be."""
    plain = batch(lambda pictures: pictures)
    ground = plain.images[:1, :, :1, :1]
    loud = batch(lambda pictures: ((pictures - ground) * 1.3 + ground).clamp(0, 1))
    assert soft_shapes(loud).mean() > soft_shapes(plain).mean() + 0.05


def test_its_gradient_reaches_the_pixels_through_a_weighted_sum():
    lessons = batch(lambda pictures: (pictures * 0.9).requires_grad_())
    scores = WeightedReward("soft_shapes")(lessons, keep_gradient=True)
    (gradient,) = torch.autograd.grad(scores.reward.sum(), lessons.images)
    assert gradient.abs().sum((1, 2, 3)).gt(0).all()
    assert not WeightedReward("soft_shapes")(lessons).reward.requires_grad


def test_a_prompt_without_requirements_is_unscored():
    one = EpisodeBatch(["anything"], [""], torch.rand(1, 3, 24, 24), [{}])
    assert soft_shapes(one).isnan().all()
    assert shapes_thought(one).isnan().all()


def test_thoughts_are_read_as_layouts():
    episodes = episodes_of(ShapesTask().lessons(200, 3, clean=True))
    for text, known in zip(episodes.texts, episodes.metadata, strict=True):
        assert judge(read_words(text), known).strict == 1
        assert read_words(f"red circle top wrong-picture {text}") == read_words(text)
    assert shapes_thought(episodes).sum() == 200
    said = dataclasses.replace(episodes, rounds=[["nonsense", text, "red circle top right-picture"] for text in episodes.texts])
    assert shapes_thought(said).sum() == 200
    assert shapes_thought(dataclasses.replace(said, rounds=[[text, "nonsense"] for text in said.texts])).sum() == 0
    for nonsense in ("", "red circle", "red circle top , blue square top", "two : red", "circle red top"):
        assert read_words(nonsense) is None
    wrong = dataclasses.replace(episodes, texts=["red"] * 200, rounds=[])
    assert shapes_thought(wrong).sum() == 0
