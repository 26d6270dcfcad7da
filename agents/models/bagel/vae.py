"""BAGEL's auto-encoder (that of FLUX), through diffusers: images to latent tokens and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

SCALE = 0.3611
"""A latent is SCALE * (sample - SHIFT)."""
SHIFT = 0.1159
"""See `SCALE`."""


def load_vae(
    weights: Mapping[str, Tensor],
    channels: tuple[int, ...] = (128, 256, 512, 512),
    layers_per_block: int = 2,
) -> Any:
    """Build the auto-encoder from weights under the names of `ae.safetensors`.

    Args:
        weights: all tensors of the file.
        channels: of each level; the defaults are the release's.
        layers_per_block: residual blocks a level.

    Returns:
        A frozen `diffusers.AutoencoderKL`.

    Raises:
        RuntimeError: the weights do not fit these sizes.
    """
    levels = len(channels)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        latent_channels=16,
        # This VAE lacks the two convolutions around the latents that diffusers calls `quant`.
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    )
    # The file has the names of the original code; diffusers renames them to its own.
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(weights), vae.config))
    return vae.eval().requires_grad_(False)


@dataclass(frozen=True)
class VaeLatents:
    """Converts images to latent tokens with a VAE, and back.

    A token is a `patch x patch` square of latents; its features are ordered (row, column, channel).

    Attributes:
        vae: a `diffusers.AutoencoderKL`, see `load_vae`.
        rows: latent tokens from top to bottom.
        columns: latent tokens from left to right.
        patch: side of a token's square, in latents.
    """

    vae: Any
    rows: int
    columns: int
    patch: int = 2

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `[N, rows * columns, patch * patch * 16]` float32.

        Returns:
            Images `[N, 3, height, width]` float32 in [0, 1].
        """
        # [N, L, patch * patch * 16] -> [N, rows, columns, patch, patch, 16]
        squares = latents.unflatten(1, (self.rows, self.columns))
        squares = squares.unflatten(3, (self.patch, self.patch, -1))
        # [N, rows, columns, patch, patch, 16] -> [N, 16, rows * patch, columns * patch]
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
            noise: `[N, 16, rows * patch, columns * patch]` float32 to sample the posterior, as
                BAGEL does; if left out, its mean is taken.

        Returns:
            `[N, rows * columns, patch * patch * 16]` float32.
        """
        pixels = (images * 2 - 1).to(self.vae.device, self.vae.dtype)
        # Mean and standard deviation, each [N, 16, rows * patch, columns * patch].
        posterior = self.vae.encode(pixels).latent_dist
        sample = posterior.mean
        if noise is not None:
            sample = posterior.mean + posterior.std * noise.to(self.vae.device)
        grid = SCALE * (sample.float().to(images.device) - SHIFT)
        squares = grid.unflatten(3, (self.columns, self.patch))
        squares = squares.unflatten(2, (self.rows, self.patch))
        # [N, 16, rows, patch, columns, patch] -> [N, rows * columns, patch * patch * 16]
        return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
