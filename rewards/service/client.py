"""Requests to servers that score: many at once, in order, and a failure spoils only itself."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from rewards.registry import did_you_mean
from rewards.service.background import background_loop
from rewards.service.breaker import Breaker
from rewards.service.exchange import CallError, exchange, new_client

T = TypeVar("T")

SHOWN_BYTES = 200
"""So many bytes of a malformed answer are shown."""

MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What reading an answer of the wrong form may raise."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a client asks of a server at most. Times are in seconds.

    Attributes:
        concurrency: requests under way at once.
        timeout: of one try, from the first byte sent to the last one received.
        budget: of a whole batch. What is unanswered then has failed.
        tries: of one request. A try that found no server, or that the server asked to repeat
            later, does not count.
        answer_bytes: of one answer.
        backoff: the longest pause before the second try. It doubles with each further one, and
            the pause is drawn between 0 and it.
        longest_pause: where that doubling ends.
        failures_in_a_row: after so many, one request at a time tries the server, and the others
            wait.
        probe_pause: between two such tries.
    """

    concurrency: int = 16
    timeout: float = 60.0
    budget: float = 300.0
    tries: int = 3
    answer_bytes: int = 1 << 20
    backoff: float = 0.25
    longest_pause: float = 8.0
    failures_in_a_row: int = 8
    probe_pause: float = 2.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one of them is not a number above 0.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            # Not `value <= 0`, which lets NaN pass.
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"expected limits.{field.name} to be above 0, got {value!r}")

    @classmethod
    def of(cls, limits: Limits | Mapping[str, Any] | None) -> Limits:
        """Limits from what stands in a config.

        Args:
            limits: some of the attributes by name; limits as they are; or None for the defaults.

        Raises:
            ValueError: an unknown name, or a value that is no number above 0.
        """
        if isinstance(limits, Limits):
            return limits
        given = dict(limits or {})
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"unknown entry {name!r} of limits; {did_you_mean(name, known)}")
        return cls(**given)


@dataclass(frozen=True)
class Request(Generic[T]):
    """One request.

    Attributes:
        path: what follows the URL of the client, such as "/models".
        read: makes the result from the bytes of the answer. What it raises of `MALFORMED` leads
            to another try; a `CallError` says itself what to do.
        body: what is posted, or a function that makes it, which is called in another thread, just
            before it is sent. None asks by GET.
        content_type: of the body.
    """

    path: str
    read: Callable[[bytes], T]
    body: bytes | Callable[[], bytes] | None = None
    content_type: str = "application/json"


