"""The auto-encoder against numbers of the public reference implementation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.models.bagel.vae import VaeLatents, load_vae

TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def vae_oracle():
    return load_file(Path(__file__).parents[2] / "data" / "bagel_oracle_vae.safetensors")


@pytest.fixture(scope="module")
def vae(vae_oracle):
    names = [name for name in vae_oracle if not name.startswith(("in.", "out."))]
    return load_vae({name: vae_oracle[name] for name in names})


def tokens(grid):
    """Latents `[N, 16, 12, 8]` as tokens of 2 x 2 squares, `[N, 24, 64]`."""
    squares = grid.unflatten(3, (4, 2)).unflatten(2, (6, 2))
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


@torch.no_grad()
def test_posterior(vae, vae_oracle):
    moments = vae.encode(vae_oracle["in.image"]).latent_dist.parameters
    torch.testing.assert_close(moments, vae_oracle["out.moments"], **TOLERANCE)


@torch.no_grad()
def test_encode_samples_the_posterior(vae, vae_oracle):
    latents = VaeLatents(vae, rows=6, columns=4)
    found = latents.encode(vae_oracle["in.image"] * 0.5 + 0.5, vae_oracle["in.eps"])
    torch.testing.assert_close(found, tokens(vae_oracle["out.z"]), **TOLERANCE)


@torch.no_grad()
def test_encode_without_noise_is_the_mean(vae, vae_oracle):
    latents = VaeLatents(vae, rows=6, columns=4)
    image = vae_oracle["in.image"] * 0.5 + 0.5
    zero = torch.zeros_like(vae_oracle["in.eps"])
    torch.testing.assert_close(latents.encode(image), latents.encode(image, zero))


@torch.no_grad()
def test_decode(vae, vae_oracle):
    latents = VaeLatents(vae, rows=6, columns=4)
    expected = (vae_oracle["out.decoded"] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(latents.decode(tokens(vae_oracle["in.z"])), expected, **TOLERANCE)


CHANNELS = (32, 64, 64, 64)


@pytest.fixture(scope="module")
def larger(make_autoencoder):
    """Two blocks a level and growing channels."""
    return load_vae(make_autoencoder(CHANNELS, blocks=2))


def test_sizes_follow_from_the_weights(larger, vae):
    config = larger.config
    assert tuple(config.block_out_channels) == CHANNELS
    assert (config.layers_per_block, config.latent_channels) == (2, 16)
    assert tuple(vae.config.block_out_channels) == (32, 64)
    assert vae.config.layers_per_block == 1


def test_every_weight_is_used(larger, make_autoencoder):
    weights = make_autoencoder(CHANNELS, blocks=2)
    own = larger.state_dict()
    assert len(own) == len(weights)
    assert torch.equal(own["encoder.conv_in.weight"], weights["encoder.conv_in.weight"])
    # The file counts the levels of the decoder from the other end.
    expected = weights["decoder.up.0.block.2.conv1.weight"]
    assert torch.equal(own["decoder.up_blocks.3.resnets.2.conv1.weight"], expected)
    assert not any(weight.requires_grad for weight in larger.parameters())


def test_dtype(make_autoencoder):
    vae = load_vae(make_autoencoder((32,), blocks=1), dtype=torch.bfloat16)
    assert {weight.dtype for weight in vae.parameters()} == {torch.bfloat16}
    latents = VaeLatents(vae, rows=4, columns=4)
    image = latents.decode(torch.randn(1, 16, 64))
    assert image.dtype == torch.float32
    assert latents.encode(image).dtype == torch.float32


def test_file_of_another_kind():
    with pytest.raises(ValueError, match=r"found no encoder\.down\.0\.block\.0\.conv2\.weight"):
        load_vae({"weight": torch.zeros(1)})


@pytest.mark.parametrize("change", ["missing", "shape", "unknown"])
def test_weights_that_do_not_fit(make_autoencoder, change):
    weights = make_autoencoder((32, 32), blocks=1)
    if change == "missing":
        del weights["decoder.conv_out.bias"]
        message = "missing decoder.conv_out.bias"
    elif change == "shape":
        weights["encoder.mid.block_1.conv1.weight"] = torch.zeros(32, 16, 3, 3)
        message = r"conv1.weight: expected \(32, 32, 3, 3\), got \(32, 16, 3, 3\)"
    else:
        weights["encoder.down.0.block.0.conv9.weight"] = torch.zeros(1)
        message = "unexpected .*conv9.weight"
    with pytest.raises(ValueError, match=message):
        load_vae(weights)


def test_image_size(larger, vae):
    assert VaeLatents(larger, rows=3, columns=5).image_size == (48, 80)
    assert VaeLatents(vae, rows=6, columns=4).image_size == (24, 16)


@pytest.fixture
def calls(vae, monkeypatch):
    """How many images the VAE got in each call."""
    sizes = []
    for method in ("encode", "decode"):
        original = getattr(vae, method)

        def counted(batch, original=original):
            sizes.append(len(batch))
            return original(batch)

        monkeypatch.setattr(vae, method, counted)
    return sizes


@torch.no_grad()
def test_few_images_at_a_time(vae, calls):
    latents = VaeLatents(vae, rows=6, columns=4)
    few = VaeLatents(vae, rows=6, columns=4, max_pixels=2 * 24 * 16)
    values = torch.randn(5, 24, 64, generator=torch.Generator().manual_seed(1))
    images = latents.decode(values)
    noise = torch.randn(5, 16, 12, 8, generator=torch.Generator().manual_seed(2))
    encoded = latents.encode(images, noise)
    assert calls == [5, 5]
    torch.testing.assert_close(few.decode(values), images)
    torch.testing.assert_close(few.encode(images, noise), encoded)
    torch.testing.assert_close(few.encode(images), latents.encode(images))
    assert calls == [5, 5, 2, 2, 1, 2, 2, 1, 2, 2, 1, 5]


@pytest.mark.parametrize(("side", "expected"), [(1024, 1), (512, 4), (2048, 1)])
def test_large_images_are_decoded_one_at_a_time(vae, side, expected):
    assert VaeLatents(vae, rows=side // 4, columns=side // 4).batch_size == expected


def test_decode_has_a_gradient(vae, calls):
    latents = VaeLatents(vae, rows=6, columns=4, max_pixels=1)
    values = torch.randn(2, 24, 64, requires_grad=True)
    latents.decode(values).sum().backward()
    assert calls == [1, 1]
    assert (values.grad.abs().amax((1, 2)) > 0).all()
