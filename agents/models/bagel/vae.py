"""BAGEL's auto-encoder (that of FLUX), through diffusers: images to latent tokens and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from agents.storage import check_weights

SCALE = 0.3611
"""A latent is SCALE * (sample - SHIFT)."""
SHIFT = 0.1159
"""See `SCALE`."""
FIRST_BLOCK = "encoder.down.{}.block.0.conv2.weight"
"""A weight that every level has."""
LATENT_INPUT = "decoder.conv_in.weight"
"""A weight that takes a latent image."""


def load_vae(
    weights: Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Build the auto-encoder from weights under the names of `ae.safetensors`.

    All sizes follow from the weights.

    Args:
        weights: all tensors of the file.
        device: where the auto-encoder works.
        dtype: in which it works.

    Returns:
        A frozen `diffusers.AutoencoderKL`.

    Raises:
        ValueError: the weights are no such auto-encoder's.
    """
    channels, _ = latent_sizes({name: weight.shape for name, weight in weights.items()})
    # The weights replace those that are made here.
    with torch.device("meta"):
        vae = _build(weights, channels)
    # The file has the names of the original code; diffusers renames them to its own.
    converted = convert_ldm_vae_checkpoint(dict(weights), vae.config)
    # Before they are assigned: `vae.to(dtype)` would warn of a cast at every load.
    renamed = {name: weight.to(device, dtype) for name, weight in converted.items()}
    check_weights(vae, renamed, "the auto-encoder's file")
    vae.load_state_dict(renamed, assign=True)
    return vae.eval().requires_grad_(False)


def latent_sizes(shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Channels of a latent image, and pixels a side of each of its values.

    Args:
        shapes: of all weights of an auto-encoder, see `load_vae`.

    Raises:
        ValueError: the weights are no such auto-encoder's.
    """
    for name in (FIRST_BLOCK.format(0), LATENT_INPUT):
        if name not in shapes:
            raise ValueError(
                f"expected the weights of an auto-encoder, found no {name}; take the file "
                "ae.safetensors of the release"
            )
    # Each level but the last halves both sides.
    return shapes[LATENT_INPUT][1], 2 ** (_count(FIRST_BLOCK, shapes) - 1)


def _build(weights: Mapping[str, Tensor], latent_channels: int) -> Any:
    levels = _count(FIRST_BLOCK, weights)
    channels = [len(weights[FIRST_BLOCK.format(level)]) for level in range(levels)]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=_count("encoder.down.0.block.{}.conv2.weight", weights),
        latent_channels=latent_channels,
        # This VAE lacks the two convolutions around the latents that diffusers calls `quant`.
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    )


def _count(name: str, weights: Mapping[str, Any]) -> int:
    """Count for which numbers 0, 1, ... there is a weight called `name`."""
    number = 0
    while name.format(number) in weights:
        number += 1
    return number


@dataclass(frozen=True)
class VaeLatents:
    """Converts images to latent tokens with a VAE, and back.

    A token is a `patch x patch` square of latents; its features are ordered (row, column, channel).

    Attributes:
        vae: a `diffusers.AutoencoderKL`, see `load_vae`. It may be on another device than the
            images and latents, and have another dtype.
        rows: latent tokens from top to bottom.
        columns: latent tokens from left to right.
        patch: side of a token's square, in latents.
        max_pixels: the VAE gets so many images at a time as have this many pixels together, but at
            least one. An image of 1024 x 1024 takes some gigabytes in float32.
    """

    vae: Any
    rows: int
    columns: int
    patch: int = 2
    max_pixels: int = 1024 * 1024

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of an image, in pixels."""
        # Each level but the last halves both sides.
        side = self.patch * 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.rows * side, self.columns * side

    @property
    def batch_size(self) -> int:
        """The number of images that the VAE gets at a time."""
        height, width = self.image_size
        return max(1, self.max_pixels // (height * width))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `[N, rows * columns, patch * patch * channels]` float32.

        Returns:
            Images `[N, 3, height, width]` float32 in [0, 1].
        """
        return torch.cat([self._decode(part) for part in latents.split(self.batch_size)])

    def _decode(self, latents: Tensor) -> Tensor:
        # [N, L, patch * patch * channels] -> [N, rows, columns, patch, patch, channels]
        squares = latents.unflatten(1, (self.rows, self.columns))
        squares = squares.unflatten(3, (self.patch, self.patch, -1))
        # [N, rows, columns, patch, patch, channels] -> [N, channels, rows * patch, columns * patch]
        grid = squares.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        # The inverse of the scaling in `encode`; the VAE may have another dtype than the latents.
        samples = (grid / SCALE + SHIFT).to(self.vae.device, self.vae.dtype)
        pixels = self.vae.decode(samples).sample.to(latents.device)
        # The VAE works in [-1, 1]; its output may lie slightly outside.
        return (pixels.float() * 0.5 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images as latents.

        Args:
            images: `[N, 3, height, width]` float32 in [0, 1].
            noise: `[N, channels, rows * patch, columns * patch]` float32 to sample the posterior,
                as BAGEL does; if left out, its mean is taken.

        Returns:
            `[N, rows * columns, patch * patch * channels]` float32.
        """
        parts = images.split(self.batch_size)
        noises: Sequence[Tensor | None] = [None] * len(parts)
        if noise is not None:
            noises = noise.split(self.batch_size)
        return torch.cat([self._encode(*pair) for pair in zip(parts, noises, strict=True)])

    def _encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        pixels = (images * 2 - 1).to(self.vae.device, self.vae.dtype)
        # Mean and standard deviation, each [N, channels, rows * patch, columns * patch].
        posterior = self.vae.encode(pixels).latent_dist
        sample = posterior.mean
        if noise is not None:
            sample = posterior.mean + posterior.std * noise.to(self.vae.device)
        grid = SCALE * (sample.float().to(images.device) - SHIFT)
        squares = grid.unflatten(3, (self.columns, self.patch))
        squares = squares.unflatten(2, (self.rows, self.patch))
        # [N, channels, rows, patch, columns, patch] -> [N, L, patch * patch * channels]
        return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
