"""A server that scores for training runs on other machines, or in other environments.

It needs the extra `serve`. The reward `remote` is its client.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from rewards.expression import parse_sum
from rewards.registry import did_you_mean
from rewards.service.wire import pack_health, pack_scores, unpack_episodes
from rewards.weighted_sum import WeightedReward

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

SUM = "sum"
"""The name under which a server has the whole sum."""

RESERVED = (SUM, "reward", "failures")
"""Names that mean something else in a URL or an answer."""

BODY_BYTES = 256 << 20
"""The largest body that is read, unless another limit is given."""

QUEUE = 8
"""So many requests are read, wait or are scored at once, unless another number is given."""

BODY_SECONDS = 60.0
"""A body must arrive in this time."""

KEEP_ALIVE_SECONDS = 60
"""A connection without requests is closed after it, later than the client would."""

CLOSE = {"connection": "close"}
"""The header of an answer to a client that would otherwise go on sending."""

logger = logging.getLogger(__name__)


def served_rewards(text: str) -> dict[str, WeightedReward]:
    """The rewards of a server: the whole sum by the name `sum`, and each reward in it by its own.

    Args:
        text: a sum, as for `rewards.expression.parse_sum`.

    Raises:
        ValueError: no such sum, an unknown name or option, a name that stands twice with
            different options, or one that a server needs for itself.
    """
    rewards = {SUM: WeightedReward(text)}
    for term in parse_sum(text):
        if term.name in RESERVED:
            raise ValueError(
                f"the name {term.name!r} means something else on a server; serve that reward by "
                f"another one, as in far(use={term.name!r})"
            )
        if term.name in rewards:
            raise ValueError(
                f"expected each reward once, got {term.name!r} twice with different options; give "
                f"one of them a name of its own, as in other(use={term.name!r}, ...)"
            )
        rewards[term.name] = WeightedReward(term.name, {term.name: term.options})
    return rewards


def make_app(
    rewards: Mapping[str, WeightedReward],
    *,
    token: str = "",
    body_bytes: int = BODY_BYTES,
    queue: int = QUEUE,
) -> Starlette:
    """The server as an ASGI application.

    `POST /score/NAME` takes episodes from `rewards.service.wire.pack_episodes` and answers as
    `rewards.service.wire.pack_scores`. `GET /health` answers with the names of the rewards, the
    version of this library and the number of the wire's form. An error is a status with its text:
    400 for a body that holds no episodes, 401 for the token, 404 for the name, 408 for a body that
    is too slow, 413 for one that is too long, 500 with what the scorer raised, 503 for a full
    queue.

    Args:
        rewards: by the names under which they are asked for.
        token: what a client must send as bearer token; empty for none.
        body_bytes: a body may have at most.
        queue: so many requests are read, wait or are scored at once.

    Raises:
        ImportError: Starlette is not installed.
        ValueError: the token cannot stand in a header, or a limit is below 1.
    """
    try:
        from starlette.applications import Starlette
        from starlette.routing import Route
    except ImportError as error:
        raise _missing("starlette") from error
    # A token from a file often ends in a line break; the client leaves it out too.
    token = token.strip()
    # The message must not hold the token.
    if not (token.isascii() and token.isprintable()):
        raise ValueError("expected a token of printable ASCII characters, got others")
    for name, value in (("body_bytes", body_bytes), ("queue", queue)):
        if value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
    desk = _Desk(rewards, token, body_bytes, queue)
    routes = [
        Route("/health", desk.health),
        # The name of a reward may hold slashes.
        Route("/score/{name:path}", desk.score, methods=["POST"]),
    ]
    return Starlette(routes=routes)


def serve(app: Starlette, host: str, port: int) -> None:
    """Run the server until it is interrupted. What is being scored then is still answered.

    Args:
        app: from `make_app`.
        host: the address to listen on.
        port: to listen on; 0 for any that is free.

    Raises:
        ImportError: uvicorn is not installed.
        SystemExit: the port is taken.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise _missing("uvicorn") from error
    uvicorn.run(app, host=host, port=port, access_log=False, timeout_keep_alive=KEEP_ALIVE_SECONDS)


