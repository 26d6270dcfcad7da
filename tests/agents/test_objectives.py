"""The objectives against numbers worked out by hand, and against finite differences in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents.objectives import (
    clip_fraction,
    clipped_surrogate,
    flow_matching_loss,
    group_advantage,
    groups_with_signal,
    image_loss,
    latent_kl,
    plain_log_ratio,
    ratio_norm,
    refl_loss,
    text_kl,
    text_loss,
    velocity_mse,
)


def test_advantage_by_hand():
    reward = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    group = torch.tensor([7, 7, 7, 3, 3])
    spread = math.sqrt(2 / 3)
    expected = torch.tensor([-1 / spread, 0, 1 / spread, -1, 1])
    torch.testing.assert_close(group_advantage(reward, group), expected)


def test_equal_rewards_have_no_signal():
    assert (group_advantage(torch.full((24,), 0.7), torch.zeros(24, dtype=torch.long)) == 0).all()
    assert (group_advantage(torch.tensor([0.7]), torch.tensor([0])) == 0).all()


def test_an_unscored_sample_is_left_out():
    reward, group = torch.tensor([1.0, math.nan, 3.0, math.nan, math.nan]), torch.tensor([0, 0, 0, 1, 1])
    torch.testing.assert_close(group_advantage(reward, group), torch.tensor([-1.0, 0, 1, 0, 0]))
    assert groups_with_signal(reward, group).tolist() == [True, False]


@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.integers(0, 3)), min_size=1, max_size=30), st.randoms())
def test_group_order_changes_nothing(samples, rng):
    reward, group = torch.tensor([s[0] for s in samples]), torch.tensor([s[1] for s in samples])
    order = list(range(len(samples)))
    rng.shuffle(order)
    torch.testing.assert_close(group_advantage(reward, group)[order], group_advantage(reward[order], group[order]), atol=1e-5, rtol=1e-4)


def test_clipped_surrogate_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0])
    expected = torch.tensor([1.2 * 2, 1.5 * -2, 0.5 * 2, 0.8 * -2, 1.1 * 3]) - advantage
    torch.testing.assert_close(clipped_surrogate(ratio.log(), advantage, 0.2), expected)


def test_the_upper_clip_can_be_another():
    log_ratio, advantage = torch.tensor([1.25, 1.5, 0.5]).log(), torch.tensor([1.0, 1.0, -1.0])
    torch.testing.assert_close(clipped_surrogate(log_ratio, advantage, 0.2, 0.28), torch.tensor([0.25, 0.28, 0.2]))
    assert clip_fraction(log_ratio, advantage, torch.ones(3, dtype=torch.bool), 0.2, 0.28).item() == pytest.approx(2 / 3)


def test_clip_fraction_counts_what_has_no_gradient():
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.01, 0.5]).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0])
    mask = torch.tensor([True, True, True, True, True, False])
    (gradient,) = torch.autograd.grad((clipped_surrogate(log_ratio, advantage, 0.2) * mask).sum(), log_ratio)
    assert gradient.eq(0)[mask].float().mean() == clip_fraction(log_ratio.detach(), advantage, mask, 0.2)


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


def test_text_loss_without_a_token():
    nothing = torch.zeros(1, 3)
    assert text_loss(nothing, nothing, torch.ones(1), torch.zeros(1, 3, dtype=torch.bool), 0.2).tolist() == [0]


def latents(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, old, noise = (torch.randn(3, 2, 5, 4, generator=generator, dtype=dtype) for _ in range(3))
    std = torch.rand(3, 2, generator=generator, dtype=dtype) + 0.1
    return mean, old, old + std[..., None, None] * noise, noise, std


def gaussian(x, mean, std):
    return (-((x - mean) ** 2) / (2 * std**2) - std.log()).mean((-2, -1))


def test_plain_ratio_is_the_ratio_of_densities():
    mean, old, sample, _, std = latents()
    spread = std[..., None, None]
    torch.testing.assert_close(plain_log_ratio(sample, mean, old, std), gaussian(sample, mean, spread) - gaussian(sample, old, spread))


def test_ratio_norm_is_equation_5_and_minus_mean_d_eps():
    mean, old, sample, noise, std = latents()
    spread = std[..., None, None]
    log_r = gaussian(sample, mean, spread) - gaussian(sample, old, spread)
    equation_5 = std * (log_r + ((old - mean) ** 2).mean((-2, -1)) / (2 * std**2))
    torch.testing.assert_close(ratio_norm(sample, mean, old, std), equation_5)
    torch.testing.assert_close(ratio_norm(sample, mean, old, std), -((old - mean) * noise).mean((-2, -1)))


def test_image_loss_by_hand():
    loss = image_loss(torch.tensor([[0.0, 5e-5], [1e-3, -1e-3]]), torch.tensor([2.0, -1.0]), 1e-4)
    first = 2 * (0 + math.expm1(5e-5)) / 2
    second = -(math.expm1(1e-3) + -1e-4) / 2
    torch.testing.assert_close(loss, -torch.tensor([first, second]))


def test_velocity_mse_by_hand():
    velocity = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    assert velocity_mse(velocity, torch.zeros_like(velocity)).tolist() == [(1 + 4 + 9 + 16) / 4]


def test_text_kl_by_hand():
    ours, reference = torch.tensor([[0.5, 0.2, 0.9]]).log(), torch.tensor([[0.25, 0.4, 0.1]]).log()
    mask = torch.tensor([[True, True, False]])
    expected = ((0.5 - math.log(0.5) - 1) + (2 - math.log(2) - 1)) / 2
    assert text_kl(ours, reference, mask).item() == pytest.approx(expected, rel=1e-5)
    assert text_kl(ours, ours, mask).item() == 0


def test_text_kl_is_unbiased():
    """Summed over the vocabulary under the policy, the estimate is the KL itself."""
    policy, reference = (torch.randn(1, 50, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    mask = torch.ones(50, 1, dtype=torch.bool)
    estimate = (policy.exp()[0] * text_kl(policy.T, reference.T, mask)).sum()
    torch.testing.assert_close(estimate, (policy.exp() * (policy - reference)).sum())


def test_latent_kl_by_hand_and_against_torch():
    mean, other, _, _, std = latents()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std[..., None, None]), torch.distributions.Normal(other, std[..., None, None])
    )
    torch.testing.assert_close(latent_kl(mean, other, std), expected.mean((1, 2, 3)))
    one = torch.ones(1, 1, 1, 1)
    assert latent_kl(3 * one, one, torch.tensor([[0.5]])).item() == pytest.approx(4 / (2 * 0.25))


def test_flow_matching_loss_by_hand():
    latent, noise, t = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[[3.0, -1.0]]]]), torch.tensor([[0.25]])
    noisy = 0.75 * latent[:, None] + 0.25 * noise
    assert flow_matching_loss(noise - latent[:, None], noisy, latent, t).item() == pytest.approx(0, abs=1e-6)
    assert flow_matching_loss(torch.zeros_like(noisy), noisy, latent, t).item() == pytest.approx((2**2 + 3**2) / 2)


def test_refl_loss_by_hand():
    assert refl_loss(torch.tensor([0.5, 1.0])).tolist() == [-0.5, -1]


@pytest.mark.parametrize("objective", ["text", "image", "plain", "mse", "latent_kl", "flow_matching", "text_kl"])
def test_gradients_against_finite_differences(objective):
    mean, old, sample, _, std = latents()
    advantage = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    log_prob = torch.tensor([[-1.0, -2.0], [-0.5, -1.5], [-0.7, -0.9]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    functions = {
        "text": lambda lp: text_loss(lp, log_prob - 0.05, advantage, mask, 0.2),
        "image": lambda m: image_loss(ratio_norm(sample, m, old, std), advantage, 0.9),
        "plain": lambda m: image_loss(plain_log_ratio(sample, m, old, std), advantage, 0.9),
        "mse": lambda m: velocity_mse(m, old),
        "latent_kl": lambda m: latent_kl(m, old, std),
        "flow_matching": lambda m: flow_matching_loss(m, sample, mean[:, 0], std),
        "text_kl": lambda lp: text_kl(lp, log_prob - 0.3, mask),
    }
    start = (log_prob if objective.startswith("text") else old + 0.01 * mean).clone().requires_grad_()
    assert torch.autograd.gradcheck(functions[objective], (start,))
