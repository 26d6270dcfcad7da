"""BAGEL's vision encoder: SigLIP on patches, and a connector to the language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.activations import ACT2FN
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from agents.models.bagel.embeddings import grid_positions


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision encoder; the defaults are the release's.

    Attributes:
        hidden_size: width of the encoder.
        intermediate_size: width of its MLPs.
        num_hidden_layers: the number of its layers.
        num_attention_heads: heads of its attention.
        image_size: longest side of an image, in pixels; with `patch_size` it sets the side of the
            encoder's position table.
        patch_size: side of a patch, in pixels.
        layer_norm_eps: epsilon of all norms.
        hidden_act: activation of the MLPs.
        connector_act: activation of the connector.
        max_patches: side of the language model's own table of patch positions.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 26
    num_attention_heads: int = 16
    image_size: int = 980
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    connector_act: str = "gelu_pytorch_tanh"
    max_patches: int = 70

    @property
    def table_side(self) -> int:
        """Rows and columns of the encoder's own position table."""
        return self.image_size // self.patch_size

    @property
    def longest_side(self) -> int:
        """The longest side of an image for which both position tables have entries, in pixels."""
        return min(self.table_side, self.max_patches) * self.patch_size

    def check_size(self, height: int, width: int) -> None:
        """Refuse an image, of a size in pixels, that the encoder cannot read.

        Raises:
            ValueError: a side is not a multiple of the patch, or is too long.
        """
        patch = self.patch_size
        if height % patch or width % patch or max(height, width) > self.longest_side:
            raise ValueError(
                f"expected image sides in multiples of {patch} up to {self.longest_side} pixels, "
                f"got {height} x {width}; resize what the vision encoder reads, as the processor's "
                "`vit_transform` of the right max_size and stride does"
            )

    def siglip(self) -> SiglipVisionConfig:
        """Give the same sizes in the form that the parts from transformers take."""
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
        # SiglipEncoder alone, outside its model, does not choose an attention by itself.
        config._attn_implementation = "sdpa"
        return config


class _Embeddings(nn.Module):
    """A linear map of patches, and a trained position table with a fixed stride."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.table_side**2, config.hidden_size)


class _VisionModel(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = SiglipEncoder(config.siglip())  # type: ignore[arg-type]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class VisionEncoder(nn.Module):
    """Images to patch features, nested as the weight names of the release require.

    Args:
        config: the sizes.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = _VisionModel(config)

    def patches(self, pixels: Tensor) -> Tensor:
        """Cut images `[N, 3, height, width]` into patches.

        Returns:
            `[N, rows * columns, patch * patch * 3]`, features ordered (row, column, channel).
        """
        patch = self.config.patch_size
        # Width is split first, so that axis 2 is still the height.
        squares = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        # [N, 3, rows, patch, columns, patch] -> [N, rows * columns, patch * patch * 3]
        return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def patch_positions(self, pixels: Tensor, stride: int) -> Tensor:
        """Find the entry of each patch in a position table.

        Args:
            pixels: `[N, 3, height, width]`; only the size counts.
            stride: columns of the table.

        Returns:
            `[rows * columns]` int64, `row * stride + column` of each patch.

        Raises:
            ValueError: see `VisionConfig.check_size`.
        """
        patch = self.config.patch_size
        height, width = pixels.shape[2:]
        self.config.check_size(height, width)
        return grid_positions(height // patch, width // patch, stride).to(pixels.device)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images; each attends to itself alone.

        Args:
            pixels: `[N, 3, height, width]` in [-1, 1], see `patch_positions`.

        Returns:
            Features `[N, patches, hidden_size]`.
        """
        embeddings = self.vision_model.embeddings
        # The encoder's own table; the language model's has `max_patches` columns.
        positions = self.patch_positions(pixels, self.config.table_side)
        # [N, patches, patch * patch * 3] -> [N, patches, hidden_size]
        hidden = embeddings.patch_embedding(self.patches(pixels))
        hidden = hidden + embeddings.position_embedding(positions)
        encoded = self.vision_model.encoder(inputs_embeds=hidden).last_hidden_state
        return self.vision_model.post_layernorm(encoded)


class Connector(nn.Module):
    """A small MLP that maps features to the width of the language model.

    Args:
        config: the sizes of the vision encoder.
        hidden_size: width of the language model.
    """

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, hidden_size)
        self.act = ACT2FN[config.connector_act]
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[..., config.hidden_size]` to `[..., hidden_size]`."""
        return self.fc2(self.act(self.fc1(features)))
