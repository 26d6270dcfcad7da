"""Sums of rewards in text, such as `0.7 * pickscore(device='cuda:1') + 0.3 * ocr`."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import Any

# The sign in front of a number belongs to the term, the one after `e` to the number.
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NAME = r"[^\W\d]\w*(?:[-./:][^\W\d]\w*)*"
# A sign; a number and `*`, or not; a name.
_BEGIN = re.compile(
    rf"\s*(?P<sign>[+-]?\s*-?)\s*(?:(?P<before>{_NUMBER})\s*\*\s*)?(?P<name>{_NAME})"
)
_OPEN = re.compile(r"\s*(?=\()")
# `*` and a number, or not. Then the next sign or the end.
_END = re.compile(rf"(?:\s*\*\s*(?P<after>-?{_NUMBER}))?\s*(?=[+-]|$)")


@dataclass(frozen=True)
class Term:
    """One reward of a sum.

    Attributes:
        name: of the reward.
        weight: what it is multiplied by.
        options: that stand in parentheses after its name.
    """

    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


def parse_sum(text: str) -> list[Term]:
    """Read a sum of rewards.

    A term is a name, or a name and a number joined by `*`, in either order. A name may hold `-`
    before a letter, so a minus between two names needs a space after it. Options may follow a
    name in parentheses; they are written as in Python, and their values are literals.

    Args:
        text: the sum. Nothing in it is executed.

    Returns:
        Its terms, in order. Those of one name and the same options are added up.

    Raises:
        ValueError: the text is not such a sum.

    >>> parse_sum("shapes - brevity * 0.1")
    [Term(name='shapes', weight=1.0, options={}), Term(name='brevity', weight=-0.1, options={})]
    >>> parse_sum("0.5 * ocr(threads=2)")
    [Term(name='ocr', weight=0.5, options={'threads': 2})]
    """
    terms: list[Term] = []
    position = 0
    while text[position:].strip():
        term, position = _read_term(text, position)
        for index, known in enumerate(terms):
            if (known.name, known.options) == (term.name, term.options):
                terms[index] = Term(term.name, known.weight + term.weight, term.options)
                break
        else:
            terms.append(term)
    return terms


def _read_term(text: str, start: int) -> tuple[Term, int]:
    """The term that begins at a place of the text, and where it ends."""
    begin = _BEGIN.match(text, start)
    if begin is None:
        raise _not_a_term(text, start)
    position = begin.end()
    options: dict[str, Any] = {}
    opening = _OPEN.match(text, position)
    if opening is not None:
        options, position = _read_options(text, begin["name"], opening.end())
    end = _END.match(text, position)
    if end is None:
        raise _not_a_term(text, start)
    # A number that is left out is 1. Both orders are allowed, so either may be there.
    weight = float(begin["before"] or 1.0) * float(end["after"] or 1.0)
    # "a + -b" has a sign of its own after that of the sum, and "a - -b" has two.
    if begin["sign"].count("-") == 1:
        weight = -weight
    return Term(begin["name"], weight, options), end.end()


def _not_a_term(text: str, start: int) -> ValueError:
    return ValueError(
        f"expected a reward such as 'shapes + 0.1 * brevity', got {text!r}: "
        f"{text[start:].strip()!r} does not begin with a name, or with a number, `*` and a name, "
        "and then `+`, `-` or the end"
    )


def _read_options(text: str, name: str, start: int) -> tuple[dict[str, Any], int]:
    """The options in the parentheses that open at a place of the text, and where they end."""
    problem = "its parenthesis is not closed"
    # A text in quotes may hold parentheses. The right one is the first that makes a whole call.
    for closing in re.finditer(r"\)", text[start:]):
        end = start + closing.end()
        try:
            # A name of a reward may hold `-`, and `f` may not.
            call = ast.parse(f"f{text[start:end]}", mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            problem = getattr(error, "msg", "") or str(error)
            continue
        assert isinstance(call, ast.Call)
        return _literals(name, call), end
    raise ValueError(
        f"expected options of {name!r} as in pickscore(device='cuda:1'), got {text[start:]!r}: "
        f"{problem}"
    )


def _literals(name: str, call: ast.Call) -> dict[str, Any]:
    """The keyword arguments of a call."""
    unnamed = [ast.unparse(argument) for argument in call.args]
    unnamed += [f"**{ast.unparse(each.value)}" for each in call.keywords if each.arg is None]
    if unnamed:
        raise ValueError(
            f"expected options of {name!r} by their names, as in pickscore(device='cuda:1'), got "
            f"{unnamed[0]!r}"
        )
    options: dict[str, Any] = {}
    for keyword in call.keywords:
        option = str(keyword.arg)
        # Only compiling would complain, and nothing is compiled here.
        if option in options:
            raise ValueError(f"expected one value for {option!r} of reward {name!r}, got two")
        try:
            options[option] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise ValueError(
                f"expected {option!r} of reward {name!r} to be a literal (a text in quotes, a "
                "number, True, False, None, a list or a mapping of such), got "
                f"{ast.unparse(keyword.value)!r}"
            ) from None
    return options
