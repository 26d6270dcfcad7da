"""Imports point down, and never in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = {
    "rewards": {"rewards"},
    "unigrpo_env": {"rewards", "unigrpo_env"},
    "agents": {"rewards", "unigrpo_env", "agents"},
}
OURS = {*TOP, "examples", "tests"}
ORDER = (
    ("cli",),
    ("experiments",),
    ("training",),
    ("reporting",),
    ("evaluation",),
    ("objectives", "rollout"),
    ("policy",),
    ("trajectory", "models", "testing"),
    ("config", "storage"),
)
"""The rooms of `agents`, from top to bottom; a room imports those below it."""


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the rooms"
            yield node.module or ""


def room(path):
    return path.relative_to(ROOT / "agents").parts[0].removesuffix(".py")


@pytest.mark.parametrize("folder", TOP)
def test_packages_import_downwards(folder):
    assert files(folder)
    for path in files(folder):
        for module in imported(path):
            top = module.split(".")[0]
            assert top not in OURS or top in TOP[folder], f"{path} imports {module}"


def test_rooms_import_downwards():
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    for path in files("agents"):
        own = room(path)
        if own == "__init__":
            continue
        for module in imported(path):
            parts = module.split(".")
            if parts[0] != "agents" or len(parts) < 2 or parts[1] == own:
                continue
            below = level[parts[1]] >= level[own]
            assert below, f"{path} imports {module}, which is above it"


def test_modules_form_no_circle():
    arrows = {}
    for folder in TOP:
        for path in files(folder):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            arrows[name] = set(top_level_imports(path))
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        if name in done:
            return
        for other in arrows.get(name, ()):
            visit(other, [*trail, name])
        done.add(name)

    for name in arrows:
        visit(name, [])


def top_level_imports(path):
    """Modules that are imported when this one is, those for type checking apart."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_no_pickle():
    for path in (path for folder in TOP for path in files(folder)):
        for line in path.read_text().splitlines():
            # Weights of others may come in no other form; then nothing but tensors is read.
            assert "torch.load(" not in line or "weights_only=True" in line, path
        assert "pickle" not in {module.split(".")[0] for module in imported(path)}, path


def test_files_and_functions_are_short():
    """A file fits the eye, a function fits a screen."""
    for path in (path for folder in TOP for path in files(folder)):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                start = node.lineno
                if ast.get_docstring(node):
                    start = node.body[0].end_lineno
                assert node.end_lineno - start <= 45, f"{path}: {node.name}"
