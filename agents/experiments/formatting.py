"""Numbers and tables as Markdown text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def mean_and_half_range(values: Sequence[float | None]) -> str:
    """Write the mean of some seeds, and half their range if there are several.

    >>> mean_and_half_range([0.25, 0.75])
    '0.500 ± 0.250'
    >>> mean_and_half_range([0.5]), mean_and_half_range([None])
    ('0.500', '')

    Args:
        values: one for each seed; None where there is no such measure.
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{sum(known) / len(known):.3f}"
    if len(known) == 1:
        return mean
    return f"{mean} ± {(max(known) - min(known)) / 2:.3f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown.

    Args:
        head: the titles of the columns.
        rows: the cells.
    """
    lines = []
    for cells in (head, ["---"] * len(head), *rows):
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wrap_markdown(text: str, width: int = 100) -> str:
    """Wrap the prose of Markdown; tables, headings and images stay as they are.

    Args:
        text: paragraphs and lists.
        width: columns of a line.
    """
    lines = []
    for line in text.splitlines():
        if line.startswith(("|", "#", "![")) or not line:
            lines.append(line)
            continue
        indent = ""
        if line.startswith("* "):
            indent = "  "
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)
