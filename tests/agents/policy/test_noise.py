"""All that an actor draws depends on an episode's seed, not on its batch."""

import torch

from agents.policy.noise import EpisodeNoise

CPU = torch.device("cpu")


def step_noise(seeds, images_before, index, window=3):
    noise = EpisodeNoise(seeds, 4, CPU)
    x = torch.zeros(len(seeds), 2, 5)
    return noise.step_noise(images_before, torch.tensor(index), window, x)


def test_uniform_numbers_are_uniform():
    noise = EpisodeNoise(range(200), 50, CPU)
    columns = [noise.token_uniform(torch.full((200, 1), place)) for place in range(50)]
    drawn = torch.cat(columns).flatten()
    assert drawn.dtype == torch.float64
    assert drawn.min() > 0
    assert drawn.max() <= 1
    # The largest gap to the distribution function; 2 / sqrt(n) is far beyond chance.
    expected = torch.linspace(0, 1, len(drawn), dtype=torch.float64)
    assert (drawn.sort().values - expected).abs().max() < 2 / len(drawn) ** 0.5


def test_rows_depend_on_their_own_seed():
    position = torch.tensor([[1], [1]])
    together = EpisodeNoise([7, 8], 4, CPU).token_uniform(position)
    alone = EpisodeNoise([8], 4, CPU).token_uniform(position[:1])
    assert torch.equal(together[1:], alone)
    assert together[0] != together[1]
    steps = step_noise([7, 8], [0, 2], [1, 2])
    assert torch.equal(steps[1:], step_noise([8], [2], [2]))


def test_each_image_and_step_has_its_own_noise():
    found = [
        step_noise([7], [number], [index]) for number, index in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    for first in range(4):
        for second in range(first):
            assert not torch.equal(found[first], found[second])


def test_noise_is_drawn_once_an_image(monkeypatch):
    noise = EpisodeNoise([7, 8], 4, CPU)
    draws = []
    drawn = torch.randn(2, 3, 2, 5)

    def count_draws(keys, shape):
        draws.append(keys)
        return drawn

    monkeypatch.setattr("agents.policy.noise.keyed_noise", count_draws)
    x = torch.zeros(2, 2, 5)
    for index in range(3):
        found = noise.step_noise([0, 1], torch.tensor([index, 2 - index]), 3, x)
        assert torch.equal(found[0], drawn[0, index])
        assert torch.equal(found[1], drawn[1, 2 - index])
    noise.step_noise([1, 1], torch.tensor([0, 0]), 3, x)
    assert len(draws) == 2
