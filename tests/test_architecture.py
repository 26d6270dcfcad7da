"""Imports follow the rooms: rewards <- unigrpo_env <- agents <- examples."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"rewards": {"rewards"}, "unigrpo_env": {"rewards", "unigrpo_env"}, "agents": {"rewards", "unigrpo_env", "agents"}}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the rooms"
            yield node.module or ""


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_follow_the_rooms(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for module in imported(path):
            top = module.split(".")[0]
            assert top not in ("agents", "examples", "tests", "unigrpo_env", "rewards") or top in ALLOWED[room], f"{path} imports {module}"


def test_no_pickle():
    for path in (p for room in ALLOWED for p in (ROOT / room).rglob("*.py")):
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "pickle" not in {module.split(".")[0] for module in imported(path)}, path
