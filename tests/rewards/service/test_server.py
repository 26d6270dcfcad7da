"""What a server of rewards answers, asked over a real connection."""

import contextlib
import json
import pickle
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch

import rewards.service.server
from rewards import EpisodeBatch, WeightedReward
from rewards.service.server import make_app, served_rewards
from rewards.service.wire import MEDIA_TYPE, pack_episodes

FOLDER = str(Path(__file__).parent)
if FOLDER not in sys.path:
    sys.path.append(FOLDER)

from reward_server import RewardServer


def body(count=2, side=4):
    images = torch.zeros(count, 3, side, side)
    return pack_episodes(EpisodeBatch(["a"] * count, ["b c"] * count, images, [{}] * count))


def ones(episodes):
    return [1.0] * len(episodes)


def ask(server, content, name="ones", token=None, **options):
    headers = {"content-type": MEDIA_TYPE}
    if token:
        headers["authorization"] = f"Bearer {token}"
    options.setdefault("timeout", 5)
    return send("POST", f"{server.url}/score/{name}", content=content, headers=headers, **options)


def send(method, url, **options):
    # Certificates take 0.2 s to load, and nothing here uses them.
    return httpx2.request(method, url, trust_env=False, verify=False, **options)


def start(reward=ones, **options):
    return RewardServer({reward.__name__: WeightedReward(reward)}, **options)


def test_scores_are_lists():
    with start() as server:
        answer = ask(server, body())
    assert answer.headers["content-type"] == "application/json"
    failures = {"counts": {}, "first": None}
    assert answer.json() == {"reward": [1, 1], "ones": [1, 1], "failures": failures}


def test_health_tells_the_names_and_the_version():
    with RewardServer(served_rewards("shapes + 0.1 * brevity")) as server:
        told = send("GET", f"{server.url}/health").json()
    assert told["rewards"] == ["brevity", "shapes", "sum"]
    assert isinstance(told["version"], str)
    assert told["format"] == 1


@pytest.mark.parametrize("given", [None, "secreT", "secret1", "sécret"])
def test_a_wrong_token_is_refused(given):
    with start(token="secret\n") as server:
        headers = [] if given is None else [(b"Authorization", f"Bearer {given}".encode())]
        for method, path in (("GET", "/health"), ("POST", "/score/ones"), ("POST", "/score/x")):
            answer = send(method, server.url + path, headers=headers)
            assert answer.status_code == 401
            assert answer.text == "expected the token of this server, got another one"
        assert ask(server, body(), token="secret").status_code == 200


def test_a_token_is_compared_in_constant_time(monkeypatch):
    compared = []
    compare = rewards.service.server.hmac.compare_digest
    monkeypatch.setattr(
        rewards.service.server.hmac,
        "compare_digest",
        lambda one, other: compared.append((one, other)) or compare(one, other),
    )
    with start(token="secret") as server:
        ask(server, body(), token="guess")
    assert compared == [(b"guess", b"secret")]


def test_an_unknown_name():
    with start() as server:
        answer = ask(server, body(), name="one")
    assert answer.status_code == 404
    assert answer.text == "no reward 'one' on this server; did you mean 'ones'? Known: ones"


def test_a_pickle_is_refused():
    with start() as server:
        answer = ask(server, pickle.dumps(list(range(200))))
        assert answer.status_code == 400
        assert "bytes that are no safetensors" in answer.text
        assert ask(server, body()).status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_long(declared):
    content = body(side=64)
    with start(body_bytes=len(content) - 1) as server:
        # Parts without a length in the head.
        answer = ask(server, content if declared else iter([content[:9000], content[9000:]]))
        assert answer.status_code == 413
        assert answer.text.startswith(f"expected a body of at most {len(content) - 1} bytes")
        assert ask(server, body()).status_code == 200


