"""The way from an auto-encoder's values to latents is found by asking for the way back."""

import pytest
import torch
from tiny import FAMILIES

from agents.models.thinker_painter.latent_layout import (
    LatentLayout,
    from_tokens,
    to_tokens,
    token_shape,
)
from agents.models.thinker_painter.painter import Painter

CPU = torch.device("cpu")
SHAPE = (6, 16)
"""Packed latents: 2 x 3 tokens of 2 x 2 places of 4 channels."""


def unpacked(latents):
    """`[N, 6, 16]` as `[N, 4, 4, 6]`, scaled and shifted by channel."""
    places = latents.reshape(len(latents), 2, 3, 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    values = places.reshape(len(latents), 4, 4, 6)
    scale = torch.tensor([0.5, 2.0, 1.0, 3.0]).to(values.dtype)[:, None, None]
    shift = torch.tensor([0.1, -0.3, 0.0, 0.7]).to(values.dtype)[:, None, None]
    return values * scale + shift


def test_order_scale_and_shift_are_found():
    layout = LatentLayout(unpacked, SHAPE, CPU)
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layout.latents(unpacked(latents)), latents, atol=1e-6, rtol=1e-5)


def test_more_values_than_one_digit_of_places():
    """Places are asked for digit by digit."""
    count = 5000
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    layout = LatentLayout(lambda latents: latents.flatten(1)[:, order], (count, 1), CPU)
    latents = torch.randn(1, count, 1)
    assert torch.equal(layout.latents(latents.flatten(1)[:, order]), latents)


def test_in_bfloat16():
    """A pipeline in bfloat16 answers in it; places must be right all the same."""

    def ask(latents):
        return unpacked(latents.bfloat16())

    layout = LatentLayout(ask, SHAPE, CPU)
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = layout.latents(unpacked(latents).bfloat16())
    torch.testing.assert_close(found, latents, atol=3e-2, rtol=2e-2)


def test_no_gradient_is_kept():
    weight = torch.ones((), requires_grad=True)
    layout = LatentLayout(lambda latents: latents * weight, SHAPE, CPU)
    assert not layout.latents(torch.zeros(1, *SHAPE)).requires_grad


OTHERS = {
    "not linear": lambda latents: latents.square(),
    "a rotation": lambda latents: latents @ torch.linalg.qr(torch.randn(16, 16))[0],
    "two of each": lambda latents: latents.flatten(1)[:, torch.arange(96) // 2],
    "nothing": torch.zeros_like,
    "no signs": torch.abs,
    "a sum": lambda latents: latents + latents.flip(-1),
    "noise": lambda latents: latents + 0.2 * torch.randn(latents.shape),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_an_auto_encoder_that_does_something_else_is_refused(other):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="got one that does something else"):
        LatentLayout(other, SHAPE, CPU)


def test_another_number_of_values_is_refused():
    with pytest.raises(ValueError, match="of 96 values, as many as a latent has, got 48"):
        LatentLayout(lambda latents: latents[:, ::2], SHAPE, CPU)


def test_tokens_and_back():
    latents = torch.randn(2, 4, 3, 5)
    tokens = to_tokens(latents)
    assert tokens.shape == (2, 15, 4)
    assert token_shape((4, 3, 5)) == (15, 4)
    assert torch.equal(from_tokens(tokens, (4, 3, 5)), latents)
    packed = torch.randn(2, 6, 16)
    assert to_tokens(packed) is packed
    assert from_tokens(packed, (6, 16)) is packed
    assert token_shape((6, 16)) == (6, 16)


@pytest.mark.parametrize("name", ["sd3", "klein", "qwen", "sana"])
def test_a_painter_in_bfloat16_encodes_images(name):
    pipeline, call = FAMILIES[name]()
    painter = Painter(pipeline, **call)
    images = torch.rand(1, 3, *painter.image_size, generator=torch.Generator().manual_seed(0))
    known = painter.encode_images(images)
    pipeline.to(torch.bfloat16)
    found = Painter(pipeline, **call).encode_images(images)
    assert found.dtype == torch.float32
    assert (found - known).norm() < 0.1 * known.norm()


def test_a_pipeline_that_mixes_channels_is_refused_for_images():
    pipeline, call = FAMILIES["sd3"]()
    painter = Painter(pipeline, **call)
    pipeline.vae.register_to_config(scaling_factor=float("inf"))
    with pytest.raises(ValueError, match="images cannot be encoded"):
        painter.encode_images(torch.rand(1, 3, 16, 24))
