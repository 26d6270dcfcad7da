"""The stochastic sampler that makes a flow model a policy, in float32 whatever the model's dtype.

Conventions, said here once: t = 1 is noise. A step goes from `t` down to `next_t`, so
dt = next_t - t < 0. Log-probabilities and squared norms of latents are reduced by the **mean** over
latent tokens and values, which sets the scale of clip ranges and penalty weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.float().reshape(value.shape + (1,) * (like.ndim - value.ndim))


@dataclass(frozen=True)
class FlowStep:
    """The next latent's distribution, N(mean, std^2).

    Attributes:
        mean: shaped like the latent, float32.
        std: shaped like t, float32; 0 where the step is an ODE step.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Mean + std * noise, with standard normal `noise` shaped like the latent."""
        return torch.addcmul(self.mean, _column(self.std, self.mean), noise)

    def log_prob(self, latent: Tensor) -> Tensor:
        """Log-density of the next `latent` `[N, L, C]`, averaged over its values: `[N]` float32.

        It is minus infinity or not a number where the step is not stochastic (std 0).
        """
        std = _column(self.std, self.mean)
        density = torch.distributions.Normal(self.mean, std, validate_args=False)
        return density.log_prob(latent.float()).flatten(1).mean(1)


def _gaussian_step(
    x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor, variance: Tensor
) -> FlowStep:
    """Equation (3) for any sigma^2 = `variance` `[N]`."""
    x = x.float()
    velocity = velocity.float()
    t = t.float()
    dt = (next_t - t).float()
    # The mean is keep * x + push * v, which needs one pass over the latent.
    keep = 1 + variance / (2 * t) * dt
    push = (1 + variance * (1 - t) / (2 * t)) * dt
    mean = torch.addcmul(_column(keep, x) * x, _column(push, x), velocity)
    return FlowStep(mean, (variance * -dt).sqrt())


def sde_step(
    x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor, noise_level: float | Tensor
) -> FlowStep:
    """Flow-SDE, UniGRPO's own kernel, with sigma = a sqrt(t / (1 - t)).

    Equation (3):

        mean = x (1 + sigma^2 / (2 t) dt) + v (1 + sigma^2 (1 - t) / (2 t)) dt
        std = sigma sqrt(-dt)

    sigma diverges at t = 1. It is taken at `next_t` there, the grid's second point; t itself is not
    clamped in the drift. With a = 0 this is the Euler step of the ODE.

    Args:
        x: `[N, L, C]`.
        velocity: `[N, L, C]`.
        t: `[N]`.
        next_t: `[N]`, below t.
        noise_level: a, a number or `[N]`.
    """
    level = torch.as_tensor(noise_level, dtype=torch.float32, device=x.device)
    # The first step begins at t = 1, where sigma is infinite.
    clamped = torch.where(t < 1, t, next_t).float()
    return _gaussian_step(x, velocity, t, next_t, level**2 * clamped / (1 - clamped))


def dance_step(
    x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor, noise_level: float | Tensor
) -> FlowStep:
    """DanceGRPO (arXiv 2505.07818): the same SDE with a constant sigma = a, so std = a sqrt(-dt).

    Args:
        x: as for `sde_step`, like all the others.
        velocity: likewise.
        t: likewise.
        next_t: likewise.
        noise_level: likewise.
    """
    level = torch.as_tensor(noise_level, dtype=torch.float32, device=x.device)
    return _gaussian_step(x, velocity, t, next_t, (level**2).expand(t.shape))


def cps_step(
    x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor, noise_level: float | Tensor
) -> FlowStep:
    """Flow-CPS (arXiv 2509.05952): the noise in a latent stays what the schedule says.

    Part of it is fresh. With x0 = x - t v, x1 = x + (1 - t) v and t' = next_t:

        mean = (1 - t') x0 + t' cos(a pi / 2) x1
        std = t' sin(a pi / 2)

    Args:
        x: as for `sde_step`.
        velocity: likewise.
        t: likewise.
        next_t: likewise.
        noise_level: a in [0, 1], a number or `[N]`.
    """
    x = x.float()
    velocity = velocity.float()
    t = t.float()
    next_t = next_t.float()
    level = torch.as_tensor(noise_level, dtype=torch.float32, device=x.device)
    angle = level * (torch.pi / 2)
    # What is left of the noise that the latent had; the rest of it is drawn anew.
    old_noise = next_t * angle.cos()
    keep = 1 - next_t + old_noise
    push = -t * (1 - next_t) + (1 - t) * old_noise
    mean = torch.addcmul(_column(keep, x) * x, _column(push, x), velocity)
    return FlowStep(mean, next_t * angle.sin())


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float | Tensor], FlowStep]

KERNELS: dict[str, Kernel] = {"flow_sde": sde_step, "flow_cps": cps_step, "dance": dance_step}
"""Stochastic steps by name. Each gives mean and std of the next latent, dt included in both."""


def ode_step(x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor) -> Tensor:
    """One Euler step of the ODE, x + v dt: the mean of `sde_step` at a = 0.

    Args:
        x: as for `sde_step`.
        velocity: likewise.
        t: likewise.
        next_t: likewise.
    """
    return torch.addcmul(x.float(), _column(next_t - t, x), velocity.float())


@dataclass(frozen=True)
class Window:
    """Where a rollout is stochastic: some consecutive steps of each image.

    They begin in `[low, high - size]`, both ends of which may be drawn. The paper's [0, 5) with
    three steps begins at 0, 1 or 2. The last step of an image must stay outside: its Gaussian is
    too sharp. With `slide_every` the window does not jump: it begins at `low`, moves on by one step
    after so many iterations (MixGRPO, arXiv 2507.21802), and starts over behind the end.

    Attributes:
        size: stochastic steps.
        low: first step at which the window may begin.
        high: step before which it ends.
        slide_every: iterations between moves; 0 for random starts.

    Raises:
        ValueError: no such window.
    """

    size: int = 3
    low: int = 0
    high: int = 5
    slide_every: int = 0

    def __post_init__(self) -> None:
        """Refuse a window that does not fit between `low` and `high`."""
        fits = 1 <= self.size <= self.high - self.low
        if self.low < 0 or self.slide_every < 0 or not fits:
            raise ValueError(
                f"expected 0 <= low, 1 <= size <= high - low and slide_every >= 0, got {self}"
            )

    def check(self, image_steps: int) -> None:
        """Raise ValueError if the window could touch the last of `image_steps` steps."""
        if self.high > image_steps - 1:
            raise ValueError(
                f"expected the window to end before the last of {image_steps} image steps, "
                f"got {self}; lower `high` or take more steps"
            )

    def draw(self, groups: int, generator: torch.Generator, iteration: int = 0) -> Tensor:
        """A start for each group, `[groups]` int64: one window a group, never one a sample.

        Args:
            groups: how many.
            generator: of random starts, on the CPU.
            iteration: where a sliding window stands.
        """
        # Both ends of the range may be drawn.
        starts = self.high - self.size - self.low + 1
        if self.slide_every:
            return torch.full((groups,), self.low + iteration // self.slide_every % starts)
        return torch.randint(self.low, self.low + starts, (groups,), generator=generator)
