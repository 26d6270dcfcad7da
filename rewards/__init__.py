"""What an episode is worth: a registry of rewards, and the rewards that come with the library."""

from rewards.base import EpisodeBatch, Reward, Scores, UnscoredError
from rewards.registry import Registry
from rewards.weighted_sum import REWARDS, WeightedReward, register_reward

__all__ = [
    "REWARDS",
    "EpisodeBatch",
    "Registry",
    "Reward",
    "Scores",
    "UnscoredError",
    "WeightedReward",
    "register_reward",
]
