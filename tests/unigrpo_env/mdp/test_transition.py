"""The transition, step by step and in random legal episodes."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unigrpo_env.mdp.rules import Phase, Rules
from unigrpo_env.mdp.state import EncodedPrompt, EpisodeState
from unigrpo_env.mdp.transition import split_by_phase, transition

RULES = Rules(
    vocab_size=8,
    prompt_budget=4,
    text_budget=3,
    times=(1.0, 0.5, 0.0),
    latent_shape=(2, 3),
    open_image_id=2,
    end_id=5,
    forbidden_ids=(0, 1),
)
PROMPT = EncodedPrompt([1, 6, 2, 1], torch.zeros(0, 2, 3), [])

# Token 3 stands for an image, and 1 follows it.
CLOSING = dataclasses.replace(
    RULES, text_after_images=True, image_id=3, continuation_ids=(1,), forbidden_ids=(0, 1, 3)
)


def begin(rows=1, rules=RULES):
    state = EpisodeState.empty(rows, rules)
    state.begin(torch.arange(rows), rules, [PROMPT] * rows, range(rows))
    return state


def step(state, token, latent, active, rules=RULES):
    return transition(state, rules, token, latent, split_by_phase(state, active))


def write(state, *tokens, rules=RULES):
    for token in tokens:
        step(state, torch.tensor([token]), torch.zeros(1, 2, 3), torch.tensor([True]), rules)


def draw(state, rules=RULES):
    for _ in range(rules.image_steps):
        step(state, torch.tensor([0]), torch.ones(1, 2, 3), torch.tensor([True]), rules)


def stream(state):
    return state.tokens[0, : state.num_tokens[0]].tolist()


def test_an_opening_token_opens_the_image():
    state = begin()
    write(state, 7, 2)
    assert state.phase.tolist() == [Phase.IMAGE]
    assert state.tokens[0].tolist() == [1, 6, 2, 1, 7, 2, 0, 0]
    assert state.sampled.tolist() == [2]
    assert state.legal_tokens.nonzero().tolist() == [[0, 0]], "padding alone"
    assert state.latent.abs().sum() > 0


def test_a_spent_budget_forces_the_opening_token():
    state = begin()
    write(state, 7, 6, 7)
    assert state.phase.tolist() == [Phase.IMAGE]
    assert state.tokens[0].tolist() == [1, 6, 2, 1, 7, 6, 7, 2]
    assert state.sampled.tolist() == [3], "a forced token was not chosen"
    assert state.num_tokens.tolist() == [8]


def test_a_last_opening_token_is_not_doubled():
    state = begin()
    write(state, 7, 6, 2)
    assert state.num_tokens.tolist() == [7]


def test_the_end_token_ends_without_an_image():
    state = begin()
    write(state, 5)
    assert state.phase.tolist() == [Phase.DONE]
    assert state.images_drawn.tolist() == [0]


def test_an_end_that_is_not_legal_does_nothing():
    rules = dataclasses.replace(RULES, end_before_image=False)
    state = begin(rules=rules)
    write(state, 5, rules=rules)
    assert state.phase.tolist() == [Phase.TEXT]
    assert stream(state) == [1, 6, 2, 1, 5]
    write(state, 7, 5, rules=rules)
    assert state.phase.tolist() == [Phase.IMAGE]


def test_the_latent_becomes_the_action():
    state = begin()
    write(state, 2)
    action = torch.arange(6.0).view(1, 2, 3)
    step(state, torch.tensor([0]), action, torch.tensor([True]))
    assert torch.equal(state.latent, action)
    assert state.step.tolist() == [1]
    step(state, torch.tensor([0]), action + 1, torch.tensor([True]))
    assert state.phase.tolist() == [Phase.DONE]
    assert torch.equal(state.latent, action + 1)


def test_noise_depends_on_the_seed_alone():
    alone = begin(1)
    crowd = begin(3)
    write(alone, 2)
    step(crowd, torch.tensor([2, 2, 2]), torch.zeros(3, 2, 3), torch.tensor([True] * 3))
    assert torch.equal(alone.latent[0], crowd.latent[0])
    assert not torch.equal(crowd.latent[0], crowd.latent[1])


def test_without_text_the_image_comes_first():
    rules = dataclasses.replace(RULES, text_budget=0)
    assert begin(rules=rules).phase.tolist() == [Phase.IMAGE]


@pytest.mark.parametrize(
    ("end_id", "tokens", "text"),
    [(None, (7, 2), [7, 2]), (5, (7, 5), [7, 5]), (None, (7, 6, 7), [7, 6, 7])],
)
def test_text_alone_ends(end_id, tokens, text):
    rules = dataclasses.replace(RULES, image_budget=0, end_id=end_id)
    state = begin(rules=rules)
    write(state, *tokens, rules=rules)
    assert state.phase.tolist() == [Phase.DONE]
    assert stream(state) == [1, 6, 2, 1, *text], "nothing is forced where no image opens"
    assert state.images_drawn.tolist() == [0]
    assert not state.latent.any()


@pytest.mark.parametrize(
    ("end_id", "tokens"), [(None, (7, 2)), (None, (7, 6, 7)), (5, (7, 5)), (5, (2, 6, 7))]
)
def test_a_last_text_follows_the_image(end_id, tokens):
    rules = dataclasses.replace(CLOSING, end_id=end_id)
    state = begin(rules=rules)
    write(state, 2, rules=rules)
    draw(state, rules)
    assert state.phase.tolist() == [Phase.TEXT]
    assert stream(state) == [1, 6, 2, 1, 2, 3, 1]
    assert state.image_positions.tolist() == [[5]]
    write(state, *tokens[:-1], rules=rules)
    assert state.phase.tolist() == [Phase.TEXT], "an opening token does nothing beside an end_id"
    write(state, tokens[-1], rules=rules)
    assert state.phase.tolist() == [Phase.DONE]
    assert stream(state) == [1, 6, 2, 1, 2, 3, 1, *tokens]


def test_ended_rows_rise():
    rules = dataclasses.replace(RULES, image_budget=0)
    state = begin(3, rules)
    active = torch.ones(3, dtype=torch.bool)
    latent = torch.zeros(3, 2, 3)
    for tokens in ([7, 7, 7], [7, 7, 7]):
        assert len(step(state, torch.tensor(tokens), latent, active, rules)) == 0
    # Row 0 has spent its budget, row 1 ends by its token.
    assert step(state, torch.tensor([7, 5, 7]), latent, active, rules).tolist() == [0, 1, 2]


@pytest.mark.parametrize("active", [torch.tensor([True]), torch.tensor([1, 0])])
def test_a_mask_is_bool_and_of_all_rows(active):
    with pytest.raises(ValueError, match=r"expected active of shape \[2\] and dtype bool"):
        split_by_phase(begin(2), active)


@pytest.mark.parametrize(
    ("rows", "shown"), [(3, r"\[0, 1, 2\] have"), (11, r"\[0, 1, 2, 3, 4, 5, 6, 7\] and 3 more")]
)
def test_rows_that_have_ended_are_named(rows, shown):
    state = EpisodeState.empty(rows, RULES)
    with pytest.raises(ValueError, match=f"episodes {shown}"):
        split_by_phase(state, torch.ones(rows, dtype=torch.bool))


def test_a_saved_state_is_restored_in_place():
    state = begin(2)
    view = state.tokens
    saved = state.copy()
    step(state, torch.tensor([2, 7]), torch.zeros(2, 2, 3), torch.tensor([True, True]))
    state.restore(saved)
    assert state.tokens is view
    for entry in dataclasses.fields(EpisodeState):
        assert torch.equal(getattr(state, entry.name), getattr(begin(2), entry.name)), entry.name


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_rows_do_not_touch_each_other(data):
    """Three ragged rows under random masks go on as each does alone."""
    crowd = begin(3)
    alone = [begin(3) for _ in range(3)]
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
            in_crowd = getattr(crowd, entry.name)[row]
            assert torch.equal(in_crowd, getattr(alone[row], entry.name)[row]), entry.name
    assert (crowd.sampled <= RULES.text_budget).all()
    assert (crowd.images_drawn <= RULES.image_budget).all()
