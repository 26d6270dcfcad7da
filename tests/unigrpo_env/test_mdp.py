"""The transition, step by step and under random legal play."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unigrpo_env.flow_time import time_grid
from unigrpo_env.mdp import EpisodeState, Phase, Rules, transition, whose_turn

RULES = Rules(
    vocab_size=8,
    prompt_budget=4,
    text_budget=3,
    image_steps=2,
    latent_shape=(2, 3),
    open_image_id=2,
    end_id=5,
    forbidden_ids=(0, 1),
    time_shift=1.0,
)


def begin(rows=1, rules=RULES):
    state = EpisodeState.empty(rows, rules)
    state.begin(torch.arange(rows), rules, [[1, 6, 2, 1]] * rows, range(rows))
    return state


def step(state, token, latent, active, rules=RULES):
    transition(state, rules, token, latent, whose_turn(state, active))


def say(state, *tokens, rules=RULES):
    for token in tokens:
        step(state, torch.tensor([token]), torch.zeros(1, 2, 3), torch.tensor([True]), rules)


def test_an_opening_token_opens_the_image():
    state = begin()
    say(state, 7, 2)
    assert state.phase.tolist() == [Phase.IMAGE]
    assert state.tokens[0].tolist() == [1, 6, 2, 1, 7, 2, 0, 0]
    assert state.sampled.tolist() == [2]
    assert not state.legal_tokens.any()
    assert state.latent.abs().sum() > 0


def test_a_spent_budget_forces_the_opening_token():
    state = begin()
    say(state, 7, 6, 7)
    assert state.phase.tolist() == [Phase.IMAGE]
    assert state.tokens[0].tolist() == [1, 6, 2, 1, 7, 6, 7, 2]
    assert state.sampled.tolist() == [3], "a forced token was not chosen"
    assert state.num_tokens.tolist() == [8]


def test_an_opening_token_as_the_last_of_the_budget_is_not_doubled():
    state = begin()
    say(state, 7, 6, 2)
    assert state.num_tokens.tolist() == [7]


def test_the_end_token_ends_without_an_image():
    state = begin()
    say(state, 5)
    assert state.phase.tolist() == [Phase.DONE]
    assert state.images_drawn.tolist() == [0]


def test_the_latent_becomes_the_action():
    state = begin()
    say(state, 2)
    action = torch.arange(6.0).view(1, 2, 3)
    step(state, torch.tensor([0]), action, torch.tensor([True]))
    assert torch.equal(state.latent, action)
    assert state.step.tolist() == [1]
    step(state, torch.tensor([0]), action + 1, torch.tensor([True]))
    assert state.phase.tolist() == [Phase.DONE]
    assert torch.equal(state.latent, action + 1)


def test_noise_depends_on_the_seed_alone():
    alone, crowd = begin(1), begin(3)
    say(alone, 2)
    step(crowd, torch.tensor([2, 2, 2]), torch.zeros(3, 2, 3), torch.tensor([True, True, True]))
    assert torch.equal(alone.latent[0], crowd.latent[0])
    assert not torch.equal(crowd.latent[0], crowd.latent[1])


def test_no_text_budget_begins_with_the_image():
    assert begin(rules=dataclasses.replace(RULES, text_budget=0)).phase.tolist() == [Phase.IMAGE]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_do_not_touch_each_other(data):
    """Random play of three ragged rows, with random active masks, gives what each row gives alone."""
    crowd, alone = begin(3), [begin(3) for _ in range(3)]
    for _ in range(12):
        token = torch.tensor(data.draw(st.lists(st.integers(2, 7), min_size=3, max_size=3)))
        latent = torch.full((3, 2, 3), data.draw(st.floats(-2, 2, width=32)))
        wanted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
        active = wanted & (crowd.phase != Phase.DONE)
        step(crowd, token, latent, active)
        for row in range(3):
            step(alone[row], token, latent, active & (torch.arange(3) == row))
    for row in range(3):
        for entry in dataclasses.fields(EpisodeState):
            assert torch.equal(getattr(crowd, entry.name)[row], getattr(alone[row], entry.name)[row]), entry.name
    assert (crowd.sampled <= RULES.text_budget).all()
    assert (crowd.images_drawn <= RULES.image_budget).all()


@given(st.integers(1, 60), st.floats(0.2, 8))
def test_time_grid_falls_from_one_to_zero(steps, shift):
    grid = time_grid(steps, shift)
    assert len(grid) == steps + 1
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_time_grid_by_hand():
    assert torch.allclose(time_grid(2, 3.0), torch.tensor([1, 3 * 0.5 / 2, 0]))


@pytest.mark.parametrize("change", [{"image_steps": 0}, {"text_budget": -1}, {"image_budget": 2}, {"forbidden_ids": (2,)}])
def test_rules_that_cannot_be(change):
    with pytest.raises(ValueError, match=r"expected|forbidden"):
        dataclasses.replace(RULES, **change)
