"""Sums of rewards: how they are written, checked and computed."""

import functools
import logging
import pickle
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from rewards import (
    REWARDS,
    EpisodeBatch,
    Failures,
    LazyReward,
    Scores,
    WeightedReward,
    register_reward,
)
from rewards.factory import BUILT_IN
from rewards.weighted_sum import reward_names


@pytest.fixture(autouse=True)
def same_registry(monkeypatch):
    """Rewards that a test registers are gone after it."""
    list(REWARDS)
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))


def episodes(count=2):
    return EpisodeBatch(
        ["a"] * count, ["one two"] * count, torch.zeros(count, 3, 24, 24), [{}] * count
    )


def ones(batch):
    return torch.ones(len(batch))


def twos(batch):
    return [2.0] * len(batch)


class Constant:
    """A reward that is an object."""

    def __call__(self, batch):
        return [3.0] * len(batch)


async def slow(batch):
    return [1.0] * len(batch)


class Slow:
    async def __call__(self, batch):
        return [1.0] * len(batch)


def test_a_sum_adds_weighted_rewards():
    reward = WeightedReward({"brevity": 3.0})
    scores = reward(episodes())
    assert scores.reward.tolist() == [1.0, 1.0]
    assert scores.components["brevity"].tolist() == pytest.approx([1 / 3, 1 / 3])
    mixed = WeightedReward({"brevity": 3.0, ones: -1, Constant(): 0.5})(episodes())
    assert mixed.reward.tolist() == [1.5, 1.5]
    assert list(mixed.components) == ["brevity", "ones", "Constant"]


def test_a_subtracted_reward_counts_against():
    scores = WeightedReward("brevity - 2 * brevity")(episodes())
    torch.testing.assert_close(scores.reward, torch.full((2,), -1 / 3))


def test_a_sequence_is_a_sum():
    scores = WeightedReward([ones, "brevity", twos])(episodes())
    torch.testing.assert_close(scores.reward, torch.full((2,), 3 + 1 / 3))
    assert list(scores.components) == ["ones", "brevity", "twos"]


def test_parts_of_one_name_are_kept_apart():
    first, second = (lambda batch: [1.0, 2.0]), (lambda batch: [10.0, 20.0])
    scores = WeightedReward([first, second])(episodes())
    assert scores.reward.tolist() == [11, 22]
    assert scores.components["<lambda>"].tolist() == [1, 2]
    assert scores.components["<lambda>_2"].tolist() == [10, 20]


def test_components_are_named_after_the_reward():
    def parts(batch):
        return {"why": [5.0, 6.0], "reward": [1.0, 2.0]}

    scores = WeightedReward(parts)(episodes())
    assert {name: values.tolist() for name, values in scores.components.items()} == {
        "parts/why": [5, 6],
        "parts": [1, 2],
    }
    assert scores.reward.tolist() == [1, 2]


def test_components_need_a_reward():
    with pytest.raises(ValueError, match="one of them to be 'reward'"):
        WeightedReward(lambda batch: {"score": [1.0, 1.0]})(episodes())


def test_one_number_an_episode_is_expected():
    with pytest.raises(ValueError, match=r"shape \[3\]; expected one number an episode, \[2\]"):
        WeightedReward(lambda batch: [1.0, 2.0, 3.0])(episodes())


def test_what_is_not_finite_is_unscored():
    found = WeightedReward(lambda batch: [float("inf"), 1.0])(episodes())
    assert found.reward.isnan().tolist() == [True, False]
    unscored = WeightedReward({ones: 1, "shapes": 0})(episodes())
    assert unscored.reward.isnan().all()


def test_an_error_names_the_reward():
    def broken(batch):
        raise OSError("no connection")

    with pytest.raises(OSError, match="no connection") as error:
        WeightedReward(broken)(episodes())
    assert error.value.__notes__ == ["raised by reward 'broken' on 2 episodes"]


