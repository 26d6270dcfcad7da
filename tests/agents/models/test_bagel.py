"""The model against numbers of the public reference implementation."""

import re

import pytest
import torch
from torch import nn

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.model import Bagel
from agents.models.bagel.tiny_config import TINY_CONFIG, load_tiny
from unigrpo_env.flow_time import time_grid

TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.parametrize("grad", [False, True], ids=["cache", "training"])
def test_logits_and_context(model, oracle, read, grad):
    with torch.set_grad_enabled(grad):
        logits, _ = read("prompt")
        torch.testing.assert_close(logits[0], oracle["out.prompt.logits"], **TOLERANCE)
        logits, context = read("prompt", "thought")
    torch.testing.assert_close(logits[0], oracle["out.thought.logits"], **TOLERANCE)
    for layer in range(3):
        for name, stored in (("k", context.keys), ("v", context.values)):
            found = stored[layer][0, :, : context.size].transpose(0, 1)
            torch.testing.assert_close(found, oracle[f"out.context.{name}.{layer}"], **TOLERANCE)


@torch.no_grad()
def test_one_call_equals_two(model, oracle):
    ids = torch.cat([oracle["in.prompt.ids"], oracle["in.thought.ids"]])[None]
    logits, _ = model.append_text(model.empty_context(1), ids)
    torch.testing.assert_close(logits[0, 12:], oracle["out.thought.logits"], **TOLERANCE)


@torch.no_grad()
def test_greedy_tokens(model, oracle, read):
    expected = oracle["out.greedy.ids"]
    _, context = read("prompt")
    found = [expected[0]]
    while len(found) < len(expected):
        logits, context = model.append_text(context, found[-1].view(1, 1))
        found.append(logits[0, -1].argmax())
    assert torch.stack(found).tolist() == expected.tolist()


@pytest.mark.parametrize("grad", [False, True], ids=["cache", "training"])
def test_velocities(model, oracle, read, grad):
    x = oracle["in.gen.x_t"]
    t = oracle["in.gen.t"]
    with torch.set_grad_enabled(grad):
        _, context = read("prompt", "thought")
        velocity = model.predict_velocity(context.repeat_interleave(5), x, t)
        again = model.predict_velocity(context.repeat_interleave(5), x, t)
    torch.testing.assert_close(velocity, oracle["out.gen.v"], **TOLERANCE)
    assert torch.equal(velocity, again), "a noisy latent is no part of the context"


@torch.no_grad()
def test_six_step_sampling(model, oracle, read):
    _, context = read("prompt", "thought")
    times = time_grid(6, shift=3.0)
    x = oracle["in.gen.noise"][None]
    torch.testing.assert_close(times[:-1], oracle["out.gen.sample_t"], **TOLERANCE)
    for step in range(6):
        torch.testing.assert_close(x[0], oracle["out.gen.sample_x"][step], **TOLERANCE)
        velocity = model.predict_velocity(context, x, times[step : step + 1])
        torch.testing.assert_close(velocity[0], oracle["out.gen.sample_v"][step], **TOLERANCE)
        x = x + velocity * (times[step + 1] - times[step])
    torch.testing.assert_close(x[0], oracle["out.gen.sample_x"][6], **TOLERANCE)


def test_velocity_without_grad_keeps_context_grad(small_bagel):
    x = torch.randn(1, 36, 48)
    t = torch.tensor([0.5])
    ids = torch.tensor([[1, 9, 2]])
    _, context = small_bagel.append_text(small_bagel.empty_context(1), ids)
    with torch.no_grad():
        small_bagel.predict_velocity(context, x, t)
    small_bagel.zero_grad()
    small_bagel.predict_velocity(context, x, t).sum().backward()
    assert small_bagel.language_model.model.embed_tokens.weight.grad[9].abs().sum() > 0


def test_position_table_is_not_trained(small_bagel):
    table = small_bagel.latent_pos_embed.pos_embed
    assert not table.requires_grad
    listed = [id(w) for weights in small_bagel.parameters_by_expert().values() for w in weights]
    assert id(table) not in listed
    assert "latent_pos_embed.pos_embed" in small_bagel.state_dict()


