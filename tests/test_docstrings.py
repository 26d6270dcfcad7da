"""Everything public has a docstring, and its sections name what the code has."""

import ast
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("rewards", "unigrpo_env", "agents")
    for path in (ROOT / folder).rglob("*.py")
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_public(node):
    """Whether a function or class is documented: private names and setters are not."""
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    return not node.name.startswith("_") and not decorators & {"setter", "overload"}


def public_nodes(body, prefix=""):
    """Public functions and classes as (dotted name, node), those in public classes included."""
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and is_public(node):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_nodes(node.body, f"{prefix}{node.name}.")


def section(docstring, title):
    """The names that a section of a docstring lists, in order; None without that section."""
    lines = inspect.cleandoc(docstring).splitlines()
    if f"{title}:" not in lines:
        return None
    names = []
    for line in lines[lines.index(f"{title}:") + 1 :]:
        # A line that is not indented ends the section.
        if line and not line.startswith(" "):
            break
        entry = re.match(r" {4}\*{0,2}(\w+)(?: \([^)]*\))?:", line)
        if entry:
            names.append(entry[1])
        else:
            assert not line or line.startswith(" " * 8), f"neither an entry nor text: {line!r}"
    return names


def parameters(function):
    """The names of all parameters but self and cls, in order."""
    arguments = function.args
    found = [*arguments.posonlyargs, *arguments.args, arguments.vararg]
    found += [*arguments.kwonlyargs, arguments.kwarg]
    names = [argument.arg for argument in found if argument is not None]
    return [name for name in names if name not in ("self", "cls")]


def fields(node):
    """The names of the annotated attributes of a class, those of all instances aside."""
    found = []
    for name, annotation in annotated(node):
        if not annotation.startswith("ClassVar"):
            found.append(name)
    return found


def annotated(node):
    """The annotated names in the body of a class, each with its annotation."""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, ast.unparse(statement.annotation)


def constructor(node):
    """What a class is called with; None if it inherits its `__init__`."""
    for statement in node.body:
        if isinstance(statement, FUNCTIONS) and statement.name == "__init__":
            return parameters(statement)
    if is_dataclass(node):
        return fields(node)
    return None


def is_dataclass(node):
    """Whether a class is decorated as a dataclass."""
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def attributes(node):
    """Every name that an object of the class has by its class body and its `__init__`."""
    # Annotations that belong to all instances are attributes too.
    found = {name for name, _ in annotated(node)}
    for statement in node.body:
        if isinstance(statement, FUNCTIONS):
            found.add(statement.name)
        if isinstance(statement, ast.Assign):
            found.update(target.id for target in statement.targets if isinstance(target, ast.Name))
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            found.add(child.attr)
    return found


def wrong_arguments(name, node):
    """What is wrong with the section `Args:` of a function or class; nothing if it is right."""
    documented = section(ast.get_docstring(node) or "", "Args")
    if documented is None:
        return []
    if isinstance(node, ast.ClassDef):
        expected = constructor(node)
    else:
        expected = parameters(node)
    if expected is None or documented == expected:
        return []
    return [f"{name}: Args: has {documented}, the signature has {expected}"]


def wrong_attributes(name, node):
    """What is wrong with the section `Attributes:` of a class; nothing if it is right."""
    documented = section(ast.get_docstring(node) or "", "Attributes")
    if documented is None:
        return []
    found = []
    unknown = [entry for entry in documented if entry not in attributes(node)]
    if unknown and not node.bases:
        found.append(f"{name}: Attributes: names {unknown}, which it does not have")
    if is_dataclass(node):
        missing = [entry for entry in fields(node) if entry not in documented]
        if missing:
            found.append(f"{name}: Attributes: lacks {missing}")
    return found


def tree(module):
    return ast.parse((ROOT / module).read_text())


def test_sections_are_read():
    """The tests below find nothing wrong only if the sections are understood."""
    text = """First line.

    Args:
        a: `[N]`, of: several words,
            on two lines.
        *rest: others.
        b (int): with a type.

    Returns:
        c: no argument.
    """
    assert section(text, "Args") == ["a", "rest", "b"]
    assert section(text, "Raises") is None
    function = ast.parse("def f(self, a, /, *rest, b=1, **more): ...").body[0]
    assert parameters(function) == ["a", "rest", "b", "more"]


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    parsed = tree(module)
    missing = [] if ast.get_docstring(parsed) else ["the module"]
    for name, node in public_nodes(parsed.body):
        if not ast.get_docstring(node):
            missing.append(name)
    assert not missing, f"{module}: no docstring: {missing}"


@pytest.mark.parametrize("module", MODULES)
def test_args_are_those_of_the_signature(module):
    wrong = []
    for name, node in public_nodes(tree(module).body):
        wrong += wrong_arguments(name, node)
    assert not wrong, f"{module}: {wrong}"


@pytest.mark.parametrize("module", MODULES)
def test_attributes_are_those_of_the_class(module):
    wrong = []
    for name, node in public_nodes(tree(module).body):
        if isinstance(node, ast.ClassDef):
            wrong += wrong_attributes(name, node)
    assert not wrong, f"{module}: {wrong}"
