"""The objectives of UniGRPO (arXiv 2603.23500) and of the methods it is compared with.

They are pure functions, and equation numbers are the paper's. A loss is what is minimised, one
value an episode; how episodes are weighted is the caller's business.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, clip_range: float, clip_high: float | None = None
) -> Tensor:
    """min(r A, clip(r, 1 - eps, 1 + eps) A) of equations (2) and (6), with r given by its log.

    The clip is on the log, at log(1 - eps) and log(1 + eps): an eps of 1e-6 is only eight float32
    steps around r = 1. For the same reason the value returned is the surrogate less its value A at
    r = 1, which no gradient sees.

    Args:
        log_ratio: any shape.
        advantage: broadcastable to it.
        clip_range: eps in (0, 1).
        clip_high: another eps for the upper side ("clip-higher", arXiv 2503.14476).
    """
    low, high = _log_range(clip_range, clip_high)
    # expm1 of a small log ratio keeps the digits that exp(x) - 1 would lose.
    clipped = log_ratio.clamp(low, high)
    return torch.minimum(log_ratio.expm1() * advantage, clipped.expm1() * advantage)


def _log_range(clip_range: float, clip_high: float | None) -> tuple[float, float]:
    if clip_high is None:
        clip_high = clip_range
    return math.log1p(-clip_range), math.log1p(clip_high)


def clip_fraction(
    log_ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_range: float,
    clip_high: float | None = None,
) -> Tensor:
    """The share of entries in the last dimension whose gradient the clip cuts off.

    That is where the ratio is past the range on the side that the advantage pulls to.

    Args:
        log_ratio: any shape.
        advantage: broadcastable to it.
        mask: bool, like `log_ratio`; the entries that count.
        clip_range: as for `clipped_surrogate`.
        clip_high: likewise.
    """
    low, high = _log_range(clip_range, clip_high)
    # A ratio may go as far as it likes on the side that the advantage pushes away from.
    bound = torch.where(advantage > 0, high, -low)
    cut = (log_ratio * advantage.sign() > bound) & (advantage != 0)
    return (cut & mask).sum(-1) / mask.sum(-1).clamp(min=1)


def text_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_range: float,
    clip_high: float | None = None,
) -> Tensor:
    """Equation (2) without its KL term (see `text_kl`), negated.

    The clipped surrogate is averaged over an episode's own tokens.

    Args:
        log_prob: `[N, K]`, of each token under the policy.
        old_log_prob: `[N, K]`, under the policy that wrote it.
        advantage: `[N]`, or `[N, K]` where tokens of one episode have different ones.
        mask: `[N, K]` bool, True for tokens that the policy chose.
        clip_range: as for `clipped_surrogate`.
        clip_high: likewise.

    Returns:
        `[N]`; 0 for an episode without a token of its own.
    """
    # Forced tokens were never a choice: ratio 1, and no gradient through their -inf.
    log_ratio = torch.where(mask, log_prob - old_log_prob, 0)
    by_token = advantage.view(len(advantage), -1)
    surrogate = clipped_surrogate(log_ratio, by_token, clip_range, clip_high)
    return -(surrogate * mask).sum(1) / mask.sum(1).clamp(min=1)


def text_kl(log_prob: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """The KL term of (2) against the frozen reference.

    It is the unbiased, never negative estimate r - log r - 1 with r = p_ref / p
    (arXiv 2402.03300, equation 4).

    Args:
        log_prob: `[N, K]`, of each token under the policy.
        reference: `[N, K]`, under the reference.
        mask: as for `text_loss`.

    Returns:
        `[N]`.
    """
    log_ratio = torch.where(mask, reference - log_prob, 0)
    # r - log r - 1 with r = exp(log_ratio).
    estimate = log_ratio.expm1() - log_ratio
    return (estimate * mask).sum(1) / mask.sum(1).clamp(min=1)


def plain_log_ratio(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Equation (4) as a log, by the mean over latent dimensions.

        log p(sample) - log p_old(sample) = -(d^2 + 2 std d eps) / (2 std^2)

    with d = old_mean - mean and eps = (sample - old_mean) / std.

    Args:
        sample: `[..., L, C]`, the next latent.
        mean: `[..., L, C]`, its mean under the policy.
        old_mean: `[..., L, C]`, under the old one.
        std: `[...]`, positive.

    Returns:
        `[...]`.
    """
    # d of the equation.
    gap = old_mean - mean
    scale = std[..., None, None]
    squares = gap**2 + 2 * gap * (sample - old_mean)
    return -(squares / (2 * scale**2)).mean((-2, -1))


