"""The sampler: by hand, and in distribution against a velocity field that is known."""

import math

import pytest
import torch

from agents.flow import KERNELS, Window, cps_step, dance_step, ode_step, sde_step
from agents.models.toy import gaussian_velocity
from unigrpo_env.flow_time import time_grid


def test_step_by_hand():
    x, v = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0)
    step = sde_step(x, v, torch.tensor([0.5]), torch.tensor([0.4]), 0.8)
    sigma2, dt = 0.64 * 0.5 / 0.5, -0.1
    mean = 2 * (1 + sigma2 / (2 * 0.5) * dt) + 3 * (1 + sigma2 * 0.5 / (2 * 0.5)) * dt
    assert step.mean.item() == pytest.approx(mean, rel=1e-6)
    assert step.std.item() == pytest.approx(math.sqrt(sigma2 * 0.1), rel=1e-6)
    drift = (3 + sigma2 / (2 * 0.5) * (2 + 0.5 * 3)) * dt
    assert step.mean.item() == pytest.approx(2 + drift, rel=1e-6), "the other form of equation (3)"


def test_sigma_is_taken_at_the_second_point_when_t_is_one():
    x = torch.ones(1, 1, 1)
    step = sde_step(x, x, torch.tensor([1.0]), torch.tensor([0.9]), 0.8)
    sigma2 = 0.64 * 0.9 / 0.1
    assert step.std.item() == pytest.approx(math.sqrt(sigma2 * 0.1), rel=1e-5)
    assert step.mean.item() == pytest.approx(1 - sigma2 / 2 * 0.1 - 0.1, rel=1e-5), "t itself is not clamped"


def test_the_other_kernels_by_hand():
    x, v, t, next_t = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0), torch.tensor([0.5]), torch.tensor([0.4])
    dance = dance_step(x, v, t, next_t, 0.6)
    assert dance.std.item() == pytest.approx(0.6 * math.sqrt(0.1), rel=1e-6)
    assert dance.mean.item() == pytest.approx(2 + (3 + 0.36 / (2 * 0.5) * (2 + 0.5 * 3)) * -0.1, rel=1e-6)
    cps = cps_step(x, v, t, next_t, 0.8)
    clean, noise = 2 - 0.5 * 3, 2 + 0.5 * 3
    assert cps.mean.item() == pytest.approx(0.6 * clean + 0.4 * math.cos(0.4 * math.pi) * noise, rel=1e-6)
    assert cps.std.item() == pytest.approx(0.4 * math.sin(0.4 * math.pi), rel=1e-6)
    assert cps_step(x, v, t, torch.tensor([0.0]), 0.8).std.item() == 0, "no noise is left at the end"


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_noise_is_the_ode(kernel):
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t, next_t = torch.tensor([1.0, 0.3]), torch.tensor([0.8, 0.1])
    step = KERNELS[kernel](x, v, t, next_t, 0.0)
    torch.testing.assert_close(step.mean, x + v * (next_t - t)[:, None, None])
    torch.testing.assert_close(ode_step(x, v, t, next_t), step.mean)
    assert (step.std == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_std_is_that_of_the_next_latent(kernel):
    """One meaning for all kernels, dt included: what is drawn has the mean and the spread that the step names."""
    x, v, count = torch.full((20_000, 1, 1), 0.3), torch.full((20_000, 1, 1), -0.2), 20_000
    step = KERNELS[kernel](x, v, torch.full((count,), 0.8), torch.full((count,), 0.7), 0.7)
    drawn = step.sample(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    assert drawn.mean().item() == pytest.approx(step.mean[0].item(), abs=4 * step.std[0].item() / math.sqrt(count))
    assert drawn.std().item() == pytest.approx(step.std[0].item(), rel=0.03)


@pytest.mark.parametrize("kernel", KERNELS)
def test_arithmetic_is_float32_whatever_comes_in(kernel):
    x = torch.randn(1, 2, 2, dtype=torch.bfloat16)
    assert KERNELS[kernel](x, x, torch.tensor([0.5]), torch.tensor([0.4]), 0.8).mean.dtype == torch.float32


@pytest.mark.parametrize(("kernel", "noise_level"), [("flow_sde", 0.0), ("flow_sde", 0.5), ("flow_sde", 0.8), ("dance", 0.5)])
def test_the_sde_keeps_the_marginals(kernel, noise_level):
    """With the exact velocity of a Gaussian, 500 steps of ODE or SDE both end in that Gaussian."""
    generator = torch.Generator().manual_seed(0)
    mean, spread, count = 0.7, 0.4, 20_000
    x = torch.randn(count, 1, 1, generator=generator)
    times = time_grid(500)
    for t, next_t in zip(times[:-1], times[1:], strict=True):
        rows = t.expand(count)
        velocity = gaussian_velocity(x, rows, torch.full((count, 1, 1), mean), spread)
        level = noise_level if next_t > 0 else 0.0
        x = KERNELS[kernel](x, velocity, rows, next_t.expand(count), level).sample(torch.randn(x.shape, generator=generator))
    assert x.mean().item() == pytest.approx(mean, abs=4 * spread / math.sqrt(count) + 0.005)
    assert x.std().item() == pytest.approx(spread, rel=0.03)


def test_the_window_is_half_open():
    starts = Window(3, 0, 5).draw(1000, torch.Generator().manual_seed(0))
    assert set(starts.tolist()) == {0, 1, 2}


def test_a_sliding_window_moves_on_and_starts_over():
    window, generator = Window(4, 1, 7, slide_every=25), torch.Generator()
    starts = [set(window.draw(3, generator, iteration).tolist()) for iteration in (0, 24, 25, 50, 74, 75)]
    assert starts == [{1}, {1}, {2}, {3}, {3}, {1}]


@pytest.mark.parametrize("bad", [(0, 0, 5), (3, 0, 2), (2, -1, 4)])
def test_windows_that_cannot_be(bad):
    with pytest.raises(ValueError, match="expected 0 <= low"):
        Window(*bad)


def test_the_last_step_stays_outside():
    Window(3, 0, 5).check(6)
    with pytest.raises(ValueError, match="before the last"):
        Window(3, 0, 5).check(5)
