"""A judge on a server that may fail in every way."""

import base64
import io
import json
import math
import pickle
import re
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.base import EpisodeBatch
from rewards.judge.reward import Judge
from rewards.service.client import CallError

FOLDER = str(Path(__file__).parents[1] / "service")
if FOLDER not in sys.path:
    sys.path.append(FOLDER)

from fake_server import FakeServer

QUICK = {
    "concurrency": 16,
    "timeout": 1.0,
    "budget": 10.0,
    "tries": 2,
    "backoff": 0.01,
    "answer_bytes": 100_000,
    "failures_in_a_row": 99,
}


def reply(path, body):
    """A judge that says what the question tells it to say, such as `p=0.25` or `n=4`."""
    if path.endswith("/models"):
        return json.dumps({"data": [{"id": "seer"}]}).encode()
    text = question_of(body)
    said = re.search(r"p=([\d.]+)", text)
    share = float(said[1]) if said else 0.5
    top = [
        {"token": "Yes", "logprob": math.log(0.8 * share + 1e-12)},
        {"token": "No", "logprob": math.log(0.8 * (1 - share) + 1e-12)},
    ]
    if "mumbles" in text:
        top = [{"token": "The", "logprob": -0.1}]
    number = re.search(r"n=(\d+)", text)
    choice = {
        "message": {"content": f"Score: {number[1]}" if number else "Yes"},
        "logprobs": {"content": [{"token": "Yes", "top_logprobs": top}]},
    }
    return json.dumps({"choices": [choice]}).encode()


def question_of(body):
    return json.loads(body)["messages"][0]["content"][1]["text"]


def judge_of(server, limits=None, **options):
    limits = QUICK | (limits or {})
    return Judge(url=server.url + "/v1", **({"model": "seer"} | options), limits=limits)


def batch(*prompts, metadata=None):
    count = len(prompts)
    return EpisodeBatch(
        list(prompts),
        ["<think>SECRET WORDS</think>"] * count,
        torch.rand(count, 3, 8, 8),
        metadata or [{}] * count,
        thoughts=[["SECRET WORDS"]] * count,
    )


@pytest.fixture(scope="module")
def server():
    with FakeServer(reply) as running:
        yield running


def test_the_score_is_the_share_of_yes(server):
    scores = judge_of(server)(batch("p=0.25", "p=1.0", "p=0.0"))
    assert scores.reward.tolist() == pytest.approx([0.25, 1, 0], abs=1e-6)
    assert scores.components["answered"].tolist() == pytest.approx([0.8] * 3, abs=1e-6)
    assert not scores.failures


def test_scores_are_in_the_order_of_the_episodes():
    prompts = [f"p={number / 40:.3f}" for number in range(40)]
    with FakeServer(reply, delay=lambda number: 0.02 - 0.004 * (number % 5)) as server:
        scores = judge_of(server)(batch(*prompts))
    assert scores.reward.tolist() == pytest.approx([n / 40 for n in range(40)], abs=1e-6)


def test_each_fault_is_nan_for_its_own_episode_with_its_kind(server):
    kinds = {
        "stall": "timeout",
        "drip": "timeout",
        "e500": "HTTP 500",
        "e400": "HTTP 400",
        "redirect": "HTTP 302",
        "garbage": "malformed",
        "form": "malformed",
        "close": "connection",
        "half": "connection",
        "flood": "too long",
    }
    prompts = [f"p=0.5 fault={fault}" for fault in kinds]
    started = time.perf_counter()
    judge = judge_of(server, limits={"timeout": 0.5})
    scores = judge(batch("p=0.25", *prompts, "mumbles", "p=0.75"))
    assert time.perf_counter() - started < 3
    assert scores.reward.isnan().tolist() == [False, *[True] * (len(kinds) + 1), False]
    expected = {}
    for kind in [*kinds.values(), "unparsed"]:
        expected[kind] = expected.get(kind, 0) + 1
    assert scores.failures.counts == expected
    assert isinstance(scores.failures.first, CallError)


def test_an_unreadable_verdict_is_not_asked_for_again():
    with FakeServer(reply) as server:
        scores = judge_of(server)(batch("mumbles"))
        assert scores.reward.isnan().all()
        assert scores.components["answered"].isnan().all()
        assert len(server.asked) == 1


def test_the_mean_of_the_questions_is_paid_and_strictness_logged(server):
    metadata = [
        {"questions": ["p=1.0", "p=0.5001"]},
        {"questions": ["p=1.0", "p=0.2", "p=0.3"]},
        {"questions": ["p=0.9", "mumbles", "fault=e400"]},
        {},
    ]
    scores = judge_of(server, mode="questions")(batch(*"abcd", metadata=metadata))
    expected = torch.tensor([0.75005, 0.5, math.nan, math.nan])
    torch.testing.assert_close(scores.reward, expected, equal_nan=True)
    strict = torch.tensor([1, 0, math.nan, math.nan])
    torch.testing.assert_close(scores.components["strict"], strict, equal_nan=True)
    # An episode counts once, though two of its questions failed.
    assert scores.failures.counts == {"unparsed": 1, "no questions": 1}


def test_a_rating_is_scaled_and_logged(server):
    judge = judge_of(server, mode="rating", scale=[1, 5])
    scores = judge(batch("n=1", "n=4", "n=9", "none"))
    expected = torch.tensor([0, 0.75, math.nan, math.nan])
    torch.testing.assert_close(scores.reward, expected, equal_nan=True)
    assert scores.components["rating"][:2].tolist() == [1, 4]
    assert scores.failures.counts == {"unparsed": 2}
    assert "from 1 (not at all) to 5" in question_of(server.asked[-1][2])


