"""A reward on a server is that of this process, and loses nothing that the server can score."""

import logging
import pickle
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import rewards.service.wire
from rewards import EpisodeBatch, Failures, Scores, WeightedReward
from rewards.service.client import CallError
from rewards.service.remote import Remote
from rewards.service.server import served_rewards
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask
from unigrpo_env.tasks.task import demonstration_batch

FOLDER = str(Path(__file__).parent)
if FOLDER not in sys.path:
    sys.path.append(FOLDER)

from fake_server import FakeServer
from reward_server import RewardServer, free_port

QUICK = {"budget": 10.0, "backoff": 0.01, "tries": 2, "timeout": 5.0, "probe_pause": 0.05}


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("rewards").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("rewards").setLevel(logging.NOTSET)


def numbered(count, side=4):
    """Episodes whose first pixel is their number, in parts of 255."""
    images = torch.zeros(count, 3, side, side)
    images[:, 0, 0, 0] = torch.arange(count) / 255
    return EpisodeBatch(["a"] * count, ["b"] * count, images, [{}] * count)


def number(episodes):
    return episodes.images[:, 0, 0, 0] * 255


def start(reward, **options):
    return RewardServer({"it": WeightedReward({reward: 1.0})}, **options)


def far(server, **options):
    options.setdefault("name", "it")
    return Remote(url=server.url, limits=QUICK | options.pop("limits", {}), **options)


@pytest.mark.parametrize("exact", [True, False])
def test_scores_are_those_of_this_process_bit_for_bit(exact):
    episodes = demonstration_batch(ShapesTask().demonstrations(40, 3, clean=False))
    images = episodes.images + 0.1 * torch.rand(
        episodes.images.shape, generator=torch.Generator().manual_seed(0)
    )
    if not exact:
        # What came from bytes loses nothing.
        images = (images.clamp(0, 1) * 255).round() / 255
    episodes = EpisodeBatch(episodes.prompts, episodes.texts, images, episodes.metadata)
    text = "shapes + 0.1 * brevity + 0.5 * crispness + soft_shapes"
    here = WeightedReward(text)(episodes)
    assert here.reward.unique().numel() > 20
    with RewardServer(served_rewards(text)) as server:
        there = far(server, name="sum", exact=exact)(episodes)
        alone = far(server, name="crispness", exact=exact)(episodes)
    assert torch.equal(there.reward, here.reward)
    assert there.components.keys() == here.components.keys()
    for name, values in here.components.items():
        assert torch.equal(there.components[name], values)
    assert torch.equal(alone.reward, here.components["crispness"])
    assert alone.components == {}


def test_the_server_sees_all_that_a_reward_sees():
    seen = []

    def look(episodes):
        seen.append(episodes)
        return number(episodes)

    images = torch.rand(3, 3, 4, 4)
    batch = EpisodeBatch(
        prompts=["p", "q", "r"],
        texts=["", "x", "y z"],
        images=images,
        metadata=[{}, {"kind": "edit"}, {"objects": [{"colour": None}]}],
        all_images=[images[:0], images[1:2], torch.rand(2, 3, 4, 4)],
        thoughts=[[], ["x"], ["y", "z"]],
        sources=[torch.rand(2, 3, 2, 2), images[:0], torch.rand(1, 3, 4, 4)],
    )
    with start(look) as server:
        far(server, exact=True)(batch)
    (got,) = seen
    for name in ("prompts", "texts", "metadata", "thoughts"):
        assert getattr(got, name) == getattr(batch, name)
    for name in ("images", "all_images", "sources"):
        for mine, theirs in zip(getattr(got, name), getattr(batch, name), strict=True):
            assert torch.equal(mine, theirs)


def test_episodes_are_scored_in_batches_and_in_order():
    sizes = []

    def measured(episodes):
        sizes.append(len(episodes))
        return number(episodes)

    with start(measured) as server:
        scores = far(server, batch=3)(numbered(8))
    assert scores.reward.tolist() == list(range(8))
    assert sorted(sizes) == [2, 3, 3]


def test_no_episodes_need_no_server():
    reward = Remote(url="http://127.0.0.1:1")
    assert reward(numbered(0)).reward.shape == (0,)


def test_components_lose_the_name_that_was_asked_for():
    def it(episodes):
        return {"reward": number(episodes), "ink": number(episodes) + 1}

    with RewardServer({"it": WeightedReward(it)}) as server:
        scores = WeightedReward(far(server, batch=1))(numbered(2))
    assert scores.components.keys() == {"Remote", "Remote/ink"}
    assert scores.components["Remote/ink"].tolist() == [1, 2]


def test_what_the_server_could_not_score_says_why():
    def picky(episodes):
        reward = number(episodes).masked_fill(number(episodes) == 1, torch.nan)
        return Scores(reward, {}, Failures({"timeout": 1}, ValueError("the judge sleeps")))

    with start(picky) as server:
        scores = far(server)(numbered(3))
    assert scores.reward.isnan().tolist() == [False, True, False]
    assert str(scores.failures) == "1 x picky: timeout; the first: the judge sleeps"


