"""A model with its adapters off stands for the model that it was before."""

import copy

import pytest
import torch
from torch import nn

from agents.config.schema import AlgorithmSettings
from agents.models.lora import adapters_by_expert, add_adapters
from agents.models.reference import AdaptersOff
from agents.objectives.loss import UniGRPOLoss

LOSSES = ("loss_text", "loss_image", "loss_velocity", "loss_kl")


def adapted(model):
    """The model, with adapters whose weights are not zero."""
    add_adapters(model, {"text": 2, "image": 3}, {"text": 4, "image": 6})
    generator = torch.Generator().manual_seed(1)
    for weights in adapters_by_expert(model).values():
        for weight in weights:
            weight.data.normal_(0, 0.1, generator=generator)
    return model


def walk(model, with_image=True):
    """What every method gives on the way through a short episode."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(60, (2, 3), generator=generator)
    x = torch.randn(2, *model.latent_shape, generator=generator)
    t = torch.tensor([0.2, 0.9])
    context = model.empty_context(2)
    model.reserve(context, tokens=6, images=1)
    logits, context = model.append_text(context, ids)
    velocity = model.predict_velocity(context, x, t)
    context = model.append_image(context, x)
    hidden, context = model.append_hidden(context, ids)
    return [logits, velocity, model.compute_logits(hidden), model.predict_velocity(context, x, t)]


def assert_same(found, expected):
    """To the last bit."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_model_before(small_bagel, dtype):
    before = small_bagel.cast_weights(dtype).frozen_copy()
    model = adapted(small_bagel)
    reference = model.reference()
    with torch.no_grad():
        expected = walk(before)
        trained = walk(model)
    found = walk(reference)
    assert not any(output.requires_grad for output in found)
    assert_same(found, expected)
    with torch.no_grad():
        assert_same(walk(model), trained)
    assert not torch.equal(trained[1], expected[1])


def test_model_without_adapters_is_copied(small_bagel):
    reference = small_bagel.reference()
    assert type(reference) is type(small_bagel)
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert reference.llm2vae.weight is not small_bagel.llm2vae.weight


def test_reference_has_nothing_of_its_own(small_bagel):
    reference = adapted(small_bagel).reference()
    assert list(reference.parameters()) == []
    assert list(reference.modules()) == [reference]
    assert reference.state_dict() == {}
    assert reference.parameters_by_expert() == {"text": [], "image": []}
    # Neither freezes nor moves the model.
    reference.requires_grad_(False).to(torch.float64)
    assert all(weight.requires_grad for weight in small_bagel.trainable_by_expert()["text"])
    assert small_bagel.llm2vae.weight.dtype == torch.float32


def test_reference_has_what_the_model_has(small_bagel):
    model = adapted(small_bagel)
    model.source = "somewhere"
    model.max_rows = 5
    reference = model.reference()
    model.checkpointing = True
    for name in ("config", "source", "device", "vocab_size", "latent_shape", "max_rows"):
        assert getattr(reference, name) == getattr(model, name), name
    assert reference.checkpointing
    assert reference.processor is model.processor
    context = model.empty_context(1)
    assert reference.velocity_bytes(context) == model.velocity_bytes(context)


def test_reference_needs_no_copy_of_the_model(small_bagel):
    pair = nn.Module()
    pair.model = adapted(small_bagel)
    pair.__dict__["reference"] = pair.model.reference()
    assert copy.deepcopy(pair.reference).model is small_bagel
    # In a copy of both the reference is that of the copied model.
    copied = copy.deepcopy(pair)
    assert copied.model is not small_bagel
    assert copied.reference.model is copied.model
    assert isinstance(pair.reference.frozen_copy(), AdaptersOff)


def test_reference_is_saved_whole(small_bagel, tmp_path):
    before = small_bagel.frozen_copy()
    reference = adapted(small_bagel).reference()
    saved = type(small_bagel).from_pretrained(reference.save_pretrained(tmp_path / "base"))
    assert_same(saved.state_dict().values(), before.state_dict().values())


@pytest.mark.slow
def test_loss_and_gradient_are_those_with_a_copy(small_bagel, short_variant, collect, prepare):
    variant = short_variant("text_to_image")
    before = small_bagel.frozen_copy()
    model = adapted(small_bagel)
    episodes = prepare(collect(model, variant), variant)
    settings = AlgorithmSettings(velocity_weight=1.0, latent_kl_weight=1.0, text_kl_weight=1.0)
    legal = variant.rules.legal_by_round()
    view = model.reference()
    results = []
    # Where a layer is computed again in the backward pass, its adapters are on again.
    for reference, checkpointing in ((before, False), (view, False), (view, True)):
        model.checkpointing = checkpointing
        loss = UniGRPOLoss(model, reference, legal, settings)
        model.zero_grad()
        out = loss(episodes)
        sum(out[name] for name in LOSSES).backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        results.append([*(out[name] for name in LOSSES), *gradients])
    expected, *others = results
    assert expected[2] > 0
    assert len(expected) > 40
    for found in others:
        assert_same(found, expected)
