"""Rewards are checked and prepared before the first episode."""

import copy
import functools

import pytest

from agents.config.loading import load_config
from agents.training.evaluator import Evaluator
from agents.training.preparation import check_reward_options, prepare_rewards
from agents.training.trainer import Trainer
from rewards import LazyReward
from unigrpo_env.variants.variant import make_variant

pytestmark = pytest.mark.slow


class Heavy(LazyReward):
    """Counts how often it is loaded; fails where its model is missing."""

    loads = []

    def __init__(self, *, model="here", factor=1.0):
        self.model = model
        self.factor = factor

    def load(self):
        if self.model == "missing":
            raise OSError("no model there")
        self.loads.append(self.model)
        return self.model

    def __call__(self, episodes):
        assert self.loaded
        return self.factor * episodes.images.mean((1, 2, 3))


@pytest.fixture(autouse=True)
def heavy(rewards):
    # A class of its own for each test, so that no instance is left of another one.
    made = type("Heavy", (Heavy,), {"loads": []})
    rewards.add("heavy", made)
    return made


@functools.cache
def composed():
    return load_config(["env=toy", "model=toy", "trainer.groups=2", "trainer.minibatches=1"])


def settings(**changes):
    """Settings of the toy: `settings(env={"reward": "heavy"})`."""
    config = copy.deepcopy(composed())
    config.env.text_budget = 2
    config.evaluation.prompts = 2
    for section, values in changes.items():
        for name, value in values.items():
            setattr(getattr(config, section), name, value)
    return config


def with_model(config, model):
    config.env.reward_options = {"heavy": {"model": model}}
    return config


OTHERS = {
    "env.reward": {"env": {"reward": "heavy"}},
    "env.thought_reward": {"env": {"thought_reward": "heavy"}},
    "env.round_reward": {"env": {"round_reward": "heavy"}},
    "evaluation.reward": {"evaluation": {"reward": "toy + 0.5 * heavy"}},
    "algorithm.refl_reward": {"algorithm": {"image_objective": "refl", "refl_reward": "heavy"}},
}


@pytest.mark.parametrize(("setting", "changes"), OTHERS.items())
def test_every_reward_is_prepared(heavy, setting, changes):
    with pytest.raises(ValueError) as error:
        Trainer(with_model(settings(**changes), "missing"))
    assert str(error.value) == (
        f"{setting} cannot score: no model there (raised while reward 'heavy' was prepared)"
    )
    assert isinstance(error.value.__cause__, OSError)
    Trainer(with_model(settings(**changes), "elsewhere"))
    assert heavy.loads == ["elsewhere"]


def test_a_fault_in_the_code_of_a_reward_keeps_its_type(heavy, monkeypatch):
    monkeypatch.setattr(heavy, "load", lambda self: self.nothing)
    with pytest.raises(AttributeError, match="nothing") as error:
        Trainer(settings(env={"reward": "heavy"}))
    assert "the reward is named in env.reward" in error.value.__notes__


def test_what_is_not_used_is_not_prepared():
    """An evaluation needs its own reward alone, and only ReFL needs the one of ReFL."""
    config = settings(env={"reward": "heavy"}, evaluation={"reward": "toy"})
    assert Evaluator(with_model(config, "missing")).evaluate().reward.shape == (2,)
    Trainer(with_model(settings(algorithm={"refl_reward": "heavy"}), "missing"))


def test_a_run_loads_each_model_once(heavy):
    config = settings(
        env={
            "reward": "toy + heavy",
            "round_reward": "heavy + other",
            "reward_options": {"other": {"use": "heavy", "model": "there"}},
        },
        evaluation={"reward": "other"},
    )
    trainer = Trainer(config)
    trainer.iterate()
    trainer.evaluate()
    assert sorted(heavy.loads) == ["here", "there"]


def test_options_are_those_of_the_saved_run(heavy, tmp_path):
    options = {"heavy": {"factor": 0}}
    config = settings(env={"reward": "heavy", "reward_options": options})
    config.output.folder = str(tmp_path)
    trainer = Trainer(config)
    assert trainer.iterate()["reward"] == 0
    trainer.save()
    resumed = Trainer.resume(tmp_path)
    assert resumed.config.env.reward_options == options
    assert resumed.iterate()["reward"] == 0


def test_options_that_no_reward_uses():
    config = settings(env={"reward_options": {"heav": {}}})
    variant = make_variant("toy", reward="toy + 0.1 * heavy", thought_reward={len: 1.0})
    message = r"env\.reward_options\.heav is given, but no reward .* did you mean 'heavy'"
    with pytest.raises(ValueError, match=message):
        check_reward_options(config, variant)
    with pytest.raises(ValueError, match="no reward of this run uses 'heav'"):
        Evaluator(config)
    for section, name in (("evaluation", "reward"), ("algorithm", "refl_reward")):
        changed = copy.deepcopy(config)
        setattr(getattr(changed, section), name, "toy + heav")
        check_reward_options(changed, variant)


def test_functions_need_no_preparation():
    variant = make_variant("toy", reward=lambda episodes: [0.0] * len(episodes))
    prepare_rewards({"env.reward": variant.reward, "other": "toy + brevity"}, variant)
