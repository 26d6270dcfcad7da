"""The package is light to import, and registers its envs."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest

import unigrpo_env  # noqa: F401
from unigrpo_env.variants.variant import VARIANTS

IDS = sorted(name for name in gym.registry if name.startswith("unigrpo/"))
HEAVY = ("torch", "diffusers", "transformers", "tokenizers", "torchrl", "tensordict", "matplotlib")


@pytest.mark.parametrize("line", ["import unigrpo_env", "import unigrpo_env.launch"])
def test_the_import_is_light(line):
    code = f"{line}; import sys; print([name for name in {HEAVY} if name in sys.modules])"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]"


def test_every_variant_has_an_id():
    assert {gym.spec(name).kwargs["variant"] for name in IDS} == {*VARIANTS}
    assert len(IDS) == 6


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasium_makes_every_id(env_id):
    env = gym.make(env_id)
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert info["prompt"]
