"""Heavy parts are built once, and stay where they were built."""

import copy
import pickle
import threading
import time
from dataclasses import dataclass

import pytest

from rewards import LazyReward


class Counting(LazyReward):
    """Counts how often it loads; it calls no other `__init__`."""

    def __init__(self, *, factor=1.0, seconds=0.0):
        self.factor = factor
        self.seconds = seconds
        self.loads = []

    def load(self):
        time.sleep(self.seconds)
        self.loads.append(1)
        # Nothing that could be pickled or copied.
        return threading.Lock()

    def __call__(self, episodes):
        assert self.loaded is not None
        return [self.factor] * len(episodes)


@dataclass(frozen=True)
class Frozen(LazyReward):
    level: float = 1.0

    def load(self):
        return self.level


def test_nothing_is_loaded_before_the_first_use():
    reward = Counting()
    assert reward.loads == []
    assert reward.loaded is reward.loaded
    assert reward.loads == [1]
    assert Frozen(2.0).loaded == 2.0


def test_threads_wait_for_one_load():
    reward = Counting(seconds=0.05)
    found = []
    threads = [threading.Thread(target=lambda: found.append(reward.loaded)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(found) == 4
    assert set(found) == {reward.loaded}
    assert reward.loads == [1]


def test_a_failed_load_is_tried_again():
    class Missing(Counting):
        def load(self):
            super().load()
            if len(self.loads) == 1:
                raise ImportError("not yet")
            return "here"

    reward = Missing()
    with pytest.raises(ImportError, match="not yet"):
        reward.prepare()
    assert reward.loaded == "here"


def test_what_was_loaded_may_be_nothing():
    class Nothing(Counting):
        def load(self):
            self.loads.append(1)

    reward = Nothing()
    assert reward.loaded is None
    reward.prepare()
    assert reward.loads == [1]


@pytest.mark.parametrize("copied", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy])
def test_copies_carry_the_options_alone(copied):
    reward = Counting(factor=0.5)
    reward.prepare()
    other = copied(reward)
    assert other.factor == 0.5
    assert vars(other).keys() == vars(reward).keys()
    assert other.loaded is not reward.loaded
    assert other.loads == [1, 1]
    assert copied(Frozen(3.0)).loaded == 3.0


def test_a_subclass_says_how_it_loads():
    with pytest.raises(NotImplementedError, match="LazyReward has no load"):
        LazyReward().prepare()
