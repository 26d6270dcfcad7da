"""Sums of rewards in text."""

import pytest

from rewards.expression import Term, parse_sum


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("shapes", {"shapes": 1}),
        ("0.5 * a + b+2*c", {"a": 0.5, "b": 1, "c": 2}),
        ("a * 0.5 + b*2", {"a": 0.5, "b": 2}),
        ("shapes - 0.1 * brevity", {"shapes": 1, "brevity": -0.1}),
        ("shapes-0.1*brevity", {"shapes": 1, "brevity": -0.1}),
        ("-a - b", {"a": -1, "b": -1}),
        ("a + -0.2 * b", {"a": 1, "b": -0.2}),
        ("a - -0.2 * b", {"a": 1, "b": 0.2}),
        ("a * -2", {"a": -2}),
        ("1e-3 * a + b * 1E+2 - 2.5e-1*c", {"a": 1e-3, "b": 100, "c": -0.25}),
        (".5*a + 2.*b", {"a": 0.5, "b": 2}),
        ("a + a - 0.5 * a", {"a": 1.5}),
        ("my-reward - my.other/part", {"my-reward": 1, "my.other/part": -1}),
        ("team:reward*2-a", {"team:reward": 2, "a": -1}),
        ("-0.1 * a", {"a": -0.1}),
        ("", {}),
    ],
)
def test_sums_in_text(text, weights):
    found = parse_sum(text)
    assert [(term.name, term.weight) for term in found] == list(weights.items())
    assert not any(term.options for term in found)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        (
            "0.7 * pickscore(device='cuda:1', batch=8) + 0.3 * ocr",
            [Term("pickscore", 0.7, {"device": "cuda:1", "batch": 8}), Term("ocr", 0.3)],
        ),
        ("a(x=-1) * 2 - b (y=None)", [Term("a", 2, {"x": -1}), Term("b", -1, {"y": None})]),
        ("a()", [Term("a")]),
        ("my-reward(x=True)-a.b/c", [Term("my-reward", 1, {"x": True}), Term("a.b/c", -1)]),
        ("a(x=')', y=\"(\") + b", [Term("a", 1, {"x": ")", "y": "("}), Term("b")]),
        ("a(x='1 + 2 * b')", [Term("a", 1, {"x": "1 + 2 * b"})]),
        (
            "a(x=[1, {'tries': (5, 2.5)}],\n  y='''two\nlines''')",
            [Term("a", 1, {"x": [1, {"tries": (5, 2.5)}], "y": "two\nlines"})],
        ),
        ("a(x=1) + 2 * a(x=1) + a(x=2)", [Term("a", 3, {"x": 1}), Term("a", 1, {"x": 2})]),
    ],
)  # fmt: skip
def test_options_in_parentheses(text, terms):
    assert parse_sum(text) == terms


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("x * a", "x * a"),
        ("a +", "+"),
        ("a b", "a b"),
        ("0.5", "0.5"),
        ("a + 2 * * b", "+ 2 * * b"),
        ("a, b", "a, b"),
        ("a + 0.5x", "+ 0.5x"),
        ("2 * (a + b)", "2 * (a + b)"),
        ("b + a(x=1)(y=2)", "+ a(x=1)(y=2)"),
        ("a(x=1).b", "a(x=1).b"),
        ("'a'", "'a'"),
    ],
)
def test_text_that_is_no_sum(text, rest):
    with pytest.raises(ValueError, match="expected a reward such as") as error:
        parse_sum(text)
    assert f"{rest!r} does not begin with a name" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os')", r"options of '__import__' by their names, .* got \"'os'\""),
        ("a(1)", "by their names, .* got '1'"),
        ("a(**{'x': 1})", "by their names"),
        ("a(*[1])", "by their names"),
        ("a(x=__import__('os').system('ls'))", "'x' of reward 'a' to be a literal"),
        ("a(x=y)", "to be a literal .* got 'y'"),
        ("a(x=f'{1}')", "to be a literal"),
        ("a(x=1 if 1 else 2)", "to be a literal"),
        ("a(x={**{}})", "to be a literal"),
        ("a(x=1", "got '\\(x=1': its parenthesis is not closed"),
        ("a(x=1, 2)", "positional argument follows keyword"),
        ("a(x=1, x=2)", "one value for 'x' of reward 'a', got two"),
        ("a(x='1)", "unterminated string"),
        (f"a(x={'(' * 210}{')' * 210})", "too many nested parentheses"),
        ("a(x='\0')", "null"),
    ],
)
def test_options_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sum(text)
