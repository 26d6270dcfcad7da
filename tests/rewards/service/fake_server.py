"""A server on loopback that misbehaves as it is told.

Whoever asks says how: `fault=stall` anywhere in the body stalls each time, `fault=stall:1` only
the first time that this body comes.
"""

import asyncio
import contextlib
import gzip
import re
import threading
from collections import Counter

STATUS = {
    "e400": (400, b"image too large", b""),
    "e401": (401, b"wrong token", b""),
    "e408": (408, b"slow", b""),
    "e425": (425, b"early", b""),
    "e429": (429, b"busy", b""),
    "e500": (500, b"CUDA out of memory", b""),
    "e503": (503, b"loading", b""),
    "later": (429, b"busy", b"retry-after: 1\r\n"),
    "redirect": (302, b"", b"location: http://127.0.0.1:1/elsewhere\r\n"),
}
"""Faults that are answers: the status, the body and a header."""

FLOOD = 100 << 20
"""Bytes of an answer without end."""

BOMB = gzip.compress(b"0" * (4 << 20), compresslevel=1)
"""A small answer that unpacks to a large one."""


class FakeServer:
    """Answers in a thread of its own until it is stopped.

    Args:
        reply: makes the body of a good answer from the path and the body of the request.
        port: where to listen; 0 for any.
        delay: seconds before a good answer, of the number of requests so far.

    Attributes:
        url: where it listens.
        asked: path, head and body of each request, in order of arrival.
        most: the most requests that were under way at once.
        flooded: bytes of a flood that were sent before the client hung up.
    """

    def __init__(self, reply, port=0, delay=lambda number: 0.0):
        self.reply = reply
        self.delay = delay
        self.asked = []
        self.most = 0
        self.flooded = 0
        self._port = port
        self._now = 0
        self._tries = Counter()
        self._connections = set()
        self._loop = asyncio.new_event_loop()
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._is_up.wait(5)
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        """Break off all connections, as if the process were killed."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(5)

    def _run(self):
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self):
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        self._port = server.sockets[0].getsockname()[1]
        self._is_up.set()
        await self._stopping.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=1)

    async def _connected(self, reader, writer):
        self._connections.add(asyncio.current_task())
        # A client that hangs up, and a server that is stopped, are no errors here.
        with contextlib.suppress(
            asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError
        ):
            while await self._answer_one(reader, writer):
                pass
        self._connections.discard(asyncio.current_task())
        writer.transport.abort() if self._stopping.is_set() else writer.close()

    async def _answer_one(self, reader, writer):
        """Whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1])) if length else b""
        path = head.split()[1]
        self.asked.append((path, head, body))
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            keeps = await self._misbehave(self._fault(body), path, body, writer)
            await writer.drain()
            return keeps
        finally:
            self._now -= 1

    def _fault(self, body):
        """What this request asks for, or nothing if it has had that often enough."""
        found = re.search(rb"fault=([a-z0-9]+)(?::(\d+))?", body)
        if not found:
            return None
        self._tries[body] += 1
        if found[2] and self._tries[body] > int(found[2]):
            return None
        return found[1].decode()

    async def _misbehave(self, fault, path, body, writer):
        if fault is None:
            await asyncio.sleep(self.delay(len(self.asked)))
            self._send(writer, 200, self.reply(path, body))
        elif fault in STATUS:
            self._send(writer, *STATUS[fault])
        elif fault == "stall":
            await asyncio.sleep(60)
        elif fault == "garbage":
            self._send(writer, 200, b"<html>not JSON")
        elif fault == "form":
            self._send(writer, 200, b'{"choices": []}')
        elif fault == "nested":
            self._send(writer, 200, b"[" * 20_000)
        elif fault == "bomb":
            self._send(writer, 200, BOMB, b"content-encoding: gzip\r\n")
        elif fault == "close":
            return False
        elif fault == "half":
            self._send(writer, 200, self.reply(path, body)[:2], length=4000)
            return False
        elif fault == "drip":
            self._send(writer, 200, b"", length=4000)
            await self._pour(writer, b" ", 4000, 0.02)
        elif fault == "flood":
            self._send(writer, 200, b"", length=FLOOD)
            await self._pour(writer, b" " * 65536, FLOOD, 0)
        else:
            raise AssertionError(fault)
        return True

    def _send(self, writer, status, body, header=b"", length=None):
        length = len(body) if length is None else length
        head = b"HTTP/1.1 %d X\r\n%bcontent-length: %d\r\n\r\n" % (status, header, length)
        writer.write(head + body)

    async def _pour(self, writer, piece, total, pause):
        for _ in range(total // len(piece)):
            writer.write(piece)
            await writer.drain()
            self.flooded += len(piece)
            await asyncio.sleep(pause)
