"""From rewards to the advantage of every token and every stochastic step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents.objectives.advantages import (
    expand_advantage,
    group_advantage,
    groups_with_signal,
    mask_steps,
    reward_to_go,
    stages_of,
)

NAN = math.nan
SAMPLES = st.lists(
    st.tuples(st.floats(-5, 5, width=32), st.integers(0, 3)), min_size=1, max_size=30
)


def test_advantage_by_hand():
    reward = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    group = torch.tensor([7, 7, 7, 3, 3])
    std = math.sqrt(2 / 3)
    expected = torch.tensor([-1 / std, 0, 1 / std, -1, 1])
    torch.testing.assert_close(group_advantage(reward, group), expected)


def test_equal_rewards_have_no_signal():
    equal = torch.full((24,), 0.7)
    assert not group_advantage(equal, torch.zeros(24, dtype=torch.long)).any()
    assert not group_advantage(torch.tensor([0.7]), torch.tensor([0])).any()


def test_unscored_sample_is_left_out():
    reward = torch.tensor([1.0, NAN, 3.0, NAN, NAN])
    group = torch.tensor([0, 0, 0, 1, 1])
    expected = torch.tensor([-1.0, 0, 1, 0, 0])
    torch.testing.assert_close(group_advantage(reward, group), expected)
    assert groups_with_signal(reward, group).tolist() == [True, False]


@given(SAMPLES, st.randoms())
def test_order_of_samples_changes_nothing(samples, rng):
    reward = torch.tensor([sample[0] for sample in samples])
    group = torch.tensor([sample[1] for sample in samples])
    order = list(range(len(samples)))
    rng.shuffle(order)
    found = group_advantage(reward[order], group[order])
    torch.testing.assert_close(group_advantage(reward, group)[order], found, atol=1e-5, rtol=1e-4)


def test_reward_to_go_by_hand():
    found = reward_to_go(
        reward=torch.tensor([1.0, 1.0, 1.0]),
        thought_reward=torch.tensor([[10.0, 20.0], [10.0, 0.0], [NAN, 20.0]]),
        round_reward=torch.tensor([[100.0, 200.0], [100.0, 0.0], [100.0, 200.0]]),
        images_drawn=torch.tensor([2, 1, 2]),
        rounds_begun=torch.tensor([2, 2, 2]),
    )
    expected = [[331.0, 321.0, 221.0, 201.0], [111.0, 101.0, 1.0, NAN], [NAN] * 4]
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text_to_image", [5.0, 5.0]),
        ("text_alone", [5.0, NAN]),
        # The last text is a stage that has no image.
        ("last_text", [5.0, 5.0, 5.0, NAN]),
        ("story", [5.0] * 6),
    ],
)
def test_stages_of_each_scenario(small_bagel, short_variant, collect, name, expected):
    variant = short_variant(name, reward=lambda episodes: [5.0] * len(episodes))
    episodes = collect(small_bagel, variant).flatten(0, 1)
    found = stages_of(episodes, variant.rules.rounds)
    rows = torch.tensor(expected).expand(9, -1)
    torch.testing.assert_close(found, rows, equal_nan=True)


@pytest.mark.parametrize("name", ["text_to_image", "reflect", "dialogue", "last_text", "edit"])
def test_parts_get_the_advantage_of_their_stage(small_bagel, short_variant, collect, name):
    variant = short_variant(name)
    rounds = variant.rules.rounds
    episodes = collect(small_bagel, variant).flatten(0, 1)
    stages = torch.arange(9.0)[:, None] * 100 + torch.arange(2 * rounds)
    text, image = expand_advantage(episodes, stages)
    expected = stages[:, 1::2, None].expand(-1, -1, 2)
    assert torch.equal(image, expected[:, : variant.rules.image_budget])
    for index, row in enumerate(episodes):
        number = 0
        places = (row.image_positions - row.prompt_length).tolist()
        for slot, chosen in enumerate(row.chosen_mask.tolist()):
            number += slot in places
            if chosen:
                assert text[index, slot] == stages[index, 2 * number]


def test_one_advantage_serves_all_parts(small_bagel, short_variant, collect):
    variant = short_variant("story")
    episodes = collect(small_bagel, variant).flatten(0, 1)
    one = torch.randn(9)
    text, image = expand_advantage(episodes, one)
    by_stage = expand_advantage(episodes, one[:, None].expand(-1, 6))
    assert torch.equal(text, by_stage[0])
    assert torch.equal(image, by_stage[1])


def test_steps_of_images_that_were_drawn(small_bagel, collect_ragged):
    _, episodes = collect_ragged(small_bagel)
    flat = episodes.flatten(0, 1)
    mask = mask_steps(flat)
    assert mask.shape == (9, 3, 2)
    assert torch.equal(mask.sum((1, 2)), 2 * flat.images_drawn)
    drawn = flat.window_latents[:, :, 0].abs().sum((2, 3)) > 0
    assert torch.equal(mask[:, :, 0], drawn)
