"""Learning rates, clipping, and what is frozen."""

import math

import pytest
import torch

from agents.config.schema import AlgorithmSettings, OptimizerSettings
from agents.models.toy import ToyModel
from agents.training.optimization import Optimization


def make_optimization(model, iterations=10, algorithm=None, **settings):
    algorithm = algorithm or AlgorithmSettings()
    return Optimization(model, OptimizerSettings(**settings), algorithm, iterations)


def set_gradients(model, value):
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.full_like(weight, value)


def test_schedule_by_hand():
    optimization = make_optimization(ToyModel(), iterations=10, warmup=4, decay=0.1)
    found = [optimization.schedule(iteration) for iteration in range(11)]
    expected = []
    for iteration in range(11):
        rise = min(1, (iteration + 1) / 4)
        expected.append(rise * (1 - 0.9 * iteration / 10))
    assert found == pytest.approx(expected)
    assert found[10] == pytest.approx(0.1)


def test_no_warmup_and_no_iterations():
    optimization = make_optimization(ToyModel(), iterations=0, warmup=0)
    assert optimization.schedule(0) == 1


def test_experts_have_their_own_rates():
    """The first step of AdamW is the learning rate, whatever the gradient."""
    model = ToyModel()
    optimization = make_optimization(model, text_lr=0.1, image_lr=0.03, warmup=1)
    set_gradients(model, 0.5)
    optimization.step(0)
    torch.testing.assert_close(model.words.detach(), torch.full((5, 5, 5), -0.1))
    torch.testing.assert_close(model.images.detach(), torch.full((5, 1, 12), -0.03))


def test_each_expert_is_clipped_alone():
    model = ToyModel()
    optimization = make_optimization(model, max_grad_norm=1.0)
    model.words.grad = torch.full_like(model.words, 2.0)
    model.images.grad = torch.full_like(model.images, 1e-3)
    norms = optimization.step(0)
    assert norms["text_grad_norm"] == pytest.approx(2 * math.sqrt(125), rel=1e-5)
    assert norms["image_grad_norm"] == pytest.approx(1e-3 * math.sqrt(60), rel=1e-5)
    assert float(model.words.grad.norm()) == pytest.approx(1, rel=1e-4)
    assert float(model.images.grad.norm()) == pytest.approx(norms["image_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("frozen", ["text", "image"])
def test_weight_zero_freezes_an_expert(small_bagel, frozen):
    algorithm = AlgorithmSettings(**{f"{frozen}_weight": 0.0})
    make_optimization(small_bagel, algorithm=algorithm)
    for expert, weights in small_bagel.parameters_by_expert().items():
        assert all(weight.requires_grad == (expert != frozen) for weight in weights)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_that_is_not_finite(value):
    model = ToyModel()
    optimization = make_optimization(model)
    set_gradients(model, 0.5)
    model.images.grad[0] = value
    with pytest.raises(FloatingPointError, match=r"image expert is \w+ in iteration 4; the weig"):
        optimization.step(3)
    assert not model.words.any(), "the weights are as before"
    assert not model.images.any()


def test_names_are_in_the_order_of_the_optimiser(small_bagel):
    optimization = make_optimization(small_bagel)
    weights = dict(small_bagel.named_parameters())
    ordered = []
    for group in optimization.optimizer.param_groups:
        ordered += group["params"]
    assert len(optimization.names) == len(ordered)
    for name, weight in zip(optimization.names, ordered, strict=True):
        assert weights[name] is weight


def test_zero_grad():
    model = ToyModel()
    optimization = make_optimization(model)
    set_gradients(model, 1.0)
    optimization.zero_grad()
    assert model.words.grad is None
