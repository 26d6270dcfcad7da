"""Learning rates, clipping, and what is frozen."""

import math

import pytest
import torch

from agents.config.schema import AlgorithmSettings, OptimizerSettings
from agents.models.lora import add_adapters
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


def half_precision_toy(value=0.01):
    """A toy in bfloat16, all of whose weights have one value."""
    model = ToyModel().cast_weights(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    return model


def backward(model, gradient):
    """Give each trained weight a gradient, as a backward pass does."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    sum((weight * gradient).sum() for weight in weights).backward()


def test_steps_below_the_resolution_of_bfloat16_add_up():
    model = half_precision_toy()
    start = model.words.detach().clone()
    optimization = make_optimization(model, text_lr=1e-6, image_lr=1e-6, warmup=1, decay=1.0)
    assert torch.equal((start.float() - 1e-6).bfloat16(), start), "one step alone would be lost"
    for step in range(100):
        optimization.zero_grad()
        backward(model, 1.0)
        optimization.step(0)
        if step == 0:
            assert torch.equal(model.words, start)
    master = optimization.masters["words"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, start.float() - 1e-4, rtol=0, atol=1e-7)
    assert torch.equal(model.words, master.bfloat16())
    assert not torch.equal(model.words, start)


def test_gradients_add_up_in_float32():
    model = half_precision_toy()
    optimization = make_optimization(model)
    for gradient in (1.0, 2**-9, 2**-9):
        backward(model, gradient)
        assert model.words.grad is None, "freed as soon as it is added"
    total = optimization.masters["words"].grad
    assert torch.equal(total, torch.full((5, 5, 5), 1 + 2**-8))
    assert optimization.step(0)["text_grad_norm"] > 1
    optimization.zero_grad()
    assert optimization.masters["words"].grad is None


def test_last_optimization_has_the_gradient():
    model = half_precision_toy()
    first = make_optimization(model)
    second = make_optimization(model)
    backward(model, 1.0)
    assert first.masters["words"].grad is None
    assert second.masters["words"].grad.eq(1).all()


def test_only_what_is_trained_has_a_master():
    model = half_precision_toy()
    optimization = make_optimization(model, algorithm=AlgorithmSettings(text_weight=0.0))
    assert set(optimization.masters) == {"images"}
    assert make_optimization(ToyModel()).masters == {}


def test_adapters_alone_are_trained(small_bagel):
    add_adapters(small_bagel.cast_weights(torch.bfloat16), {"image": 2}, {"image": 4.0})
    optimization = make_optimization(small_bagel)
    assert optimization.experts["text"] == []
    assert all("lora" in name for name in optimization.names)
    assert optimization.masters == {}, "adapters are float32 themselves"
    trained = {name for name, weight in small_bagel.named_parameters() if weight.requires_grad}
    assert trained == set(optimization.names)
    backward(small_bagel, 1.0)
    assert optimization.step(0)["text_grad_norm"] == 0


def test_average_follows_the_masters():
    model = half_precision_toy()
    optimization = make_optimization(model, text_lr=1e-6, ema=0.5, warmup=1)
    backward(model, 1.0)
    optimization.step(0)
    master = optimization.masters["words"].detach()
    start = torch.full((5, 5, 5), 0.01).bfloat16().float()
    expected = (start + master) / 2
    torch.testing.assert_close(optimization.average.averages["words"], expected, rtol=0, atol=1e-9)
    assert make_optimization(ToyModel()).average is None


def test_something_must_be_trained(small_bagel):
    add_adapters(small_bagel, {"image": 2}, {"image": 4.0})
    with pytest.raises(ValueError, match="expected something to train, got none"):
        make_optimization(small_bagel, algorithm=AlgorithmSettings(image_weight=0.0))
