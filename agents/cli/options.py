"""Options that several commands share."""

from __future__ import annotations

import argparse


def positive_int(text: str) -> int:
    """Read a whole number of at least 1, as an argparse type.

    Args:
        text: the word of the command line.

    Raises:
        argparse.ArgumentTypeError: it is not such a number.
    """
    # `isdecimal` refuses signs and points, so "-1" and "1.0" get the same message.
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def make_parser(command: str, epilog: str = "") -> argparse.ArgumentParser:
    """Make the parser of one command, with `--import`.

    Args:
        command: name of the command.
        epilog: what `--help` prints last, as it is.
    """
    from agents.cli import COMMANDS

    parser = argparse.ArgumentParser(
        f"unigrpo {command}",
        description=COMMANDS[command][1],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An option of hydra could be taken for an abbreviation of one of these.
        allow_abbrev=False,
    )
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE_OR_PATH",
        action="append",
        default=[],
        help="module to import first, for the rewards and variants it registers (repeatable)",
    )
    return parser
