"""A web server of files on this machine that does what a test tells it to, and counts what it sends."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote

from typing_extensions import Self

__all__ = ["FileServer", "Request"]

# What a test may do instead of serving the file: True when it has answered.
Misbehave = Callable[["Request"], bool]


@dataclass
class FileServer:
    """Serves the files of a folder by range requests.

    Attributes:
        folder: what is served.
        misbehave: asked first for each request.
        sent: bytes of files that were sent.
        requests: the paths asked for, in order.
        tokens: the Authorization headers that came.
    """

    folder: Path
    misbehave: Misbehave | None = None
    sent: int = 0
    requests: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)

    def __enter__(self) -> Self:
        owner: FileServer = self

        class Handler(Request):
            server_of_files = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: Request) -> None:
        """Answers a request that nothing was made of; servers of more than files override this."""
        request.send_file(self.folder / unquote(request.path.split("?")[0]).lstrip("/"))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class Request(BaseHTTPRequestHandler):
    """One request; `misbehave` may call `reply`."""

    server_of_files: FileServer

    def do_GET(self) -> None:
        server = self.server_of_files
        server.requests.append(self.path)
        server.tokens.append(self.headers.get("Authorization"))
        if server.misbehave is not None and server.misbehave(self):
            return
        server.answer(self)

    do_HEAD = do_GET  # noqa: N815 - the name is http.server's

    def send_file(self, file: Path, headers: dict[str, str] | None = None) -> None:
        """Answers with a file, or the part of it that is asked for."""
        if not file.is_file():
            self.reply(404)
            return
        size = file.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self.reply(200, file.read_bytes(), headers)
            return
        begin, end = int(match[1]), min(int(match[2] or size) + 1, size)
        if begin >= size:
            self.reply(416)
            return
        with file.open("rb") as data:
            data.seek(begin)
            self.reply(206, data.read(end - begin), {"Content-Range": f"bytes {begin}-{end - 1}/{size}", **(headers or {})})

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, announced: int | None = None) -> None:
        """Answers; `announced` is the length that is promised, where it is another one."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        if self.command == "HEAD":
            body = b""
        self.server_of_files.sent += len(body)  # before the client can know of the answer
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is http.server's
        """Tests print nothing."""
