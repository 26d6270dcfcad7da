"""AdamW with a learning rate for each expert, clipping, and a schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from agents.config.schema import AlgorithmSettings, OptimizerSettings
from agents.models.base import UnifiedModel


class Optimization:
    """How gradients become new weights.

    Args:
        model: what is trained; an expert whose objective has weight 0 is frozen.
        settings: of the optimiser.
        algorithm: the weights of the two objectives.
        iterations: of the run, for the schedule.

    Attributes:
        experts: trainable parameters by expert.
        optimizer: the `torch.optim.Optimizer`, one parameter group an expert.
        names: of the parameters, in the order of the optimiser.
    """

    def __init__(
        self,
        model: UnifiedModel[Any],
        settings: OptimizerSettings,
        algorithm: AlgorithmSettings,
        iterations: int,
    ) -> None:
        self.settings = settings
        self.iterations = max(iterations, 1)
        self.experts = model.parameters_by_expert()
        weights = {"text": algorithm.text_weight, "image": algorithm.image_weight}
        for expert, parameters in self.experts.items():
            for parameter in parameters:
                parameter.requires_grad_(bool(weights[expert]))
        self.rates = {"text": settings.text_lr, "image": settings.image_lr}
        # One group an expert: their learning rates differ.
        groups = []
        for expert, rate in self.rates.items():
            groups.append({"params": self.experts[expert], "lr": rate})
        self.optimizer = torch.optim.AdamW(
            groups,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self.names = _names_of(model, self.optimizer)

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad()

    def step(self, iteration: int) -> dict[str, float]:
        """One step along the gradient that was summed up.

        Args:
            iteration: counted from 0, for the schedule.

        Returns:
            The gradient norm of each expert before clipping.

        Raises:
            FloatingPointError: the gradient is not finite; the weights have not changed.
        """
        norms: dict[str, float] = {}
        groups = zip(self.optimizer.param_groups, self.experts.items(), strict=True)
        for group, (expert, parameters) in groups:
            # Each expert is clipped by itself: the text's gradient is far larger than the image's.
            norm = float(nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient of the {expert} expert is {norm} in iteration {iteration + 1}; "
                    "the weights are as before it. Lower the learning rates, or look at the "
                    "reward and the noise level"
                )
            norms[f"{expert}_grad_norm"] = norm
            group["lr"] = self.rates[expert] * self.schedule(iteration)
        self.optimizer.step()
        return norms

    def schedule(self, iteration: int) -> float:
        """Factor of the learning rates.

        It rises linearly over `warmup` iterations and falls linearly to `decay` at the last one.

        Args:
            iteration: counted from 0.
        """
        settings = self.settings
        rise = min(1.0, (iteration + 1) / max(settings.warmup, 1))
        return rise * (1 - (1 - settings.decay) * iteration / self.iterations)


def _names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The name of each of the optimiser's parameters."""
    # The optimiser knows parameters by number, a checkpoint by name.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        found += [names[id(parameter)] for parameter in group["params"]]
    return found
