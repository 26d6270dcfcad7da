"""BAGEL's auto-encoder (FLUX's), through diffusers: pictures to latent tokens and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

SCALE, SHIFT = 0.3611, 0.1159
"""A latent is SCALE (sample - SHIFT)."""


def load_vae(weights: Mapping[str, Tensor], channels: tuple[int, ...] = (128, 256, 512, 512), layers_per_block: int = 2) -> Any:
    """The auto-encoder from weights under the names of `ae.safetensors`.

    Args:
        weights: all tensors of the file.
        channels: of each level; the defaults are the release's.
        layers_per_block: residual blocks a level.

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
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    )
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(weights), vae.config))
    return vae.eval().requires_grad_(False)


@dataclass(frozen=True)
class VaeDecoder:
    """Latent tokens to pictures, the env's `decode`, and the way back. A token is a `patch x patch` square of latents, features ordered (row, column, channel).

    Attributes:
        vae: an `AutoencoderKL`, see `load_vae`.
        rows, columns: latent tokens down and across.
        patch: side of a token's square, in latents.
    """

    vae: Any
    rows: int
    columns: int
    patch: int = 2

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents `[N, rows * columns, patch * patch * 16]` float32 to pictures `[N, 3, height, width]` in [0, 1]."""
        squares = latents.unflatten(1, (self.rows, self.columns)).unflatten(3, (self.patch, self.patch, -1))
        grid = squares.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        pixels = self.vae.decode((grid / SCALE + SHIFT).to(self.vae.device, self.vae.dtype)).sample.to(latents.device)
        return (pixels.float() * 0.5 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures `[N, 3, height, width]` in [0, 1] to latents; `noise` `[N, 16, h, w]` samples the posterior as BAGEL does, without it the mean."""
        posterior = self.vae.encode((images * 2 - 1).to(self.vae.device, self.vae.dtype)).latent_dist
        sample = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(self.vae.device)
        grid = SCALE * (sample.float().to(images.device) - SHIFT)
        squares = grid.unflatten(3, (self.columns, self.patch)).unflatten(2, (self.rows, self.patch))
        return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
