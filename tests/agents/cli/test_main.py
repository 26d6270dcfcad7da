"""The command line as a whole."""

import importlib
import subprocess
import sys

import pytest

from agents.cli import COMMANDS, main

LIGHT = """
import sys, time
from agents.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
heavy = {"torch", "hydra", "rich.live", "rewards", "matplotlib", "peft"} & set(sys.modules)
assert not heavy, heavy
assert time.process_time() < 1
"""


def test_help_is_light():
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("words", [[], ["trian"], ["--no-such-option"]])
def test_unknown_commands(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: unigrpo" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: unigrpo {command}" in out
    assert COMMANDS[command][1].split()[0] in out
    assert "--import" in out


def test_commands_are_called_with_the_other_words(monkeypatch):
    found = []
    for name, _ in COMMANDS.values():
        module = importlib.import_module(f"agents.cli.{name}")
        monkeypatch.setattr(module, "main", lambda words, name=name: found.append((name, words)))
    for command in COMMANDS:
        assert main([command, "a", "--b"]) == 0
    assert found == [(name, ["a", "--b"]) for name, _ in COMMANDS.values()]
