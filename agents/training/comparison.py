"""Comparing the episodes of a group: from rewards to the advantage of every token and step."""

from __future__ import annotations

import torch
from torch import Tensor

from agents.objectives.advantages import (
    expand_advantage,
    group_advantage,
    groups_with_signal,
    mask_steps,
    stages_of,
)
from agents.trajectory import Trajectory
from rewards import Failures, UnscoredError


def add_advantages(
    episodes: Trajectory,
    advantage: str,
    rounds: int,
    max_unscored: float,
    failures: Failures | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Give every token and step its advantage, equation (1), and say which episodes count.

    It writes `returns`, `text_advantage`, `image_advantage`, `step_mask` and `is_scored`.

    Args:
        episodes: groups of episodes, changed in place.
        advantage: `episode`, from all rewards of an episode; or `reward_to_go`, from what was paid
            after each text and each image began.
        rounds: texts of an episode at most.
        max_unscored: share of episodes without a score above which it stops.
        failures: why they have none, where the rewards said so.

    Returns:
        Which groups have signal, `[groups]` bool, and metrics.

    Raises:
        UnscoredError: more than the allowed share had no score. It says how often each kind of
            failure occurred, and the first one is its cause.
    """
    shape = episodes.batch_size
    flat = episodes.flatten(0, 1)
    # What was paid on the way and at the end, [N] each.
    thoughts = flat.thought_reward.sum(-1)
    images = flat.round_reward.sum(-1)
    total = flat.reward + (thoughts + images)
    unscored = float(total.isnan().float().mean())
    _check_unscored(unscored, len(total), max_unscored, failures or Failures())
    returns = total
    if advantage == "reward_to_go":
        returns = stages_of(flat, rounds)
    # One column an episode, or one a stage.
    stages = returns.view(len(total), -1).unbind(1)
    compared = torch.stack([group_advantage(stage, flat.group) for stage in stages], 1)
    text, image = expand_advantage(flat, compared.view_as(returns))
    episodes.returns = returns.unflatten(0, shape)
    # In memory of their own, because groups may be replaced later.
    episodes.text_advantage = text.contiguous().unflatten(0, shape)
    episodes.image_advantage = image.contiguous().unflatten(0, shape)
    episodes.step_mask = mask_steps(flat).contiguous().unflatten(0, shape)
    episodes.is_scored = ~total.isnan().unflatten(0, shape)
    signals = [groups_with_signal(stage, flat.group) for stage in stages]
    signal = torch.stack(signals).any(0)
    return signal, {
        "thought_reward": float(thoughts.nanmean()),
        "round_reward": float(images.nanmean()),
        "reward": float(flat.reward.nanmean()),
        "frac_groups_with_signal": float(signal.float().mean()),
        "unscored": unscored,
        "thought_length": float(flat.chosen_mask.sum(-1).float().mean()),
    }


def _check_unscored(share: float, episodes: int, max_unscored: float, failures: Failures) -> None:
    if share > max_unscored or share == 1:
        reason = str(failures) or "the reward returned NaN or infinity for them"
        raise UnscoredError(
            f"{round(share * episodes)} of {episodes} episodes could not be scored: {reason}. Mend "
            "the reward, or raise trainer.max_unscored if so many failures are to be expected"
        ) from failures.first
