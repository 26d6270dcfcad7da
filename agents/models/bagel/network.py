"""The architecture of BAGEL: its parts, and how tokens run through them.

Two experts share one attention over one linear context, see `layers`. Text is causal, with one
rotary position a token. An image is `<start> tokens <end>` at one single position. It attends fully
to itself and tells its tokens apart by a fixed sin-cos table.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from agents.models.bagel.attention import image_bias, text_bias
from agents.models.bagel.config import BagelConfig
from agents.models.bagel.embeddings import PositionTable, TimeEmbedder, grid_positions
from agents.models.bagel.layers import GENERATION, UNDERSTANDING, LanguageModel
from agents.models.bagel.vision import Connector, VisionEncoder
from agents.models.kv_cache import KeyValueContext
from agents.models.recompute import run_again_in_backward

TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
"""Fixed sin-cos tables: they are in the weights file and are never trained."""

Streams = dict[str, Tensor]
"""New tokens of each expert, `[N, T_expert, hidden_size]`."""
LayerResults = tuple[Streams, list[Tensor], list[Tensor]]
"""The last hidden states, and keys and values of each layer, `[N, kv_heads, K, head_dim]`."""


class BagelNetwork(nn.Module):
    """The modules under their original names, and their forward pass.

    Computations run in the dtype of the weights. Only rotary positions and the sinusoids of the
    flow time are computed in float32 first.

    Args:
        config: the sizes. Weights are random until they are loaded, or set by `initialise`.

    Attributes:
        latent_positions: `[L]` int64, the entry of each latent token in the position table.
        marker_ids: `[2]` int64, the tokens around an image.
        checkpointing: keep no activations inside a layer for the backward pass, but compute them
            again there.
    """

    latent_positions: Tensor
    marker_ids: Tensor
    checkpointing: bool = False

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        # The order of the modules is that of the random draws in `initialise`.
        self.language_model = LanguageModel(config)
        self.time_embedder = TimeEmbedder(config.hidden_size)
        self.vae2llm = nn.Linear(config.latent_dim, config.hidden_size)
        self.llm2vae = nn.Linear(config.hidden_size, config.latent_dim)
        self.latent_pos_embed = PositionTable(config.hidden_size, config.max_latent_size)
        # Without a vision encoder the model reads an image only as latents.
        if config.vision is not None:
            self.vit_model = VisionEncoder(config.vision)
            self.connector = Connector(config.vision, config.hidden_size)
            self.vit_pos_embed = PositionTable(config.hidden_size, config.vision.max_patches)
        # No file holds what follows from the config. So it is made in memory, and on the CPU for
        # the same numbers everywhere, where the weights are on the device `meta`.
        with torch.device("cpu"):
            self.rotary = Qwen2RotaryEmbedding(config.qwen2())
            markers = torch.tensor([config.image_start_id, config.image_end_id])
            positions = grid_positions(
                config.latent_height, config.latent_width, config.max_latent_size
            )
        self.register_buffer("latent_positions", positions, persistent=False)
        self.register_buffer("marker_ids", markers, persistent=False)

    def initialise(self, seed: int, std: float = 0.02) -> Self:
        """Set fresh weights.

        Matrices are normal, norms one, biases and the velocity head zero. The generation expert is
        a copy of the understanding expert.

        Args:
            seed: of the normal weights.
            std: their standard deviation.

        Returns:
            The model itself.
        """
        generator = torch.Generator().manual_seed(seed)
        weights = dict(self.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                if name in TABLES:
                    continue
                if weight.ndim != 1:
                    weight.normal_(0, std, generator=generator)
                elif "norm" in name and name.endswith("weight"):
                    weight.fill_(1.0)
                else:
                    weight.fill_(0.0)
            # Copied after all draws: each weight above has drawn its own numbers.
            for name, weight in weights.items():
                if GENERATION in name:
                    weight.copy_(weights[name.replace(GENERATION, UNDERSTANDING)])
            self.llm2vae.weight.zero_()
        return self

    def embed_latents(self, x: Tensor, t: Tensor) -> Tensor:
        """Make tokens of latents.

        Args:
            x: `[N, L, C]` float32.
            t: `[N]` float32, their flow times.

        Returns:
            `[N, L, hidden_size]`.
        """
        tokens = self.vae2llm(x.to(self.vae2llm.weight.dtype)) + self.time_embedder(t)[:, None]
        return tokens + self.latent_pos_embed.pos_embed[self.latent_positions]

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Make tokens of images, one a patch.

        Args:
            pixels: `[N, 3, height, width]` float32 in [-1, 1].

        Returns:
            `[N, patches, hidden_size]`.

        Raises:
            ValueError: the vision encoder takes no images of this size.
        """
        positions = self.vit_model.patch_positions(pixels, self.vit_model.config.max_patches)
        # [patches, hidden_size]
        table = self.vit_pos_embed.pos_embed[positions]
        return self.connector(self.vit_model(pixels.to(table.dtype))) + table

    def run_text(
        self, context: KeyValueContext, ids: Tensor, mask: Tensor, position: Tensor
    ) -> LayerResults:
        """Run all layers on text.

        Args:
            context: what was read before.
            ids: `[N, T]` int64.
            mask: `[N, T]` bool, False where a position is padding.
            position: `[N, T]` int64, rotary positions.
        """
        embedded = self.language_model.model.embed_tokens(ids)
        bias = text_bias(context, mask, embedded.dtype)
        return self._run_layers(context, {UNDERSTANDING: embedded}, position, bias)

    def run_image(
        self, context: KeyValueContext, tokens: Tensor, expert: str, *, keep: bool = True
    ) -> LayerResults:
        """Run all layers on one image segment.

        The two markers stand before the tokens: a set of keys has no order.

        Args:
            context: what was read before.
            tokens: `[N, T, hidden_size]`, without the markers.
            expert: which they go through; the markers go through the understanding expert.
            keep: False gives no keys and values, and leaves the context as it is.
        """
        # [2, hidden_size] -> [N, 2, hidden_size]
        markers = self.language_model.model.embed_tokens(self.marker_ids)
        markers = markers.expand(len(tokens), -1, -1)
        if expert == UNDERSTANDING:
            streams = {UNDERSTANDING: torch.cat([markers, tokens], 1)}
        else:
            streams = {UNDERSTANDING: markers, expert: tokens}
        bias = image_bias(context, 2 + tokens.shape[1], tokens.dtype)
        # One position for the whole segment: [N, 1].
        return self._run_layers(context, streams, context.position[:, None], bias, keep=keep)

    def _run_layers(
        self,
        context: KeyValueContext,
        streams: Streams,
        position: Tensor,
        bias: Tensor | None,
        *,
        keep: bool = True,
    ) -> LayerResults:
        """Run all layers on `streams`, at rotary positions `[N, T]`, or `[N, 1]` for all the same.

        Args:
            context: what was read before.
            streams: the new tokens; T in all.
            position: int64.
            bias: see `agents.models.bagel.attention`.
            keep: see `run_image`.
        """
        if keep and context.in_place:
            context.reserve(sum(tokens.shape[1] for tokens in streams.values()))
        # Cosines and sines, each [N, T, head_dim] or [N, 1, head_dim].
        rotary = self.rotary(next(iter(streams.values())), position)
        keys = []
        values = []
        for index, layer in enumerate(self.language_model.model.layers):
            inputs = streams, rotary, bias, context.extend(index, keep=keep)
            # Nothing in a layer is random.
            streams, key, value = run_again_in_backward(layer, *inputs, active=self.checkpointing)
            if keep:
                keys.append(key)
                values.append(value)
            # Otherwise they are freed here, before the next layer makes its own.
            del key, value
        return streams, keys, values


