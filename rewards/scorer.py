"""What rewards with a heavy part, such as a model or an engine, have in common."""

from __future__ import annotations

import threading
from typing import Any, Self


class LazyReward:
    """Base of rewards whose heavy parts are built at the first use and are never pickled.

    A subclass keeps its options as attributes, builds the heavy parts in `load`, and uses
    `self.loaded` when it is called.

    >>> class Loud(LazyReward):
    ...     def load(self):
    ...         return str.upper
    ...
    ...     def __call__(self, episodes):
    ...         return [float(self.loaded(text) == text) for text in episodes.texts]
    """

    _loaded: Any
    _is_loaded: bool
    _lock: threading.RLock

    # Here and not in `__init__`, which a subclass may forget to call and unpickling skips.
    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Make an object that has loaded nothing."""
        made = super().__new__(cls)
        vars(made).update(_not_loaded())
        return made

    def load(self) -> Any:
        """Build the heavy parts; called once, at the first use.

        Raises:
            ImportError: a package is missing.
            Exception: whatever keeps the parts from being built.
        """
        raise NotImplementedError(f"{type(self).__name__} has no load()")

    @property
    def loaded(self) -> Any:
        """What `load` returned. Threads that ask at the same time wait for one of them."""
        if not self._is_loaded:
            with self._lock:
                if not self._is_loaded:
                    loaded = self.load()
                    vars(self).update(_loaded=loaded, _is_loaded=True)
        return self._loaded

    def prepare(self) -> None:
        """Load, so that what is missing is known before the first episode.

        A subclass may also score one blank image.

        Raises:
            Exception: whatever `load` raised.
        """
        # The property loads; its value is of no use here.
        _ = self.loaded

    def __getstate__(self) -> dict[str, Any]:
        """The options alone: a process that unpickles the reward loads its own parts."""
        return {name: value for name, value in vars(self).items() if name not in _not_loaded()}


def _not_loaded() -> dict[str, Any]:
    """The attributes of a reward that has loaded nothing."""
    # The lock is re-entrant, because the parts of a reward may ask for one another.
    return {"_loaded": None, "_is_loaded": False, "_lock": threading.RLock()}
