"""A real server of rewards, in a thread of this process."""

import socket
import threading
import time

import uvicorn

from rewards.service.server import make_app


def free_port():
    """A port that nothing listens on, a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RewardServer:
    """Serves until it is stopped.

    Args:
        rewards: by the names under which they are served.
        port: where to listen; 0 for any.
        options: of `make_app`.

    Attributes:
        url: where it listens.
    """

    def __init__(self, rewards, port=0, **options):
        port = port or free_port()
        app = make_app(rewards, **options)
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=port, log_level="critical", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.005)
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def kill(self):
        """Break off all connections, whatever is under way."""
        connections = list(self._server.server_state.connections)
        if connections:
            connections[0].loop.call_soon_threadsafe(self._break_off)
        self._server.force_exit = True
        self._server.should_exit = True
        self._thread.join(5)
        assert not self._thread.is_alive()

    def _break_off(self):
        # As the kernel does: nobody may connect once more while the others are broken off.
        for listening in self._server.servers:
            listening.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
