"""A client that loses no more than what a server fails to answer."""

import asyncio
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import pytest

from rewards.service.background import then
from rewards.service.client import CallError, HttpClient, Limits, Request

FOLDER = str(Path(__file__).parent)
if FOLDER not in sys.path:
    sys.path.append(FOLDER)

from fake_server import FakeServer

QUICK = Limits(
    concurrency=8,
    timeout=1.0,
    budget=10.0,
    tries=2,
    answer_bytes=50_000,
    backoff=0.01,
    failures_in_a_row=99,
    probe_pause=0.05,
)


IDS = itertools.count()


def echo(path, body):
    """The number that was sent, in the form that `read` expects."""
    return json.dumps({"number": json.loads(body)["number"] if body else -1}).encode()


def read(answer):
    return json.loads(answer)["number"]


def request(number, fault=""):
    # The server counts how often a body has come, so each needs to be another.
    how = f"fault={fault} id={next(IDS)}" if fault else ""
    body = json.dumps({"number": number, "how": how})
    return Request("/score", read, body.encode())


def limits(**changes):
    return Limits(**(vars(QUICK) | changes))


def client_of(server, **changes):
    return HttpClient(url=server.url, limits=limits(**changes))


def kinds(answers):
    return [answer.kind if isinstance(answer, CallError) else answer for answer in answers]


def batch(client, *faults, budget=None):
    """What becomes of one request for each fault; an empty fault is none."""
    requests = [request(number, fault) for number, fault in enumerate(faults)]
    return client.submit_batch(requests, budget).result(20)


@pytest.fixture(scope="module")
def server():
    with FakeServer(echo) as running:
        yield running


def test_answers_are_in_the_order_of_the_requests_and_few_are_under_way():
    # Later requests are answered sooner.
    with FakeServer(echo, delay=lambda number: 0.03 - 0.007 * (number % 5)) as server:
        answers = batch(client_of(server), *[""] * 40)
        assert answers == list(range(40))
        assert 4 <= server.most <= 8


@pytest.mark.parametrize(
    "fault",
    ["stall", "e500", "e408", "e425", "e429", "garbage", "form", "nested", "close", "half", "drip"],
)
def test_a_fault_that_passes_costs_no_answer(server, fault):
    assert batch(client_of(server, timeout=0.4), f"{fault}:1", "") == [0, 1]


def test_faults_that_stay_fail_alone_and_within_their_deadline(server):
    expected = {
        "stall": "timeout",
        "drip": "timeout",
        "e500": "HTTP 500",
        "e429": "HTTP 429",
        "e400": "HTTP 400",
        "e401": "HTTP 401",
        "redirect": "HTTP 302",
        "garbage": "malformed",
        "form": "malformed",
        "nested": "malformed",
        "bomb": "malformed",
        "close": "connection",
        "half": "connection",
        "flood": "too long",
    }
    started = time.perf_counter()
    answers = batch(client_of(server, concurrency=20, timeout=0.5), *expected, "")
    assert time.perf_counter() - started < 3
    assert kinds(answers) == [*expected.values(), len(expected)]


@pytest.mark.parametrize(("fault", "tries"), [("e400", 1), ("redirect", 1), ("e500", 2)])
def test_only_what_may_pass_is_tried_again(fault, tries):
    with FakeServer(echo) as server:
        batch(client_of(server), fault)
        assert len(server.asked) == tries


def test_a_flood_is_cut_off_early():
    with FakeServer(echo) as server:
        (answer,) = batch(client_of(server), "flood")
        assert answer.kind == "too long"
        assert "50000 bytes" in str(answer)
        # What is under way in the buffers of the system comes on top.
        assert server.flooded < 20 << 20


def test_a_compressed_answer_is_neither_asked_for_nor_unpacked():
    with FakeServer(echo) as server:
        (answer,) = batch(client_of(server), "bomb")
        assert answer.kind == "malformed"
        assert "accept-encoding: identity" in server.asked[0][1].lower()


def test_a_redirect_is_not_followed_and_the_message_names_it(server):
    (answer,) = batch(client_of(server), "redirect")
    assert "http://127.0.0.1:1/elsewhere" in str(answer)


