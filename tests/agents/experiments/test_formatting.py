"""Markdown as a page holds it."""

from agents.experiments.formatting import wrap_markdown


def test_prose_is_wrapped_and_tables_are_not():
    table = "| " + "cell " * 40 + "|"
    found = wrap_markdown(f"# title\n\n{'word ' * 40}\n\n* {'item ' * 40}\n\n{table}").splitlines()
    assert found[0] == "# title"
    assert table in found
    assert max(len(line) for line in found if line != table) <= 100
    items = [line for line in found if "item" in line]
    assert items[0].startswith("* item")
    assert all(line.startswith("  item") for line in items[1:])
