"""Describes a run: its algorithm, scenario and reward, and the settings that were changed."""

from __future__ import annotations

from typing import Any

from agents.config.model_settings import ModelSettings
from agents.config.schema import AlgorithmSettings, Config
from unigrpo_env.variants.variant import Variant


def changed_settings(config: Config) -> dict[str, tuple[Any, Any]]:
    """List the settings that differ from their defaults.

    Args:
        config: the settings of a run.

    Returns:
        The default and the value of each, by name: `section.key`.
    """
    # The dataclasses hold the defaults; a group such as `env=edit` counts as a change.
    return _changes(Config().to_dict(), config.to_dict(), "")


def _changes(
    defaults: dict[str, Any], values: dict[str, Any], prefix: str
) -> dict[str, tuple[Any, Any]]:
    found = {}
    for key, value in values.items():
        default = defaults[key]
        name = f"{prefix}{key}"
        # A section may hold further sections. A mapping with free keys is empty by default.
        if isinstance(value, dict) and default:
            found.update(_changes(default, value, f"{name}."))
        elif value != default:
            found[name] = (default, value)
    return found


def describe(config: Config, variant: Variant) -> dict[str, str]:
    """Name what a run trains, where and on what reward.

    Args:
        config: the settings of the run.
        variant: the scenario of the run.
    """
    optimizer = config.optimizer
    return {
        "algorithm": algorithm_name(config.algorithm),
        "scenario": config.env.variant,
        "reward": _reward_text(variant.reward),
        "model": _model_name(config.model),
        "learning rates": f"{optimizer.text_lr:g} (text), {optimizer.image_lr:g} (image)",
    }


def _model_name(settings: ModelSettings) -> str:
    """The model's name, or the names of its parts."""
    parts = [name for name in (settings.thinker, settings.painter) if name]
    return f"{settings.source} ({' + '.join(parts)})" if parts else settings.source


def algorithm_name(settings: AlgorithmSettings) -> str:
    """Name an algorithm as the paper does.

    Args:
        settings: the objective and its weights.
    """
    if settings.method == "sft":
        return "SFT"
    # A weight of 0 freezes the expert, so only the other one is trained.
    if not settings.image_weight:
        return "TextGRPO"
    objective = settings.image_objective
    if settings.text_weight:
        joint = {"flow_grpo": "UniGRPO", "fpo": "UniFPO"}
        return joint.get(objective, f"TextGRPO and {objective}")
    alone = {"flow_grpo": "FlowGRPO", "fpo": "FPO", "refl": "ReFL"}
    return alone.get(objective, objective)


def _reward_text(reward: Any) -> str:
    if isinstance(reward, str):
        return reward
    # An instance of a class has no `__name__`.
    if callable(reward):
        return getattr(reward, "__name__", type(reward).__name__)
    return str(reward)
