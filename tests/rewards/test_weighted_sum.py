"""Sums of rewards: how they are written, checked and computed."""

import functools

import pytest
import torch

from rewards import REWARDS, EpisodeBatch, WeightedReward, register_reward
from rewards.weighted_sum import BUILT_IN, parse_weights


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


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("shapes", {"shapes": 1}),
        ("0.5 * a + b+2*c", {"a": 0.5, "b": 1, "c": 2}),
        ("a * 0.5 + b*2", {"a": 0.5, "b": 2}),
        ("shapes - 0.1 * brevity", {"shapes": 1, "brevity": -0.1}),
        ("shapes-0.1*brevity", {"shapes": 1, "brevity": -0.1}),
        ("-a - b", {"a": -1, "b": -1}),
        ("a + -0.2 * b", {"a": 1, "b": -0.2}),
        ("a - -0.2 * b", {"a": 1, "b": 0.2}),
        ("a * -2", {"a": -2}),
        ("1e-3 * a + b * 1E+2 - 2.5e-1*c", {"a": 1e-3, "b": 100, "c": -0.25}),
        (".5*a + 2.*b", {"a": 0.5, "b": 2}),
        ("a + a - 0.5 * a", {"a": 1.5}),
        ("my-reward - my.other/part", {"my-reward": 1, "my.other/part": -1}),
        ("-0.1 * a", {"a": -0.1}),
        ("", {}),
    ],
)
def test_sums_in_text(text, weights):
    assert parse_weights(text) == weights
    assert list(parse_weights(text)) == list(weights)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("x * a", "x * a"),
        ("a +", "+"),
        ("a b", "a b"),
        ("0.5", "0.5"),
        ("a + 2 * * b", "+ 2 * * b"),
        ("a, b", "a, b"),
        ("a + 0.5x", "+ 0.5x"),
    ],
)
def test_text_that_is_no_sum(text, rest):
    with pytest.raises(ValueError, match="expected a reward such as") as error:
        parse_weights(text)
    assert f"{rest!r} does not begin with a name" in str(error.value)


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
        (Constant, r"register an instance, such as Constant\(\)"),
        ([Constant], "register an instance"),
        ({Constant: 1.0}, "register an instance"),
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

    assert REWARDS["mine"] is my_reward
    scores = WeightedReward("2 * mine")(episodes())
    assert scores.reward.tolist() == [8, 8]
    assert list(scores.components) == ["mine"]
    with pytest.raises(ValueError, match="already registered"):
        register_reward("mine")(ones)


def test_any_registered_name_can_be_asked_for():
    register_reward("2 in 1")(ones)
    assert WeightedReward("2 in 1")(episodes()).reward.tolist() == [1, 1]


@pytest.mark.parametrize("thing", [Constant, slow, Slow(), 3])
def test_only_rewards_are_registered(thing):
    with pytest.raises(TypeError, match="reward 'mine'"):
        register_reward("mine")(thing)
    assert "mine" not in REWARDS


def test_a_class_from_a_plugin_is_refused():
    REWARDS.add("counter", "collections:Counter")
    with pytest.raises(TypeError, match="'counter' is the class Counter"):
        WeightedReward("counter")


def test_all_rewards_of_the_library_load():
    lines = REWARDS.describe()
    for name in BUILT_IN:
        line = lines[name]
        assert line, name
        assert "cannot be imported" not in line
        assert callable(REWARDS[name])
