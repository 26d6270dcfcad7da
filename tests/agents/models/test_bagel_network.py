"""Precision, checkpoints and memory of the forward pass."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.model import Bagel

IDS = torch.tensor([[1, 9, 2, 7], [4, 5, 6, 8]])
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
TIMES = torch.tensor([0.3, 0.9])


@pytest.fixture
def half(vision_bagel):
    """The same weights in bfloat16."""
    return copy.deepcopy(vision_bagel).cast_weights(torch.bfloat16)


def read(model, latent):
    """Text, an image, text and a velocity; returns logits, velocity and context."""
    _, context = model.append_text(model.empty_context(2), IDS, MASK)
    context = model.append_image(context, latent)
    logits, context = model.append_text(context, IDS[:, :2])
    return logits, model.predict_velocity(context, latent.flip(1), TIMES), context


def relative(found, expected):
    return (found.float() - expected).norm() / expected.norm()


@torch.no_grad()
def test_bfloat16_is_close_to_float32(vision_bagel, half):
    latent = torch.randn(2, 36, 48, generator=torch.Generator().manual_seed(0))
    logits, velocity, _ = read(vision_bagel, latent)
    half_logits, half_velocity, _ = read(half, latent)
    assert half_logits.dtype == torch.bfloat16
    assert half_velocity.dtype == torch.float32
    assert 1e-4 < relative(half_logits, logits) < 0.02
    assert 1e-4 < relative(half_velocity, velocity) < 0.02


@pytest.mark.parametrize("grad", [False, True], ids=["cache", "training"])
def test_cache_has_the_dtype_of_the_weights(vision_bagel, half, grad):
    latent = torch.randn(2, 36, 48)
    with torch.set_grad_enabled(grad):
        _, _, context = read(vision_bagel, latent)
        _, _, half_context = read(half, latent)
    for name in ("keys", "values"):
        whole = sum(tensor.nbytes for tensor in getattr(context, name))
        assert sum(tensor.nbytes for tensor in getattr(half_context, name)) == whole / 2


def test_rotary_positions_stay_exact_in_bfloat16():
    """Frequencies in bfloat16 would turn position 5000 by some rounds more or less."""
    config = BagelConfig(
        vocab_size=8, hidden_size=128, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, latent_height=1, latent_width=1,
        max_latent_size=1,
    )  # fmt: skip
    model = Bagel(config).cast_weights(torch.bfloat16)
    position = torch.arange(0, 5001, 250)
    hidden = model.language_model.model.embed_tokens.weight[:1, None]
    cosine, sine = model.rotary(hidden, position[None])
    assert cosine.dtype == torch.bfloat16
    frequencies = 1e6 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    angle = position[:, None] * frequencies
    # The halves of a head share their angles. Rounding a number below 1 to 8 bits costs 0.002.
    for found, expected in ((cosine, angle.cos()), (sine, angle.sin())):
        assert (found[0, :, :64].double() - expected).abs().max() < 0.004
        assert torch.equal(found[0, :, 64:], found[0, :, :64])


@torch.no_grad()
def test_flow_times_stay_apart_in_bfloat16(half):
    """Times are embedded in float32: two of them differ that are one number in bfloat16."""
    times = torch.tensor([0.897, 0.8999])
    assert times.bfloat16().unique().numel() == 1
    waves = []
    half.time_embedder.mlp.register_forward_pre_hook(lambda _, inputs: waves.append(inputs[0]))
    half.time_embedder(times)
    assert waves[0].dtype == torch.bfloat16
    assert not torch.equal(waves[0][0], waves[0][1])


def losses(model, latent):
    """The loss of texts, images and velocities, part of it after a cut and a growing context."""
    with torch.no_grad():
        _, prompt = model.append_text(model.empty_context(2), IDS, MASK)
    after_prompt, _ = model.append_text(prompt, IDS)
    with torch.no_grad():
        # The prompt grows in place before the backward pass of what followed it.
        model.append_text(prompt, IDS.flip(1))
    logits, velocity, context = read(model, latent)
    cut = model.append_image(context, latent, with_grad=False)
    cut_logits, _ = model.append_text(cut, IDS)
    total = after_prompt.square().mean() + logits.square().mean() + velocity.square().mean()
    return total + cut_logits.square().mean()


def gradients(model, latent):
    model.zero_grad()
    loss = losses(model, latent)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            found[name] = weight.grad.clone()
    return found


def saved_bytes(model, latent):
    """Bytes of all tensors that autograd keeps for the backward pass, weights left out."""
    weights = {weight.data_ptr() for weight in model.parameters()}
    sizes = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = losses(model, latent)
    assert loss.requires_grad
    return sum(sizes.values())


def test_checkpointing_changes_no_gradient(vision_bagel):
    latent = torch.randn(2, 36, 48)
    expected = gradients(vision_bagel, latent)
    vision_bagel.checkpointing = True
    found = gradients(vision_bagel, latent)
    assert found.keys() == expected.keys()
    assert len(found) > 50
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_checkpointing_keeps_less(vision_bagel):
    latent = torch.randn(2, 36, 48)
    everything = saved_bytes(vision_bagel, latent)
    vision_bagel.checkpointing = True
    assert saved_bytes(vision_bagel, latent) < 0.4 * everything


@torch.no_grad()
def test_checkpointing_waits_for_a_gradient(vision_bagel, monkeypatch):
    vision_bagel.checkpointing = True
    monkeypatch.setattr("agents.models.recompute.checkpoint", None)
    assert torch.isfinite(read(vision_bagel, torch.randn(2, 36, 48))[0]).all()


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, MASK], ids=["dense", "ragged"])
def test_velocity_leaves_the_cache_as_it_was(small_bagel, mask):
    _, context = small_bagel.append_text(small_bagel.empty_context(2), IDS, mask)
    buffers = [*context.keys, *context.values]
    before = [buffer.clone() for buffer in buffers]
    capacity = context.capacity
    small_bagel.predict_velocity(context, torch.randn(2, 36, 48), TIMES)
    assert (context.size, context.capacity) == (4, capacity)
    assert [buffer.data_ptr() for buffer in (*context.keys, *context.values)] == [
        buffer.data_ptr() for buffer in buffers
    ]
    for buffer, old in zip(buffers, before, strict=True):
        assert torch.equal(buffer, old)


def test_velocity_keeps_no_keys_with_gradient(small_bagel):
    results = small_bagel.run_image(
        small_bagel.empty_context(2), torch.randn(2, 36, 32), "_moe_gen", keep=False
    )
    assert results[1:] == ([], [])


@torch.no_grad()
def test_reserved_decoding_allocates_no_cache(vision_bagel):
    latent = torch.randn(2, 36, 48)
    _, context = vision_bagel.append_text(vision_bagel.empty_context(2), IDS, MASK)
    vision_bagel.reserve(context, tokens=6, images=2)
    # An image: 36 latent tokens and 2 x 2 patches, with two markers each.
    assert context.capacity == 4 + 6 + 2 * (38 + 6)
    places = [buffer.data_ptr() for buffer in (*context.keys, *context.values)]
    for position in range(3):
        token = IDS[:, position : position + 1]
        _, context = vision_bagel.append_text(context, token, MASK[:, position : position + 1])
    context = vision_bagel.append_image(context, latent)
    vision_bagel.predict_velocity(context, latent, TIMES)
    context = vision_bagel.append_image(context, latent)
    _, context = vision_bagel.append_text(context, IDS[:, :3])
    assert context.size == context.capacity
    assert [buffer.data_ptr() for buffer in (*context.keys, *context.values)] == places


def test_reserve_does_nothing_with_gradient(small_bagel):
    _, context = small_bagel.append_text(small_bagel.empty_context(2), IDS)
    small_bagel.reserve(context, tokens=6, images=2)
    assert context.capacity == context.size == 4


def peak_bytes(function):
    """The most memory that a call holds at once, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    held = 0
    most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@torch.no_grad()
