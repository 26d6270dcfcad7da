"""The distribution of the next token, the same in rollout and in training."""

from __future__ import annotations

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, legal: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the next token, `[..., V]` float32.

    Args:
        logits: `[..., V]`.
        legal: bool, broadcastable to them. The others get -inf, and the legal ones are
            renormalised.
        temperature: the logits are divided by it.
    """
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return logits.masked_fill(~legal, -torch.inf).log_softmax(-1)


@torch.no_grad()
def token_entropy(log_probs: Tensor, legal: Tensor) -> Tensor:
    """Entropy of the next token, `[...]` float32, in nats; it carries no gradient.

    Args:
        log_probs: `[..., V]`, from `token_log_probs`.
        legal: as there.
    """
    return -(log_probs.exp() * log_probs.masked_fill(~legal, 0)).sum(-1)
