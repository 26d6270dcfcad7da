"""BAGEL's eyes: a SigLIP tower on patches of any grid, and the connector into the language model's space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.activations import ACT2FN
from transformers.models.siglip.modeling_siglip import SiglipEncoder


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower; the defaults are the release's.

    Attributes:
        image_size: side of the largest picture, in pixels; with `patch_size` it sets the position table's side.
        min_size: what the shorter side of a smaller picture is enlarged to by `VisionTower.fit`.
        max_patches: side of the language model's own table of patch places.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 26
    num_attention_heads: int = 16
    image_size: int = 980
    min_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    connector_act: str = "gelu_pytorch_tanh"
    max_patches: int = 70

    def siglip(self) -> SiglipVisionConfig:
        """The same sizes as the transformers parts want them."""
        config = SiglipVisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            layer_norm_eps=self.layer_norm_eps,
            hidden_act=self.hidden_act,
        )
        config._attn_implementation = "sdpa"
        return config


class _Embeddings(nn.Module):
    """Patches by a plain linear map, places by a learnt table with a fixed stride: no interpolation."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2, config.hidden_size)


class _VisionModel(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = SiglipEncoder(config.siglip())  # type: ignore[arg-type]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class VisionTower(nn.Module):
    """Pictures to patch features; nested as the release's weight names want it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = _VisionModel(config)

    @property
    def largest(self) -> int:
        """Most patches a side that both position tables have."""
        return min(self.config.image_size // self.config.patch_size, self.config.max_patches)

    def fit(self, images: Tensor) -> Tensor:
        """Pictures `[N, 3, height, width]` in [0, 1] as `forward` wants them, in [-1, 1].

        The longer side is brought down to `image_size`, then the shorter up to `min_size`, then each to the nearest multiple of a patch that there is.
        """
        patch, sides = self.config.patch_size, images.shape[2:]
        scale = max(min(self.config.image_size / max(sides), 1), self.config.min_size / min(sides))
        fitting = [patch * min(max(1, round(side * scale / patch)), self.largest) for side in sides]
        if fitting != list(sides):
            images = F.interpolate(images, fitting, mode="bicubic", antialias=True).clamp(0, 1)
        return images * 2 - 1

    def patches(self, pixels: Tensor) -> Tensor:
        """Pictures `[N, 3, height, width]` as `[N, rows * columns, patch * patch * 3]`, features ordered (row, column, channel)."""
        patch = self.config.patch_size
        squares = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def places(self, pixels: Tensor, stride: int) -> Tensor:
        """`[rows * columns]` int64, `row * stride + column` of each patch.

        Raises:
            ValueError: sides that are no multiple of the patch, or more patches a side than the tables have.
        """
        patch, largest = self.config.patch_size, self.largest
        height, width = pixels.shape[2:]
        if height % patch or width % patch or max(height, width) > largest * patch:
            raise ValueError(
                f"expected picture sides that are multiples of {patch} up to {largest * patch} pixels, got {height} x {width}; resize it first"
            )
        rows, columns = (torch.arange(side // patch, device=pixels.device) for side in (height, width))
        return (rows[:, None] * stride + columns).flatten()

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures `[N, 3, height, width]` in [-1, 1] to features `[N, patches, hidden_size]`; each picture attends to itself."""
        embeddings = self.vision_model.embeddings
        places = self.places(pixels, self.config.image_size // self.config.patch_size)
        hidden = embeddings.patch_embedding(self.patches(pixels)) + embeddings.position_embedding(places)
        return self.vision_model.post_layernorm(self.vision_model.encoder(inputs_embeds=hidden).last_hidden_state)


class Connector(nn.Module):
    """Features into the language model's space, `[..., hidden_size of the tower]` to `[..., hidden_size]`."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, hidden_size)
        self.act = ACT2FN[config.connector_act]
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(features)))
