"""The objectives of UniGRPO (arXiv 2603.23500) and of the methods it is compared with, as pure functions. Equation numbers are the paper's.

A loss is what is minimised, one value an episode; how episodes are weighted is the caller's business.
"""

from __future__ import annotations

import math

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


def stage_returns(reward: Tensor, thought_reward: Tensor, round_reward: Tensor, images_drawn: Tensor, rounds_begun: Tensor) -> Tensor:
    """What was still to be earned when each stage began: thought 1, picture 1, thought 2, ... A thought's own reward comes before its picture's steps, so it is none of theirs.

    Args:
        reward: `[N]`, at the end.
        thought_reward, round_reward: `[N, R]`, of each thought and each picture.
        images_drawn: `[N]` int64.
        rounds_begun: `[N]` int64, thoughts begun; one more than pictures where words ended the episode.

    Returns:
        `[N, 2 R]`; NaN for stages that an episode did not have, and wherever any of its rewards is.

    >>> stage_returns(torch.tensor([1.0]), torch.tensor([[0.5, 0.0]]), torch.tensor([[0.1, 0.2]]), torch.tensor([2]), torch.tensor([2]))
    tensor([[1.8000, 1.3000, 1.2000, 1.2000]])
    """
    paid = torch.stack([thought_reward, round_reward], 2).flatten(1)
    onward = reward[:, None] + paid.flip(1).cumsum(1).flip(1)
    stage = torch.arange(paid.shape[1], device=paid.device)
    happened = torch.where(stage % 2 == 0, stage // 2 < rounds_begun[:, None], stage // 2 < images_drawn[:, None])
    return torch.where(happened & ~paid.isnan().any(1, keepdim=True), onward, torch.nan)


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_range: float, clip_high: float | None = None) -> Tensor:
    """min(r A, clip(r, 1 - eps, 1 + eps) A) of equations (2) and (6), with r given by its log.

    The clip is on the log, at log(1 - eps) and log(1 + eps): an eps of 1e-6 is only eight float32 steps around r = 1. For the same reason the value returned is
    the surrogate less its value A at r = 1, which no gradient sees.

    Args:
        log_ratio: any shape.
        advantage: broadcastable to it.
        clip_range: eps in (0, 1).
        clip_high: another eps for the upper side ("clip-higher", arXiv 2503.14476).
    """
    low, high = _log_range(clip_range, clip_high)
    clipped = log_ratio.clamp(low, high)
    return torch.minimum(log_ratio.expm1() * advantage, clipped.expm1() * advantage)


def _log_range(clip_range: float, clip_high: float | None) -> tuple[float, float]:
    return math.log1p(-clip_range), math.log1p(clip_range if clip_high is None else clip_high)


def clip_fraction(log_ratio: Tensor, advantage: Tensor, mask: Tensor, clip_range: float, clip_high: float | None = None) -> Tensor:
    """The share of unmasked entries in the last dimension whose gradient the clip cuts off: ratio past the range on the side that the advantage pulls to."""
    low, high = _log_range(clip_range, clip_high)
    bound = torch.where(advantage > 0, high, -low)
    cut = (log_ratio * advantage.sign() > bound) & (advantage != 0)
    return (cut & mask).sum(-1) / mask.sum(-1).clamp(min=1)


def text_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, clip_range: float, clip_high: float | None = None
) -> Tensor:
    """Equation (2) without its KL term (see `text_kl`), negated: the clipped surrogate, averaged over an episode's own tokens.

    Args:
        log_prob, old_log_prob: `[N, K]`, of each token under the policy and under the one that wrote it.
        advantage: `[N]`, or `[N, K]` where tokens of one episode have different ones.
        mask: `[N, K]` bool, True for tokens the policy chose.
        clip_range, clip_high: as for `clipped_surrogate`.

    Returns:
        `[N]`; 0 for an episode without a token of its own.
    """
    log_ratio = torch.where(mask, log_prob - old_log_prob, 0)
    surrogate = clipped_surrogate(log_ratio, advantage.view(len(advantage), -1), clip_range, clip_high)
    return -(surrogate * mask).sum(1) / mask.sum(1).clamp(min=1)


