"""The distribution of the next token, the same in rollout and in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from agents.models.recompute import run_again_in_backward

LOGITS_AT_ONCE = 2**24
"""Logits that are held at a time where a long text is evaluated; as float32 they take 64 MiB."""

Head = Callable[[Tensor], Tensor]
"""States `[..., H]` to logits `[..., V]`."""


def token_log_probs(logits: Tensor, legal: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the next token, `[..., V]` float32.

    Args:
        logits: `[..., V]`.
        legal: bool, broadcastable to them. The others get -inf, and the legal ones are
            renormalised.
        temperature: the logits are divided by it.
    """
    return _legal_logits(logits, legal, temperature).log_softmax(-1)


@torch.no_grad()
def token_entropy(log_probs: Tensor, legal: Tensor) -> Tensor:
    """Entropy of the next token, `[...]` float32, in nats; it carries no gradient.

    Args:
        log_probs: `[..., V]`, from `token_log_probs`.
        legal: as there.
    """
    return -(log_probs.exp() * log_probs.masked_fill(~legal, 0)).sum(-1)


def fits_at_once(tokens: int, vocab_size: int) -> bool:
    """Whether the logits of so many tokens are no more than `LOGITS_AT_ONCE`."""
    return tokens * vocab_size <= LOGITS_AT_ONCE


def chosen_log_probs(
    head: Head, states: Tensor, chosen: Tensor, legal: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen tokens and the entropies before them, some tokens at a time.

    No more than `LOGITS_AT_ONCE` logits exist at once, in the backward pass neither: they are
    computed again there.

    Args:
        head: makes logits of states.
        states: `[M, H]`, those before each token.
        chosen: `[M]` int64, the tokens.
        legal: `[V]` bool, as for `token_log_probs`.
        temperature: as there.

    Returns:
        Two of `[M]` float32; the entropy, in nats, carries no gradient.
    """

    def _evaluate(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits = _legal_logits(head(states), legal, temperature)
        # Without the table of all log-probabilities, which would be another [m, V].
        total = logits.logsumexp(-1)
        log_prob = logits.gather(1, chosen[:, None])[:, 0] - total
        return log_prob, _entropy(logits, total, legal)

    size = max(LOGITS_AT_ONCE // len(legal), 1)
    log_probs = []
    entropies = []
    for part, tokens in zip(states.split(size), chosen.split(size), strict=True):
        log_prob, entropy = run_again_in_backward(_evaluate, part, tokens)
        log_probs.append(log_prob)
        entropies.append(entropy)
    return torch.cat(log_probs), torch.cat(entropies)


def _legal_logits(logits: Tensor, legal: Tensor, temperature: float) -> Tensor:
    """Float32, divided by the temperature, and -inf where a token is not legal."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return logits.masked_fill(~legal, -torch.inf)


@torch.no_grad()
def _entropy(logits: Tensor, total: Tensor, legal: Tensor) -> Tensor:
    """Entropy `[M]` of masked logits `[M, V]`, whose logsumexp is `total`."""
    log_probs = logits - total[:, None]
    weighted = log_probs.exp()
    # A token that is not legal would add 0 times infinity.
    weighted.mul_(log_probs.masked_fill_(~legal, 0))
    return -weighted.sum(-1)