def test_the_gradient_is_kept_on_demand():
    batch = episodes()
    batch.images.requires_grad_()

    def brightness(batch):
        return batch.images.mean((1, 2, 3))

    reward = WeightedReward(brightness)
    assert not reward(batch).reward.requires_grad
    assert reward(batch, keep_gradient=True).reward.requires_grad


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("shaps", "unknown reward 'shaps'; did you mean 'shapes'"),
        ("shapes + x", "unknown reward 'x'"),
        (["shapes", "0.5 * brevity"], "unknown reward '0.5"),
        ({"shapes": float("nan")}, "finite weight for reward 'shapes', got nan"),
        ({"shapes": "heavy"}, "finite weight for reward 'shapes', got 'heavy'"),
        ({"shapes": None}, "finite weight"),
        ({}, "at least one reward, got none; Known: .*shapes"),
        ([], "at least one reward"),
        (" ", "at least one reward"),
    ],
)
def test_sums_that_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedReward(weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (3, r"expected a reward: a name, .* got 3 \(int\)"),
        (None, "expected a reward"),
        ({3: 1.0}, "expected a reward: .* got 3"),
        (["shapes", None], "expected a reward"),
        (b"shapes", "expected a reward"),
        (Constant, r"give an instance, such as Constant\(\)"),
        ([Constant], "give an instance"),
        ({Constant: 1.0}, "give an instance"),
        (slow, "'slow' is a coroutine function; expected a plain function"),
        (Slow(), "'Slow' is a coroutine function"),
        (functools.partial(slow), "coroutine function"),
    ],
)
def test_things_that_are_no_rewards(weights, message):
    with pytest.raises(TypeError, match=message):
        WeightedReward(weights)


def test_a_registered_function_has_a_name():
    @register_reward("mine")
    def my_reward(batch):
        return [4.0] * len(batch)

    scores = WeightedReward("2 * mine")(episodes())
    assert scores.reward.tolist() == [8, 8]
    assert list(scores.components) == ["mine"]


def test_any_registered_name_can_be_asked_for():
    register_reward("2 in 1")(ones)
    assert WeightedReward("2 in 1")(episodes()).reward.tolist() == [1, 1]


def test_all_rewards_of_the_library_load():
    lines = REWARDS.describe()
    for name in BUILT_IN:
        line = lines[name]
        assert line, name
        assert "cannot be imported" not in line
        assert callable(REWARDS[name])


class Level(LazyReward):
    """Returns its level, and NaN with a failure for the first episode where it is told to."""

    def __init__(self, *, level=1.0, fails=False):
        self.level = level
        self.fails = fails

    def load(self):
        if self.level < 0:
            raise ImportError("a package is missing")
        return threading.Lock()

    def __call__(self, batch):
        assert self.loaded is not None
        values = torch.full((len(batch),), float(self.level))
        if not self.fails:
            return values
        values[0] = torch.nan
        failures = Failures.of([TimeoutError("late")], kind=lambda error: "timeout")
        return Scores(values, {"raw": 2 * values}, failures)


def test_options_of_rewards():
    register_reward("level")(Level)
    options = {"level": {"level": 0.5}, "other": {"use": "level", "level": 4}, "unused": {}}
    scores = WeightedReward("level + 2 * other + level(level=3)", options)(episodes())
    assert {name: values.tolist() for name, values in scores.components.items()} == {
        "level": [0.5, 0.5],
        "other": [4, 4],
        "level_2": [3, 3],
    }
    assert scores.reward.tolist() == [11.5, 11.5]
    assert WeightedReward({"other": 2.0}, options)(episodes()).reward.tolist() == [8, 8]
    one = WeightedReward("my name", {"my name": {"use": "level"}})
    assert one(episodes()).reward.tolist() == [1, 1]


def test_sums_share_their_rewards():
    register_reward("level")(Level)
    first, second = WeightedReward("level"), WeightedReward("0.5 * level + brevity")
    assert first._parts[0].reward is second._parts[0].reward


def test_names_of_a_reward():
    assert reward_names("a + 2 * b(x=1)") == ["a", "b"]
    assert reward_names(["a", ones]) == ["a"]
    assert reward_names({"a": 1.0, ones: 2.0}) == ["a"]
    assert reward_names(ones) == reward_names("") == []
    assert reward_names("two words", {"two words": {}}) == ["two words"]


