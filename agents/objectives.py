"""The objectives of UniGRPO (arXiv 2603.23500) as pure functions. Equation numbers are the paper's.

Each returns one value an episode; how episodes are weighted is the caller's business. "Loss" is what is minimised.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(reward: Tensor, group: Tensor) -> Tensor:
    """Equation (1): (R_i - mean) / std inside each group, with the population's std.

    A NaN reward is left out of its group's mean and std and gets advantage 0. A group whose rewards are all equal, or of one, has no signal:
    exactly 0.

    Args:
        reward: `[N]` float32.
        group: `[N]` int64, an id for each group.

    >>> group_advantage(torch.tensor([1.0, 0.0, 0.7, 0.7]), torch.tensor([4, 4, 9, 9]))
    tensor([ 1., -1.,  0.,  0.])
    """
    _, index = group.unique(return_inverse=True)
    groups = int(index.max()) + 1
    scored = ~reward.isnan()
    value = reward.masked_fill(~scored, 0).double()
    zeros = value.new_zeros(groups)
    count = zeros.index_add(0, index, scored.double()).clamp(min=1)
    mean = zeros.index_add(0, index, value) / count
    centred = (value - mean[index]) * scored
    std = (zeros.index_add(0, index, centred**2) / count).sqrt()
    has_signal = groups_with_signal(reward, index)[index] & scored
    return torch.where(has_signal, centred / std[index].clamp(min=1e-12), 0).to(reward.dtype)


def groups_with_signal(reward: Tensor, group: Tensor) -> Tensor:
    """`[groups]` bool, in the order of the groups' ids: do the scored rewards of a group differ? By max and min, not by a rounded std."""
    _, index = group.unique(return_inverse=True)
    empty = reward.new_full((int(index.max()) + 1,), torch.nan)
    low = empty.scatter_reduce(0, index, reward.nan_to_num(torch.inf), "amin", include_self=False)
    high = empty.scatter_reduce(0, index, reward.nan_to_num(-torch.inf), "amax", include_self=False)
    return high > low


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """min(r A, clip(r, 1 - eps, 1 + eps) A) of equations (2) and (6), with r given by its log.

    The clip is on the log, at log(1 - eps) and log(1 + eps): an eps of 1e-6 is only eight float32 steps around r = 1. For the same reason the value returned is
    the surrogate less its value A at r = 1, which no gradient sees.

    Args:
        log_ratio: any shape.
        advantage: broadcastable to it.
        clip_range: eps in (0, 1).
    """
    clipped = log_ratio.clamp(torch.log1p(torch.tensor(-clip_range)).item(), torch.log1p(torch.tensor(clip_range)).item())
    return torch.minimum(log_ratio.expm1() * advantage, clipped.expm1() * advantage)


def clip_fraction(log_ratio: Tensor, advantage: Tensor, mask: Tensor, clip_range: float) -> Tensor:
    """The share of unmasked entries whose gradient the clip cuts off: ratio past the range on the side that the advantage pulls to."""
    bound = torch.where(advantage > 0, torch.log1p(torch.tensor(clip_range)), -torch.log1p(torch.tensor(-clip_range)))
    cut = (log_ratio * advantage.sign() > bound) & (advantage != 0)
    return (cut & mask).sum() / mask.sum().clamp(min=1)


def text_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, clip_range: float) -> Tensor:
    """Equation (2) without its KL term (the paper's weight is 0), negated: the clipped surrogate, averaged over an episode's own tokens.

    Args:
        log_prob, old_log_prob: `[N, K]`, of each token under the policy and under the one that wrote it.
        advantage: `[N]`.
        mask: `[N, K]` bool, True for tokens the policy chose.
        clip_range: eps.

    Returns:
        `[N]`; 0 for an episode without a token of its own.
    """
    log_ratio = torch.where(mask, log_prob - old_log_prob, 0)
    surrogate = clipped_surrogate(log_ratio, advantage[:, None], clip_range)
    return -(surrogate * mask).sum(1) / mask.sum(1).clamp(min=1)


def plain_log_ratio(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Equation (4) as a log, by the mean over latent dimensions: log p(sample) - log p_old(sample) = -(d^2 + 2 std d eps) / (2 std^2).

    Args:
        sample, mean, old_mean: `[..., L, C]`, the next latent and its mean under the policy and under the old one; d = old_mean - mean,
            eps = (sample - old_mean) / std.
        std: `[...]`, positive.

    Returns:
        `[...]`.
    """
    gap, spread = old_mean - mean, std[..., None, None]
    return -((gap**2 + 2 * gap * (sample - old_mean)) / (2 * spread**2)).mean((-2, -1))


def ratio_norm(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Equation (5), RatioNorm (from GRPO-Guard): std (log r + ||old_mean - mean||^2 / (2 std^2)), std = sigma sqrt(|dt|).

    Written as what it is equal to, -mean(d eps) with d = old_mean - mean and eps = (sample - old_mean) / std: centred on zero, and without the
    cancellation of the two large terms. Arguments as for `plain_log_ratio`.
    """
    return -((old_mean - mean) * (sample - old_mean)).mean((-2, -1)) / std


def image_loss(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Equation (6) without its KL term, negated: the clipped surrogate averaged over an episode's stochastic steps.

    Args:
        log_ratio: `[N, W]`, from `ratio_norm` or `plain_log_ratio`.
        advantage: `[N]`.
        clip_range: eps.

    Returns:
        `[N]`.
    """
    return -clipped_surrogate(log_ratio, advantage[:, None], clip_range).mean(1)


def velocity_mse(velocity: Tensor, reference: Tensor) -> Tensor:
    """Equation (8): ||v - v_ref||^2, by the mean over latent dimensions and over an episode's stochastic steps.

    Args:
        velocity, reference: `[N, W, L, C]`, of the policy and of the frozen model that training started from.

    Returns:
        `[N]`.
    """
    return ((velocity - reference) ** 2).mean((1, 2, 3))