@pytest.mark.parametrize("mode", ["yes_no", "questions", "rating"])
def test_the_judge_never_sees_what_the_model_wrote(mode):
    with FakeServer(reply) as server:
        judge_of(server, mode=mode)(batch("n=3", metadata=[{"questions": ["p=0.5"]}]))
        assert len(server.asked) == 1
        assert b"SECRET" not in server.asked[0][2]


def test_images_that_change_after_submission_do_not_matter(server):
    episodes = batch("p=0.5")
    pixels = (episodes.images[0] * 255).round()
    with FakeServer(reply) as server:
        future = judge_of(server).submit(episodes)
        episodes.images.zero_()
        future.result(5)
        url = json.loads(server.asked[0][2])["messages"][0]["content"][0]["image_url"]["url"]
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    assert sent.tolist() == pixels.permute(1, 2, 0).byte().tolist()


def test_an_image_of_nan_is_not_sent(server):
    episodes = batch("p=0.5", "p=0.5")
    episodes.images[0, 0, 0, 0] = math.nan
    scores = judge_of(server)(episodes)
    assert scores.reward.isnan().tolist() == [True, False]
    assert scores.failures.counts == {"no image": 1}


def test_a_batch_is_scored_while_the_caller_works():
    with FakeServer(reply, delay=lambda number: 0.2) as server:
        future = judge_of(server).submit(batch(*["p=0.5"] * 16))
        assert not future.done()
        assert wait([future], timeout=5).done


def test_a_cancelled_batch_sends_nothing_more(caplog):
    with FakeServer(reply, delay=lambda number: 0.1) as server:
        future = judge_of(server, limits={"concurrency": 2}).submit(batch(*["p=0.5"] * 20))
        time.sleep(0.15)
        assert future.cancel()
        time.sleep(0.05)
        asked = len(server.asked)
        assert 2 <= asked < 20
        time.sleep(0.2)
        assert len(server.asked) == asked
    # The thread of the loop has no error of its own.
    assert not caplog.records


def test_the_only_model_of_the_server_needs_no_name(server):
    judge = judge_of(server, model="")
    assert judge(batch("p=0.5")).reward.tolist() == pytest.approx([0.5])
    assert json.loads(server.asked[-1][2])["model"] == "seer"


def test_preparation_checks_the_model_and_a_verdict():
    with FakeServer(reply) as server:
        judge_of(server).prepare()
        assert [path for path, _, _ in server.asked] == ["/v1/models", "/v1/chat/completions"]
        with pytest.raises(ValueError, match="did you mean 'seer'"):
            judge_of(server, model="seeer").prepare()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("fault=e500 {prompt}", "CUDA out of memory"),
        ("fault=e401 {prompt}", "HTTP 401: wrong token"),
        ("fault=garbage {prompt}", "malformed: cannot read"),
    ],
)
def test_preparation_fails_with_the_text_of_the_server(server, template, message):
    with pytest.raises(CallError, match=message):
        judge_of(server, prompt=template).prepare()


def test_preparation_fails_at_once_where_no_server_is():
    judge = Judge(url="http://127.0.0.1:1/v1")
    started = time.perf_counter()
    with pytest.raises(CallError, match=r"connection: http://127\.0\.0\.1:1/v1/models"):
        judge.prepare()
    assert time.perf_counter() - started < 1


def test_preparation_names_a_server_without_log_probabilities():
    def silent(path, body):
        if path.endswith("/models"):
            return reply(path, body)
        return b'{"choices": [{"message": {"content": "Yes"}, "logprobs": null}]}'

    with FakeServer(silent) as server:
        with pytest.raises(CallError, match="top_logprobs"):
            judge_of(server).prepare()


def test_a_judge_that_says_nothing_about_a_grey_image_is_only_a_warning(server, caplog):
    judge_of(server, prompt="mumbles {prompt}").prepare()
    assert "no verdict on a grey image" in caplog.text


def test_no_token_of_the_environment_is_in_a_pickle_or_a_message(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    with FakeServer(reply) as server:
        judge = judge_of(server, token_variable="JUDGE_TOKEN")
        scores = judge(batch("p=0.5", "fault=e500"))
        assert "Bearer s3cret" in server.asked[0][1]
        assert "s3cret" not in str(scores.failures)
        written = pickle.dumps(judge)
        assert b"s3cret" not in written
        assert pickle.loads(written)(batch("p=0.5")).reward.tolist() == pytest.approx([0.5])
        assert "Bearer s3cret" in server.asked[-1][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "yesno"}, "did you mean 'yes_no'"),
        ({"prompt": "Is it {promt}?"}, r"text with \{prompt\}"),
        ({"mode": "rating", "pattern": r"\d+"}, "a group for the number"),
        ({"mode": "rating", "pattern": "("}, "a regular expression"),
        ({"mode": "rating", "scale": [5, 1]}, r"such as \[1, 5\]"),
        ({"limits": {"timout": 1}}, "did you mean 'timeout'"),
        ({"url": "localhost"}, "expected a url such as"),
    ],
)
def test_a_wrong_option_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        Judge(**({"url": "http://127.0.0.1:1/v1"} | options))