def test_pixels_that_cannot_be_sent_spoil_only_their_episode():
    episodes = numbered(4)
    episodes.images[2, 1] = torch.nan
    with start(number) as server:
        rounded = far(server, batch=2)(episodes)
        exact = far(server, exact=True)(episodes)
    assert rounded.reward.isnan().tolist() == [False, False, True, False]
    assert rounded.reward[3] == 3
    assert rounded.failures.counts == {"no image": 1}
    assert exact.reward.tolist() == [0, 1, 2, 3]


def test_metadata_that_cannot_be_sent_are_an_error():
    episodes = EpisodeBatch(["a"], ["b"], torch.zeros(1, 3, 2, 2), [{"box": {"at": 1j}}])
    with (
        start(number) as server,
        pytest.raises(ValueError, match=r"metadata\[0\]\['box'\]\['at'\] of a type that JSON has"),
    ):
        far(server)(episodes)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"name": "is"}, "HTTP 404", "no reward 'is' on this server; did you mean 'it'?"),
        ({"token": "guess"}, "HTTP 401", "expected the token of this server"),
        ({"token": "secret", "batch": 60}, "HTTP 413", "expected a body of at most 9000 bytes"),
    ],
)
def test_a_refusal_carries_the_text_of_the_server(options, kind, text):
    with start(number, token="secret", body_bytes=9000) as server:
        scores = far(server, **{"token": "secret", "batch": 10, **options})(numbered(60, side=8))
    assert scores.reward.isnan().all()
    assert scores.failures.counts == {kind: 60}
    assert text in str(scores.failures.first)


def test_an_answer_of_another_length_is_no_score():
    with FakeServer(lambda path, body: b'{"reward": [1, 2]}') as server:
        scores = far(server)(numbered(3))
    assert scores.failures.counts == {"malformed": 3}
    assert "expected 3 numbers under 'reward'" in str(scores.failures.first)


def test_a_full_queue_loses_nothing():
    with start(number, queue=1) as server:
        scores = far(server, batch=2)(numbered(4))
    assert scores.reward.tolist() == list(range(4))


def test_a_server_that_is_killed_and_comes_back_loses_nothing():
    entered = threading.Semaphore(0)

    def slow(episodes):
        entered.release()
        time.sleep(0.05)
        return number(episodes)

    port = free_port()
    first = start(slow, port=port)
    reward = far(first, batch=2)
    future = reward.submit(numbered(24))
    for _ in range(3):
        assert entered.acquire(timeout=5)
    first.kill()
    assert not future.done()
    time.sleep(0.3)
    with start(slow, port=port):
        scores = future.result(10)
    assert scores.reward.tolist() == list(range(24))
    assert not scores.failures


def test_submitting_does_not_wait():
    def slow(episodes):
        time.sleep(0.5)
        return number(episodes)

    with start(slow) as server:
        reward = far(server)
        begun = time.monotonic()
        future = reward.submit(numbered(2))
        assert time.monotonic() - begun < 0.3
        assert future.result().reward.tolist() == [0, 1]


def test_a_scorer_that_fails_now_and_then_says_why():
    def sometimes(episodes):
        if (number(episodes) % 10 < 3).any():
            raise RuntimeError("CUDA out of memory")
        return number(episodes)

    with start(sometimes) as server:
        reward = far(server, batch=1, limits={"failures_in_a_row": 99})
        scores = WeightedReward(reward)(numbered(20))
    assert scores.reward.isnan().sum() == 6
    assert scores.failures.counts == {"Remote: HTTP 500": 6}
    assert "CUDA out of memory" in str(scores.failures)


def test_prepare_asks_for_the_name():
    with start(number, token="secret") as server:
        far(server, token="secret").prepare()
        with pytest.raises(ValueError, match="got 'ti'; did you mean 'it'"):
            far(server, name="ti", token="secret").prepare()
        with pytest.raises(CallError, match="HTTP 401: expected the token"):
            far(server, token="other").prepare()
    with pytest.raises(CallError, match="connection"):
        far(server, token="secret").prepare()


def test_prepare_refuses_another_form_of_the_wire(monkeypatch):
    monkeypatch.setattr(rewards.service.wire, "FORMAT", 2)
    with start(number) as server, pytest.raises(ValueError, match="speaks form 2"):
        far(server).prepare()


def test_a_token_from_the_environment_is_not_pickled(monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", "secret")
    with start(number, token="secret") as server:
        reward = far(server, token_variable="SCORER_TOKEN")
        assert reward(numbered(2)).reward.tolist() == [0, 1]
        pickled = pickle.dumps(reward)
        assert b"secret" not in pickled
        assert pickle.loads(pickled)(numbered(2)).reward.tolist() == [0, 1]


@pytest.mark.parametrize("batch", [0, -1, 1.5, "4"])
def test_a_batch_is_a_whole_number(batch):
    with pytest.raises(ValueError, match="batch as a whole number of at least 1"):
        Remote(url="http://x", batch=batch)
