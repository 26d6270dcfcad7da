"""The stochastic sampler that makes a flow model a policy, in float32 whatever the model's dtype.

Conventions, said here once: t = 1 is noise; a step goes from `t` down to `next_t`, dt = next_t - t < 0; log-probabilities and squared norms of
latents are reduced by the **mean** over latent tokens and values, which sets the scale of clip ranges and penalty weights.
"""

from __future__ import annotations

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
        """mean + std noise, with standard normal `noise` shaped like the latent."""
        return torch.addcmul(self.mean, _column(self.std, self.mean), noise)


def _gaussian_step(x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor, variance: Tensor) -> FlowStep:
    """Equation (3) for any sigma^2 = `variance` `[N]`."""
    x, velocity = x.float(), velocity.float()
    t, dt = t.float(), (next_t - t).float()
    keep = 1 + variance / (2 * t) * dt
    push = (1 + variance * (1 - t) / (2 * t)) * dt
    return FlowStep(torch.addcmul(_column(keep, x) * x, _column(push, x), velocity), (variance * -dt).sqrt())


def sde_step(x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor, noise_level: float | Tensor) -> FlowStep:
    """Flow-SDE, UniGRPO's own, with sigma = a sqrt(t / (1 - t)).

    Equation (3):

        mean = x (1 + sigma^2 / (2 t) dt) + v (1 + sigma^2 (1 - t) / (2 t)) dt,   std = sigma sqrt(-dt).

    sigma diverges at t = 1 and is taken at `next_t` there, the grid's second point; t itself is not clamped in the drift. With a = 0 this is the
    Euler step of the ODE.

    Args:
        x, velocity: `[N, L, C]`.
        t, next_t: `[N]`, next_t < t.
        noise_level: a, a number or `[N]`.
    """
    level = torch.as_tensor(noise_level, dtype=torch.float32, device=x.device)
    clamped = torch.where(t < 1, t, next_t).float()
    return _gaussian_step(x, velocity, t, next_t, level**2 * clamped / (1 - clamped))


def dance_step(x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor, noise_level: float | Tensor) -> FlowStep:
    """DanceGRPO (arXiv 2505.07818): the same SDE with a constant sigma = a, so std = a sqrt(-dt).

    Arguments as for `sde_step`.
    """
    level = torch.as_tensor(noise_level, dtype=torch.float32, device=x.device)
    return _gaussian_step(x, velocity, t, next_t, (level**2).expand(t.shape))


def cps_step(x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor, noise_level: float | Tensor) -> FlowStep:
    """Flow-CPS (arXiv 2509.05952): the noise in a latent stays what the schedule says, part of it fresh.

    With x0 = x - t v and x1 = x + (1 - t) v:

        mean = (1 - t') x0 + t' cos(a pi / 2) x1,   std = t' sin(a pi / 2),   t' = next_t.

    Arguments as for `sde_step`, a in [0, 1].
    """
    x, velocity, t, next_t = x.float(), velocity.float(), t.float(), next_t.float()
    angle = torch.as_tensor(noise_level, dtype=torch.float32, device=x.device) * (torch.pi / 2)
    old_noise = next_t * angle.cos()
    keep, push = 1 - next_t + old_noise, -t * (1 - next_t) + (1 - t) * old_noise
    return FlowStep(torch.addcmul(_column(keep, x) * x, _column(push, x), velocity), next_t * angle.sin())


KERNELS = {"flow_sde": sde_step, "flow_cps": cps_step, "dance": dance_step}
"""Stochastic steps by name. Each gives the mean and the std of the next latent, dt included in both."""


def ode_step(x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor) -> Tensor:
    """One Euler step of the ODE, x + v dt: the mean of `sde_step` at a = 0, and its arguments."""
    return torch.addcmul(x.float(), _column(next_t - t, x), velocity.float())


@dataclass(frozen=True)
class Window:
    """Where a rollout is stochastic: `size` consecutive steps that begin in `[low, high - size]`, both ends of which may be drawn.

    The paper's [0, 5) with three steps begins at 0, 1 or 2. The last step of an image must stay outside: its Gaussian is too sharp.
    All steps but the last are a window of that size. With `slide_every` the window does not jump: it begins at `low`, moves on by one step after so
    many iterations (MixGRPO, arXiv 2507.21802), and starts over behind the end.
    """

    size: int = 3
    low: int = 0
    high: int = 5
    slide_every: int = 0

    def __post_init__(self) -> None:
        if not (self.low >= 0 and 1 <= self.size <= self.high - self.low and self.slide_every >= 0):
            raise ValueError(f"expected 0 <= low, 1 <= size <= high - low and slide_every >= 0, got {self}")

    def check(self, image_steps: int) -> None:
        """Raise ValueError if the window could touch the last of `image_steps` steps."""
        if self.high > image_steps - 1:
            raise ValueError(
                f"expected the window to end before the last of {image_steps} image steps, got {self}; lower `high` or take more steps"
            )

    def draw(self, groups: int, generator: torch.Generator, iteration: int = 0) -> Tensor:
        """A start for each group, `[groups]` int64: one window a group, never one a sample."""
        starts = self.high - self.size - self.low + 1
        if self.slide_every:
            return torch.full((groups,), self.low + iteration // self.slide_every % starts)
        return torch.randint(self.low, self.low + starts, (groups,), generator=generator)
