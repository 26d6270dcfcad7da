"""The benchmark runs; its figures are for people to read."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from agents.config import load_config

BENCH = Path(__file__).parent / "bench.py"


def load_module(name, monkeypatch):
    """A file beside this one as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCH.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look their module up.
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def memory(monkeypatch):
    """The memory figures, of a model of a few thousand weights."""
    module = load_module("memory", monkeypatch)
    sizes = {
        "vocab_size": 576,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    monkeypatch.setattr(module, "SIZES", sizes)
    monkeypatch.setattr(module, "PIXELS", 64)
    monkeypatch.setattr(module, "PROMPT", {"rollout": 20, "update": 20})
    monkeypatch.setattr(module, "THOUGHT", {"rollout": 5, "update": 5})
    monkeypatch.setattr(module, "RANK", 4)
    return module


@pytest.mark.slow
def test_bench_prints_figures(tmp_path, monkeypatch, capsys):
    """Of few episodes, in this process; what it imports from its folder is imported before."""
    load_module("memory", monkeypatch)
    load_module("painting", monkeypatch)
    load_module("bare_loop", monkeypatch)
    bench = load_module("bench", monkeypatch)
    few = ["trainer.groups=2", "trainer.group_size=4"]
    monkeypatch.setattr(bench, "load_config", lambda words: load_config([*words, *few]))
    monkeypatch.setattr(sys, "argv", [str(BENCH), "--pairs", "1", "--only", "ad"])
    monkeypatch.chdir(tmp_path)
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    figures = [json.loads(line) for line in lines if line.startswith("{")]
    assert [figure["figure"] for figure in figures] == ["a", "d"]
    assert figures[1]["ratio"] < figures[1]["limit"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_measured(memory, tmp_path):
    """Each run works, and its sum has the parts that it should have."""
    memory.write_folder(tmp_path)
    small = memory.measure("rollout", tmp_path, 2)
    large = memory.measure("rollout", tmp_path, 4)
    assert large["parts"]["cache"] == 2 * small["parts"]["cache"] > 0
    assert large["parts"]["activations"] == small["parts"]["activations"] > 0
    update = memory.measure("update", tmp_path)
    assert update["parts"]["training"] > 0
    load = memory.measure("load", tmp_path)
    assert load["parts"]["weights"] == (tmp_path / "ema.safetensors").stat().st_size
    for found in (small, large, update, load):
        assert found["needed"] == sum(found["parts"].values())
