"""Options that several commands share."""

import argparse

import pytest

from agents.cli.options import make_parser, positive_int


def test_positive_int():
    assert positive_int("3") == 3
    for text in ("0", "-1", "x", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            positive_int(text)


def test_import_is_repeatable():
    args = make_parser("list").parse_args(["--import", "a", "--import", "./b.py"])
    assert args.imports == ["a", "./b.py"]


def test_options_are_not_abbreviated():
    _, others = make_parser("list").parse_known_args(["--imp", "a"])
    assert others == ["--imp", "a"]
