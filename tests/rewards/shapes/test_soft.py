"""The proxy: it has a gradient, is roughly correct, and can be fooled."""

import dataclasses

import torch

from rewards import EpisodeBatch, WeightedReward
from rewards.shapes.grid import KINDS, draw
from rewards.shapes.soft import recognise, soft_shapes
from rewards.shapes.verifier import shapes
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask
from unigrpo_env.tasks.task import demonstration_batch

RED_CIRCLE = 1 + KINDS.index(("red", "circle"))
BLUE_SQUARE = 1 + KINDS.index(("blue", "square"))


def demonstrations(clean=True):
    return demonstration_batch(ShapesTask().demonstrations(200, 1, clean=clean))


def test_clean_cells_are_recognised():
    kinds = torch.arange(21)[:, None].expand(-1, 9)
    probabilities = recognise(draw(kinds))
    assert torch.equal(probabilities.argmax(-1), kinds)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(21, 9))


def test_correct_images_score_higher():
    batch = demonstrations(clean=False)
    correct = shapes(batch)["reward"] == 1
    soft = soft_shapes(batch)
    assert soft[correct].mean() > soft[~correct].mean() + 0.2


def test_more_contrast_is_worth_more():
    """The weakness of the proxy: the image gets worse and the reward better."""
    plain = demonstrations()
    ground = plain.images[:1, :, :1, :1]
    louder = ((plain.images - ground) * 1.3 + ground).clamp(0, 1)
    loud = dataclasses.replace(plain, images=louder)
    assert soft_shapes(loud).mean() > soft_shapes(plain).mean() + 0.05


def test_a_gradient_reaches_the_pixels():
    batch = demonstrations()
    batch = dataclasses.replace(batch, images=(batch.images * 0.9).requires_grad_())
    scores = WeightedReward("soft_shapes")(batch, keep_gradient=True)
    (gradient,) = torch.autograd.grad(scores.reward.sum(), batch.images)
    assert gradient.abs().sum((1, 2, 3)).gt(0).all()
    assert not WeightedReward("soft_shapes")(batch).reward.requires_grad


def test_the_relation_counts():
    wanted = [
        {"count": 1, "colour": "red", "shape": "circle"},
        {"count": 1, "colour": "blue", "shape": "square"},
    ]
    images = draw(torch.tensor([[RED_CIRCLE, BLUE_SQUARE] + [0] * 7] * 2))
    metadata = [{"objects": wanted, "relation": name} for name in ("left of", "right of")]
    found = soft_shapes(EpisodeBatch(["", ""], ["", ""], images, metadata))
    assert found[0] > found[1] + 0.2


def test_a_prompt_without_objects_is_unscored():
    images = draw(torch.tensor([[RED_CIRCLE] + [0] * 8] * 2))
    wanted = {"objects": [{"count": 1, "colour": None, "shape": "circle"}]}
    found = soft_shapes(EpisodeBatch(["", ""], ["", ""], images, [{}, wanted]))
    assert found.isnan().tolist() == [True, False]
    alone = EpisodeBatch(["anything"], [""], torch.rand(1, 3, 24, 24), [{}])
    assert soft_shapes(alone).isnan().all()
