"""What an episode may do, and rules under which none could be played."""

import dataclasses
import math

import pytest
import torch

from unigrpo_env.mdp.rules import Rules

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

STORY = dataclasses.replace(RULES, image_budget=3, image_id=1, continuation_ids=(1,), end_id=None)


def legal(mask):
    return mask.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_budget": 0}, "expected prompt_budget >= 1, got 0"),
        ({"text_budget": -1}, "expected text_budget >= 0, got -1"),
        ({"image_budget": -1}, "expected image_budget >= 0"),
        ({"turn_budget": -1}, "expected turn_budget >= 0"),
        ({"source_images": -1}, "expected source_images >= 0"),
        ({"min_source_images": 1}, "min_source_images <= source_images, got 1 and 0"),
        ({"image_budget": 2}, "an image_id among forbidden_ids"),
        ({"source_images": 1, "image_id": 6}, "an image_id among forbidden_ids"),
        ({"text_after_images": True}, "an image_id among forbidden_ids"),
        ({"image_budget": 2, "image_id": 1}, "expected continuation_ids"),
        ({"forbidden_ids": (2,)}, "open_image_id 2 is among forbidden_ids"),
        ({"forbidden_ids": (5,)}, "end_id 5 is among forbidden_ids"),
        ({"end_id": 2}, "expected an end_id other than open_image_id 2"),
        ({"text_budget": 0, "image_budget": 0}, "text_budget >= 1 where text stands"),
    ],
)
def test_rules_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RULES, **change)


def test_a_last_text_needs_a_text_budget():
    with pytest.raises(ValueError, match="text_budget >= 1 where text stands after the last"):
        dataclasses.replace(STORY, text_after_images=True, text_budget=0)


@pytest.mark.parametrize(
    "times",
    [(), (1.0,), (1.0, 0.5, 0.5), (0.0, 1.0), (1.5, 0.0), (1.0, -0.1), (1.0, math.nan, 0.0)],
)
def test_times_must_fall_from_one_to_zero(times):
    with pytest.raises(ValueError, match=r"flow times \(image_steps >= 1\) that fall"):
        dataclasses.replace(RULES, times=times)


def test_times_are_an_image_s_steps():
    rules = dataclasses.replace(RULES, times=(1.0, 0.6, 0.3, 0.0))
    assert rules.image_steps == 3
    assert torch.equal(rules.time_tensor(), torch.tensor([1.0, 0.6, 0.3, 0.0]))


@pytest.mark.parametrize(
    ("change", "rounds", "stored", "tokens", "steps"),
    [
        ({}, 1, 0, 4 + 4, 3 + 2),
        ({"text_budget": 0}, 1, 0, 4 + 1, 2),
        ({"image_budget": 0}, 1, 0, 4 + 4, 3),
        ({"image_budget": 3}, 3, 2, 4 + 3 * 4 + 2 * 2, 3 * 3 + 3 * 2),
        ({"image_budget": 3, "turn_budget": 5}, 3, 2, 4 + 3 * 4 + 2 * 7, 3 * 3 + 3 * 2),
        ({"text_after_images": True}, 2, 1, 4 + 2 * 4 + 2, 2 * 3 + 2),
        ({"source_images": 2}, 1, 2, 4 + 4, 3 + 2),
    ],
)
def test_sizes_follow_from_budgets(change, rounds, stored, tokens, steps):
    rules = dataclasses.replace(STORY, **({"image_budget": 1} | change))
    assert rules.rounds == rounds
    assert rules.stored_images == stored
    assert rules.max_tokens == tokens
    assert rules.max_steps == steps


def test_forbidden_tokens_are_never_legal():
    assert legal(RULES.legal_tokens()) == [2, 3, 4, 5, 6, 7]


def test_the_end_may_wait_for_the_first_image():
    rules = dataclasses.replace(STORY, end_id=5, end_before_image=False)
    assert legal(rules.legal_tokens(0)) == [2, 3, 4, 6, 7]
    assert legal(rules.legal_tokens(1)) == [2, 3, 4, 5, 6, 7]


def test_a_last_text_cannot_open_an_image():
    rules = dataclasses.replace(STORY, end_id=5, text_after_images=True)
    assert [2 in legal(mask) for mask in rules.legal_by_round()] == [True, True, True, False]
    without_end = dataclasses.replace(rules, end_id=None)
    assert without_end.legal_by_round()[:, 2].all(), "there it ends the episode"


def test_text_alone_may_always_end():
    rules = dataclasses.replace(RULES, image_budget=0, end_before_image=False)
    assert legal(rules.legal_tokens()) == [3, 4, 5, 6, 7]
    same = dataclasses.replace(rules, end_id=2)
    assert legal(same.legal_tokens()) == [2, 3, 4, 5, 6, 7]


def test_padding_alone_is_legal_outside_the_text():
    assert legal(RULES.idle_tokens()) == [0]
    assert legal(dataclasses.replace(RULES, pad_id=7).idle_tokens()) == [7]
