"""The console script beside a distribution that has packages of the same names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unigrpo_env.launch import main, overwritten_package

ROOT = Path(__file__).parents[2]


def launch(first, *words):
    """Run the console script with `first` before everything else on the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(first), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-m", "unigrpo_env.launch", *words],
        env=environment,
        cwd=first,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_our_own_packages_are_found():
    assert overwritten_package() is None


def test_launch(tmp_path):
    done = launch(tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: unigrpo" in done.stdout


@pytest.mark.parametrize("package", ["agents", "rewards"])
def test_foreign_package(tmp_path, package):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("import no_such_dependency\n")
    done = launch(tmp_path, "--help")
    assert done.returncode == 2
    assert f"`{package}` is not that of unigrpo" in done.stderr
    assert "openai-agents" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["agents", "rewards"])
def test_removed_files(package, monkeypatch, capsys):
    """What is left when the other distribution is uninstalled: a folder without `__init__.py`."""
    import unigrpo_env.launch as module

    find = module.find_spec

    class Spec:
        origin = None

    monkeypatch.setattr(module, "find_spec", lambda name: Spec() if name == package else find(name))
    assert main() == 2
    assert f"`{package}`" in capsys.readouterr().err
