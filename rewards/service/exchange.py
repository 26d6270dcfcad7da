"""One request and its answer: every way to fail is one kind of error."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx2

ERROR_LENGTH = 2000
"""So many bytes of the text of an error are kept."""

CONNECT_SECONDS = 10.0
"""A connection that takes longer has failed."""

BUSY = (408, 425, 429)
"""The status of a server that works but does not take this request now."""

ABSENT = (502, 503, 504)
"""The status that a gateway gives if there is no server behind it, as during a restart."""


class CallError(RuntimeError):
    """A request that brought no usable answer.

    Args:
        kind: a few words by which failures are counted, such as "HTTP 500" or "timeout".
        detail: what happened, for the reader of an error message.
        retry: whether another try may help.
        wait: so many seconds the server asks to wait before it.
        is_outage: whether it says that the server does not work, and not only this request.
        is_counted: whether it uses up one of the tries that a request has.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        retry: bool = False,
        wait: float | None = None,
        is_outage: bool = False,
        is_counted: bool = True,
    ) -> None:
        # Both, so that the error can be pickled.
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail
        self.retry = retry
        self.wait = wait
        self.is_outage = is_outage
        self.is_counted = is_counted

    def hide(self, secret: str) -> None:
        """Take a secret out of the text.

        Args:
            secret: what must not be shown; nothing happens if it is empty.
        """
        if secret:
            self.detail = self.detail.replace(secret, "***")
            self.args = (self.kind, self.detail)

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def new_client(token: str, is_secure: bool) -> httpx2.AsyncClient:
    """A client that sends nothing anywhere else than to the URL of a request.

    Args:
        token: sent as bearer token, unless it is empty.
        is_secure: whether it will be used for HTTPS.

    Raises:
        ImportError: httpx2 is not installed.
        ValueError: the token cannot stand in a header.
    """
    try:
        import httpx2
    except ImportError as error:
        raise ImportError(
            "a reward on a server needs httpx2; install it with: pip install 'unigrpo[remote]'"
        ) from error
    # The message must not hold the token, as that of httpx2 would.
    if not (token.isascii() and token.isprintable()):
        raise ValueError("expected a token of printable ASCII characters, got others")
    # It would write a line for each request into the log of the run.
    chatter = logging.getLogger("httpx2")
    if chatter.level == logging.NOTSET:
        chatter.setLevel(logging.WARNING)
    # A compressed answer could be far larger than what is counted while it arrives.
    headers = {"accept-encoding": "identity"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    return httpx2.AsyncClient(
        headers=headers,
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
        # How many are under way at once is limited before a request comes here.
        limits=httpx2.Limits(max_connections=None),
        trust_env=False,
        follow_redirects=False,
        # The certificates take 0.1 s to load, and plain HTTP has no use for them.
        verify=is_secure,
    )


async def exchange(
    client: httpx2.AsyncClient,
    url: str,
    body: bytes | None,
    content_type: str,
    *,
    seconds: float,
    answer_bytes: int,
) -> bytes:
    """Send one request and read its answer.

    Args:
        client: from `new_client`.
        url: where to.
        body: what is posted; None asks by GET.
        content_type: of the body.
        seconds: from the first byte sent to the last one received.
        answer_bytes: an answer that is longer is given up.

    Raises:
        CallError: for whatever reason there is no answer with status 200.
    """
    import httpx2

    method = "GET" if body is None else "POST"
    headers = {} if body is None else {"content-type": content_type}
    try:
        # The time-outs of httpx2 hold for one read each: an answer that comes in drops of one
        # byte never reaches them.
        async with asyncio.timeout(seconds):
            async with client.stream(method, url, content=body, headers=headers) as response:
                if response.status_code != 200:
                    raise await _refusal(response)
                return await _read(response, answer_bytes)
    except TimeoutError:
        detail = f"no whole answer from {url} in {seconds:g} s"
        raise CallError("timeout", detail, retry=True, is_outage=True) from None
    except httpx2.TransportError as error:
        # The request is not to blame for a server that is not there.
        is_counted = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        detail = f"{url}: {type(error).__name__}: {error}"
        raise CallError(
            "connection", detail, retry=True, is_outage=True, is_counted=is_counted
        ) from None


async def _read(response: httpx2.Response, answer_bytes: int) -> bytes:
    """The body of an answer, counted while it arrives."""
    body = bytearray()
    async for part in response.aiter_raw():
        body += part
        if len(body) > answer_bytes:
            detail = f"{response.url} sent more than {answer_bytes} bytes"
            raise CallError("too long", detail)
    return bytes(body)


async def _refusal(response: httpx2.Response) -> CallError:
    """What a status other than 200 means."""
    status = response.status_code
    body = bytearray()
    async for part in response.aiter_raw():
        body += part
        if len(body) >= ERROR_LENGTH:
            break
    text = body[:ERROR_LENGTH].decode("utf-8", "replace").strip()
    if response.is_redirect:
        target = response.headers.get("location")
        text = f"a redirect to {target!r}, which is not followed; give the final URL instead"
    is_outage = status >= 500
    wait = None
    if is_outage or status in BUSY:
        wait = _seconds_to_wait(response.headers.get("retry-after"))
    return CallError(
        f"HTTP {status}",
        f"{text or 'no text'} ({response.url})",
        retry=is_outage or status in BUSY,
        wait=wait,
        # A server that says when to come back works.
        is_outage=is_outage and wait is None,
        is_counted=wait is None and status not in ABSENT,
    )


def _seconds_to_wait(retry_after: str | None) -> float | None:
    """Seconds from a header `Retry-After`, which has seconds or a date; None if it has neither."""
    if not retry_after:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        # More digits than a float can hold give infinity, which is longer than any budget.
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    # HTTP allows no other zone than GMT.
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