def test_an_error_has_the_text_of_the_server(server):
    (answer,) = batch(client_of(server), "e500")
    assert "CUDA out of memory" in str(answer)
    assert str(pickle.loads(pickle.dumps(answer))) == str(answer)


def test_the_server_says_when_to_come_back(server):
    started = time.perf_counter()
    # One try is allowed, and one that was put off is not counted.
    assert batch(client_of(server, tries=1), "later:1") == [0]
    assert 1.0 <= time.perf_counter() - started < 3


def test_what_is_put_off_beyond_the_budget_fails_in_time(server):
    started = time.perf_counter()
    (answer,) = batch(client_of(server), "later", budget=0.2)
    assert time.perf_counter() - started < 0.9
    assert answer.kind == "out of time"
    assert "busy" in str(answer)


def test_the_budget_holds_for_the_whole_batch(server):
    started = time.perf_counter()
    client = client_of(server, timeout=5.0, concurrency=4, budget=0.3)
    answers = batch(client, *["stall"] * 40)
    assert time.perf_counter() - started < 2.5
    assert kinds(answers) == ["out of time"] * 40


def test_few_requests_reach_a_server_that_always_fails():
    with FakeServer(echo) as server:
        client = client_of(server, tries=3, failures_in_a_row=8, probe_pause=0.1, budget=0.5)
        answers = batch(client, *["e500"] * 64)
        # Without a breaker it would be 3 x 64. 8 open it, then a probe each 0.1 s.
        assert 8 <= len(server.asked) <= 8 + 8 + 5
        assert all("CUDA out of memory" in str(answer) for answer in answers)


def test_no_sample_of_a_server_that_starts_late_is_lost():
    with FakeServer(echo) as early:
        port = int(early.url.rpartition(":")[2])
    client = HttpClient(
        url=early.url, limits=limits(tries=1, failures_in_a_row=4, probe_pause=0.05)
    )
    future = client.submit_batch([request(number) for number in range(40)])
    time.sleep(0.4)
    with FakeServer(echo, port=port):
        assert future.result(10) == list(range(40))


def test_a_server_that_is_killed_and_restarted_loses_no_sample():
    first = FakeServer(echo, delay=lambda number: 0.05)
    client = client_of(first, failures_in_a_row=4, probe_pause=0.05)
    future = client.submit_batch([request(number) for number in range(60)])
    while len(first.asked) < 10:
        time.sleep(0.005)
    first.stop()
    assert not future.done()
    time.sleep(0.2)
    with FakeServer(echo, port=int(first.url.rpartition(":")[2])):
        assert future.result(10) == list(range(60))


def test_a_breaker_that_opens_again_and_again_loses_nothing(server):
    client = client_of(server, tries=3, concurrency=4, failures_in_a_row=4, probe_pause=0.02)
    assert batch(client, *["e500:1"] * 24) == list(range(24))


def test_a_batch_is_answered_while_the_caller_works():
    with FakeServer(echo, delay=lambda number: 0.2) as server:
        future = client_of(server).submit_batch([request(number) for number in range(8)])
        assert not future.done()
        assert wait([future], timeout=5).done
        assert future.result() == list(range(8))


def test_a_body_is_made_once_and_in_another_thread(server):
    threads = []

    def make():
        threads.append(threading.current_thread().name)
        return json.dumps({"number": 3, "how": "fault=e500:1 made"}).encode()

    assert client_of(server).submit_batch([Request("/", read, make)]).result(5) == [3]
    assert len(threads) == 1
    assert threads[0] != "rewards-http"


def test_it_works_inside_a_running_event_loop(server):
    async def inside():
        return batch(client_of(server), "", "")

    assert asyncio.run(inside()) == [0, 1]


