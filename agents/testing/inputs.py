"""What the contract of models gives a model to read, and what it measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from agents.models.base import UnifiedModel

LENGTHS = (4, 2, 3)
"""Tokens of the rows of a ragged batch."""


class Inputs:
    """Random inputs of a model's sizes, always the same in the same order."""

    def __init__(self, model: UnifiedModel[Any]) -> None:
        self.vocab_size = model.vocab_size
        self.latent_shape = model.latent_shape
        self.device = next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(0)

    def ids(self, rows: int, length: int) -> Tensor:
        """Tokens `[rows, length]` int64."""
        ids = torch.randint(self.vocab_size, (rows, length), generator=self.generator)
        return ids.to(self.device)

    def latent(self, rows: int) -> Tensor:
        """A latent `[rows, L, C]` float32."""
        return torch.randn(rows, *self.latent_shape, generator=self.generator).to(self.device)

    def times(self, rows: int) -> Tensor:
        """Flow times `[rows]` float32."""
        return torch.rand(rows, generator=self.generator).to(self.device)

    def ragged(self) -> tuple[Tensor, Tensor]:
        """Tokens `[3, 4]` int64 and their mask, False where a row has ended."""
        ids = self.ids(len(LENGTHS), max(LENGTHS))
        # [1, 4] < [3, 1] -> [3, 4]
        mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        return ids, mask.to(self.device)


def outputs_of(model: UnifiedModel[Any]) -> tuple[Tensor, Tensor]:
    """Logits `[tokens, V]` of a ragged text, and the velocities `[N, L, C]` after it."""
    inputs = Inputs(model)
    ids, mask = inputs.ragged()
    logits, context = model.append_text(model.empty_context(len(ids)), ids, mask)
    velocity = model.predict_velocity(context, inputs.latent(len(ids)), inputs.times(len(ids)))
    return logits[mask], velocity


def trainable_weights(model: UnifiedModel[Any]) -> dict[str, nn.Parameter]:
    """The parameters that need a gradient, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def weighted_sum(output: Tensor) -> Tensor:
    """A number whose gradient differs from entry to entry: a plain sum may have none."""
    # Drawn on the CPU, so that every device gets the same weights.
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return (output * weights.to(output.device)).sum()


def reached_weights(model: UnifiedModel[Any], output: Tensor) -> set[str]:
    """Names of the trainable parameters that get a gradient from `output`."""
    gradients = gradients_of(model, weighted_sum(output))
    return {name for name, gradient in gradients.items() if gradient.any()}


def all_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two dictionaries of gradients hold the same numbers, but for rounding."""
    if first.keys() != second.keys():
        return False
    return all(torch.allclose(first[name], second[name]) for name in first)


def gradients_of(model: UnifiedModel[Any], loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each trainable parameter that the loss depends on."""
    weights = trainable_weights(model)
    # The graph is kept, because two losses may share a context.
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, retain_graph=True)
    gradients = {}
    for name, gradient in zip(weights, found, strict=True):
        if gradient is not None:
            gradients[name] = gradient
    return gradients
