"""One instance of a reward for its class and options."""

import threading
import time

import pytest
import torch

from rewards import REWARDS, EpisodeBatch, make_reward, register_reward
from rewards.factory import check_entry


@pytest.fixture(autouse=True)
def same_registry(monkeypatch):
    """Rewards that a test registers are gone after it."""
    list(REWARDS)
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))


class Level:
    """A reward that is an option."""

    made = 0

    def __init__(self, *, level=1.0, names=()):
        # Long enough for another thread to begin as well.
        time.sleep(0.01)
        type(self).made += 1
        self.level = level
        self.names = names

    def __call__(self, batch):
        return [self.level] * len(batch)


class Named:
    """A reward with an option that must be given, and any others."""

    def __init__(self, url, **others):
        self.url = url
        self.others = others

    def __call__(self, batch):
        return [0.0] * len(batch)


class Silent:
    """A class of no rewards."""


class Slow:
    async def __call__(self, batch):
        return [1.0] * len(batch)


def ones(batch):
    return torch.ones(len(batch))


@pytest.fixture
def level():
    """A class of rewards that is registered as `level`, anew for each test."""
    return register_reward("level")(type("Level", (Level,), {"made": 0}))


def test_a_class_is_registered_with_its_options(level):
    reward = make_reward("level", {"level": 0.5})
    assert isinstance(reward, level)
    assert reward(EpisodeBatch(["a"], ["b"], torch.zeros(1, 3, 2, 2), [{}])) == [0.5]


def test_a_process_holds_one_instance_for_each_options(level):
    first = make_reward("level", {"level": 2, "names": ("a", "b")})
    assert make_reward("level", {"names": ["a", "b"], "level": 2}) is first
    assert make_reward("level", {"level": 2}) is not first
    assert make_reward("level") is make_reward("level", {})
    assert level.made == 3
    assert first.names == ["a", "b"], "a tuple is a list, whichever of the two comes first"


def test_threads_get_the_same_instance(level):
    found = []
    barrier = threading.Barrier(4)

    def ask():
        barrier.wait(5)
        found.append(make_reward("level"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


def test_another_name_may_use_a_reward(level):
    judge = make_reward("judge_a", {"use": "level", "level": 3})
    assert judge is make_reward("level", {"level": 3})
    assert judge is not make_reward("judge_b", {"use": "level", "level": 4})
    assert make_reward("mine", {"use": "brevity"}) is REWARDS["brevity"]
    with pytest.raises(ValueError, match="unknown reward 'levl'; did you mean 'level'"):
        make_reward("judge_a", {"use": "levl"})
    with pytest.raises(ValueError, match=r"'use' of reward 'judge_a' to be the name .* got 3"):
        make_reward("judge_a", {"use": 3})
    with pytest.raises(ValueError, match="'brevity' is registered, so it cannot stand for 'level'"):
        make_reward("brevity", {"use": "level"})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("level", {"levle": 1}, "'level' has no option 'levle'; did you mean 'level'"),
        ("level", {"threads": 1}, "no option 'threads'; Known: level, names"),
        ("level", {"level": object()}, "options of reward 'level' that JSON can hold"),
        (
            "named",
            {},
            "reward 'named' needs the option 'url', got \\[\\]; write named\\(url=...\\)",
        ),
        ("named", {"model": "x"}, r"env.reward_options.named.url"),
        ("levels", {}, "unknown reward 'levels'; did you mean 'level'"),
    ],
)
def test_options_that_are_refused(level, name, options, message):
    register_reward("named")(Named)
    with pytest.raises(ValueError, match=message):
        make_reward(name, options)


def test_a_class_may_take_any_options():
    register_reward("named")(Named)
    made = make_reward("named", {"url": "x", "model": "y"})
    assert (made.url, made.others) == ("x", {"model": "y"})


def test_a_function_takes_no_options():
    with pytest.raises(TypeError, match=r"'brevity' is a function .* got \['length'\]"):
        make_reward("brevity", {"length": 3})


def test_an_error_of_a_class_names_the_reward():
    @register_reward("fails")
    class Fails(Level):
        def __init__(self, *, level=0):
            raise OSError("no such file")

    with pytest.raises(OSError, match="no such file") as error:
        make_reward("fails", {"level": 1})
    assert error.value.__notes__ == ["raised while reward 'fails' was made with ['level']"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Silent, "reward 'mine' is the class Silent without __call__"),
        (Slow, "'mine' is a coroutine function"),
        (Slow(), "'mine' is a coroutine function"),
        (3, "reward 'mine' to be a callable .* got int"),
    ],
)
def test_only_rewards_and_their_classes_are_registered(entry, message):
    with pytest.raises(TypeError, match=message):
        register_reward("mine")(entry)
    assert "mine" not in REWARDS
    check_entry("mine", Level)


def test_a_class_from_a_plugin_is_checked():
    REWARDS.add("counter", "collections:Counter")
    with pytest.raises(TypeError, match="'counter' is the class Counter without __call__"):
        make_reward("counter")


def test_a_registered_function_is_returned_unchanged():
    assert register_reward("mine")(ones) is ones
    assert make_reward("mine") is ones
    with pytest.raises(ValueError, match="already registered"):
        register_reward("mine")(ones)