def forward_values(config: BagelConfig, length: int, slots: int) -> int:
    """How many numbers a forward pass of one image segment holds at once, in one row.

    Five times the hidden states (the embedded tokens; a layer's input, mixed by attention, after
    it, and normed), keys and values of one layer, and the larger of what MLP and attention take.

    Args:
        config: the sizes.
        length: tokens of the segment.
        slots: that the segment sees, itself among them.
    """
    key_width = config.num_key_value_heads * config.head_dim
    hidden = 5 * length * config.hidden_size
    keys = 2 * slots * key_width
    # The gate, what it multiplies, and the product.
    mlp = 3 * length * config.intermediate_size
    # Queries and keys as they were projected, normed and rotated; and the copy for a GPU.
    attention = 4 * length * (config.hidden_size + key_width)
    return hidden + keys + max(mlp, attention)


def backward_values(config: BagelConfig, length: int, checkpointing: bool) -> int:
    """How many numbers more are held where the pass is to have a gradient.

    A layer keeps some twelve hidden states (norms, queries, keys, values, the result of attention)
    and of its MLP six (gate, activation, what it multiplies, the product, two gradients).

    Args:
        config: the sizes.
        length: tokens of the segment.
        checkpointing: whether all layers but one keep their input alone.
    """
    layer = length * (12 * config.hidden_size + 6 * config.intermediate_size)
    if checkpointing:
        return config.num_hidden_layers * length * config.hidden_size + layer
    return config.num_hidden_layers * layer
