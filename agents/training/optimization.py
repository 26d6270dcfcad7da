"""AdamW with a rate for each expert, clipping, a schedule, and float32 copies of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from agents.config.schema import AlgorithmSettings, OptimizerSettings
from agents.models.base import UnifiedModel
from agents.training.ema import WeightAverage


class Optimization:
    """How gradients become new weights.

    A weight that is not float32 gets a float32 copy, its master: an update of 1e-6 would be lost in
    bfloat16, which has three digits. The gradients of all micro-batches are summed up in float32,
    the optimiser changes the master, and the weight follows it.

    Args:
        model: what is trained; an expert whose objective has weight 0 is frozen.
        settings: of the optimiser.
        algorithm: the weights of the two objectives.
        iterations: of the run, for the schedule.

    Attributes:
        experts: what the optimiser changes, by expert: masters, or the parameters themselves.
        optimizer: the `torch.optim.Optimizer`, one parameter group an expert.
        names: of the parameters, in the order of the optimiser.
        masters: by the names of their parameters; empty where all that is trained is float32.
        average: of the weights after each update; None for none.

    Raises:
        ValueError: there is nothing to train.
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
        self.rates = {"text": settings.text_lr, "image": settings.image_lr}
        weights = {"text": algorithm.text_weight, "image": algorithm.image_weight}
        # The optimiser knows parameters by number, a checkpoint by name.
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        parameters = model.trainable_by_expert()
        self.experts: dict[str, list[nn.Parameter]] = {}
        self.names: list[str] = []
        self.masters: dict[str, nn.Parameter] = {}
        self._trained: dict[str, nn.Parameter] = {}
        for expert in self.rates:
            self.experts[expert] = []
            for parameter in parameters[expert]:
                name = name_of[id(parameter)]
                self.names.append(name)
                parameter.requires_grad_(bool(weights[expert]))
                self.experts[expert].append(self._prepare(name, parameter))
        if not self._trained:
            raise ValueError(
                "expected something to train, got none: algorithm.text_weight=0 and "
                "algorithm.image_weight=0 freeze their experts, and with adapters on one expert "
                "the other one is frozen; change the weights or model.lora"
            )
        self._make_optimizer()

    def _prepare(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimiser changes for a parameter."""
        if not parameter.requires_grad:
            return parameter
        self._trained[name] = parameter
        if parameter.dtype == torch.float32:
            return parameter
        self.masters[name] = nn.Parameter(parameter.detach().float())
        _hand_gradients_to(self.masters[name], parameter)
        return self.masters[name]

    def _make_optimizer(self) -> None:
        settings = self.settings
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
        self.average: WeightAverage | None = None
        if settings.ema is not None:
            values = {**self._trained, **self.masters}
            self.average = WeightAverage(self._trained, values, settings.ema)

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
        self._follow_masters()
        if self.average is not None:
            self.average.update()
        return norms

    @torch.no_grad()
    def _follow_masters(self) -> None:
        for name, master in self.masters.items():
            self._trained[name].copy_(master)

    @torch.no_grad()
    def load_masters(self, masters: dict[str, Tensor]) -> None:
        """Take masters from a checkpoint; the weights follow them.

        Args:
            masters: by the names of their parameters.
        """
        for name, master in self.masters.items():
            master.copy_(masters[name])
        self._follow_masters()

    def schedule(self, iteration: int) -> float:
        """Factor of the learning rates.

        It rises linearly over `warmup` iterations and falls linearly to `decay` at the last one.

        Args:
            iteration: counted from 0.
        """
        settings = self.settings
        rise = min(1.0, (iteration + 1) / max(settings.warmup, 1))
        return rise * (1 - (1 - settings.decay) * iteration / self.iterations)


def _hand_gradients_to(master: nn.Parameter, parameter: nn.Parameter) -> None:
    """From now on add each gradient of a parameter to that of its master, in float32."""
    # A parameter has one hook, whose master is exchanged: two hooks would hand on half each.
    is_new = not hasattr(parameter, "master")
    parameter.master = master  # type: ignore[attr-defined]
    if is_new:
        parameter.register_post_accumulate_grad_hook(_add_to_master)


def _add_to_master(parameter: Tensor) -> None:
    master = parameter.master  # type: ignore[attr-defined]
    gradient = parameter.grad
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient
    # Freed at once: the gradients of all weights would take as much memory as the model.
    parameter.grad = None
