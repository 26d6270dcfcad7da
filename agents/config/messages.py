"""Errors of hydra and OmegaConf as messages of one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn the errors of hydra and OmegaConf into a ValueError of one line."""
    try:
        yield
    except MissingConfigException as error:
        raise ValueError(_missing_config(error)) from error
    except OverrideParseException as error:
        # A syntax error in one word of the command line, which the user must see to find it.
        raise ValueError(f"cannot read {error.override!r}: {one_line(error)}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """Write the message of an error of hydra or OmegaConf in one line.

    Args:
        error: the error, or one that was raised from it.
    """
    # Where OmegaConf knows the setting, its name and the first line of the message are enough. The
    # error that knows it may be the cause of the one that came.
    cause: BaseException | None = error
    while cause is not None:
        key = getattr(cause, "full_key", None)
        if key:
            return f"{key}: {str(cause).splitlines()[0]}"
        cause = cause.__cause__
    # Line breaks and runs of blanks become one blank.
    return " ".join(str(error).split())


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """See `rewards.registry.did_you_mean`.

    Args:
        name: the unknown name.
        known: the names that exist.
    """
    # Imported only for an error: `rewards` imports torch, which takes seconds.
    from rewards.registry import did_you_mean

    # Where the known names are too many to list, the text ends in a blank.
    return did_you_mean(name, known).rstrip()


def _missing_config(error: MissingConfigException) -> str:
    # Such as `algorithm/fpo`; a file that is no option of a group has no slash.
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return one_line(error)
    return f"unknown {group} {option!r}; {did_you_mean(option, list(error.options or ()))}"