class _Desk:
    """Takes the requests, and lets one scorer work at a time."""

    def __init__(
        self, rewards: Mapping[str, WeightedReward], token: str, body_bytes: int, queue: int
    ) -> None:
        self._rewards = dict(rewards)
        self._token = token.encode()
        self._body_bytes = body_bytes
        self._places = queue
        self._turn = asyncio.Lock()
        # One thread for all calls: two scorers at once would need the memory of both, and few are
        # made for several threads.
        self._scorer = ThreadPoolExecutor(1, "scorer")

    async def health(self, request: Request) -> Response:
        """Say what is here."""
        from starlette.responses import Response

        self._check_token(request)
        return Response(pack_health(self._rewards), media_type="application/json")

    async def score(self, request: Request) -> Response:
        """Score the episodes of one request."""
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        parts = request.stream()
        try:
            self._check_token(request)
            reward = self._reward(request.path_params["name"])
            return await self._in_queue(request, parts, reward)
        except HTTPException as error:
            if not await self._discard(parts):
                error.headers = {**(error.headers or {}), **CLOSE}
            raise
        except ClientDisconnect:
            # Nobody reads this answer.
            return Response(status_code=400)

    def _check_token(self, request: Request) -> None:
        """Refuse who has no right to ask."""
        from starlette.exceptions import HTTPException

        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Not `==`, whose time tells how much of a guess is right.
        is_right = hmac.compare_digest(given.strip().encode(), self._token)
        if self._token and not (is_right and scheme.lower() == "bearer"):
            headers = {"www-authenticate": "Bearer"}
            raise HTTPException(401, "expected the token of this server, got another one", headers)

    def _reward(self, name: str) -> WeightedReward:
        """The reward of a name."""
        from starlette.exceptions import HTTPException

        if name not in self._rewards:
            known = did_you_mean(name, list(self._rewards))
            raise HTTPException(404, f"no reward {name!r} on this server; {known}")
        return self._rewards[name]

    async def _in_queue(
        self, request: Request, parts: AsyncIterator[bytes], reward: WeightedReward
    ) -> Response:
        """Read and score, if there is a place left."""
        from starlette.exceptions import HTTPException

        if self._places == 0:
            detail = "too many requests wait for this server; ask again later"
            raise HTTPException(503, detail, {"retry-after": "1"})
        # Taken before the body is read, so that the memory for bodies has a limit.
        self._places -= 1
        try:
            return await self._answer(request, await self._read(request, parts), reward)
        finally:
            self._places += 1

    async def _read(self, request: Request, parts: AsyncIterator[bytes]) -> bytes:
        """The body, counted while it streams: a client may send more than it has declared."""
        from starlette.exceptions import HTTPException

        too_long = (
            f"expected a body of at most {self._body_bytes} bytes, got more; send fewer episodes "
            "at once (the option `batch`), or raise the limit of this server"
        )
        if int(request.headers.get("content-length", 0)) > self._body_bytes:
            raise HTTPException(413, too_long)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in parts:
                    body += part
                    if len(body) > self._body_bytes:
                        raise HTTPException(413, too_long)
        except TimeoutError:
            detail = f"no whole body in {BODY_SECONDS:g} s"
            raise HTTPException(408, detail, CLOSE) from None
        return bytes(body)

    async def _answer(self, request: Request, body: bytes, reward: WeightedReward) -> Response:
        """Unpack, wait for the turn, and score."""
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        try:
            episodes = await asyncio.to_thread(unpack_episodes, body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        # It would be held while this waits.
        del body
        async with self._turn:
            # A client that no longer waits has sent the same again, or gone.
            if await request.is_disconnected():
                raise ClientDisconnect
            loop = asyncio.get_running_loop()
            try:
                scores = await loop.run_in_executor(self._scorer, reward, episodes)
            # Whatever it is, the run that asked needs its text and the server goes on.
            except Exception as error:
                logger.exception("a scorer failed")
                lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
                raise HTTPException(500, "; ".join(lines)) from error
        return Response(pack_scores(scores), media_type="application/json")

    async def _discard(self, parts: AsyncIterator[bytes]) -> bool:
        """Read on for a while before an error is sent; whether that was all.

        If the connection is closed while the client still sends, it may never see the error.
        """
        from starlette.requests import ClientDisconnect

        left = self._body_bytes
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in parts:
                    left -= len(part)
                    if left < 0:
                        return False
        except (TimeoutError, ClientDisconnect):
            return False
        return True


def _missing(package: str) -> ImportError:
    return ImportError(
        f"a server of rewards needs {package}; install it with: pip install 'unigrpo[serve]'"
    )
