"""Things that are known by a name, in Python, in configs and on the command line."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

T = TypeVar("T")

FEW = 12
"""Up to this many known names, an error message lists all of them."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of an error message about an unknown name.

    It proposes names that are spelled alike, and lists all known names unless they are many.

    Args:
        name: the unknown name.
        known: the names that exist.
    """
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    guess = ""
    if near:
        guess = f"did you mean {' or '.join(map(repr, near))}? "
        # A list of very many names would hide the proposal.
        if len(known) > FEW:
            return guess
    return f"{guess}Known: {', '.join(sorted(known)) or 'none'}"


class Registry(Generic[T]):
    """A mapping from names to things.

    Names are case-sensitive, and each can be taken once. An entry may be lazy
    (`"module:attribute"`): it is imported when it is first asked for. Entries may also come from
    installed packages.

    Args:
        kind: what the entries are, for messages.
        entry_point_group: the group of entry points under which installed packages add entries.

    >>> colours = Registry("colour")
    >>> colours.add("red", 1)
    >>> colours["red"]
    1
    >>> colours["rad"]
    Traceback (most recent call last):
    ValueError: unknown colour 'rad'; did you mean 'red'? Known: red
    """

    def __init__(self, kind: str, entry_point_group: str | None = None) -> None:
        self.kind = kind
        self._group = entry_point_group
        # A string or an entry point is a lazy entry: it is replaced once it is imported.
        self._entries: dict[str, T | str | EntryPoint] = {}
        # Looking for plug-ins takes a while, so it waits for the first question.
        self._plugins_loaded = entry_point_group is None

    def add(self, name: str, entry: T | str) -> None:
        """Add an entry.

        Args:
            name: the name by which it is known.
            entry: the thing itself, or `"module:attribute"`.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is already registered; choose another name")
        self._entries[name] = entry

    def describe(self) -> dict[str, str]:
        """Each name with the first line of its entry's docstring, sorted by name.

        An entry that cannot be imported is described by its error, and does not stop the others.
        """
        found = {}
        for name in self:
            try:
                docstring = inspect.getdoc(self[name]) or ""
            # An import can fail in any way, and a list should show the other entries then.
            except Exception as error:
                reason = str(error) or type(error).__name__
                found[name] = f"(cannot be imported: {reason.splitlines()[0]})"
            else:
                found[name] = docstring.partition("\n")[0]
        return found

    def __getitem__(self, name: str) -> T:
        """The entry with this name; a lazy one is imported.

        Raises:
            ValueError: there is no such entry.
        """
        self._load_plugins()
        if name not in self._entries:
            hint = did_you_mean(name, list(self._entries))
            raise ValueError(f"unknown {self.kind} {name!r}; {hint}")
        entry = self._entries[name]
        if isinstance(entry, str | EntryPoint):
            try:
                loaded = _load(entry)
            except Exception as error:
                # The error may come from a package that the user has never heard of.
                error.add_note(f"raised while {self.kind} {name!r} was imported from {entry!r}")
                raise
            self._entries[name] = cast(T, loaded)
        return cast(T, self._entries[name])

    def __iter__(self) -> Iterator[str]:
        """The names, sorted."""
        self._load_plugins()
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        """Whether there is an entry with this name."""
        self._load_plugins()
        return name in self._entries

    def _load_plugins(self) -> None:
        """Note the entries of installed packages, without importing them."""
        if self._plugins_loaded:
            return
        # Set first: a broken installation should not be searched again and again.
        self._plugins_loaded = True
        for point in entry_points(group=cast(str, self._group)):
            # A name of our own stays what it is, whatever is installed beside it.
            self._entries.setdefault(point.name, point)


def _load(entry: str | EntryPoint) -> object:
    """Import a lazy entry."""
    if isinstance(entry, EntryPoint):
        return entry.load()
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)
