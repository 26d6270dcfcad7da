"""The rewards of a run: their options checked and their parts loaded before the first episode."""

from __future__ import annotations

from agents.config.schema import Config
from rewards import WeightedReward
from rewards.registry import did_you_mean
from rewards.weighted_sum import reward_names
from unigrpo_env.variants.variant import RewardSpec, Variant

Rewards = dict[str, RewardSpec]
"""Rewards by the settings that name them."""

MISSING = (ImportError, OSError, ValueError, RuntimeError)
"""What a reward raises whose surroundings are wrong; anything else is a fault of its code."""


def rollout_rewards(variant: Variant) -> Rewards:
    """The rewards that episodes are paid.

    Args:
        variant: the scenario.
    """
    found: Rewards = {"env.reward": variant.reward}
    if variant.thought_reward is not None:
        found["env.thought_reward"] = variant.thought_reward
    if variant.round_reward is not None:
        found["env.round_reward"] = variant.round_reward
    return found


def evaluation_rewards(config: Config, variant: Variant) -> Rewards:
    """The rewards that are paid in an evaluation.

    Args:
        config: all settings.
        variant: of training.
    """
    found = rollout_rewards(variant)
    if config.evaluation.reward:
        del found["env.reward"]
        found["evaluation.reward"] = config.evaluation.reward
    return found


def training_rewards(config: Config, variant: Variant) -> Rewards:
    """The rewards that training needs.

    Args:
        config: all settings.
        variant: of training.
    """
    found = rollout_rewards(variant)
    algorithm = config.algorithm
    is_refl = algorithm.method == "rl" and algorithm.image_objective == "refl"
    if is_refl and algorithm.refl_reward:
        found["algorithm.refl_reward"] = algorithm.refl_reward
    return found


def check_reward_options(config: Config, variant: Variant) -> None:
    """Refuse options of a reward that nothing in the run uses.

    Args:
        config: all settings.
        variant: of training.

    Raises:
        ValueError: `env.reward_options` names such a reward.
    """
    options = config.env.reward_options
    specs = [
        *rollout_rewards(variant).values(),
        config.evaluation.reward,
        config.algorithm.refl_reward,
    ]
    used: list[str] = []
    for spec in specs:
        used += reward_names(spec, options)
    for name in options:
        if name not in used:
            raise ValueError(
                f"env.reward_options.{name} is given, but no reward of this run uses {name!r}; "
                f"{did_you_mean(name, sorted(set(used)))}"
            )


def prepare_rewards(rewards: Rewards, variant: Variant) -> None:
    """Load what rewards need, so that what is missing is known before the first episode.

    The instances are kept by `rewards.make_reward`, and the envs use the same ones.

    Args:
        rewards: see `training_rewards` and `evaluation_rewards`.
        variant: has their options.

    Raises:
        ValueError: a package, file or server is missing; its cause is what the reward raised.
        Exception: whatever else a reward raised, with notes of its name and of the setting.
    """
    for setting, spec in rewards.items():
        reward = WeightedReward(spec, variant.reward_options)
        try:
            reward.prepare()
        except MISSING as error:
            notes = "; ".join(getattr(error, "__notes__", []))
            raise ValueError(f"{setting} cannot score: {error} ({notes})") from error
        except Exception as error:
            error.add_note(f"the reward is named in {setting}")
            raise