@pytest.mark.parametrize("words", [10, 400])
def test_velocity_bytes_are_those_of_one_row(words):
    """Of a model with the proportions of the release, whose MLP is the largest part."""
    config = BagelConfig(
        vocab_size=64, hidden_size=224, intermediate_size=1184, num_hidden_layers=2,
        num_attention_heads=28, num_key_value_heads=4, latent_height=8, latent_width=8,
        max_latent_size=8, image_start_id=3, image_end_id=4,
    )  # fmt: skip
    model = Bagel(config).initialise(0)
    _, context = model.append_text(model.empty_context(2), torch.ones(2, words).long())
    x = torch.randn(2, *model.latent_shape)
    found = peak_bytes(lambda: model.predict_velocity(context, x, TIMES))
    # All rows at once work on no copy of the context.
    numbers = sum(part[:, :, : context.size].numel() for part in context.keys + context.values)
    copied = 4 * numbers
    assert 0.9 < (2 * model.velocity_bytes(context) - copied) / found < 1.1
    estimate = model.velocity_bytes(context)
    model.cast_weights(torch.bfloat16)
    assert model.velocity_bytes(context) == estimate / 2


def test_velocity_bytes_count_what_the_backward_pass_needs(small_bagel):
    """Most without checkpoints, less with them, least without a gradient."""
    context = small_bagel.empty_context(1)
    with_all = small_bagel.velocity_bytes(context)
    small_bagel.checkpointing = True
    with_checkpoints = small_bagel.velocity_bytes(context)
    with torch.no_grad():
        without = small_bagel.velocity_bytes(context)
    assert without < with_checkpoints < with_all
