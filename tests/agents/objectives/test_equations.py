"""The objectives against numbers worked out by hand, and against finite differences."""

import math

import pytest
import torch

from agents.objectives.equations import (
    clip_fraction,
    clipped_surrogate,
    flow_matching_loss,
    image_loss,
    latent_kl,
    plain_log_ratio,
    ratio_norm,
    refl_loss,
    text_kl,
    text_loss,
    velocity_mse,
)


def test_clipped_surrogate_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0])
    surrogate = torch.tensor([1.2 * 2, 1.5 * -2, 0.5 * 2, 0.8 * -2, 1.1 * 3])
    found = clipped_surrogate(ratio.log(), advantage, 0.2)
    torch.testing.assert_close(found, surrogate - advantage)


def test_upper_clip_may_differ():
    log_ratio = torch.tensor([1.25, 1.5, 0.5]).log()
    advantage = torch.tensor([1.0, 1.0, -1.0])
    found = clipped_surrogate(log_ratio, advantage, 0.2, 0.28)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.28, 0.2]))
    mask = torch.ones(3, dtype=torch.bool)
    fraction = clip_fraction(log_ratio, advantage, mask, 0.2, 0.28)
    assert fraction.item() == pytest.approx(2 / 3)


def test_clip_fraction_counts_lost_gradients():
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.01, 0.5]).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0])
    mask = torch.tensor([True, True, True, True, True, False])
    surrogate = (clipped_surrogate(log_ratio, advantage, 0.2) * mask).sum()
    (gradient,) = torch.autograd.grad(surrogate, log_ratio)
    lost = gradient.eq(0)[mask].float().mean()
    assert lost == clip_fraction(log_ratio.detach(), advantage, mask, 0.2)


def test_tiny_clip_ranges_survive_float32():
    log_ratio = torch.tensor([2e-6, 5e-7]).requires_grad_()
    clipped_surrogate(log_ratio, torch.ones(2), 1e-6).sum().backward()
    assert log_ratio.grad.tolist() == pytest.approx([0.0, 1.0], abs=1e-5)


def test_text_loss_by_hand():
    old = torch.tensor([[0.5, 0.25, 0.9], [0.5, 0.1, 0.1]]).log()
    new = torch.tensor([[0.55, 0.5, 0.1], [0.4, 0.7, 0.7]]).log()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = text_loss(new, old, torch.tensor([2.0, -1.0]), mask, 0.2)
    first = ((1.1 - 1) * 2 + (1.2 - 1) * 2) / 2
    second = (0.8 - 1) * -1
    torch.testing.assert_close(loss, -torch.tensor([first, second]))


