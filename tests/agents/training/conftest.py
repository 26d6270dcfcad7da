"""Trainers of a toy and of a small random model, with rewards of their own."""

import copy
import functools
import math

import pytest
import torch

from agents.config.loading import load_config
from agents.training.trainer import Trainer
from rewards import REWARDS

QUIET = ["output.tensorboard=false", "output.samples_every=0", "evaluation.every=0"]
TOY = ["env=toy", "model=toy", "env.text_budget=2", "trainer.minibatches=1"]
SMALL = [
    "trainer.groups=2",
    "trainer.group_size=4",
    "trainer.minibatches=1",
    "env.text_budget=4",
    "env.image_steps=6",
    "env.reward=mean_red",
    "evaluation.prompts=4",
]


FOLDER = "the folder of the test"


@functools.cache
def composed(overrides):
    """Settings, composed once for all tests that ask for them."""
    return load_config([f"output.folder='{FOLDER}'", *overrides])


def config_of(folder, overrides):
    """The settings of a run in `folder`, unless they name another one."""
    config = copy.deepcopy(composed(tuple(overrides)))
    if config.output.folder == FOLDER:
        config.output.folder = str(folder)
    return config


def mean_red(episodes):
    return episodes.images[:, 0].mean((1, 2))


def some_nan(episodes):
    return [math.nan if row % 8 == 0 else row % 3 for row in range(len(episodes))]


def halves(episodes):
    """The same for all in every other group of four, NaN for some, different in the rest."""
    row = torch.arange(len(episodes))
    value = torch.where(row // 4 % 2 == 0, 0.5, mean_red(episodes))
    return value.masked_fill(row % 7 == 3, math.nan)


@pytest.fixture
def rewards():
    """Rewards for one test; more may be added."""
    kept = dict(REWARDS._entries)
    for reward in (mean_red, some_nan, halves):
        REWARDS.add(reward.__name__, reward)
    REWARDS.add("all_nan", lambda episodes: [math.nan] * len(episodes))
    REWARDS.add("constant", lambda episodes: [0.7] * len(episodes))
    yield REWARDS
    REWARDS._entries = kept


@pytest.fixture
def toy_trainer(rewards, tmp_path):
    """Make a trainer of the toy: `toy_trainer(*overrides)`; its folder is `tmp_path`."""

    def make(*overrides):
        return Trainer(config_of(tmp_path, [*TOY, *QUIET, *overrides]))

    return make


@pytest.fixture
def small_trainer(rewards, tmp_path):
    """Make a trainer of a given model: `small_trainer(model, *overrides)`."""

    def make(model, *overrides):
        return Trainer(config_of(tmp_path, [*SMALL, *QUIET, *overrides]), model)

    return make


@pytest.fixture
def weights_of():
    """Copy the weights of a trainer's model."""

    def copy(trainer):
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    return copy