def test_initialise_depends_on_the_seed_alone(small_bagel):
    first = Bagel(small_bagel.config).initialise(3)
    second = Bagel(small_bagel.config).initialise(3)
    other = Bagel(small_bagel.config).initialise(4)
    weights = first.state_dict()
    for name, value in second.state_dict().items():
        assert torch.equal(weights[name], value)
    assert not torch.equal(weights["vae2llm.weight"], other.state_dict()["vae2llm.weight"])
    assert not first.llm2vae.weight.any()
    for name, value in weights.items():
        if "_moe_gen" in name:
            assert torch.equal(value, weights[name.replace("_moe_gen", "")])


def test_shipped_weights_have_the_tiny_config():
    model = load_tiny()
    assert model.config == TINY_CONFIG
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000


def test_release_without_vision_has_its_size():
    """Without vision encoder: what its layers, its embedding and its head add up to."""
    with torch.device("meta"):
        model = Bagel(BagelConfig())
    layers = 0
    heads = 0
    for name, weight in model.named_parameters():
        if ".layers." in name:
            layers += weight.numel()
        if "embed_tokens" in name or "lm_head" in name:
            heads += weight.numel()
    assert round(layers / 2 / 1e9, 2) == 6.53
    assert round(heads / 1e9, 2) == 1.09


class ResizableProcessor:
    """Takes images of any size."""

    def __init__(self, height, width):
        self.image_size = (height, width)

    def resized(self, height, width):
        return ResizableProcessor(height, width)


def test_image_size_moves_the_latent_grid(model):
    """The oracle's model has a table of 12 x 12 latent tokens, each of 16 x 16 pixels."""
    wide = Bagel(model.config)
    wide.load_state_dict(model.state_dict())
    wide.processor = ResizableProcessor(128, 128)
    wide.set_image_size(48, 192)
    assert wide.latent_shape == (36, 64)
    assert wide.config.latent_height == 3
    assert wide.processor.image_size == (48, 192)
    # Row 1 begins at entry 12 of the table.
    assert wide.latent_positions.tolist() == list(range(36))
    wide.set_image_size(128, 128)
    assert torch.equal(wide.latent_positions, model.latent_positions)
    x = torch.randn(1, 64, 64)
    t = torch.tensor([0.5])
    ids = torch.tensor([[1, 2]])
    _, context = model.append_text(model.empty_context(1), ids)
    expected = model.predict_velocity(context, x, t)
    assert torch.equal(wide.predict_velocity(context, x, t), expected)


@pytest.mark.parametrize("size", [(40, 32), (0, 32), (32, 208)])
def test_image_size_without_positions(model, size):
    small = Bagel(model.config)
    with pytest.raises(ValueError, match="multiples of 16 up to 192 pixels, got"):
        small.set_image_size(*size)
    assert small.config == model.config


def test_image_size_that_the_processor_does_not_take(small_bagel):
    with pytest.raises(ValueError, match="a size of 24 x 24 pixels, because ShapesProcessor"):
        small_bagel.set_image_size(12, 24)
    assert small_bagel.latent_shape == (36, 48)
    small_bagel.set_image_size(24, 24)


def test_adapters_go_into_the_layers_alone(vision_bagel):
    (pattern,) = Bagel.lora_targets
    matched = set()
    for name, module in vision_bagel.named_modules():
        if isinstance(module, nn.Linear) and re.search(pattern, name):
            matched.add(re.sub(r"\d+", "0", name))
    assert len(matched) == 14, "seven linear layers of each expert"
    assert all(name.startswith("language_model.model.layers.0.") for name in matched)


def test_logits_are_those_of_the_hidden_states(small_bagel):
    ids = torch.tensor([[1, 9, 2], [4, 5, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logits, _ = small_bagel.append_text(small_bagel.empty_context(2), ids, mask)
    hidden, _ = small_bagel.append_hidden(small_bagel.empty_context(2), ids, mask)
    assert hidden.shape == (2, 3, 32)
    assert torch.equal(small_bagel.compute_logits(hidden), logits)
    # Any shape of states will do.
    torch.testing.assert_close(small_bagel.compute_logits(hidden[0, 0]), logits[0, 0])
