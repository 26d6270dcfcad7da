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
    _check_section(config, "")
    _check_groups(config)
    _check_prompts(config)
    _check_reward_options(config)
    _check_kernel(config)
    _check_average(config)
    _check_parts(config)
    _check_lora(config)


def _check_section(section: Any, prefix: str) -> None:
    for entry in dataclasses.fields(section):
        name = f"{prefix}{entry.name}"
        value = getattr(section, entry.name)
        # A section may hold further sections.
        if dataclasses.is_dataclass(value):
            _check_section(value, f"{name}.")
        else:
            check_setting(name, value, entry.metadata)


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
    # A minibatch holds whole groups, and all of them have the same size.
    if trainer.groups % trainer.minibatches:
        raise ValueError(
            f"expected trainer.groups={trainer.groups} to be a multiple of "
            f"trainer.minibatches={trainer.minibatches}"
        )
    episodes = trainer.groups // trainer.minibatches * trainer.group_size
    if episodes % trainer.micro_batches:
        raise ValueError(
            f"expected the {episodes} episodes of a minibatch (groups / minibatches x group_size) "
            f"to be a multiple of trainer.micro_batches={trainer.micro_batches}"
        )


def _check_prompts(config: Config) -> None:
    # The file takes the place of the held-out part of `env.prompts`.
    if config.env.test_prompts is not None and config.env.prompts is None:
        raise ValueError(
            f"expected env.prompts beside env.test_prompts={config.env.test_prompts}, got none: "
            "give the file of the training prompts too"
        )


def _check_reward_options(config: Config) -> None:
    for name, options in config.env.reward_options.items():
        if not isinstance(options, Mapping):
            raise ValueError(
                f"expected env.reward_options.{name} to be a mapping from options to values, got "
                f"{options!r}; write env.reward_options.{name}.OPTION=VALUE"
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


def _check_average(config: Config) -> None:
    if config.evaluation.ema and config.optimizer.ema is None:
        raise ValueError(
            "expected optimizer.ema beside evaluation.ema=true, got none: without it no average "
            "of the weights is kept; set optimizer.ema=0.99"
        )


def _check_parts(config: Config) -> None:
    model = config.model
    if model.kind and not model.painter:
        raise ValueError(
            f"expected model.painter beside model.kind={model.kind}, got none: give the folder or "
            "the hub id of a diffusers pipeline"
        )
    parts = [name for name in ("thinker", "painter") if getattr(model, name)]
    if parts and not model.kind:
        raise ValueError(
            f"expected model.kind beside model.{parts[0]}={getattr(model, parts[0])}, got none: "
            "set model.kind=thinker_painter to put a model together from parts"
        )


def _check_lora(config: Config) -> None:
    lora = config.model.lora
    # Without a rank there are no adapters, and what describes them would change nothing.
    described = bool(lora.targets) or bool(lora.text.alpha) or bool(lora.image.alpha)
    if described and not lora.text.rank and not lora.image.rank:
        raise ValueError(
            "expected model.lora.text.rank or model.lora.image.rank > 0 beside the other settings "
            "of model.lora, got 0 for both; without a rank there are no adapters"
        )