def test_text_loss_with_an_advantage_a_token():
    old = torch.zeros(1, 2)
    new = torch.tensor([[1.1, 1.1]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = text_loss(new, old, torch.tensor([[2.0, -1.0]]), mask, 0.2)
    assert loss.item() == pytest.approx(-(0.1 * 2 - 0.1) / 2, rel=1e-5)


def test_text_loss_without_a_token():
    nothing = torch.zeros(1, 3)
    mask = torch.zeros(1, 3, dtype=torch.bool)
    assert text_loss(nothing, nothing, torch.ones(1), mask, 0.2).tolist() == [0]


def random_latents():
    """Mean, old mean, sample, noise `[3, 2, 5, 4]` and std `[3, 2]`, float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mean = draw(3, 2, 5, 4)
    old = draw(3, 2, 5, 4)
    noise = draw(3, 2, 5, 4)
    std = torch.rand(3, 2, generator=generator, dtype=torch.float64) + 0.1
    return mean, old, old + std[..., None, None] * noise, noise, std


def log_density(x, mean, std):
    return (-((x - mean) ** 2) / (2 * std**2) - std.log()).mean((-2, -1))


def test_plain_ratio_is_that_of_the_densities():
    mean, old, sample, _, std = random_latents()
    scale = std[..., None, None]
    expected = log_density(sample, mean, scale) - log_density(sample, old, scale)
    torch.testing.assert_close(plain_log_ratio(sample, mean, old, std), expected)


def test_ratio_norm_is_equation_5():
    mean, old, sample, noise, std = random_latents()
    scale = std[..., None, None]
    log_ratio = log_density(sample, mean, scale) - log_density(sample, old, scale)
    distance = ((old - mean) ** 2).mean((-2, -1))
    expected = std * (log_ratio + distance / (2 * std**2))
    found = ratio_norm(sample, mean, old, std)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, -((old - mean) * noise).mean((-2, -1)))


def test_image_loss_by_hand():
    log_ratio = torch.tensor([[0.0, 5e-5], [1e-3, -1e-3]])
    loss = image_loss(log_ratio, torch.tensor([2.0, -1.0]), 1e-4)
    first = 2 * (0 + math.expm1(5e-5)) / 2
    second = -(math.expm1(1e-3) + -1e-4) / 2
    torch.testing.assert_close(loss, -torch.tensor([first, second]))


def test_steps_that_were_not_taken():
    taken = torch.tensor([[True, False], [False, False]])
    log_ratio = torch.tensor([[0.1, torch.nan], [torch.nan, torch.nan]])
    loss = image_loss(log_ratio, torch.tensor([2.0, 1.0]), 0.5, taken)
    assert loss.tolist() == pytest.approx([-2 * math.expm1(0.1), 0], rel=1e-5)
    velocity = torch.tensor([[[[2.0]], [[torch.nan]]], [[[torch.nan]], [[torch.nan]]]])
    zeros = torch.zeros_like(velocity)
    assert velocity_mse(velocity, zeros, taken).tolist() == [4, 0]
    assert latent_kl(velocity, zeros, torch.ones(2, 2), taken).tolist() == [2, 0]


def test_velocity_mse_by_hand():
    velocity = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    loss = velocity_mse(velocity, torch.zeros_like(velocity))
    assert loss.tolist() == [(1 + 4 + 9 + 16) / 4]


def test_text_kl_by_hand():
    policy = torch.tensor([[0.5, 0.2, 0.9]]).log()
    reference = torch.tensor([[0.25, 0.4, 0.1]]).log()
    mask = torch.tensor([[True, True, False]])
    expected = ((0.5 - math.log(0.5) - 1) + (2 - math.log(2) - 1)) / 2
    assert text_kl(policy, reference, mask).item() == pytest.approx(expected, rel=1e-5)
    assert text_kl(policy, policy, mask).item() == 0


def test_text_kl_is_unbiased():
    """Summed over the vocabulary under the policy, the estimate is the KL itself."""
    policy = torch.randn(1, 50, dtype=torch.float64).log_softmax(-1)
    reference = torch.randn(1, 50, dtype=torch.float64).log_softmax(-1)
    mask = torch.ones(50, 1, dtype=torch.bool)
    estimate = (policy.exp()[0] * text_kl(policy.T, reference.T, mask)).sum()
    torch.testing.assert_close(estimate, (policy.exp() * (policy - reference)).sum())


def test_latent_kl_by_hand():
    one = torch.ones(1, 1, 1, 1)
    found = latent_kl(3 * one, one, torch.tensor([[0.5]]))
    assert found.item() == pytest.approx(4 / (2 * 0.25))


def test_latent_kl_is_that_of_torch():
    mean, other, _, _, std = random_latents()
    scale = std[..., None, None]
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, scale), torch.distributions.Normal(other, scale)
    )
    torch.testing.assert_close(latent_kl(mean, other, std), expected.mean((1, 2, 3)))


def test_flow_matching_loss_by_hand():
    latent = torch.tensor([[[1.0, 2.0]]])
    noise = torch.tensor([[[[3.0, -1.0]]]])
    t = torch.tensor([[0.25]])
    noisy = 0.75 * latent[:, None] + 0.25 * noise
    exact = flow_matching_loss(noise - latent[:, None], noisy, latent, t)
    assert exact.item() == pytest.approx(0, abs=1e-6)
    nothing = flow_matching_loss(torch.zeros_like(noisy), noisy, latent, t)
    assert nothing.item() == pytest.approx((2**2 + 3**2) / 2)


def test_refl_loss_by_hand():
    assert refl_loss(torch.tensor([0.5, 1.0])).tolist() == [-0.5, -1]


@pytest.mark.parametrize(
    "objective", ["text", "text_kl", "image", "plain", "mse", "latent_kl", "flow_matching"]
)
def test_gradients_against_finite_differences(objective):
    mean, old, sample, _, std = random_latents()
    advantage = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    log_prob = torch.tensor([[-1.0, -2.0], [-0.5, -1.5], [-0.7, -0.9]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    functions = {
        "text": lambda x: text_loss(x, log_prob - 0.05, advantage, mask, 0.2),
        "text_kl": lambda x: text_kl(x, log_prob - 0.3, mask),
        "image": lambda x: image_loss(ratio_norm(sample, x, old, std), advantage, 0.9),
        "plain": lambda x: image_loss(plain_log_ratio(sample, x, old, std), advantage, 0.9),
        "mse": lambda x: velocity_mse(x, old),
        "latent_kl": lambda x: latent_kl(x, old, std),
        "flow_matching": lambda x: flow_matching_loss(x, sample, mean[:, 0], std),
    }
    start = old + 0.01 * mean
    if objective.startswith("text"):
        start = log_prob
    assert torch.autograd.gradcheck(functions[objective], (start.clone().requires_grad_(),))
