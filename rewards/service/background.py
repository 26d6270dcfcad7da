"""One event loop for each process, in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_inherited: list[asyncio.AbstractEventLoop] = []


def background_loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process; the first call starts it.

    `asyncio.run` in the caller's thread would fail wherever a loop already runs, such as in a
    notebook. The thread does not keep the process alive.
    """
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="rewards-http", daemon=True).start()
        return _loop


def _forget() -> None:
    """Start anew in a forked process, which has no thread for the loop of its parent."""
    global _lock, _loop
    _lock = threading.Lock()
    if _loop is not None:
        # Never collected: closing the copy would change the selector that the parent still uses.
        _inherited.append(_loop)
        _loop = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def then(future: Future[T], change: Callable[[T], S]) -> Future[S]:
    """A future of what `change` makes of the result of another one.

    Args:
        future: what is waited for. Cancelling the new future cancels it too.
        change: called once with its result, in the thread that finishes it. It should be quick.

    Returns:
        A future that fails with whatever `future` or `change` raised.
    """
    changed: Future[S] = Future()

    def finish(done: Future[T]) -> None:
        # False if it was cancelled, and then it takes no result any more.
        if not changed.set_running_or_notify_cancel():
            return
        try:
            changed.set_result(change(done.result()))
        # Whoever asks for the result gets the error; this thread has no use for it.
        except BaseException as error:
            changed.set_exception(error)

    def pass_on(changed: Future[S]) -> None:
        if changed.cancelled():
            future.cancel()

    changed.add_done_callback(pass_on)
    future.add_done_callback(finish)
    return changed
