"""The sampler: by hand, and in distribution against a velocity field that is known."""

import math

import pytest
import torch

from agents.models.toy import gaussian_velocity
from agents.policy.sde import (
    KERNELS,
    FlowStep,
    Window,
    cps_step,
    dance_step,
    ode_step,
    sde_step,
)
from unigrpo_env.flow_time import time_grid


def filled(value):
    return torch.full((1, 1, 1), value)


def at(t):
    return torch.tensor([t])


def test_sde_step_by_hand():
    step = sde_step(filled(2.0), filled(3.0), at(0.5), at(0.4), 0.8)
    variance = 0.64 * 0.5 / 0.5
    dt = -0.1
    mean = 2 * (1 + variance / (2 * 0.5) * dt) + 3 * (1 + variance * 0.5 / (2 * 0.5)) * dt
    assert step.mean.item() == pytest.approx(mean, rel=1e-6)
    assert step.std.item() == pytest.approx(math.sqrt(variance * 0.1), rel=1e-6)
    # Equation (3) in its other form: dx = (v + sigma^2 / (2 t) (x + (1 - t) v)) dt.
    drift = (3 + variance / (2 * 0.5) * (2 + 0.5 * 3)) * dt
    assert step.mean.item() == pytest.approx(2 + drift, rel=1e-6)


def test_sigma_at_one_is_that_of_the_next_time():
    step = sde_step(filled(1.0), filled(1.0), at(1.0), at(0.9), 0.8)
    variance = 0.64 * 0.9 / 0.1
    assert step.std.item() == pytest.approx(math.sqrt(variance * 0.1), rel=1e-5)
    # In the drift t is not clamped.
    assert step.mean.item() == pytest.approx(1 - variance / 2 * 0.1 - 0.1, rel=1e-5)


def test_dance_step_by_hand():
    step = dance_step(filled(2.0), filled(3.0), at(0.5), at(0.4), 0.6)
    assert step.std.item() == pytest.approx(0.6 * math.sqrt(0.1), rel=1e-6)
    drift = 3 + 0.36 / (2 * 0.5) * (2 + 0.5 * 3)
    assert step.mean.item() == pytest.approx(2 + drift * -0.1, rel=1e-6)


def test_cps_step_by_hand():
    step = cps_step(filled(2.0), filled(3.0), at(0.5), at(0.4), 0.8)
    clean = 2 - 0.5 * 3
    noise = 2 + 0.5 * 3
    mean = 0.6 * clean + 0.4 * math.cos(0.4 * math.pi) * noise
    assert step.mean.item() == pytest.approx(mean, rel=1e-6)
    assert step.std.item() == pytest.approx(0.4 * math.sin(0.4 * math.pi), rel=1e-6)


def test_cps_leaves_no_noise_at_the_end():
    assert cps_step(filled(2.0), filled(3.0), at(0.5), at(0.0), 0.8).std.item() == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_noise_is_the_ode(kernel):
    x = torch.randn(2, 3, 4)
    velocity = torch.randn(2, 3, 4)
    t = torch.tensor([1.0, 0.3])
    next_t = torch.tensor([0.8, 0.1])
    step = KERNELS[kernel](x, velocity, t, next_t, 0.0)
    torch.testing.assert_close(step.mean, x + velocity * (next_t - t)[:, None, None])
    torch.testing.assert_close(ode_step(x, velocity, t, next_t), step.mean)
    assert not step.std.any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_noise_level_may_differ_by_row(kernel):
    x = torch.randn(2, 3, 4)
    t = torch.full((2,), 0.7)
    step = KERNELS[kernel](x, x, t, t - 0.1, torch.tensor([0.0, 0.6]))
    alone = KERNELS[kernel](x[1:], x[1:], t[1:], t[1:] - 0.1, 0.6)
    assert step.std[0] == 0
    torch.testing.assert_close(step.mean[1:], alone.mean)
    torch.testing.assert_close(step.std[1:], alone.std)