def test_failures_of_the_parts_are_kept(caplog):
    register_reward("level")(Level)
    total = WeightedReward("level(fails=True) + brevity + level(level=2, fails=True)")
    with caplog.at_level(logging.WARNING):
        scores = total(episodes())
        total(episodes())
    assert scores.failures.counts == {"level: timeout": 1, "level_2: timeout": 1}
    assert isinstance(scores.failures.first, TimeoutError)
    assert scores.reward.isnan().tolist() == [True, False]
    assert list(scores.components) == ["level/raw", "level", "brevity", "level_2/raw", "level_2"]
    assert scores.components["level/raw"][1] == 2
    (line,) = caplog.messages
    assert "1 x level: timeout, 1 x level_2: timeout; the first: late" in line


def test_a_part_that_cannot_load_is_known_before_the_first_episode():
    register_reward("level")(Level)
    WeightedReward("brevity + level").prepare()
    with pytest.raises(ImportError, match="a package is missing") as error:
        WeightedReward("brevity + level(level=-1)").prepare()
    assert error.value.__notes__ == ["raised while reward 'level' was prepared"]


def test_a_sum_can_be_pickled():
    register_reward("level")(Level)
    total = WeightedReward({"level": 1.0, "brevity": 3.0, ones: 1.0}, {"level": {"level": 7}})
    expected = total(episodes())
    found = pickle.loads(pickle.dumps(total))(episodes())
    assert torch.equal(found.reward, expected.reward)
    assert list(found.components) == ["level", "brevity", "ones"]


class Remote:
    """Scores in another thread, once `begun` local rewards have run."""

    def __init__(self, pool, is_local_done, error=None):
        self.pool = pool
        self.is_local_done = is_local_done
        self.error = error
        self.finished = False

    def submit(self, batch):
        return self.pool.submit(self._score, len(batch))

    def __call__(self, batch):
        raise AssertionError("it was not submitted")

    def _score(self, count):
        assert self.is_local_done.wait(5), "the local rewards wait for the remote ones"
        self.finished = True
        if self.error is not None:
            raise self.error
        return Scores(torch.full((count,), 2.0), {}, Failures({"timeout": 1}))


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_remote_parts_run_beside_local_ones(pool):
    done = threading.Event()

    def local(batch):
        done.set()
        return ones(batch)

    total = WeightedReward([Remote(pool, done), local, Remote(pool, done)])
    scores = total(episodes())
    assert list(scores.components) == ["Remote", "local", "Remote_2"]
    assert scores.reward.tolist() == [5, 5]
    assert scores.failures.counts == {"Remote: timeout": 1, "Remote_2: timeout": 1}


def test_an_error_of_a_remote_part_names_it(pool):
    done = threading.Event()
    done.set()
    total = WeightedReward({Remote(pool, done): 1.0, Remote(pool, done, OSError("gone")): 1.0})
    with pytest.raises(OSError, match="gone") as error:
        total(episodes())
    assert error.value.__notes__ == ["raised by reward 'Remote_2' on 2 episodes"]


def test_nothing_scores_on_after_an_error(pool):
    """A future that runs is waited for, one that does not is cancelled."""
    done = threading.Event()
    running = Remote(pool, done)
    waiting = Future()

    class Queued(Remote):
        def submit(self, batch):
            return waiting

    def broken(batch):
        done.set()
        raise OSError("no connection")

    with pytest.raises(OSError, match="no connection") as error:
        WeightedReward([running, Queued(pool, done), broken])(episodes())
    assert error.value.__notes__ == ["raised by reward 'broken' on 2 episodes"]
    assert running.finished
    assert waiting.cancelled()


def test_an_error_while_submitting_names_the_part(pool):
    waiting = Future()

    class Queued(Remote):
        def submit(self, batch):
            return waiting

    class Refusing(Remote):
        def submit(self, batch):
            raise OSError("queue full")

    done = threading.Event()
    with pytest.raises(OSError, match="queue full") as error:
        WeightedReward([Queued(pool, done), Refusing(pool, done)])(episodes())
    assert error.value.__notes__ == ["raised by reward 'Refusing' on 2 episodes"]
    assert waiting.cancelled()