def test_a_body_without_end_is_cut_off():
    sent = []

    def endless():
        while True:
            sent.append(1)
            yield bytes(65536)

    with start(body_bytes=100_000) as server:
        # Whoever does not stop to send may miss the answer.
        with contextlib.suppress(httpx2.TransportError):
            assert ask(server, endless()).status_code == 413
        # The rest is what fits into the buffers between the two.
        assert len(sent) < 1000
        assert ask(server, body()).status_code == 200


def test_a_body_that_comes_too_slowly(monkeypatch):
    monkeypatch.setattr(rewards.service.server, "BODY_SECONDS", 0.2)
    with start(queue=1) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as slow:
            slow.sendall(b"POST /score/ones HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        # The only place in the queue is free again.
        assert ask(server, body()).status_code == 200


def test_the_text_of_a_scorer_that_fails():
    def broken(episodes):
        raise RuntimeError("CUDA out of memory")

    with start(broken) as server:
        for _ in range(2):
            answer = ask(server, body(), name="broken")
            assert answer.status_code == 500
            assert answer.text == (
                "RuntimeError: CUDA out of memory; raised by reward 'broken' on 2 episodes"
            )


class Gate:
    """A reward that waits until it is let go on."""

    __name__ = "gate"

    def __init__(self):
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.now = 0
        self.most = 0
        self.calls = 0

    def __call__(self, episodes):
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        self.entered.release()
        assert self.open.wait(5)
        time.sleep(0.01)
        self.now -= 1
        return [1.0] * len(episodes)


def insist(server):
    """Ask until there is a place in the queue."""
    while True:
        answer = ask(server, body(), "gate")
        if answer.status_code != 503:
            return answer
        time.sleep(0.05)


def test_one_call_at_a_time_and_a_short_queue():
    gate = Gate()
    with start(gate, queue=3) as server, ThreadPoolExecutor(3) as pool:
        under_way = [pool.submit(insist, server) for _ in range(3)]
        assert gate.entered.acquire(timeout=5)
        refused = None
        while refused is None:
            # A time-out means that there was a place left for this one.
            with contextlib.suppress(httpx2.TimeoutException):
                refused = ask(server, body(), "gate", timeout=0.2)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.text == "too many requests wait for this server; ask again later"
        gate.open.set()
        assert [answer.result().status_code for answer in under_way] == [200] * 3
        assert gate.most == 1


def test_who_no_longer_waits_is_not_scored():
    gate = Gate()
    with start(gate) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, server, body(), "gate")
        assert gate.entered.acquire(timeout=5)
        with pytest.raises(httpx2.TimeoutException):
            ask(server, body(), "gate", timeout=0.1)
        gate.open.set()
        assert first.result().status_code == 200
        assert ask(server, body(), "gate").status_code == 200
        assert gate.calls == 2


def test_what_is_served():
    found = served_rewards("0.5 * shapes - far(use='brevity')")
    assert list(found) == ["sum", "shapes", "far"]
    with pytest.raises(ValueError, match="got 'far' twice with different options"):
        served_rewards("far(use='shapes') + far(use='brevity')")
    with pytest.raises(ValueError, match="unknown reward 'shape'"):
        served_rewards("shape")
    with pytest.raises(ValueError, match=r"another one, as in far\(use='reward'\)"):
        served_rewards("reward(use='shapes')")


def test_settings_that_make_no_server():
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        make_app({}, token="gehéim")
    assert "geh" not in str(caught.value)
    for wrong in ({"queue": 0}, {"body_bytes": 0}):
        with pytest.raises(ValueError, match="of at least 1, got 0"):
            make_app({}, **wrong)


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, f"{package}.applications", None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}; .* 'unigrpo\[serve\]'"):
        rewards.service.server.serve(make_app({}), "127.0.0.1", 0)


def test_a_name_with_a_slash():
    with RewardServer({"shop/ones": WeightedReward(ones)}) as server:
        answer = ask(server, body(), name="shop/ones")
    assert json.loads(answer.content)["reward"] == [1, 1]
