"""The command line plays every scenario by a model that a module of the user's registers."""

import subprocess
import sys
from pathlib import Path

import chat_world
import pytest
import torch
from chat_world import SIDE
from PIL import Image

from agents.cli import main
from unigrpo_env.rendering import enlarge


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("text_to_image", []),
        ("edit", ["--source", "source.png"]),
        ("reflect", []),
        ("story", []),
        ("dialogue", ["--turn", "darker"]),
    ],
)
def test_sample(variant, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    enlarge(torch.rand(3, SIDE, SIDE), SIDE).save("source.png")
    arguments = ["sample", "paint", "--model", "chat", "--variant", variant]
    arguments += ["--import", "chat_world", "--steps", "3", "--out", "found.png", *words]
    status = main(arguments)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "found.png" in printed.out
    assert Image.open("found.png").width >= 300


@pytest.mark.slow
def test_sample_in_its_own_process(tmp_path):
    """The file of the module is all that a new process needs."""
    out = tmp_path / "found.png"
    words = ["sample", "paint", "--model", "chat", "--import", str(Path(chat_world.__file__))]
    done = subprocess.run(
        [sys.executable, "-m", "agents.cli", *words, "--steps", "2", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Image.open(out).size == (384, 384)