@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_have_mean_and_std(kernel):
    """One meaning of std for all kernels, dt included."""
    count = 20_000
    x = torch.full((count, 1, 1), 0.3)
    velocity = torch.full((count, 1, 1), -0.2)
    t = torch.full((count,), 0.8)
    step = KERNELS[kernel](x, velocity, t, torch.full((count,), 0.7), 0.7)
    drawn = step.sample(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    std = step.std[0].item()
    assert drawn.mean().item() == pytest.approx(step.mean[0].item(), abs=4 * std / math.sqrt(count))
    assert drawn.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_float32(kernel):
    x = torch.randn(1, 2, 2, dtype=torch.bfloat16)
    step = KERNELS[kernel](x, x, at(0.5), at(0.4), 0.8)
    assert step.mean.dtype == torch.float32
    assert step.std.dtype == torch.float32


def test_log_prob_is_that_of_torch():
    mean = torch.randn(3, 5, 4)
    std = torch.tensor([0.1, 0.7, 2.0])
    latent = mean + torch.randn(3, 5, 4) * std[:, None, None]
    found = FlowStep(mean, std).log_prob(latent)
    for row in range(3):
        normal = torch.distributions.Normal(mean[row], std[row])
        torch.testing.assert_close(found[row], normal.log_prob(latent[row]).mean())


def test_log_prob_has_a_gradient():
    x = torch.randn(2, 5, 4)
    velocity = torch.randn(2, 5, 4, requires_grad=True)
    t = torch.full((2,), 0.7)
    step = sde_step(x, velocity, t, t - 0.1, 0.8)
    latent = step.sample(torch.randn(2, 5, 4)).detach()
    step.log_prob(latent).sum().backward()
    assert velocity.grad.abs().sum() > 0


def test_log_prob_of_an_ode_step_is_not_finite():
    step = FlowStep(torch.zeros(1, 2, 2), torch.zeros(1))
    assert not step.log_prob(torch.ones(1, 2, 2)).isfinite().any()


@pytest.mark.parametrize(
    ("kernel", "noise_level"),
    [("flow_sde", 0.0), ("flow_sde", 0.5), ("flow_sde", 0.8), ("dance", 0.5)],
)
def test_sde_keeps_the_marginals(kernel, noise_level):
    """With the exact velocity of a Gaussian, 500 steps of ODE or SDE end in that Gaussian."""
    generator = torch.Generator().manual_seed(0)
    mean = 0.7
    std = 0.4
    count = 20_000
    x = torch.randn(count, 1, 1, generator=generator)
    center = torch.full((count, 1, 1), mean)
    times = time_grid(500)
    for t, next_t in zip(times[:-1], times[1:], strict=True):
        rows = t.expand(count)
        velocity = gaussian_velocity(x, rows, center, std)
        level = noise_level if next_t > 0 else 0.0
        step = KERNELS[kernel](x, velocity, rows, next_t.expand(count), level)
        x = step.sample(torch.randn(x.shape, generator=generator))
    assert x.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(count) + 0.005)
    assert x.std().item() == pytest.approx(std, rel=0.03)


def test_both_ends_of_a_window_are_drawn():
    starts = Window(3, 0, 5).draw(1000, torch.Generator().manual_seed(0))
    assert set(starts.tolist()) == {0, 1, 2}


def test_sliding_window_starts_over():
    window = Window(4, 1, 7, slide_every=25)
    starts = []
    for iteration in (0, 24, 25, 50, 74, 75):
        starts.append(set(window.draw(3, torch.Generator(), iteration).tolist()))
    assert starts == [{1}, {1}, {2}, {3}, {3}, {1}]


@pytest.mark.parametrize("bad", [(0, 0, 5), (3, 0, 2), (2, -1, 4), (2, 0, 4, -1)])
def test_windows_that_cannot_be(bad):
    with pytest.raises(ValueError, match="expected 0 <= low"):
        Window(*bad)


def test_window_ends_before_the_last_step():
    Window(3, 0, 5).check(6)
    with pytest.raises(ValueError, match="before the last"):
        Window(3, 0, 5).check(5)
