"""The model against numbers of the public reference implementation."""

import pytest
import torch

from agents.models.bagel.model import Bagel, BagelConfig
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


def test_bfloat16_gives_float32_velocity(small_bagel):
    small_bagel.compute_dtype = torch.bfloat16
    _, context = small_bagel.append_text(small_bagel.empty_context(1), torch.tensor([[1, 9, 2]]))
    velocity = small_bagel.predict_velocity(context, torch.randn(1, 36, 48), torch.tensor([0.5]))
    assert velocity.dtype == torch.float32


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