def test_it_can_be_pickled_after_use(server):
    client = client_of(server)
    batch(client, "")
    assert batch(pickle.loads(pickle.dumps(client)), "", "") == [0, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_it_survives_a_fork_on_both_sides(server):
    client = client_of(server)
    batch(client, "")

    def child():
        os._exit(0 if batch(client, "", "") == [0, 1] else 3)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(10)
    assert process.exitcode == 0
    assert batch(client, "", "") == [0, 1]


def test_a_proxy_of_the_environment_is_ignored(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert batch(client_of(server), "") == [0]


def test_the_token_of_the_environment_is_sent_and_kept_nowhere(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret\n")
    with FakeServer(echo) as server:
        client = HttpClient(url=server.url, token_variable="JUDGE_TOKEN", limits=QUICK)
        assert batch(client, "") == [0]
        assert "authorization: bearer s3cret\r\n" in server.asked[0][1].lower()
    assert b"s3cret" not in pickle.dumps(client)


def test_a_missing_token_is_named(monkeypatch):
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    client = HttpClient(url="http://127.0.0.1:1", token_variable="JUDGE_TOKEN")
    with pytest.raises(ValueError, match="environment variable JUDGE_TOKEN"):
        client.submit_batch([request(0)])


@pytest.mark.parametrize(
    ("token", "fault", "shown"),
    # Words of these answers, which are the token here.
    [("memory", "e500", "CUDA out of ***"), ("JSON", "garbage", "<html>not ***")],
)
def test_a_token_that_the_server_sends_back_is_not_shown(server, token, fault, shown):
    client = HttpClient(url=server.url, token=token, limits=QUICK)
    (answer,) = batch(client, fault)
    assert shown in str(answer)
    assert token not in str(pickle.loads(pickle.dumps(answer)))


def test_a_token_that_no_header_can_hold_is_refused_without_showing_it():
    client = HttpClient(url="http://127.0.0.1:1", token="s3\ncret")
    with pytest.raises(ValueError, match="printable") as caught:
        client.submit_batch([request(0)])
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/", "http://", "http://h/?a=1"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="expected a url such as"):
        HttpClient(url=url)


def test_a_password_in_the_url_is_refused_without_showing_it():
    with pytest.raises(ValueError, match="token_variable") as caught:
        HttpClient(url="http://me:s3cret@host/v1")
    assert "s3cret" not in str(caught.value)


def test_limits_from_a_config_are_checked():
    assert HttpClient(url="http://h", limits={"timeout": 3}).limits.timeout == 3
    with pytest.raises(ValueError, match="did you mean 'timeout'"):
        Limits.of({"timout": 3})
    with pytest.raises(ValueError, match=r"limits\.tries to be above 0, got 0"):
        Limits(tries=0)


def test_one_question_is_tried_once(server):
    client = client_of(server)
    assert client.ask(Request("/models", read)) == -1
    started = time.perf_counter()
    with pytest.raises(CallError, match="connection"):
        HttpClient(url="http://127.0.0.1:1", limits=QUICK).ask(Request("/models", read))
    with pytest.raises(CallError, match="timeout"):
        client.ask(request(0, "stall"), seconds=0.1)
    assert time.perf_counter() - started < 0.9


def test_an_unforeseen_error_of_the_reader_is_raised(server):
    def broken(answer):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        client_of(server).submit_batch([Request("/", broken)]).result(5)


def test_requests_are_not_logged_one_by_one(server, caplog):
    caplog.set_level(logging.INFO)
    batch(client_of(server), "", "e500:1")
    assert not caplog.records


def test_an_outage_is_logged_when_it_begins_and_ends(server, caplog):
    caplog.set_level(logging.INFO)
    batch(client_of(server, concurrency=1, failures_in_a_row=1, probe_pause=0.01), "e500:1", "")
    first, second = [record.getMessage() for record in caplog.records]
    assert "waiting for a server that does not work: HTTP 500: CUDA" in first
    assert "works again" in second


def test_an_empty_batch_has_no_answers(server):
    assert batch(client_of(server)) == []


def test_a_changed_future_fails_with_what_the_change_raises(server):
    future = client_of(server).submit_batch([request(4)])
    assert then(future, len).result(5) == 1
    with pytest.raises(ZeroDivisionError):
        then(future, lambda answers: 1 / 0).result(5)
