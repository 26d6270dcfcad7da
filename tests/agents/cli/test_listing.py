"""`unigrpo list`."""

from agents.cli import main
from rewards import REWARDS


def test_list(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    names = ("unigrpo", "flow_grpo", "fpo", "dance", "velocity_weight", "channel", "dialogue")
    for name in (*names, "text_to_image", "shapes", "tiny", "toy"):
        assert f"  {name} " in out, name


def test_a_broken_plugin_does_not_stop_the_list(capsys, monkeypatch):
    entries = {**REWARDS._entries, "broken": "no_such_module:reward"}
    monkeypatch.setattr(REWARDS, "_entries", entries)
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "broken" in out
    assert "cannot be imported: No module named 'no_such_module'" in out
    assert "shapes_thought" in out


def test_imports_come_first(tmp_path, monkeypatch, capsys):
    module = tmp_path / "listed_module.py"
    module.write_text("from rewards import REWARDS\nREWARDS.add('listed_here', lambda e: e)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))
    assert main(["list", "--import", "./listed_module.py"]) == 0
    assert "listed_here" in capsys.readouterr().out
