"""`unigrpo tables`; what it runs is tested in `tests/agents/experiments`."""

from agents.cli import main


def test_no_results(tmp_path, capsys):
    assert main(["tables", "--page-only", "--out", str(tmp_path)]) == 2
    assert "expected finished runs" in capsys.readouterr().err


def test_unknown_row(tmp_path, capsys):
    assert main(["tables", "--rows", "no_such_row", "--out", str(tmp_path)]) == 2
    assert "no_such_row" in capsys.readouterr().err
