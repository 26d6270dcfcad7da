"""Noise by key."""

import pytest
import torch

from unigrpo_env.mdp.noise import keyed_generator, keyed_noise


def test_a_key_gives_the_same_noise_in_any_batch():
    alone = keyed_noise([(3, 1)], (2, 3))
    crowd = keyed_noise([(9, 0), (3, 1), (4, 2)], (2, 3))
    assert torch.equal(alone[0], crowd[1])


def test_noise_has_shape_and_dtype():
    noise = keyed_noise([(0,), (1,)], (36, 48))
    assert noise.shape == (2, 36, 48)
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 0.1
    assert (noise.std() - 1).abs() < 0.1


def test_noise_of_no_keys():
    assert keyed_noise([], (2, 3)).shape == (0, 2, 3)


@pytest.mark.parametrize("other", [(0,), (1, 0), (0, 1), (0, 0, 0), (2**40,), (-1,)])
def test_different_keys_differ(other):
    first = keyed_noise([(0, 0)], (4,))
    assert not torch.equal(first, keyed_noise([other], (4,)))


def test_neighbouring_seeds_are_not_correlated():
    noise = keyed_noise([(seed, 0) for seed in range(200)], (50,))
    product = (noise[1:] * noise[:-1]).mean()
    assert product.abs() < 0.05


@pytest.mark.parametrize(
    ("key", "seed"), [((0,), 2065550767), ((7, 1), 3887872905), ((2**40 + 3, 2), 755214542)]
)
def test_the_generator_of_a_key_is_fixed(key, seed):
    # Saved runs depend on these numbers.
    assert keyed_generator(*key).initial_seed() == seed
