"""`unigrpo evaluate`."""

import json
import os

import pytest

import agents.cli.evaluate
from agents.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """A measure that only counts its calls."""
    calls = []

    def evaluate(config, best_of):
        calls.append((config, best_of))
        return {"sampled": {"accuracy": config.trainer.seed / 10}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agents.cli.evaluate, "_evaluate", evaluate)
    return calls


def test_nothing_is_written_unless_asked(figures):
    assert main(["evaluate", "env=edit", "--best-of", "3"]) == 0
    ((config, best_of),) = figures
    assert config.env.variant == "edit"
    assert best_of == 3
    assert os.listdir() == []


def test_out(figures, tmp_path):
    assert main(["evaluate", "--out", "new/figures.json", "trainer.seed=2"]) == 0
    found = json.loads((tmp_path / "new/figures.json").read_text())
    assert found == {"sampled": {"accuracy": 0.2}}


def test_out_in_a_sweep(figures, tmp_path):
    words = ["-m", "trainer.seed=1,2", "output.folder=runs", "--out", "figures.json"]
    assert main(["evaluate", *words]) == 0
    for seed in (1, 2):
        path = tmp_path / f"runs/trainer.seed={seed}/figures.json"
        assert json.loads(path.read_text())["sampled"]["accuracy"] == seed / 10


def test_best_of_needs_a_number(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--best-of", "0"])
    assert "at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_best_of_is_no_worse(tmp_path):
    out = tmp_path / "figures.json"
    words = ["evaluation.prompts=16", "trainer.threads=1", "--best-of", "2", "--out", str(out)]
    assert main(["evaluate", *words]) == 0
    found = json.loads(out.read_text())
    assert set(found) == {"sampled", "greedy", "best of 2"}
    assert found["best of 2"]["accuracy"] >= found["sampled"]["accuracy"]
