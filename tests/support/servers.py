"""Running the HTTP server: as users do, in a process of its own, or in this one, where its models can be looked at."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import uvicorn
from typing_extensions import Self

from llama_moe.server import ServerSettings, create_app
from llama_moe.server.state import ServerState
from tests.support.processes import COMMAND, environment
from tests.support.waiting import eventually

__all__ = ["LocalServer", "ServerProcess", "local_server"]

_TIMEOUT_SECONDS = 240.0


class ServerProcess:
    """`llama-moe serve` on a free port, ready for requests; killed on leaving the `with` block if it still runs.

    Args:
        arguments: of the command, without `--bind`.
        key: sent with every request of `client`.
    """

    def __init__(self, *arguments: object, key: str | None = None) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill
        self._process = subprocess.Popen(
            [*COMMAND, "serve", "--bind", "127.0.0.1:0", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        self.url = ""
        assert eventually(lambda: self._is_ready() or self._process.poll() is not None, seconds=_TIMEOUT_SECONDS), self.log()
        assert self.url, self.log()
        self.client = httpx.Client(
            base_url=self.url, timeout=_TIMEOUT_SECONDS, headers={} if key is None else {"Authorization": f"Bearer {key}"}
        )

    def _is_ready(self) -> bool:
        _, found, rest = self.log().partition("Serving on ")
        self.url, end, _ = rest.partition("\n")
        return bool(found and end)

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        """What it has written so far."""
        # Not through the file's own offset, at which the process writes.
        with open(f"/proc/self/fd/{self._output.fileno()}") as file:  # noqa: PTH123 - a descriptor's name
            return file.read()

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def finish(self) -> int:
        """Waits for the end; returns the exit status."""
        return self._process.wait(_TIMEOUT_SECONDS)

    def stop(self) -> int:
        """Stops it as `kill` does; returns the exit status."""
        self.signal()
        return self.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()


@dataclass(frozen=True)
class LocalServer:
    """The application in this process, on a port of its own."""

    url: str
    state: ServerState
    client: httpx.Client


@contextlib.contextmanager
def local_server(settings: ServerSettings) -> Iterator[LocalServer]:
    """Runs the application on another thread, in uvicorn."""
    app = create_app(settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Of its connections too: the system takes little of what a client does not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert eventually(lambda: server.started or not thread.is_alive())
            assert server.started
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=_TIMEOUT_SECONDS) as client:
                yield LocalServer(url, app.state.server, client)
        finally:
            server.should_exit = True
            thread.join()
