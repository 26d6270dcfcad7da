"""The reference of a thinker-painter with adapters: the model without them, and no copy."""

import pytest
import torch
from folders import load_parts

from agents.config.schema import AlgorithmSettings
from agents.models.lora import adapter_weights, add_adapters
from agents.objectives.loss import UniGRPOLoss
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant

LOSSES = ("loss_text", "loss_image", "loss_velocity", "loss_kl")
PROMPTS = [Prompt("two red circles"), Prompt("a blue square"), Prompt("a green cross")]


class Prompts:
    """A task of three prompts."""

    def prompts(self, split, count, seed):
        return PROMPTS[:count]


def spread(episodes):
    return episodes.images.std((1, 2, 3))


def adapted(model):
    add_adapters(model, {"text": 2, "image": 3}, {"text": 5, "image": 7})
    generator = torch.Generator().manual_seed(0)
    for weight in adapter_weights(model).values():
        weight.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("name", ["sd3", "zimage"])
def test_loss_and_gradient_are_those_with_a_copy(parts, name, collect, prepare):
    model = load_parts(parts(name))
    before = model.frozen_copy()
    adapted(model)
    variant = make_variant(
        "text_to_image",
        processor=model.processor,
        task=Prompts(),
        reward=spread,
        text_budget=4,
        image_steps=4,
        prompt_budget=200,
    )
    episodes = prepare(collect(model, variant, prompts=PROMPTS[:2]), variant)
    settings = AlgorithmSettings(velocity_weight=1.0, latent_kl_weight=1.0, text_kl_weight=1.0)
    results = []
    for reference in (before, model.reference()):
        loss = UniGRPOLoss(model, reference, variant.rules.legal_by_round(), settings)
        model.zero_grad()
        out = loss(episodes)
        sum(out[key] for key in LOSSES).backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        results.append([*(out[key] for key in LOSSES), *gradients])
    expected, found = results
    assert min(expected[2], expected[3]) > 0
    # All adapters learn, but for the last block's that feed nothing, and nothing else does.
    assert 0.7 * len(adapter_weights(model)) < len(expected) - len(LOSSES)
    assert len(expected) - len(LOSSES) <= len(adapter_weights(model))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_reference_is_no_copy(parts):
    model = adapted(load_parts(parts("sd3")))
    reference = model.reference()
    assert list(reference.parameters()) == []
    assert list(reference.modules()) == [reference]
    assert reference.model is model


@pytest.mark.parametrize("frozen", ["text", "image"])
def test_frozen_adapters_stay_frozen(parts, frozen):
    model = adapted(load_parts(parts("zimage")))
    for weight in model.trainable_by_expert()[frozen]:
        weight.requires_grad_(False)
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    reference = model.reference()
    _, context = reference.append_text(reference.empty_context(2), torch.tensor([[30], [40]]))
    x = torch.randn(2, *model.latent_shape)
    velocity = reference.predict_velocity(context, x, torch.tensor([0.3, 0.9]))
    assert not velocity.requires_grad
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    encoder = model.painter.pipeline.text_encoder
    assert any(weight.requires_grad for weight in encoder.parameters()) == (frozen == "image")
