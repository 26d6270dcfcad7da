"""How a command ends: errors that the user can mend are one red line and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

USER_ERRORS = (ValueError, TypeError, ImportError, OSError, FloatingPointError)
"""Errors that wrong settings, files or rewards cause; and `rewards.UnscoredError`."""


@dataclass
class Outcome:
    """The end of a command.

    Attributes:
        status: the exit status of the process.
    """

    status: int = 0


@contextmanager
def report_errors() -> Iterator[Outcome]:
    """Print an error that the user can mend in one line; any other keeps its traceback.

    Yields:
        An `Outcome`, whose status is set when the block has ended.
    """
    outcome = Outcome()
    try:
        yield outcome
    except KeyboardInterrupt:
        # A training run has already said where its checkpoint is.
        _print("stopped")
        # By convention 128 + 2, the number of SIGINT.
        outcome.status = 130
    except Exception as error:
        # Notes mark an error of a reward or a plug-in, whose author needs the traceback.
        if getattr(error, "__notes__", None) or not _is_user_error(error):
            raise
        _print_error(error)
        outcome.status = 2


def _is_user_error(error: Exception) -> bool:
    if isinstance(error, USER_ERRORS):
        return True
    # An UnscoredError can only come after `rewards` was imported; importing it here takes seconds.
    rewards = sys.modules.get("rewards")
    return rewards is not None and isinstance(error, rewards.UnscoredError)


def _print_error(error: Exception) -> None:
    from rich.markup import escape

    # Square brackets in a message are not markup. Some errors have no message.
    _print(f"[red]error:[/red] {escape(str(error) or type(error).__name__)}")


def _print(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
