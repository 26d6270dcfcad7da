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
    return load_vae({name: vae_oracle[name] for name in names}, (32, 64), layers_per_block=1)


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
