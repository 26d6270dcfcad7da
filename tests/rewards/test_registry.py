"""Names, lazy entries, plug-ins."""

from importlib.metadata import EntryPoint

import pytest

from rewards import Registry
from rewards.registry import did_you_mean


def with_plugins(monkeypatch, **plugins):
    """A registry whose entry points are these."""

    def find(group):
        return [EntryPoint(name, value, group) for name, value in plugins.items()]

    monkeypatch.setattr("rewards.registry.entry_points", find)
    return Registry("thing", entry_point_group="unigrpo.things")


def test_a_name_is_taken_once():
    registry = Registry("thing")
    registry.add("One", 1)
    assert registry["One"] == 1
    with pytest.raises(ValueError, match="thing 'One' is already registered"):
        registry.add("One", 2)


def test_names_are_case_sensitive():
    registry = Registry("thing")
    registry.add("One", 1)
    assert "One" in registry
    assert "one" not in registry
    with pytest.raises(ValueError, match="unknown thing 'one'; did you mean 'One'"):
        registry["one"]


def test_names_are_sorted():
    registry = Registry("thing")
    for name in ("b", "c", "a"):
        registry.add(name, name.upper)
    assert list(registry) == ["a", "b", "c"]


def test_a_long_list_gives_way_to_the_proposal():
    many = [f"name{number}" for number in range(20)]
    assert did_you_mean("name77", many).startswith("did you mean 'name")
    assert "Known" not in did_you_mean("name77", many)
    assert did_you_mean("zzz", ["b", "a"]) == "Known: a, b"
    assert did_you_mean("zzz", []) == "Known: none"


def test_lazy_entries_load_on_first_use():
    registry = Registry("thing")
    registry.add("pi", "math:pi")
    assert 3.14 < registry["pi"] < 3.15
    registry.add("missing", "no_such_module:thing")
    assert list(registry) == ["missing", "pi"]


def test_an_import_error_names_the_entry():
    registry = Registry("thing")
    registry.add("broken", "no_such_module:thing")
    with pytest.raises(ModuleNotFoundError) as error:
        registry["broken"]
    assert "thing 'broken' was imported from 'no_such_module:thing'" in error.value.__notes__[0]


def test_plugins_come_from_entry_points(monkeypatch):
    registry = with_plugins(monkeypatch, tau="math:tau")
    assert 6.28 < registry["tau"] < 6.29
    assert "tau" in registry
    assert list(registry) == ["tau"]


def test_a_plugin_takes_no_name_of_ours(monkeypatch):
    registry = with_plugins(monkeypatch, tau="math:tau")
    registry.add("tau", "math:pi")
    assert registry["tau"] < 3.15


def test_describe_gives_first_lines():
    registry = Registry("thing")

    def documented():
        """What it does.

        And more.
        """

    registry.add("documented", documented)
    registry.add("lazy", "json:loads")
    registry.add("without", lambda: None)
    described = registry.describe()
    assert list(described) == ["documented", "lazy", "without"]
    assert described["documented"] == "What it does."
    assert described["lazy"].startswith("Deserialize")
    assert described["without"] == ""


def test_describe_skips_a_broken_plugin(monkeypatch):
    plugins = {
        "absent": "no_such_module:thing",
        "attribute": "math:no_such_attribute",
        "good": "json:loads",
        "malformed": "!",
    }
    described = with_plugins(monkeypatch, **plugins).describe()
    assert described["absent"] == "(cannot be imported: No module named 'no_such_module')"
    assert "no_such_attribute" in described["attribute"]
    assert described["malformed"].startswith("(cannot be imported: ")
    assert described["good"].startswith("Deserialize")