class HttpClient:
    """Sends batches of requests to one server and gets answers or errors, in order.

    All clients of a process share one background event loop, which starts at the first request.
    A client can be pickled and survives a fork; the copy makes its own connections. It follows no
    redirects and ignores proxies of the environment, because both would send the images elsewhere.

    Args:
        url: where the server is; the path of a request is put behind it.
        token: sent as bearer token.
        token_variable: the environment variable that holds the token. It is read when the first
            request is sent, and what it holds is never pickled.
        limits: what is asked of the server at most.

    Raises:
        ValueError: the URL is none for HTTP, or holds a password; or both tokens are given.
    """

    def __init__(
        self,
        *,
        url: str,
        token: str | None = None,
        token_variable: str | None = None,
        limits: Limits | Mapping[str, Any] | None = None,
    ) -> None:
        if token and token_variable:
            raise ValueError("expected token or token_variable, got both; leave one out")
        self.url = _checked(url)
        self.limits = Limits.of(limits)
        self._token = token
        self._token_variable = token_variable
        self._connection: _Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Options alone: connections stay in the process that made them."""
        return self.__dict__ | {"_connection": None}

    def submit_batch(
        self, requests: Sequence[Request[T]], budget: float | None = None
    ) -> Future[list[T | CallError]]:
        """Send requests, and return at once.

        Args:
            requests: what is asked.
            budget: seconds for all of them; if left out, that of the limits.

        Returns:
            A future of one entry for each request, in order: what its `read` returned, or why
            there is none. It fails only where `body` or `read` raised something unforeseen.
            Cancelling it ends the requests.

        Raises:
            ValueError: the environment variable of the token is not set.
            ImportError: httpx2 is not installed.
        """
        connection = self._connected()
        work = connection.send_all(requests, budget or self.limits.budget)
        return asyncio.run_coroutine_threadsafe(work, connection.loop)

    def ask(self, request: Request[T], seconds: float = 10.0) -> T:
        """Send one request, try it once and wait for the answer.

        Args:
            request: what is asked.
            seconds: for the answer.

        Raises:
            CallError: there is no usable answer.
            ValueError: the environment variable of the token is not set.
            ImportError: httpx2 is not installed.
        """
        connection = self._connected()
        work = connection.send_once(request, seconds)
        return asyncio.run_coroutine_threadsafe(work, connection.loop).result()

    def _connected(self) -> _Connection:
        """The connection of this process."""
        loop = background_loop()
        # A forked process has another loop than the one whose connection it inherited.
        if self._connection is None or self._connection.loop is not loop:
            token = self._token
            if self._token_variable:
                token = os.environ.get(self._token_variable)
                if not token:
                    raise ValueError(
                        f"expected a token in the environment variable {self._token_variable}, "
                        "got none; set it, or leave token_variable out"
                    )
            self._connection = _Connection(loop, self.url, token, self.limits)
        return self._connection


class _Connection:
    """The live part of a client. Its coroutines run on the background loop alone."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, url: str, token: str | None, limits: Limits
    ) -> None:
        self.loop = loop
        self._url = url
        self._limits = limits
        # A token from a file often ends in a line break, which no header may hold.
        self._token = (token or "").strip()
        self._http = new_client(self._token, url.startswith("https:"))
        self._gate = asyncio.Semaphore(limits.concurrency)
        self._breaker = Breaker(limits.failures_in_a_row, limits.probe_pause)
        self._outage: CallError | None = None

    async def send_all(self, requests: Sequence[Request[Any]], budget: float) -> list[Any]:
        """Answers or errors in order; what is late is an error."""
        if not requests:
            return []
        calls = [_Call(request) for request in requests]
        tasks = [asyncio.create_task(self._keep_trying(call)) for call in calls]
        try:
            _, late = await asyncio.wait(tasks, timeout=budget)
        finally:
            # Also if the batch itself is cancelled: nobody waits for its answers then.
            for task in tasks:
                task.cancel()
        if late:
            # A connection that cannot be closed at once must not hold up the batch.
            await asyncio.wait(late, timeout=1.0)
        answers: list[Any] = []
        for call, task in zip(calls, tasks, strict=True):
            if task in late:
                answers.append(self._out_of_time(call, budget))
            else:
                answers.append(task.result())
        return answers

    async def send_once(self, request: Request[Any], seconds: float) -> Any:
        """One try, whatever the breaker says."""
        call = _Call(request)
        return await self._try(call, min(seconds, self._limits.timeout))

    async def _keep_trying(self, call: _Call) -> Any:
        """The answer, or the error after which there is no other try."""
        tries = 0
        longest = self._limits.backoff
        try:
            while True:
                try:
                    return await self._admitted_try(call)
                except CallError as error:
                    call.error = error
                if call.error.is_counted:
                    tries += 1
                if not call.error.retry or tries >= self._limits.tries:
                    return call.error
                # Drawn at random, so that what failed together does not come back together.
                pause = random.uniform(0, longest)
                longest = min(2 * longest, self._limits.longest_pause)
                await asyncio.sleep(max(pause, call.error.wait or 0))
        finally:
            # The bodies of all requests of a batch may be more than the memory can hold.
            call.body = None

    async def _admitted_try(self, call: _Call) -> Any:
        """One try, as soon as its turn has come."""
        # The gate first: what passes the breaker must be sent while its leave still holds.
        async with self._gate, self._breaker.admit():
            try:
                answer = await self._try(call, self._limits.timeout)
            except CallError as error:
                self._report(error)
                raise
            self._report(None)
            return answer

    async def _try(self, call: _Call, seconds: float) -> Any:
        """Send a request once and read its answer."""
        try:
            return await self._exchange(call, seconds)
        except CallError as error:
            # Some servers send back what they were sent, and this text is logged.
            error.hide(self._token)
            raise

    async def _exchange(self, call: _Call, seconds: float) -> Any:
        """The same, with errors that may hold the token."""
        request = call.request
        if callable(request.body):
            # Made once, in a thread: it may take many times longer than sending it.
            call.body = call.body or await asyncio.to_thread(request.body)
        else:
            call.body = request.body
        url = self._url + request.path
        answer = await exchange(
            self._http,
            url,
            call.body,
            request.content_type,
            seconds=seconds,
            answer_bytes=self._limits.answer_bytes,
        )
        try:
            return request.read(answer)
        except MALFORMED as error:
            start = answer[:SHOWN_BYTES].decode("utf-8", "replace")
            reason = f"{type(error).__name__}: {error}"
            detail = f"cannot read the answer of {url} ({reason}); it begins with {start!r}"
            raise CallError("malformed", detail, retry=True) from error

    def _report(self, error: CallError | None) -> None:
        """Tell the breaker what became of a try."""
        if error is not None and error.wait is not None:
            # The server works, but its "later" does not prove that it can answer.
            return
        was_open = self._breaker.is_open
        if error is not None and error.is_outage:
            self._outage = error
            self._breaker.report(has_failed=True)
        else:
            self._outage = None
            self._breaker.report(has_failed=False)
        if self._breaker.is_open and not was_open:
            logger.warning("waiting for a server that does not work: %s", error)
        if was_open and not self._breaker.is_open:
            logger.warning("the server at %s works again", self._url)

    def _out_of_time(self, call: _Call, budget: float) -> CallError:
        """What to say about a request that has no answer in time."""
        if call.error is not None:
            reason = f"its last try: {call.error}"
        elif self._outage is not None:
            reason = f"it waited for the server: {self._outage}"
        else:
            reason = "its first try was not finished"
        detail = f"no answer from {self._url} in the {budget:g} s of the batch; {reason}"
        return CallError("out of time", detail)


@dataclass
class _Call:
    """A request on its way.

    Attributes:
        request: what is asked.
        body: what is posted, once it is made.
        error: of the last try.
    """

    request: Request[Any]
    body: bytes | None = None
    error: CallError | None = None


def _checked(url: str) -> str:
    """The URL without a slash at its end, if it is one."""
    parts = urlsplit(url)
    # It stands in error messages and logs.
    if parts.username or parts.password:
        raise ValueError(
            "expected a url without user name and password; give `token` or `token_variable`"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ValueError(f"expected a url such as 'http://localhost:8000/v1', got {url!r}")
    return url.rstrip("/")
