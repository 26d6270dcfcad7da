"""The examples run as they are."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from agents.cli import main
from agents.training.build import import_modules
from rewards import REWARDS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run an example in this process, which has imported torch; returns what it prints."""
    kept = dict(REWARDS._entries)

    def run(name, *arguments):
        path = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    yield run
    REWARDS._entries = kept


def run_example(name, *arguments):
    """What an example prints in a process of its own."""
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
def test_torchrl_loop(run_here):
    out = run_here("torchrl_loop.py", "--iterations", "2", "--prompts", "2", "--members", "2")
    lines = [line for line in out.splitlines() if line.startswith("iteration")]
    assert len(lines) == 2
    assert all(0 <= float(line.split()[-1]) <= 1 for line in lines)


@pytest.mark.slow
def test_random_rollout():
    out = run_example("random_rollout.py")
    assert "prompt: one plus two green triangles" in out
    assert "reward: 0.0" in out


@pytest.mark.slow
def test_custom_reward(run_here):
    out = run_here("custom_reward.py")
    assert "reward: 0.1799" in out
    assert "mostly_light: 0.8996" in out


@pytest.mark.slow
def test_readback(run_here):
    """The shipped model was not taught to read prompts, yet it does better than by chance."""
    lines = run_here("readback.py", "--prompts", "24", "--samples", "2").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "right images",
        "images of the same prompt",
        "images of other prompts",
        "two prompts, exchanged",
    ]
    assert float(lines[-1].split(": ")[1].split()[0]) > 0.7


@pytest.mark.slow
def test_unigrpo_loop(monkeypatch, capsys):
    """Of few episodes: their numbers are constants of the example."""
    path = str(ROOT / "examples" / "unigrpo_loop.py")
    import_modules([path])
    module = sys.modules[path]
    for name, value in {"B": 2, "G": 3, "N": 6}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", [path, "--iterations", "5", "--held-out", "4"])
    module.main()
    out = capsys.readouterr().out
    assert "iteration   5  reward" in out
    assert "held-out accuracy after" in out


@pytest.mark.slow
def test_edit(tmp_path, run_here):
    out = run_here("edit.py", "--folder", str(tmp_path))
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
