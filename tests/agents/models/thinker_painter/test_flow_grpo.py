"""The stochastic steps of a Stable Diffusion 3 are those of Flow-GRPO, said in float64."""

import math

import pytest
import torch
from tiny import FAMILIES

from agents.models.thinker_painter.painter import Painter
from agents.policy.sde import Window, ode_step, sde_step

STEPS = 10
LEVEL = 0.7
WINDOW = Window(3, 0, 5)


def by_hand(x, velocity, t, next_t, first):
    """Mean, standard deviation and the following step's density, one formula after the other.

    Where t is 1 and sigma has no bound, it is that of the first time after it.
    """
    x, velocity = x.double(), velocity.double()
    sigma = LEVEL * math.sqrt(first / (1 - first) if t == 1 else t / (1 - t))
    dt = next_t - t
    mean = x + (velocity + sigma**2 / (2 * t) * (x + (1 - t) * velocity)) * dt
    std = sigma * math.sqrt(-dt)

    def log_prob(latent):
        distance = (latent.double() - mean) ** 2
        density = -distance / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
        return density.mean((1, 2))

    return mean, std, log_prob


@pytest.mark.parametrize("start", range(3))
@torch.no_grad()
def test_a_window_of_stochastic_steps(start):
    pipeline, call = FAMILIES["sd3"]()
    painter = Painter(pipeline, **call)
    conditions = painter.encode(["two red circles", "a blue square"])
    generator = torch.Generator().manual_seed(start)
    x = torch.randn(2, *painter.latent_shape, generator=generator)
    grid = painter.time_grid(STEPS)
    for step, (time, following) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        t, next_t = torch.full((2,), time), torch.full((2,), following)
        velocity = painter.predict_velocity(conditions, x, t)
        if not start <= step < start + WINDOW.size:
            x = ode_step(x, velocity, t, next_t)
            continue
        found = sde_step(x, velocity, t, next_t, LEVEL)
        mean, std, log_prob = by_hand(x, velocity, time, following, grid[1])
        torch.testing.assert_close(found.mean.double(), mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found.std.double(), torch.full((2,), std).double())
        x = found.sample(torch.randn(x.shape, generator=generator))
        torch.testing.assert_close(found.log_prob(x).double(), log_prob(x), atol=1e-6, rtol=1e-6)
    assert x.isfinite().all()
