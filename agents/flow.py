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


def sde_step(x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor, noise_level: float | Tensor) -> FlowStep:
    """One step of UniGRPO's sampler, equation (3):

        mean = x (1 + sigma^2 / (2 t) dt) + v (1 + sigma^2 (1 - t) / (2 t)) dt,   std = sigma sqrt(-dt),   sigma = a sqrt(t / (1 - t)).

    sigma diverges at t = 1 and is taken at `next_t` there, the grid's second point; t itself is not clamped in the drift. With a = 0 this is the
    Euler step of the ODE.

    Args:
        x, velocity: `[N, L, C]`.
        t, next_t: `[N]`, next_t < t.
        noise_level: a, a number or `[N]`.
    """
    x, velocity = x.float(), velocity.float()
    t, dt = t.float(), (next_t - t).float()
    level = torch.as_tensor(noise_level, dtype=torch.float32, device=x.device)
    clamped = torch.where(t < 1, t, next_t.float())
    variance = level**2 * clamped / (1 - clamped)
    keep = 1 + variance / (2 * t) * dt
    push = (1 + variance * (1 - t) / (2 * t)) * dt
    return FlowStep(torch.addcmul(_column(keep, x) * x, _column(push, x), velocity), (variance * -dt).sqrt())


def ode_step(x: Tensor, velocity: Tensor, t: Tensor, next_t: Tensor) -> Tensor:
    """One Euler step of the ODE, x + v dt: the mean of `sde_step` at a = 0, and its arguments."""
    return torch.addcmul(x.float(), _column(next_t - t, x), velocity.float())


@dataclass(frozen=True)
class Window:
    """Where a rollout is stochastic: `size` consecutive steps that begin in `[low, high - size]`, both ends of which may be drawn.

    The paper's [0, 5) with three steps begins at 0, 1 or 2. The last step of an image must stay outside: its Gaussian is too sharp.
    """

    size: int = 3
    low: int = 0
    high: int = 5

    def __post_init__(self) -> None:
        if not (self.low >= 0 and 1 <= self.size <= self.high - self.low):
            raise ValueError(f"expected 0 <= low and 1 <= size <= high - low, got {self}")

    def check(self, image_steps: int) -> None:
        """Raise ValueError if the window could touch the last of `image_steps` steps."""
        if self.high > image_steps - 1:
            raise ValueError(
                f"expected the window to end before the last of {image_steps} image steps, got {self}; lower `high` or take more steps"
            )

    def draw(self, groups: int, generator: torch.Generator) -> Tensor:
        """A start for each group, `[groups]` int64: one window a group, never one a sample."""
        return torch.randint(self.low, self.high - self.size + 1, (groups,), generator=generator)