def ratio_norm(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Equation (5), RatioNorm (from GRPO-Guard), with std = sigma sqrt(|dt|).

        std (log r + ||old_mean - mean||^2 / (2 std^2))

    It is written as what it is equal to, -mean(d eps) with d = old_mean - mean and
    eps = (sample - old_mean) / std: centred on zero, and without the cancellation of the two large
    terms.

    Args:
        sample: as for `plain_log_ratio`, like all the others.
        mean: likewise.
        old_mean: likewise.
        std: likewise.

    Returns:
        `[...]`.
    """
    return -((old_mean - mean) * (sample - old_mean)).mean((-2, -1)) / std


def _mean_over_steps(values: Tensor, taken: Tensor | None) -> Tensor:
    """`[N, W]` to `[N]`: the mean over the steps `taken` (`[N, W]` bool); 0 where none was."""
    if taken is None:
        return values.mean(1)
    return torch.where(taken, values, 0).sum(1) / taken.sum(1).clamp(min=1)


def image_loss(
    log_ratio: Tensor, advantage: Tensor, clip_range: float, taken: Tensor | None = None
) -> Tensor:
    """Equation (6) without its KL term, negated.

    The clipped surrogate is averaged over an episode's stochastic steps.

    Args:
        log_ratio: `[N, W]`, from `ratio_norm` or `plain_log_ratio`.
        advantage: `[N]`, or `[N, W]` where steps of one episode have different ones.
        clip_range: eps.
        taken: `[N, W]` bool, the steps that an episode took, if not all.

    Returns:
        `[N]`.
    """
    by_step = advantage.view(len(advantage), -1)
    return -_mean_over_steps(clipped_surrogate(log_ratio, by_step, clip_range), taken)


def velocity_mse(velocity: Tensor, reference: Tensor, taken: Tensor | None = None) -> Tensor:
    """Equation (8): ||v - v_ref||^2, by the mean over latent dimensions and stochastic steps.

    Args:
        velocity: `[N, W, L, C]`, of the policy.
        reference: `[N, W, L, C]`, of the frozen model that training started from.
        taken: as for `image_loss`.

    Returns:
        `[N]`.
    """
    squares = (velocity - reference) ** 2
    if taken is None:
        return squares.mean((1, 2, 3))
    return _mean_over_steps(squares.mean((2, 3)), taken)


def latent_kl(
    mean: Tensor, reference_mean: Tensor, std: Tensor, taken: Tensor | None = None
) -> Tensor:
    """KL between two Gaussian steps of one std, exact: ||mean - mean_ref||^2 / (2 std^2).

    It is the mean over latent dimensions and stochastic steps. Where the std is high this is blind:
    it is (8) weighted by about 1 / sigma^2.

    Args:
        mean: `[N, W, L, C]`, of the policy.
        reference_mean: `[N, W, L, C]`, of the reference.
        std: `[N, W]`, positive.
        taken: as for `image_loss`.

    Returns:
        `[N]`.
    """
    squares = ((mean - reference_mean) ** 2).mean((2, 3))
    return _mean_over_steps(squares / (2 * std**2), taken)


def flow_matching_loss(velocity: Tensor, noisy: Tensor, latent: Tensor, t: Tensor) -> Tensor:
    """||v - (noise - x_0)||^2 by the mean over latent dimensions.

    At x_t = (1 - t) x_0 + t noise, noise - x_0 = (x_t - x_0) / t. The expectation bounds
    -log p(x_0) (an ELBO), up to weights of t: the surrogate of FPO and AWR.

    Args:
        velocity: `[N, W, L, C]`, v.
        noisy: `[N, W, L, C]`, x_t.
        latent: `[N, L, C]`, x_0.
        t: `[N, W]`, positive.

    Returns:
        `[N, W]`.
    """
    # noise - x_0, from x_t itself, so that the noise need not be kept.
    target = (noisy - latent[:, None]) / t[..., None, None]
    return ((velocity - target) ** 2).mean((2, 3))


def refl_loss(reward: Tensor) -> Tensor:
    """ReFL: -R of the image seen from one step, x_0 = x_t - t v; `[N]` to `[N]`.

    The gradient goes through the reward.
    """
    return -reward
