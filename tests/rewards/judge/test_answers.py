"""Verdicts that were written by hand."""

import json
import math
import re

import pytest

from rewards.judge.answers import Rating, yes_share
from rewards.service.exchange import CallError

SCORE = Rating(re.compile(r"score\W*(\d+(?:\.\d+)?)", re.IGNORECASE), 1, 5)


def tokens(**chances):
    """An answer whose first token has these chances; `_` stands for a blank."""
    top = [
        {"token": token.replace("_", " "), "logprob": math.log(chance) if chance else -9999.0}
        for token, chance in chances.items()
    ]
    choice = {"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}
    return json.dumps({"choices": [choice]}).encode()


def text(content):
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def test_the_share_of_yes_is_that_among_yes_and_no():
    verdict = yes_share(tokens(Yes=0.6, No=0.2, The=0.1))
    assert verdict.score == pytest.approx(0.75)
    assert verdict.evidence == pytest.approx(0.8)


def test_all_spellings_are_added_up_and_other_words_are_not():
    verdict = yes_share(
        tokens(Yes=0.3, _yes=0.1, YES=0.1, **{"▁Yes": 0.05, "Ġyes.": 0.05, "no": 0.2})
    )
    assert verdict.score == pytest.approx(0.75)
    assert yes_share(tokens(Yes=0.1, No=0.1, Not=0.4, Yesterday=0.3)).score == pytest.approx(0.5)


def test_one_of_the_two_words_is_enough():
    assert yes_share(tokens(Yes=0.9, no=0)).score == 1
    assert yes_share(tokens(No=0.9)).score == 0


def test_neither_yes_nor_no_is_unparsed_and_not_zero():
    with pytest.raises(CallError, match="'<think>', 'The'") as caught:
        yes_share(tokens(**{"<think>": 0.9, "The": 0.05}))
    assert caught.value.kind == "unparsed"
    assert not caught.value.retry
    assert "enable_thinking" in str(caught.value)


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}])
def test_a_server_without_log_probabilities_is_named_as_such(logprobs):
    answer = json.dumps({"choices": [{"message": {"content": "Yes"}, "logprobs": logprobs}]})
    with pytest.raises(CallError, match="top_logprobs") as caught:
        yes_share(answer.encode())
    assert caught.value.kind == "no log-probabilities"


@pytest.mark.parametrize("value", ["NaN", "1.5", "Infinity", '"high"'])
def test_what_is_no_log_probability_is_malformed(value):
    answer = tokens(Yes=0.5, No=0.5).replace(str(math.log(0.5)).encode(), value.encode())
    with pytest.raises((ValueError, TypeError)):
        yes_share(answer)


@pytest.mark.parametrize(
    ("answer", "number", "score"),
    [
        ("Score: 4", 4, 0.75),
        ("The colours fit.\n**Score:** 3/5", 3, 0.5),
        ("A first score: 5. Yet the hand is wrong. <Score>1</Score>", 1, 0.0),
        ("score = 4.5", 4.5, 0.875),
    ],
)
def test_the_last_number_is_scaled(answer, number, score):
    verdict = SCORE(text(answer))
    assert verdict.evidence == number
    assert verdict.score == pytest.approx(score)


@pytest.mark.parametrize("answer", ["", None, "four", "Score: 7", "Score: 0", "4"])
def test_no_number_or_one_beyond_the_scale_is_unparsed(answer):
    with pytest.raises(CallError) as caught:
        SCORE(text(answer))
    assert caught.value.kind == "unparsed"


def test_a_group_that_matched_nothing_is_unparsed():
    rating = Rating(re.compile(r"score(?: is (\d))?"), 1, 5)
    with pytest.raises(CallError, match="unparsed"):
        rating(text("score"))
