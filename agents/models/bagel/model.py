"""BAGEL (Deng et al. 2025, arXiv 2505.14683) behind the methods of `UnifiedModel`.

Two experts share one attention over one linear context, see `layers`. The released model of 14
billion parameters and the tiny model of this package are two configs of the same class, under the
original weight names.

Text is causal, with one rotary position a token. An image is `<start> tokens <end>` at one single
position. It attends fully to itself and tells its tokens apart by a fixed sin-cos table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.layers import (
    GENERATION,
    UNDERSTANDING,
    LanguageModel,
    PositionTable,
    TimeEmbedder,
)
from agents.models.bagel.vision import Connector, VisionConfig, VisionEncoder
from agents.models.base import UnifiedModel
from agents.models.kv_cache import KeyValueContext

TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
"""Fixed sin-cos tables: they are in the weights file and are never trained."""
IMAGE_PARTS = ("time_embedder.", "vae2llm.", "llm2vae.")
"""Parts outside the layers that belong to the image expert."""

LayerResults = tuple[dict[str, Tensor], list[Tensor], list[Tensor]]


class Bagel(UnifiedModel[KeyValueContext]):
    """The unified model: it reads text and images, writes text and predicts velocities.

    Args:
        config: the sizes. Weights are random until they are loaded, or set by `initialise`.

    Attributes:
        latent_positions: `[L]` int64, the entry of each latent token in the position table.
        marker_ids: `[2]` int64, the tokens around an image.
    """

    config_class = BagelConfig
    latent_positions: Tensor
    marker_ids: Tensor

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
        self.rotary = Qwen2RotaryEmbedding(config.qwen2())
        # Entry `row * max_latent_size + column` of the position table for each latent token.
        rows = torch.arange(config.latent_height)
        columns = torch.arange(config.latent_width)
        positions = (rows[:, None] * config.max_latent_size + columns).flatten()
        markers = torch.tensor([config.image_start_id, config.image_end_id])
        # Not persistent: both follow from the config, so the weights file need not hold them.
        self.register_buffer("latent_positions", positions, persistent=False)
        self.register_buffer("marker_ids", markers, persistent=False)

    def initialise(self, seed: int, std: float = 0.02) -> Bagel:
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

    @property
    def vocab_size(self) -> int:
        """See `UnifiedModel`."""
        return self.config.vocab_size

    @property
    def latent_shape(self) -> tuple[int, int]:
        """See `UnifiedModel`."""
        return self.config.latent_height * self.config.latent_width, self.config.latent_dim

    def parameters_by_expert(self) -> dict[str, list[nn.Parameter]]:
        """See `UnifiedModel`. The vision encoder and its connector belong to the text expert."""
        lists: dict[str, list[nn.Parameter]] = {"text": [], "image": []}
        for name, weight in self.named_parameters():
            if name in TABLES:
                continue
            is_image = GENERATION in name or name.startswith(IMAGE_PARTS)
            lists["image" if is_image else "text"].append(weight)
        return lists

    def empty_context(self, batch_size: int) -> KeyValueContext:
        """See `UnifiedModel`."""
        weight = self.vae2llm.weight
        # No slot yet: the axis of the slots has length 0.
        shape = (batch_size, self.config.num_key_value_heads, 0, self.config.head_dim)
        layers = range(self.config.num_hidden_layers)
        return KeyValueContext(
            keys=[weight.new_zeros(shape) for _ in layers],
            values=[weight.new_zeros(shape) for _ in layers],
            valid=torch.zeros(batch_size, 0, dtype=torch.bool, device=weight.device),
            position=torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
        )

    def append_text(
        self,
        context: KeyValueContext,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[Tensor, KeyValueContext]:
        """See `UnifiedModel`."""
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        # Unmasked tokens up to each token, [N, T]. Padding takes no rotary position.
        count = mask.cumsum(1)
        # [N, T]; a token after `n` unmasked tokens of this call stands `n` positions on.
        position = context.position[:, None] + (count - mask.long())
        # [N, T, size + T]
        visible = _text_attention(context, mask)
        trunk = self.language_model.model
        with self.autocast():
            embedded = {UNDERSTANDING: trunk.embed_tokens(ids)}
            streams, keys, values = self._run_layers(embedded, position, visible, context)
            # [N, T, hidden_size]
            hidden = streams[UNDERSTANDING]
            # The head is the most expensive part of a long text: run it on one position.
            if last_only and ids.shape[1] > 1:
                # [N, 1, hidden_size]
                hidden = _last_unmasked(hidden, count)
            logits = self.language_model.lm_head(trunk.norm(hidden))
        return logits, context.advance(keys, values, mask, context.position + count[:, -1])

    def predict_velocity(self, context: KeyValueContext, x: Tensor, t: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        with self.autocast():
            tokens = self._latent_tokens(x, t)
            streams, _, _ = self._run_image(context, tokens, GENERATION)
            # [N, L, hidden_size]; the markers' states are not needed.
            hidden = self.language_model.model.norm_moe_gen(streams[GENERATION])
            return self.llm2vae(hidden).float()

    def append_image(
        self,
        context: KeyValueContext,
        latent: Tensor | None = None,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        with_grad: bool = True,
    ) -> KeyValueContext:
        """See `UnifiedModel`. Read the latents first, then, with a vision encoder, the pixels.

        `append_latents` and `append_pixels` read one of the two alone.
        """
        if pixels is not None:
            self._require_vision()
        if latent is None and pixels is None:
            raise ValueError("expected a latent, pixels, or both; got neither")
        if latent is not None and pixels is None and self.config.vision is not None:
            with torch.no_grad():
                # The decoded image is an input like any other: no gradient reaches the latent.
                pixels = self.vit_model.fit(self.processor.decode_latents(latent))
        # One autocast around both parts: they share the cast weights, so in low precision their
        # gradients are added before they are cast back.
        with self.autocast():
            if latent is not None:
                context = self.append_latents(context, latent, mask, with_grad=with_grad)
            if pixels is not None:
                context = self.append_pixels(context, pixels, mask, with_grad=with_grad)
        return context

    def append_latents(
        self,
        context: KeyValueContext,
        latent: Tensor,
        mask: Tensor | None = None,
        *,
        with_grad: bool = True,
    ) -> KeyValueContext:
        """Read images as clean latents through the generation expert.

        The segment is `<start> tokens <end>` at one position, attends fully to itself, and moves
        the next position on by one.

        Args:
            context: what came before.
            latent: `[N, L, C]` float32, clean (t = 0).
            mask: `[N]` bool, the rows that read; all if left out.
            with_grad: see `UnifiedModel.append_image`.

        Returns:
            The grown context.
        """
        with self.autocast():
            # Clean latents have flow time 0.
            clean = torch.zeros(len(latent), device=latent.device)
            tokens = self._latent_tokens(latent, clean)
            return self._append_segment(context, tokens, GENERATION, mask, with_grad)

    def append_pixels(
        self,
        context: KeyValueContext,
        pixels: Tensor,
        mask: Tensor | None = None,
        *,
        with_grad: bool = True,
    ) -> KeyValueContext:
        """Read images as pixels, through the vision encoder and the understanding expert.

        The segment is laid out as in `append_latents`.

        Args:
            context: what came before.
            pixels: `[N, 3, height, width]` float32 in [-1, 1], see `VisionEncoder.fit`.
            mask: `[N]` bool, the rows that read; all if left out.
            with_grad: see `UnifiedModel.append_image`.

        Returns:
            The grown context.

        Raises:
            ValueError: the model has no vision encoder, or it takes no images of this size.
        """
        vision = self._require_vision()
        with self.autocast():
            positions = self.vit_model.patch_positions(pixels, vision.max_patches)
            # [patches, hidden_size]
            table = self.vit_pos_embed.pos_embed[positions]
            with torch.set_grad_enabled(with_grad and torch.is_grad_enabled()):
                features = self.vit_model(pixels.to(self.vae2llm.weight.dtype))
                tokens = self.connector(features) + table
            return self._append_segment(context, tokens, UNDERSTANDING, mask, with_grad)

    def _require_vision(self) -> VisionConfig:
        if self.config.vision is None:
            raise ValueError(
                "expected a model with a vision encoder, because `pixels` were given, but this one "
                "has none; leave `pixels` out"
            )
        return self.config.vision

    def _latent_tokens(self, x: Tensor, t: Tensor) -> Tensor:
        """Embed latents `[N, L, C]` at times `[N]` as `[N, L, hidden_size]`."""
        dtype = self.vae2llm.weight.dtype
        tokens = self.vae2llm(x.to(dtype)) + self.time_embedder(t)[:, None]
        return tokens + self.latent_pos_embed.pos_embed[self.latent_positions].to(dtype)

    def _run_image(self, context: KeyValueContext, tokens: Tensor, expert: str) -> LayerResults:
        """Run all layers on one image segment.

        The markers go through the understanding expert, `tokens` `[N, T, hidden_size]` through
        `expert`. The two markers stand before the tokens: a set of keys has no order.
        """
        # [2, hidden_size] -> [N, 2, hidden_size]
        markers = self.language_model.model.embed_tokens(self.marker_ids)
        markers = markers.expand(len(tokens), -1, -1)
        length = 2 + tokens.shape[1]
        # Every token of the segment sees the valid context and the whole segment: [N, T, size + T].
        before = context.valid[:, None, : context.size]
        visible = F.pad(before, (0, length), value=True).expand(-1, length, -1)
        if expert == UNDERSTANDING:
            streams = {UNDERSTANDING: torch.cat([markers, tokens], 1)}
        else:
            streams = {UNDERSTANDING: markers, expert: tokens}
        return self._run_layers(streams, context.position[:, None], visible, context)

    def _append_segment(
        self,
        context: KeyValueContext,
        tokens: Tensor,
        expert: str,
        mask: Tensor | None,
        with_grad: bool,
    ) -> KeyValueContext:
        """Append one image segment in the rows of `mask` `[N]` bool (all if left out)."""
        if with_grad or not torch.is_grad_enabled():
            _, keys, values = self._run_image(context, tokens, expert)
        else:
            # The new slots are computed without gradient; the old slots keep their gradient.
            with torch.no_grad():
                _, new_keys, new_values = self._run_image(context.detach(), tokens, expert)
            keys = _with_new_slots(context.keys, new_keys, context.size)
            values = _with_new_slots(context.values, new_values, context.size)
        # Rows outside the mask get slots that are not valid, and their position stays.
        if mask is None:
            mask = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        valid = mask[:, None].expand(-1, 2 + tokens.shape[1])
        return context.advance(keys, values, valid, context.position + mask)

    def _run_layers(
        self,
        streams: dict[str, Tensor],
        position: Tensor,
        visible: Tensor,
        context: KeyValueContext,
    ) -> LayerResults:
        """Run all layers on new tokens.

        Args:
            streams: the new tokens of each expert, `[N, T_expert, hidden_size]`; T in all.
            position: rotary positions `[N, T]` int64, or `[N, 1]` if all are the same.
            visible: `[N, T, size + T]` bool, True where a token sees another.
            context: what was read before.

        Returns:
            The last hidden states by expert, and keys and values of each layer.
        """
        if context.in_place:
            context.reserve(visible.shape[1])
        sample = next(iter(streams.values()))
        # Cosines and sines, each [N, T, head_dim] or [N, 1, head_dim].
        rotary = self.rotary(sample, position)
        # Added to the attention scores of all heads: [N, 1, T, size + T].
        bias = torch.zeros(visible.shape, dtype=sample.dtype, device=sample.device)
        bias = bias.masked_fill_(~visible, -torch.inf)[:, None]
        keys = []
        values = []
        for index, layer in enumerate(self.language_model.model.layers):
            streams, key, value = layer(streams, rotary, bias, context, index)
            keys.append(key)
            values.append(value)
        return streams, keys, values


def _text_attention(context: KeyValueContext, mask: Tensor) -> Tensor:
    """What each text token sees, `[N, T, size + T]` bool, given the mask `[N, T]` of padding.

    A token sees the context, the unmasked tokens before it, and itself. A padding token sees itself
    too, so that no softmax is empty.
    """
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    # [N, T, T]
    among_new = causal & (mask[:, None, :] | itself)
    # [N, T, size]
    before = context.valid[:, None, : context.size].expand(-1, length, -1)
    return torch.cat([before, among_new], 2)


def _last_unmasked(hidden: Tensor, count: Tensor) -> Tensor:
    """Take each row's last unmasked position of `hidden` `[N, T, H]`, as `[N, 1, H]`.

    Args:
        hidden: `[N, T, H]`.
        count: `[N, T]` int64, the number of unmasked positions up to each.
    """
    # The positions before the last unmasked one are those with a smaller count.
    # [N]; a row without an unmasked position gets 0.
    last = (count[:, -1:] > count).sum(1).clamp_(max=hidden.shape[1] - 1)
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, last].unsqueeze(1)


def _with_new_slots(old: list[Tensor], new: list[Tensor], size: int) -> list[Tensor]:
    """Join the first `size` slots of `old`, with their gradient, and the later ones of `new`."""
    joined = []
    # Each is [N, kv_heads, slots, head_dim].
    for before, after in zip(old, new, strict=True):
        joined.append(torch.cat([before[:, :, :size], after[:, :, size:]], 2))
    return joined