def text_kl(log_prob: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """The KL term of (2) against the frozen reference, by the unbiased, never negative estimate r - log r - 1 with r = p_ref / p (arXiv 2402.03300, equation 4).

    Arguments and result as for `text_loss`; `reference` `[N, K]` are the reference's log-probabilities.
    """
    log_ratio = torch.where(mask, reference - log_prob, 0)
    return ((log_ratio.expm1() - log_ratio) * mask).sum(1) / mask.sum(1).clamp(min=1)


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


def _mean_over_steps(values: Tensor, taken: Tensor | None) -> Tensor:
    """`[N, W]` to `[N]`: the mean, or that of the steps `taken` (`[N, W]` bool); 0 where none was."""
    if taken is None:
        return values.mean(1)
    return torch.where(taken, values, 0).sum(1) / taken.sum(1).clamp(min=1)


def image_loss(log_ratio: Tensor, advantage: Tensor, clip_range: float, taken: Tensor | None = None) -> Tensor:
    """Equation (6) without its KL term, negated: the clipped surrogate averaged over an episode's stochastic steps.

    Args:
        log_ratio: `[N, W]`, from `ratio_norm` or `plain_log_ratio`.
        advantage: `[N]`, or `[N, W]` where steps of one episode have different ones.
        clip_range: eps.
        taken: `[N, W]` bool, the steps that an episode took, if not all.

    Returns:
        `[N]`.
    """
    return -_mean_over_steps(clipped_surrogate(log_ratio, advantage.view(len(advantage), -1), clip_range), taken)


def velocity_mse(velocity: Tensor, reference: Tensor, taken: Tensor | None = None) -> Tensor:
    """Equation (8): ||v - v_ref||^2, by the mean over latent dimensions and over an episode's stochastic steps.

    Args:
        velocity, reference: `[N, W, L, C]`, of the policy and of the frozen model that training started from.
        taken: as for `image_loss`.

    Returns:
        `[N]`.
    """
    squares = (velocity - reference) ** 2
    return squares.mean((1, 2, 3)) if taken is None else _mean_over_steps(squares.mean((2, 3)), taken)


def latent_kl(mean: Tensor, reference_mean: Tensor, std: Tensor, taken: Tensor | None = None) -> Tensor:
    """KL between two Gaussian steps of one std, exact: ||mean - mean_ref||^2 / (2 std^2), by the mean over latent dimensions and stochastic steps.

    Where the std is high this is blind: it is (8) weighted by about 1 / sigma^2.

    Args:
        mean, reference_mean: `[N, W, L, C]`.
        std: `[N, W]`, positive.
        taken: as for `image_loss`.

    Returns:
        `[N]`.
    """
    return _mean_over_steps(((mean - reference_mean) ** 2).mean((2, 3)) / (2 * std**2), taken)


def flow_matching_loss(velocity: Tensor, noisy: Tensor, latent: Tensor, t: Tensor) -> Tensor:
    """||v - (noise - x_0)||^2 by the mean over latent dimensions, at x_t = (1 - t) x_0 + t noise, hence noise - x_0 = (x_t - x_0) / t.

    Its expectation bounds -log p(x_0) (an ELBO), up to weights of t: the surrogate of FPO and AWR.

    Args:
        velocity, noisy: `[N, W, L, C]`, v and x_t.
        latent: `[N, L, C]`, x_0.
        t: `[N, W]`, positive.

    Returns:
        `[N, W]`.
    """
    target = (noisy - latent[:, None]) / t[..., None, None]
    return ((velocity - target) ** 2).mean((2, 3))


def refl_loss(reward: Tensor) -> Tensor:
    """ReFL: -R of the picture seen from one step, x_0 = x_t - t v, the gradient through the reward. `[N]` to `[N]`."""
    return -reward
