"""Registration, weights, components."""

import pytest
import torch

from rewards import EpisodeBatch, Registry, WeightedReward
from rewards.registry import parse_weights


def episodes(count=2):
    return EpisodeBatch(["a"] * count, ["one two"] * count, torch.zeros(count, 3, 24, 24), [{}] * count)


def test_a_name_is_taken_once_and_kept_as_given():
    registry = Registry("thing")
    registry.add("One", 1)
    assert registry["One"] == 1
    with pytest.raises(ValueError, match="already registered"):
        registry.add("One", 2)
    with pytest.raises(ValueError, match="did you mean 'One'"):
        registry["one"]


def test_lazy_entries_load_on_first_use():
    registry = Registry("thing")
    registry.add("pi", "math:pi")
    assert 3.14 < registry["pi"] < 3.15


def test_plugins_come_from_entry_points(monkeypatch):
    from importlib.metadata import EntryPoint

    monkeypatch.setattr("rewards.registry.entry_points", lambda group: [EntryPoint("tau", "math:tau", group)])
    assert 6.28 < Registry("thing", entry_point_group="unigrpo.things")["tau"] < 6.29


def test_weights_and_components():
    reward = WeightedReward({"brevity": 3.0})
    scores = reward(episodes())
    assert scores.reward.tolist() == [1.0, 1.0]
    assert scores.components["brevity"].tolist() == pytest.approx([1 / 3, 1 / 3])

    def parts(batch):
        return {"reward": [1.0, 2.0], "why": [5.0, 6.0]}

    assert WeightedReward(parts)(episodes()).components["parts/why"].tolist() == [5, 6]


def test_components_need_a_reward():
    with pytest.raises(ValueError, match="one of them to be 'reward'"):
        WeightedReward(lambda batch: {"score": [1.0, 1.0]})(episodes())


def test_weights_in_words():
    assert parse_weights("shapes") == {"shapes": 1.0}
    assert parse_weights("0.5 * a + b+2*c") == {"a": 0.5, "b": 1.0, "c": 2.0}
    with pytest.raises(ValueError, match="'x' is no number"):
        parse_weights("x * a")
    with pytest.raises(ValueError, match="unknown reward 'shaps'; did you mean 'shapes'"):
        WeightedReward("shaps")
    with pytest.raises(ValueError, match="finite weight"):
        WeightedReward({"shapes": float("nan")})
    with pytest.raises(ValueError, match="at least one reward"):
        WeightedReward({})
