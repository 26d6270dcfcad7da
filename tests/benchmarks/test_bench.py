"""The benchmark runs; its figures are for people to read."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench.py"


@pytest.fixture
def memory(monkeypatch):
    """The memory figures, of a model of a few thousand weights."""
    spec = importlib.util.spec_from_file_location("memory", BENCH.parent / "memory.py")
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "memory", module)
    spec.loader.exec_module(module)
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
def test_bench_prints_figures(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCH), "--pairs", "1", "--only", "ad"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
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
