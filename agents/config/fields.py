"""One setting: a dataclass field with its help and its bounds."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, text: str, **rules: Any) -> Any:
    """Make a dataclass field with its help and its bounds.

    Args:
        default: the default value. Each instance gets its own copy of a list or mapping.
        text: one line of help.
        rules: `at_least`, `above`, `between=(low, high)` (both excluded) or `choices`; and
            `reason`, why the bound is there. See `agents.config.validation.check_setting`.
    """
    metadata = {"help": text, **rules}
    # A dataclass refuses them as defaults, because all instances would share them.
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
