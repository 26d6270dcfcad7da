"""The examples run as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from agents.cli import main

ROOT = Path(__file__).parents[2]


def run_example(name, *arguments):
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, f"examples/{name}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_torchrl_loop():
    out = run_example("torchrl_loop.py", "--iterations", "2", "--prompts", "2", "--members", "2")
    lines = [line for line in out.splitlines() if line.startswith("iteration")]
    assert len(lines) == 2
    assert all(0 <= float(line.split()[-1]) <= 1 for line in lines)


@pytest.mark.slow
def test_random_rollout():
    out = run_example("random_rollout.py")
    assert "prompt: one plus two green triangles" in out
    assert "reward: 0.0" in out


@pytest.mark.slow
def test_custom_reward():
    out = run_example("custom_reward.py")
    assert "reward: 0.1799" in out
    assert "mostly_light: 0.8996" in out


@pytest.mark.slow
def test_unigrpo_loop():
    out = run_example("unigrpo_loop.py", "--iterations", "5", "--held-out", "16")
    assert "iteration   5  reward" in out
    assert "held-out accuracy after" in out


@pytest.mark.slow
def test_edit(tmp_path):
    out = run_example("edit.py", "--folder", str(tmp_path))
    assert "instruction:" in out
    assert "thought:" in out
    for name in ("before.png", "after.png"):
        assert Image.open(tmp_path / name).size == (384, 384)


@pytest.mark.slow
def test_own_model():
    """The reward rises by imitation, and again by reinforcement learning."""
    out = run_example("own_model.py", "--steps", "50", "--iterations", "15")
    rewards = []
    for line in out.splitlines():
        if line.startswith("reward"):
            rewards.append(float(line.split()[-1]))
    at_random, before, after = rewards
    assert at_random < before < after


@pytest.mark.slow
def test_custom_reward_on_the_command_line(tmp_path):
    """The command in the docstring of the example, with less work."""
    words = ["train", "--import", "examples/custom_reward.py", f"output.folder={tmp_path / 'run'}"]
    words += ["env.reward=shapes + 0.2 * mostly_light", "trainer.iterations=1"]
    words += ["trainer.groups=2", "trainer.group_size=2", "evaluation.prompts=2"]
    assert main(words) == 0
