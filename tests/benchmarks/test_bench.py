"""The benchmark runs; its figures are for people to read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench.py"


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
