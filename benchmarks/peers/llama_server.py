"""llama-server on a loopback port, asked over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import urllib3

from benchmarks.peers.programs import program

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

_START_SECONDS = 120.0
_PROBE_SECONDS = 0.02


class LlamaServer:
    """llama-server with a model loaded.

    It is set up to do what our engine does and no more: a KV cache for each sequence, no copies of idle prompts in host memory, no
    checkpoints, no log. Its default batch and micro-batch sizes are ours, 2048 and 512.

    Args:
        model: the GGUF file.
        threads: CPU threads.
        sequences: requests that are computed at once (slots).
        context_size: tokens for each of them.
        reuse_prompts: keep a slot's KV cache for the next request whose prompt begins with the same tokens.
    """

    def __init__(self, model: Path, *, threads: int, sequences: int, context_size: int, reuse_prompts: bool = False) -> None:
        self._reuse_prompts = reuse_prompts
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [program("llama-server"), "-m", model, "--host", "127.0.0.1", "--port", port, "-t", threads, "-tb", threads]
        command += ["--parallel", sequences, "-c", sequences * context_size, "--no-kv-unified", "--fit", "off", "--device", "none"]
        command += ["--cache-ram", 0, "--ctx-checkpoints", 0, "--no-cache-idle-slots", "--no-ui", "--offline", "--log-verbosity", 1]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the server)
        self._process = subprocess.Popen([str(part) for part in command], stdout=self._output, stderr=subprocess.STDOUT)
        self._pool = urllib3.HTTPConnectionPool("127.0.0.1", port, maxsize=sequences + 1, retries=False)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                self._output.seek(0)
                raise RuntimeError(f"llama-server ended with {self._process.returncode}:\n{self._output.read().decode()[-2000:]}")
            try:
                if self._pool.request("GET", "/health").status == 200:  # 503 while it loads
                    return
            except urllib3.exceptions.HTTPError:
                pass  # it does not listen yet
            time.sleep(_PROBE_SECONDS)
        raise RuntimeError(f"llama-server was not ready after {_START_SECONDS:.0f} s")

    @contextmanager
    def open_stream(self, prompt: Sequence[int], tokens: int) -> Iterator[Iterator[int]]:
        """Asks for a greedy completion; yields an iterator over how many tokens have come, one item a message.

        Leaving the block before the end closes the connection, which cancels the request.

        Args:
            prompt: token ids.
            tokens: tokens to generate; the end of the text is not chosen.
        """
        # Of its ways to sample greedily the cheapest; at temperature 0 the default chain would filter first.
        sampling = {"samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
        body = {"prompt": list(prompt), "n_predict": tokens, "stream": True, "cache_prompt": self._reuse_prompts, **sampling}
        # The server closes connections that are idle for some seconds, and a request on one of them would fail: a new one for each.
        headers = {"Connection": "close"}
        response = self._pool.request("POST", "/completion", json=body, headers=headers, preload_content=False, timeout=None)
        try:
            if response.status != 200:
                raise RuntimeError(f"llama-server answered {response.status}: {response.read().decode()}")
            yield (message["tokens_predicted"] for message in _messages(response) if not message["stop"])
        finally:
            response.close()

    def close(self) -> None:
        """Ends the process."""
        self._pool.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _messages(response: urllib3.BaseHTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON messages of an event stream, as they come."""
    rest = b""
    for chunk in response.read_chunked():
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                message: dict[str, Any] = json.loads(event[6:])
                if "tokens_predicted" not in message:
                    raise RuntimeError(f"llama-server sent {message}")
                yield message
