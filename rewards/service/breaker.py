"""Stops the requests to a server that does not answer, and tries it one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Breaker:
    """Holds requests back after too many failed ones in a row.

    While it is open, one request at a time is let through as a probe. The others wait for what
    becomes of it: if they failed at once, a short restart of the server would lose them all. The
    first success closes it again.

    It belongs to one event loop.

    Args:
        limit: so many failures in a row open it.
        pause: seconds between the end of a failed probe and the next one.
    """

    def __init__(self, limit: int, pause: float) -> None:
        self._limit = limit
        self._pause = pause
        self._failures = 0
        self._next_probe = 0.0
        self._is_probing = False
        self._changed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether requests are held back."""
        return self._failures >= self._limit

    def report(self, has_failed: bool) -> None:
        """Count what became of a request.

        Args:
            has_failed: whether the server did not answer. An answer that refuses the request is
                no failure.
        """
        if has_failed:
            self._failures += 1
            self._next_probe = time.monotonic() + self._pause
        else:
            self._failures = 0
        self._wake()

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """Wait until a request may be sent. The request is made inside the context."""
        is_probe = await self._wait()
        try:
            yield
        finally:
            # Also when the probe is cancelled, or nobody would ever be let through again.
            if is_probe:
                self._is_probing = False
                self._wake()

    async def _wait(self) -> bool:
        """Wait for leave to send; whether it is the one probe that has it."""
        while self.is_open:
            left: float | None = self._next_probe - time.monotonic()
            if self._is_probing:
                left = None
            elif left is not None and left <= 0:
                self._is_probing = True
                return True
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return False

    def _wake(self) -> None:
        """Let all that wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()
