"""What a token of BAGEL sees, and the attention that computes it.

A text token sees the context and the text up to itself. A token of an image sees the context and
the whole image. What is not seen gets minus infinity added to its attention scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.models.kv_cache import KeyValueContext


def text_bias(context: KeyValueContext, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores of text.

    A token sees the context, the unmasked tokens before it, and itself. A padding token sees itself
    too, so that no softmax is empty.

    Args:
        context: what was read before, `size` slots.
        mask: `[N, T]` bool, False where a position is padding.
        dtype: that of the queries.

    Returns:
        `[N, 1, T, size + T]`, 0 or minus infinity.
    """
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    # [N, T, T]
    among_new = causal & (mask[:, None, :] | itself)
    # [N, T, size]
    before = context.valid[:, None, : context.size].expand(-1, length, -1)
    return _bias(torch.cat([before, among_new], 2), dtype)


def image_bias(context: KeyValueContext, length: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the attention scores of an image segment, whose tokens see each other.

    Args:
        context: what was read before, `size` slots.
        length: tokens T of the segment.
        dtype: that of the queries.

    Returns:
        `[N, 1, 1, size + T]`, 0 or minus infinity: the same for all tokens of the segment. None
        where there is nothing to hide, because the fastest attention takes no bias.
    """
    if context.is_dense:
        return None
    # [N, size + T]
    visible = F.pad(context.valid[:, : context.size], (0, length), value=True)
    return _bias(visible[:, None], dtype)


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    # [N, T, K] bool -> [N, 1, T, K]: one bias for all heads.
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, -torch.inf)[:, None]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention in which `heads / kv_heads` neighbouring query heads share a head of keys.

    Args:
        query: `[N, heads, T, head_dim]`.
        key: `[N, kv_heads, K, head_dim]`.
        value: of the same shape.
        bias: `[N, 1, T, K]` or `[N, 1, 1, K]`, added to the scores; or None.

    Returns:
        `[N, heads, T, head_dim]`.
    """
    if query.device.type != "cpu":
        return attend_folded(query, key, value, bias)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, bias, enable_gqa=grouped)


def attend_folded(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The same as `attend`, with one head of queries a head of keys.

    On a GPU, PyTorch's fused kernels share heads of keys (`enable_gqa`) only in half precision and
    without a bias; its other kernel stores all scores in float32. So the query heads that share
    keys are laid one after the other, as one head of `group * T` queries: no key is copied, and a
    fused kernel takes it in every case.

    Args:
        query: see `attend`.
        key: see `attend`.
        value: see `attend`.
        bias: see `attend`.

    Returns:
        See `attend`.
    """
    kv_heads = key.shape[1]
    group = query.shape[1] // kv_heads
    # [N, heads, T, head_dim] -> [N, kv_heads, group * T, head_dim]
    folded = query.unflatten(1, (kv_heads, group)).flatten(2, 3)
    if bias is not None and bias.shape[2] > 1:
        # [N, 1, T, K] -> [N, 1, group * T, K]
        bias = bias.repeat(1, 1, group, 1)
    mixed = F.scaled_dot_product_attention(folded, key, value, bias)
    # [N, kv_heads, group * T, head_dim] -> [N, heads, T, head_dim]
    return mixed.unflatten(2, (group, -1)).flatten(1, 2)
