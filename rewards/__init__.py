"""What an episode is worth: a registry of rewards, and the rewards that come with the library."""

from rewards.base import EpisodeBatch, Failures, Reward, Scores, UnscoredError
from rewards.factory import REWARDS, make_reward, register_reward
from rewards.registry import Registry
from rewards.scorer import LazyReward
from rewards.weighted_sum import WeightedReward

__all__ = [
    "REWARDS",
    "EpisodeBatch",
    "Failures",
    "LazyReward",
    "Registry",
    "Reward",
    "Scores",
    "UnscoredError",
    "WeightedReward",
    "make_reward",
    "register_reward",
]
