"""The layers of BAGEL's mixture of transformers, under the original weight names.

Every weight of a layer (norms, projections, MLP) exists twice. Text and the two markers around an
image go through the *understanding* expert, latent tokens through the *generation* expert (weights
that end in `_moe_gen`). Attention is shared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, apply_rotary_pos_emb

from agents.models.bagel.attention import attend
from agents.models.bagel.config import BagelConfig
from agents.models.kv_cache import Extend

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
        bias: Tensor | None,
        extend: Extend,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Run the layer on new tokens; attention sees those of all experts side by side.

        Args:
            streams: the new tokens of each expert, `[N, T_expert, hidden_size]`; T in all.
            rotary: cosines and sines, each `[N, T, head_dim]` or `[N, 1, head_dim]`.
            bias: added to the attention scores, `[N, 1, T, K]` or `[N, 1, 1, K]`; or None.
            extend: puts the new keys and values after those of the context.

        Returns:
            The new `streams`, and keys and values as `extend` gave them, each
            `[N, kv_heads, K, head_dim]`.
        """
        # A method of its own, so that no query is kept in memory while the MLP runs.
        mixed, keys, values = self._attend(streams, rotary, bias, extend)
        return self._outputs(streams, mixed), keys, values

    def _attend(
        self,
        streams: dict[str, Tensor],
        rotary: tuple[Tensor, Tensor],
        bias: Tensor | None,
        extend: Extend,
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        # [N, heads, T, head_dim], in the order of `streams`, which is that of positions and bias.
        query = _side_by_side(queries)
        key = _side_by_side(keys)
        value = _side_by_side(values)
        # Cosines and sines have no axis of heads: `unsqueeze_dim` gives them one.
        query, key = apply_rotary_pos_emb(query, key, *rotary, unsqueeze_dim=1)
        all_keys, all_values = extend(key, value)
        # [N, heads, T, head_dim] -> [N, T, hidden_size]
        mixed = attend(query, all_keys, all_values, bias).transpose(1, 2).flatten(2)
        return mixed, all_keys, all_values

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
