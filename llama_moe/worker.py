"""llama.cpp's RPC worker: serving this machine's devices to other processes, and running such a worker as a child process."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING

from . import _core
from .errors import InvalidOptionError, LlamaMoeError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import NoReturn

    from typing_extensions import Self

_MAX_PORT = 65535
_PROBE_SECONDS = 0.02
_STOP_SECONDS = 5.0


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """The IPv4 address and the port of "host:port"; llama.cpp's worker knows no other addresses.

    Raises:
        InvalidOptionError: `endpoint` is not of that form, or the host has no IPv4 address.
    """
    host, colon, port = endpoint.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and int(port) <= _MAX_PORT):
        raise InvalidOptionError(f"{endpoint!r} is not an endpoint; expected host:port, such as 127.0.0.1:50052")
    try:
        return socket.gethostbyname(host), int(port)
    except OSError as error:
        raise InvalidOptionError(f"{endpoint!r}: {host!r} has no IPv4 address ({error.strerror})") from None


def check_local(endpoint: str) -> None:
    """Refuses an endpoint that other machines can reach.

    Raises:
        InvalidOptionError: its address is not a loopback address.
    """
    host, _ = parse_endpoint(endpoint)
    if not ipaddress.ip_address(host).is_loopback:
        raise InvalidOptionError(
            f"{endpoint!r} can be reached by other machines, and the protocol of llama.cpp's worker has no authentication; "
            "expected a loopback address, such as 127.0.0.1:50052"
        )


def serve(endpoint: str, *, threads: int | None = None, cache_dir: str | None = None, until_stdin_closes: bool = False) -> NoReturn:
    """Serves this machine's devices, its CPU where there is no accelerator, until the process is killed.

    Args:
        endpoint: "host:port" to listen on.
        threads: CPU threads; None: one for each physical core this process may use.
        cache_dir: folder in which to keep weights that clients sent, so that they need not send them again; None: keep none.
        until_stdin_closes: end the process when its standard input does, so that it cannot outlive who started it.

    Raises:
        InvalidOptionError: not a valid endpoint.
        LlamaMoeError: cannot listen there; another process may be doing so.
    """
    host, port = parse_endpoint(endpoint)
    _bound_socket(host, port).close()
    if until_stdin_closes:
        threading.Thread(target=exit_with_stdin, daemon=True).start()
    _core.run_worker(f"{host}:{port}", threads or 0, cache_dir)
    raise LlamaMoeError(f"the worker on {endpoint} ended")


def exit_with_stdin() -> NoReturn:
    """Ends this process when its standard input ends: with the process that holds the other end of it."""
    # Not through sys.stdin, whose lock the interpreter wants at its own end.
    while os.read(0, 1 << 16):
        pass
    os._exit(0)


def _bound_socket(host: str, port: int) -> socket.socket:
    # SO_REUSEADDR, as llama.cpp has it too: on Linux several sockets may then be bound to one port as long as only one of them listens.
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise LlamaMoeError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return bound


def _environment() -> dict[str, str]:
    # OpenMP's idle threads spin by default. On the CPU that client and worker share each would keep the other from working, which can make
    # both a hundred times slower.
    return {"OMP_WAIT_POLICY": "passive"} | os.environ


class Worker:
    """A worker in a child process, stopped by `stop()`, by leaving a `with` block, and when this process ends in whatever way.

    With `add_rpc_device(worker.endpoint)` it stands in for an accelerator on a machine that has none.

    Args:
        bind: loopback "host:port" to listen on; port 0: any free one.
        threads: CPU threads; None: one for each physical core this process may use.
        start_timeout: seconds to wait for it to accept connections.

    Raises:
        InvalidOptionError: not a loopback endpoint.
        LlamaMoeError: another process listens there, or it did not start; the message has what it wrote.
    """

    def __init__(self, bind: str = "127.0.0.1:0", *, threads: int | None = None, start_timeout: float = 60.0) -> None:
        check_local(bind)
        host, port = parse_endpoint(bind)
        # Held until the worker listens, so that nobody else is given the port that was chosen.
        with _bound_socket(host, port) as reserved:
            port = reserved.getsockname()[1]
            self._address = (host, port)
            command = [sys.executable, "-m", "llama_moe.cli", "worker", "--bind", self.endpoint, "--until-stdin-closes"]
            if threads is not None:
                command += ["--threads", str(threads)]
            self._output = tempfile.TemporaryFile()  # noqa: SIM115 stop() closes it
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=self._output,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C is for us: who uses the worker ends before it does
                )
            except BaseException:
                self._output.close()
                raise
            try:
                self._wait_until_it_accepts(start_timeout)
            except BaseException:
                self.stop()
                raise

    @property
    def endpoint(self) -> str:
        """The "host:port" it listens on."""
        host, port = self._address
        return f"{host}:{port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process.poll() is None

    def output(self) -> str:
        """What it has written to standard output and standard error; empty once it is stopped."""
        if self._output.closed:
            return ""
        # pread: reading must not move the file offset, at which the worker writes.
        return os.pread(self._output.fileno(), 1 << 20, 0).decode(errors="replace")

    def stop(self) -> None:
        """Ends the process and waits for that. Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._output.close()

    def _wait_until_it_accepts(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(self._address, timeout=1):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(_PROBE_SECONDS)
                raise LlamaMoeError(f"the worker on {self.endpoint} ended with status {status}: {self.output().strip()}")
        raise LlamaMoeError(f"the worker on {self.endpoint} accepted no connection within {timeout:g} s: {self.output().strip()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Worker on {self.endpoint}, pid {self.pid}{'' if self.running else ', stopped'}>"
