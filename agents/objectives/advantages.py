"""From rewards to advantages: equation (1), per episode or per stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from agents.trajectory import Trajectory


def group_advantage(reward: Tensor, group: Tensor) -> Tensor:
    """Equation (1): (R_i - mean) / std inside each group, with the population's std.

    A NaN reward is left out of its group's mean and std and gets advantage 0. A group whose rewards
    are all equal, or of one, has no signal: exactly 0.

    Args:
        reward: `[N]` float32.
        group: `[N]` int64, an id for each group.

    >>> group_advantage(torch.tensor([1.0, 0.0, 0.7, 0.7]), torch.tensor([4, 4, 9, 9]))
    tensor([ 1., -1.,  0.,  0.])
    """
    _, index = group.unique(return_inverse=True)
    groups = int(index.max()) + 1
    scored = ~reward.isnan()
    # In float64: the rounded std of equal rewards is not zero in float32.
    value = reward.masked_fill(~scored, 0).double()
    zeros = value.new_zeros(groups)
    count = zeros.index_add(0, index, scored.double()).clamp(min=1)
    mean = zeros.index_add(0, index, value) / count
    centred = (value - mean[index]) * scored
    std = (zeros.index_add(0, index, centred**2) / count).sqrt()
    has_signal = groups_with_signal(reward, index)[index] & scored
    advantage = centred / std[index].clamp(min=1e-12)
    return torch.where(has_signal, advantage, 0).to(reward.dtype)


def groups_with_signal(reward: Tensor, group: Tensor) -> Tensor:
    """Whether the scored rewards of a group differ, `[groups]` bool, in the order of the ids.

    It compares maximum and minimum; a std would be rounded.

    Args:
        reward: `[N]` float32.
        group: `[N]` int64, an id for each group.
    """
    _, index = group.unique(return_inverse=True)
    empty = reward.new_full((int(index.max()) + 1,), torch.nan)
    # An unscored member can be neither the lowest nor the highest.
    lowest_last = reward.nan_to_num(torch.inf)
    highest_last = reward.nan_to_num(-torch.inf)
    low = empty.scatter_reduce(0, index, lowest_last, "amin", include_self=False)
    high = empty.scatter_reduce(0, index, highest_last, "amax", include_self=False)
    return high > low


def reward_to_go(
    reward: Tensor,
    thought_reward: Tensor,
    round_reward: Tensor,
    images_drawn: Tensor,
    rounds_begun: Tensor,
) -> Tensor:
    """Reward-to-go of each stage: text 1, image 1, text 2, ...

    The reward of a text is paid before its image starts, so it does not count for the image.

    Args:
        reward: `[N]`, at the end.
        thought_reward: `[N, R]`, of each text.
        round_reward: `[N, R]`, of each image.
        images_drawn: `[N]` int64.
        rounds_begun: `[N]` int64, texts begun; one more than images where text ended the episode.

    Returns:
        `[N, 2 R]`; NaN for stages that an episode did not have, and wherever any of its rewards is.

    >>> reward_to_go(
    ...     torch.tensor([1.0]), torch.tensor([[0.5, 0.0]]), torch.tensor([[0.1, 0.2]]),
    ...     torch.tensor([2]), torch.tensor([2]),
    ... )
    tensor([[1.8000, 1.3000, 1.2000, 1.2000]])
    """
    # [N, 2 R]: text 1, image 1, text 2, ...
    paid = torch.stack([thought_reward, round_reward], 2).flatten(1)
    to_go = reward[:, None] + paid.flip(1).cumsum(1).flip(1)
    stage = torch.arange(paid.shape[1], device=paid.device)
    number = stage // 2
    has_text = number < rounds_begun[:, None]
    has_image = number < images_drawn[:, None]
    # Even stages are texts, odd ones images.
    happened = torch.where(stage % 2 == 0, has_text, has_image)
    scored = ~paid.isnan().any(1, keepdim=True)
    return torch.where(happened & scored, to_go, torch.nan)


def stages_of(episodes: Trajectory, rounds: int) -> Tensor:
    """`reward_to_go` of recorded episodes, `[N, 2 rounds]`.

    Args:
        episodes: N trajectories.
        rounds: texts of an episode at most.
    """
    positions = episodes.image_positions - episodes.prompt_length[:, None]
    # Every image that is read opens a further round.
    begun = 1 + (positions >= 0).sum(1)
    missing = rounds - episodes.thought_reward.shape[1]
    # A text after the last image is a stage that nothing is paid for on the way.
    thought_reward = torch.nn.functional.pad(episodes.thought_reward, (0, missing))
    round_reward = torch.nn.functional.pad(episodes.round_reward, (0, missing))
    return reward_to_go(episodes.reward, thought_reward, round_reward, episodes.images_drawn, begun)


def expand_advantage(episodes: Trajectory, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """The advantage of each token, `[N, K]`, and of each stochastic step, `[N, R, W]`.

    Args:
        episodes: N trajectories.
        advantage: `[N]`, one an episode; or `[N, 2 rounds]`, one for each text and image in turn.
    """
    slots = episodes.tokens.shape[1]
    images, window = episodes.window_means.shape[1:3]
    if advantage.ndim == 1:
        # Views: an advantage of the whole episode takes no memory for its tokens.
        text = advantage[:, None].expand(-1, slots)
        return text, advantage[:, None, None].expand(-1, images, window)
    # The round of a token is the number of drawn images that stand before it or at it.
    positions = (episodes.image_positions - episodes.prompt_length[:, None])[:, :, None]
    slot = torch.arange(slots, device=advantage.device)
    number = ((positions >= 0) & (positions <= slot)).sum(1)
    # Even columns belong to texts, odd ones to images.
    text = advantage[:, 0::2].gather(1, number)
    image = advantage[:, 1::2][:, :images, None]
    return text, image.expand(-1, -1, window)


def mask_steps(episodes: Trajectory) -> Tensor:
    """Which of the stochastic steps there were, `[N, R, W]` bool."""
    images, window = episodes.window_means.shape[1:3]
    number = torch.arange(images, device=episodes.images_drawn.device)
    drawn = number < episodes.images_drawn[:, None]
    return drawn[:, :, None].expand(-1, -1, window)
