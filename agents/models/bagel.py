"""BAGEL's mixture of transformers (Deng et al. 2025, arXiv 2505.14683), compactly.

Two experts share one attention over one linear context. Every weight of a layer (norms, projections, MLP) exists twice and is chosen by
token: text and the two markers around an image go through the *understanding* expert, latent tokens through the *generation* expert
(weights ending in `_moe_gen`). The released 14-billion-parameter model and the tiny model of this package are two configs of these classes,
under the original weight names.

Text is causal, one rotary position a token. An image is `<start> latents <end>` at one single position, attends fully to itself, and tells
its places apart by a fixed sin-cos table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RotaryEmbedding, apply_rotary_pos_emb

from agents.models.context import KeyValueContext
from agents.models.seam import UnifiedModel
from agents.models.vision import Connector, VisionConfig, VisionTower
from unigrpo_env.episodes import Decoder

UNDERSTANDING, GENERATION = "", "_moe_gen"
"""The two experts, as the suffix of their weights' names."""
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
"""Fixed sin-cos tables, in the files and never trained."""


@dataclass(frozen=True)
class BagelConfig:
    """Sizes of a BAGEL model. The defaults of the two ids and `max_latent_size` are the release's.

    Attributes:
        z_channels, latent_patch_size: a latent token holds a `patch x patch` square of `z_channels` values.
        latent_height, latent_width: latent tokens down and across.
        max_latent_size: side of the position table; a token's entry is `row * max_latent_size + column`.
        image_start_id, image_end_id: the markers around an image.
        vision: the tower that looks at pictures' pixels, if the model has one.
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    z_channels: int = 16
    latent_patch_size: int = 2
    latent_height: int = 64
    latent_width: int = 64
    max_latent_size: int = 64
    image_start_id: int = 151652
    image_end_id: int = 151653
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.vision, dict):  # from a config file
            object.__setattr__(self, "vision", VisionConfig(**self.vision))

    @property
    def latent_dim(self) -> int:
        return self.z_channels * self.latent_patch_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def qwen2(self) -> Qwen2Config:
        """The same sizes as the transformers parts want them."""
        return Qwen2Config(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            hidden_act=self.hidden_act,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
        )


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys, each projection once per expert."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        for expert in (UNDERSTANDING, GENERATION):
            self.add_module(f"q_proj{expert}", nn.Linear(config.hidden_size, queries))
            self.add_module(f"k_proj{expert}", nn.Linear(config.hidden_size, keys))
            self.add_module(f"v_proj{expert}", nn.Linear(config.hidden_size, keys))
            self.add_module(f"o_proj{expert}", nn.Linear(queries, config.hidden_size, bias=False))
            self.add_module(f"q_norm{expert}", nn.RMSNorm(config.head_dim, config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", nn.RMSNorm(config.head_dim, config.rms_norm_eps))

    def project(self, hidden: Tensor, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of one expert's tokens, `[N, heads, T, head_dim]`, before rotation."""
        query, key, value = (getattr(self, f"{name}_proj{expert}")(hidden).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        query, key = getattr(self, f"q_norm{expert}")(query), getattr(self, f"k_norm{expert}")(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def output(self, mixed: Tensor, expert: str) -> Tensor:
        return getattr(self, f"o_proj{expert}")(mixed)


class Layer(nn.Module):
    """One pre-norm transformer layer. `streams` holds the tokens of each expert in a call; attention sees them side by side."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        for expert in (UNDERSTANDING, GENERATION):
            self.add_module(f"mlp{expert}", Qwen2MLP(config.qwen2()))
            self.add_module(f"input_layernorm{expert}", nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module(f"post_attention_layernorm{expert}", nn.RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self, streams: dict[str, Tensor], rotary: tuple[Tensor, Tensor], mask: Tensor, context: KeyValueContext, index: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        projected = [self.self_attn.project(getattr(self, f"input_layernorm{e}")(h), e) for e, h in streams.items()]
        query, key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in zip(*projected, strict=True))
        query, key = apply_rotary_pos_emb(query, key, *rotary, unsqueeze_dim=1)
        keys, values = context.attend(index, key, value)
        mixed = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=self.self_attn.grouped)
        mixed = mixed.transpose(1, 2).flatten(2)
        out, at = {}, 0
        for expert, hidden in streams.items():
            end = at + hidden.shape[1]
            hidden = hidden + self.self_attn.output(mixed[:, at:end], expert)
            out[expert] = hidden + getattr(self, f"mlp{expert}")(getattr(self, f"post_attention_layernorm{expert}")(hidden))
            at = end
        return out, keys, values


class Trunk(nn.Module):
    """Embedding, layers and the two final norms."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """The trunk and its head, nested as the release's weight names want them."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class TimeEmbedder(nn.Module):
    """Sinusoids of t in [0, 1] (256 of them, cosines first), then a small MLP."""

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        waves = get_timestep_embedding(t, self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class PositionTable(nn.Module):
    """Fixed two-dimensional sin-cos positions, column first, `[side * side, hidden]`."""

    def __init__(self, hidden_size: int, side: int) -> None:
        super().__init__()
        table = cast(Tensor, get_2d_sincos_pos_embed(hidden_size, side, base_size=side, output_type="pt"))
        self.pos_embed = nn.Parameter(table.float(), requires_grad=False)


def _untold(latents: Tensor) -> Tensor:
    raise ValueError(
        "expected pixels, or a decoder that shows what latents look like, to read pictures with a vision tower; "
        "call look_with(variant.decode), or look_with(None) to read latents alone"
    )


class Bagel(UnifiedModel[KeyValueContext]):
    """The unified model: reads text and pictures, gives velocities. See `agents.models.seam.UnifiedModel` for the verbs."""

    config_class = BagelConfig
    places: Tensor
    markers: Tensor

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        self._decode: Decoder | None = _untold
        self.language_model = LanguageModel(config)
        self.time_embedder = TimeEmbedder(config.hidden_size)
        self.vae2llm = nn.Linear(config.latent_dim, config.hidden_size)
        self.llm2vae = nn.Linear(config.hidden_size, config.latent_dim)
        self.latent_pos_embed = PositionTable(config.hidden_size, config.max_latent_size)
        if config.vision is not None:
            self.vit_model = VisionTower(config.vision)
            self.connector = Connector(config.vision, config.hidden_size)
            self.vit_pos_embed = PositionTable(config.hidden_size, config.vision.max_patches)
        self.rotary = Qwen2RotaryEmbedding(config.qwen2())
        rows, columns = torch.arange(config.latent_height), torch.arange(config.latent_width)
        places = (rows[:, None] * config.max_latent_size + columns).flatten()
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("markers", torch.tensor([config.image_start_id, config.image_end_id]), persistent=False)

    def initialise(self, seed: int, std: float = 0.02) -> Bagel:
        """Fresh weights: normal with `std`, norms one, biases and the velocity head zero, the generation expert a copy of its twin."""
        generator = torch.Generator().manual_seed(seed)
        weights = dict(self.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                if name in TABLES:
                    continue
                if weight.ndim == 1:
                    weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                else:
                    weight.normal_(0, std, generator=generator)
            for name, weight in weights.items():
                if GENERATION in name:
                    weight.copy_(weights[name.replace(GENERATION, UNDERSTANDING)])
            self.llm2vae.weight.zero_()
        return self

    def look_with(self, decode: Decoder | None) -> None:
        self.__dict__["_decode"] = decode  # where it is a module it is not a part of this one: not trained, moved or saved with it

    def parameter_lists(self) -> dict[str, list[nn.Parameter]]:
        image_parts = ("time_embedder.", "vae2llm.", "llm2vae.")
        lists: dict[str, list[nn.Parameter]] = {"text": [], "image": []}
        for name, weight in self.named_parameters():
            if name not in TABLES:
                lists["image" if GENERATION in name or name.startswith(image_parts) else "text"].append(weight)
        return lists

    def start(self, batch_size: int) -> KeyValueContext:
        weight = self.vae2llm.weight
        shape = (batch_size, self.config.num_key_value_heads, 0, self.config.head_dim)
        layers = range(self.config.num_hidden_layers)
        return KeyValueContext(
            keys=[weight.new_zeros(shape) for _ in layers],
            values=[weight.new_zeros(shape) for _ in layers],
            valid=torch.zeros(batch_size, 0, dtype=torch.bool, device=weight.device),
            position=torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
        )

    def read_text(
        self, context: KeyValueContext, ids: Tensor, mask: Tensor | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, KeyValueContext]:
        length = ids.shape[1]
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        count = mask.cumsum(1)
        position = context.position[:, None] + (count - mask.long())
        # A token sees what stands before it and itself; a padding token too, so that no softmax is empty.
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        among = causal & (mask[:, None, :] | torch.eye(length, dtype=torch.bool, device=ids.device))
        before = context.valid[:, None, : context.size].expand(-1, length, -1)
        with self.computing():
            streams, keys, values = self._run(
                {UNDERSTANDING: self.language_model.model.embed_tokens(ids)}, position, torch.cat([before, among], 2), context
            )
            hidden = streams[UNDERSTANDING]
            if last_only and length > 1:
                last = (count[:, -1:] > count).sum(1).clamp_(max=length - 1)
                hidden = hidden[torch.arange(len(hidden), device=ids.device), last].unsqueeze(1)
            logits = self.language_model.lm_head(self.language_model.model.norm(hidden))
        return logits, context.advance(keys, values, mask, context.position + count[:, -1])

    def velocity(self, context: KeyValueContext, x: Tensor, t: Tensor) -> Tensor:
        with self.computing():
            streams, _, _ = self._look(context, self._latent_tokens(x, t), GENERATION)
            hidden = self.language_model.model.norm_moe_gen(streams[GENERATION])
            return self.llm2vae(hidden).float()

    def read_image(
        self,
        context: KeyValueContext,
        latent: Tensor | None = None,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        learn: bool = True,
    ) -> KeyValueContext:
        """Read finished pictures: a segment of clean latents, then, with a vision tower, one of its patches. See the seam.

        The tower sees `pixels`, or else what the latents show to the eye that `look_with` gave it.
        Each segment is `<start> tokens <end>` at one position, attends fully to itself, and moves the next position on by one.
        """
        if pixels is not None and self.config.vision is None:
            raise ValueError("expected a model with a vision tower to read pixels, got one without; leave `pixels` out")
        if latent is None and pixels is None:
            raise ValueError("expected a latent, pixels, or both; got neither")
        if latent is not None and pixels is None and self.config.vision is not None and self._decode is not None:
            with torch.no_grad():
                pixels = self.vit_model.fit(self._decode(latent))
        with self.computing():
            if latent is not None:
                tokens = self._latent_tokens(latent, torch.zeros(len(latent), device=latent.device))
                context = self._remember(context, tokens, GENERATION, mask, learn)
            if pixels is not None:
                assert self.config.vision is not None
                table = self.vit_pos_embed.pos_embed[self.vit_model.places(pixels, self.config.vision.max_patches)]
                with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
                    tokens = self.connector(self.vit_model(pixels.to(self.vae2llm.weight.dtype))) + table
                context = self._remember(context, tokens, UNDERSTANDING, mask, learn)
        return context

    def _latent_tokens(self, x: Tensor, t: Tensor) -> Tensor:
        dtype = self.vae2llm.weight.dtype
        return self.vae2llm(x.to(dtype)) + self.time_embedder(t)[:, None] + self.latent_pos_embed.pos_embed[self.places].to(dtype)

    def _look(self, context: KeyValueContext, tokens: Tensor, expert: str) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        """All layers over one image segment: the markers through the understanding expert, `tokens` through `expert`."""
        markers = self.language_model.model.embed_tokens(self.markers).expand(len(tokens), -1, -1)
        length = 2 + tokens.shape[1]
        mask = F.pad(context.valid[:, None, : context.size], (0, length), value=True).expand(-1, length, -1)
        same = expert == UNDERSTANDING
        streams = {UNDERSTANDING: torch.cat([markers, tokens], 1)} if same else {UNDERSTANDING: markers, expert: tokens}
        return self._run(streams, context.position[:, None], mask, context)

    def _remember(self, context: KeyValueContext, tokens: Tensor, expert: str, mask: Tensor | None, learn: bool) -> KeyValueContext:
        """`context` with an image segment, in the rows of `mask` `[N]` (all if left out)."""
        if learn or not torch.is_grad_enabled():
            _, keys, values = self._look(context, tokens, expert)
        else:
            with torch.no_grad():
                _, new_keys, new_values = self._look(context.detach(), tokens, expert)
            old = slice(0, context.size)
            keys, values = (
                [torch.cat([was[:, :, old], now[:, :, context.size :]], 2) for was, now in zip(before, after, strict=True)]
                for before, after in ((context.keys, new_keys), (context.values, new_values))
            )
        rows = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device) if mask is None else mask
        return context.advance(keys, values, rows[:, None].expand(-1, 2 + tokens.shape[1]), context.position + rows)

    def _run(
        self, streams: dict[str, Tensor], position: Tensor, mask: Tensor, context: KeyValueContext
    ) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        """All layers over new tokens. `position` `[N, T]` or `[N, 1]` for all, `mask` `[N, T, size + T]` bool, True where seen."""
        if context.in_place:
            context.reserve(mask.shape[1])
        sample = next(iter(streams.values()))
        rotary = self.rotary(sample, position)
        bias = torch.zeros(mask.shape, dtype=sample.dtype, device=sample.device).masked_fill_(~mask, -torch.inf)[:, None]
        keys, values = [], []
        for index, layer in enumerate(self.language_model.model.layers):
            streams, key, value = layer(streams, rotary, bias, context, index)
            keys.append(key)
            values.append(value)
        return streams, keys, values
