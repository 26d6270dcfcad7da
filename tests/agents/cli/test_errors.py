"""Errors, as a user of the command line sees them."""

import pytest

from agents.cli.errors import report_errors
from rewards import UnscoredError


@pytest.mark.parametrize(
    "kind", [ValueError, TypeError, ImportError, OSError, FloatingPointError, UnscoredError]
)
def test_errors_to_mend_are_one_line(kind, capsys):
    with report_errors() as outcome:
        raise kind("expected [this], got that")
    assert outcome.status == 2
    assert capsys.readouterr().err == "error: expected [this], got that\n"


def test_no_error():
    with report_errors() as outcome:
        pass
    assert outcome.status == 0


def test_an_error_of_a_reward_keeps_its_traceback():
    error = ValueError("bad pixel")
    error.add_note("raised by reward 'mine'")
    with pytest.raises(ValueError, match="bad pixel"), report_errors():
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="bug"), report_errors():
        raise RuntimeError("bug")


def test_interrupt(capsys):
    with report_errors() as outcome:
        raise KeyboardInterrupt
    assert outcome.status == 130
    assert "stopped" in capsys.readouterr().err
