"""The layers of BAGEL's mixture of transformers, under the original weight names.

Every weight of a layer (norms, projections, MLP) exists twice. Text and the two markers around an
image go through the *understanding* expert, latent tokens through the *generation* expert (weights
that end in `_moe_gen`). Attention is shared.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, apply_rotary_pos_emb

from agents.models.bagel.config import BagelConfig
from agents.models.kv_cache import KeyValueContext

UNDERSTANDING = ""
"""Suffix of the weight names of the understanding expert."""
GENERATION = "_moe_gen"
"""Suffix of the weight names of the generation expert."""


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys; each projection once per expert.

    Args:
        config: the model's sizes.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        hidden = config.hidden_size
        key_width = config.num_key_value_heads * config.head_dim
        # The order of the modules is that of the parameters, and so of the random draws.
        for expert in (UNDERSTANDING, GENERATION):
            self.add_module(f"q_proj{expert}", nn.Linear(hidden, hidden))
            self.add_module(f"k_proj{expert}", nn.Linear(hidden, key_width))
            self.add_module(f"v_proj{expert}", nn.Linear(hidden, key_width))
            self.add_module(f"o_proj{expert}", nn.Linear(hidden, hidden, bias=False))
            self.add_module(f"q_norm{expert}", nn.RMSNorm(config.head_dim, config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", nn.RMSNorm(config.head_dim, config.rms_norm_eps))

    def project(self, hidden: Tensor, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """Compute query, key and value of one expert's tokens, before rotation.

        Args:
            hidden: `[N, T, hidden_size]`.
            expert: `UNDERSTANDING` or `GENERATION`.

        Returns:
            Three tensors `[N, heads, T, head_dim]`; keys and values may have fewer heads.
        """
        # Each is [N, T, heads, head_dim]; the norms act on head_dim.
        query = self._heads("q_proj", hidden, expert)
        key = self._heads("k_proj", hidden, expert)
        value = self._heads("v_proj", hidden, expert)
        query = getattr(self, f"q_norm{expert}")(query)
        key = getattr(self, f"k_norm{expert}")(key)
        # [N, T, heads, head_dim] -> [N, heads, T, head_dim]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _heads(self, projection: str, hidden: Tensor, expert: str) -> Tensor:
        # [N, T, heads * head_dim] -> [N, T, heads, head_dim]
        projected = getattr(self, f"{projection}{expert}")(hidden)
        return projected.unflatten(-1, (-1, self.head_dim))

    def output(self, mixed: Tensor, expert: str) -> Tensor:
        """Project what attention gave, `[N, T, hidden_size]`, with one expert's weights."""
        return getattr(self, f"o_proj{expert}")(mixed)


class Layer(nn.Module):
    """One pre-norm transformer layer with two experts.

    Args:
        config: the model's sizes.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        hidden = config.hidden_size
        eps = config.rms_norm_eps
        for expert in (UNDERSTANDING, GENERATION):
            self.add_module(f"mlp{expert}", Qwen2MLP(config.qwen2()))
            self.add_module(f"input_layernorm{expert}", nn.RMSNorm(hidden, eps))
            self.add_module(f"post_attention_layernorm{expert}", nn.RMSNorm(hidden, eps))

    def forward(
        self,
        streams: dict[str, Tensor],
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        context: KeyValueContext,
        index: int,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Run the layer on new tokens; attention sees those of all experts side by side.

        Args:
            streams: the new tokens of each expert, `[N, T_expert, hidden_size]`; T in all.
            rotary: cosines and sines, each `[N, T, head_dim]` or `[N, 1, head_dim]`.
            mask: `[N, 1, T, size + T]`, added to the attention scores.
            context: what was read before, `size` slots.
            index: the index of this layer.

        Returns:
            The new `streams`, and keys and values with the context's before them, each
            `[N, kv_heads, size + T, head_dim]`.
        """
        # Each expert projects its own tokens; attention then mixes those of all experts.
        queries = []
        keys = []
        values = []
        for expert, hidden in streams.items():
            # [N, T_expert, hidden_size]
            normed = getattr(self, f"input_layernorm{expert}")(hidden)
            query, key, value = self.self_attn.project(normed, expert)
            queries.append(query)
            keys.append(key)
            values.append(value)
        # [N, heads, T, head_dim], in the order of `streams`, which is that of positions and mask.
        query = _side_by_side(queries)
        key = _side_by_side(keys)
        value = _side_by_side(values)
        # Cosines and sines have no axis of heads: `unsqueeze_dim` gives them one.
        query, key = apply_rotary_pos_emb(query, key, *rotary, unsqueeze_dim=1)
        all_keys, all_values = context.attend(index, key, value)
        # [N, heads, T, head_dim]; with `enable_gqa` several query heads share a head of keys.
        mixed = F.scaled_dot_product_attention(
            query, all_keys, all_values, mask, enable_gqa=self.self_attn.grouped
        )
        # [N, heads, T, head_dim] -> [N, T, hidden_size]
        mixed = mixed.transpose(1, 2).flatten(2)
        return self._outputs(streams, mixed), all_keys, all_values

    def _outputs(self, streams: dict[str, Tensor], mixed: Tensor) -> dict[str, Tensor]:
        # Cut `mixed` [N, T, hidden_size] along T into the tokens of each expert again.
        outputs = {}
        start = 0
        for expert, hidden in streams.items():
            end = start + hidden.shape[1]
            # Two residual branches: attention, then the MLP.
            hidden = hidden + self.self_attn.output(mixed[:, start:end], expert)
            normed = getattr(self, f"post_attention_layernorm{expert}")(hidden)
            outputs[expert] = hidden + getattr(self, f"mlp{expert}")(normed)
            start = end
        return outputs


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Join `[N, heads, T_expert, head_dim]` along T; one part alone needs no copy."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, 2)


class Trunk(nn.Module):
    """Embedding, layers and the two final norms.

    Args:
        config: the model's sizes.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """The trunk and its head, nested as the weight names of the release require.

    Args:
        config: the model's sizes.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class TimeEmbedder(nn.Module):
    """Sinusoids of t (cosines first), then a small MLP.

    Args:
        hidden_size: width of the result.
        frequencies: the number of sinusoids.
    """

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed flow times `[N]` float32 in [0, 1] as `[N, hidden_size]`."""
        # [N, frequencies] float32
        waves = get_timestep_embedding(
            t, self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class PositionTable(nn.Module):
    """Fixed two-dimensional sin-cos positions, column first; a weight that is never trained.

    Args:
        hidden_size: width of an entry.
        side: rows and columns of the table.

    Attributes:
        pos_embed: `[side * side, hidden_size]` float32.
    """

    def __init__(self, hidden_size: int, side: int) -> None:
        super().__init__()
        # A parameter as in the release, although it is never trained.
        table = get_2d_sincos_pos_embed(hidden_size, side, base_size=side, output_type="pt")
        self.pos_embed = nn.Parameter(cast(Tensor, table).float(), requires_grad=False)
