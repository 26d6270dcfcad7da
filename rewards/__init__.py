"""What a good episode is worth: a registry of rewards, and the scorers that come with the library."""

from rewards.registry import REWARDS, EpisodeBatch, Registry, Reward, Scores, UnscoredError, WeightedReward, register_reward

__all__ = ["REWARDS", "EpisodeBatch", "Registry", "Reward", "Scores", "UnscoredError", "WeightedReward", "register_reward"]
