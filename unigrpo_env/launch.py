"""The console script `unigrpo`: checks the installation, then calls `agents.cli`.

It lives here because another distribution, openai-agents, has a package `agents` of its own and
overwrites files of ours without a warning. The check must not lie among those files.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

MARKS = {"agents": "__unigrpo__", "rewards": "register_reward"}
"""Each package that others may overwrite, with a name that our `__init__.py` contains."""


def overwritten_package() -> str | None:
    """The first of our packages that is not ours any more; None if all are.

    The files are read, not imported: a foreign package may need what is not installed.
    """
    for package, mark in MARKS.items():
        spec = find_spec(package)
        # There is no origin where `__init__.py` is gone: the other distribution was removed.
        if spec is None or spec.origin is None:
            return package
        source = Path(spec.origin)
        # In a zip archive there is no such file, and nothing that could be overwritten.
        if source.is_file() and mark not in source.read_text(encoding="utf-8"):
            return package
    return None


def main() -> int:
    """Run the command line.

    Returns:
        The exit status of `agents.cli.main`, or 2 if the installation is damaged.
    """
    package = overwritten_package()
    if package is not None:
        print(
            f"error: the installed package `{package}` is not that of unigrpo: another "
            "distribution (openai-agents does) has overwritten or removed its files; "
            "`pip install --force-reinstall --no-deps unigrpo`, in an environment without the "
            "other one, mends it",
            file=sys.stderr,
        )
        return 2
    # A plain import of `agents` would be against the order of the packages.
    return importlib.import_module("agents.cli").main()


if __name__ == "__main__":
    sys.exit(main())
