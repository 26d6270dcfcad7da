"""Checks of the settings: the bounds of each one, and the rules that join several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.config.schema import Config


def validate(config: Config) -> None:
    """Check all settings of a run.

    Args:
        config: the settings.

    Raises:
        ValueError: a setting is out of its bounds, or two do not go together.
    """
    # Single settings first, so that the rules below see values in their bounds.
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for entry in dataclasses.fields(values):
            name = f"{section.name}.{entry.name}"
            check_setting(name, getattr(values, entry.name), entry.metadata)
    _check_groups(config)
    _check_prompts(config)
    _check_kernel(config)


def check_setting(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    """Check one value against the rules beside its field. None stands for "not set" and passes.

    Args:
        name: name of the setting, for the message.
        value: its value.
        rules: any of `at_least`, `above`, `between` (both bounds excluded), `choices`; and
            `reason`, which ends the message.

    Raises:
        ValueError: the value breaks a rule.
    """
    if value is None:
        return
    if "choices" in rules and value not in rules["choices"]:
        raise ValueError(f"expected {name} to be one of {rules['choices']}, got {value!r}")
    # Written with `not`, so that NaN, for which every comparison is False, is refused.
    expected = ""
    if "at_least" in rules and not value >= rules["at_least"]:
        expected = f"{name} >= {rules['at_least']}"
    if "above" in rules and not value > rules["above"]:
        expected = f"{name} > {rules['above']}"
    if "between" in rules:
        low, high = rules["between"]
        if not low < value < high:
            expected = f"{low} < {name} < {high}"
    if not expected:
        return
    reason = ""
    if "reason" in rules:
        reason = f"; {rules['reason']}"
    raise ValueError(f"expected {expected}, got {value}{reason}")


def _check_groups(config: Config) -> None:
    trainer = config.trainer
    # A group stays whole in a part, and all parts have the same size.
    parts = trainer.minibatches * trainer.micro_batches
    if trainer.groups % parts:
        raise ValueError(
            f"expected trainer.groups={trainer.groups} to be a multiple of "
            f"minibatches x micro_batches = {parts}"
        )


def _check_prompts(config: Config) -> None:
    # The file takes the place of the held-out part of `env.prompts`.
    if config.env.test_prompts is not None and config.env.prompts is None:
        raise ValueError(
            f"expected env.prompts beside env.test_prompts={config.env.test_prompts}, got none: "
            "give the file of the training prompts too"
        )


def _check_kernel(config: Config) -> None:
    algorithm = config.algorithm
    if algorithm.image_objective == "fpo" and algorithm.latent_kl_weight:
        raise ValueError(
            "expected algorithm.latent_kl_weight = 0 with fpo, which has no stochastic steps; "
            "use velocity_weight"
        )
    # Both compare Gaussians of stochastic steps, which an ODE does not have.
    needs_noise = algorithm.latent_kl_weight or algorithm.image_objective == "flow_grpo"
    if algorithm.method == "rl" and algorithm.kernel == "ode" and needs_noise:
        raise ValueError(
            "expected a stochastic algorithm.kernel for flow_grpo and the latent KL, got 'ode'; "
            "choose one of ('flow_sde', 'flow_cps', 'dance')"
        )
    # The standard deviation of Flow-CPS is a sine of the noise level times pi / 2.
    if algorithm.kernel == "flow_cps" and algorithm.noise_level > 1:
        raise ValueError(
            f"expected algorithm.noise_level in (0, 1] for flow_cps, got {algorithm.noise_level}"
        )
