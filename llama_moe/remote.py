"""The header of a model that is on a web server, without the weights.

A GGUF file begins with all that describes it; a few megabytes of even the largest model. They are read by HTTP range requests and put into
a sparse file as large as the remote one, so that whatever reads headers finds a file as it should be.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import socket
import ssl
import struct
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ._sizes import format_size
from .errors import LlamaMoeError, ModelLoadError

if TYPE_CHECKING:
    from email.message import Message

__all__ = ["endpoint", "hub_reference", "local_header", "remote_url"]

_LOG = logging.getLogger("llama_moe")

_FIRST_BYTES = 1 << 20
# Vocabularies of 250,000 tokens make headers of 15 MB.
_MOST_BYTES = 256 << 20
_ATTEMPTS = 4
_LEAST_BYTES_PER_SECOND = 16 << 10
_ENDPOINT = "https://huggingface.co"
_REFERENCE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*/[^/?#\\][^?#\\]*\.gguf")
_FIRST_PART = re.compile(r"-00001-of-(\d{5})\.gguf$")


def remote_url(path: str | os.PathLike[str]) -> str | None:
    """The URL that `path` stands for, or None for a file of this machine.

    That is an ``http://`` or ``https://`` URL itself, or "owner/repository/file.gguf" if there is no such file here. Such a reference is of
    the Hugging Face hub, or of ``$HF_ENDPOINT``.
    """
    if not isinstance(path, str):
        return None
    if re.match(r"https?://", path, re.IGNORECASE):
        return path
    reference = hub_reference(path)
    return None if reference is None else f"{endpoint()}/{reference[0]}/resolve/main/{urllib.parse.quote(reference[1])}"


def hub_reference(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The repository and the file that "owner/repository/file.gguf" names on the hub; None for what is none, or a file of this machine."""
    if not isinstance(path, str) or not _REFERENCE.fullmatch(path) or ".." in path.split("/") or Path(path).exists():
        return None
    owner, repository, file = path.split("/", 2)
    return f"{owner}/{repository}", file


@contextlib.contextmanager
def local_header(path: str | os.PathLike[str], *, timeout: float = 30.0) -> Iterator[Path]:
    """Gives a file of this machine whose header can be read: `path` itself, or a copy of a remote file's header.

    The copy is as large as the remote file but sparse: its weights are holes, which take no space. All parts of a split model are there.
    It is gone when the context ends. Errors that name the copy are told of the remote file.

    A token for what is not public comes from ``$HF_TOKEN``, or from the file where the Hugging Face tools keep it; it is sent to the hub,
    or ``$HF_ENDPOINT``, alone.

    Args:
        path: a file, a URL, or "owner/repository/file.gguf".
        timeout: seconds to wait for a server that says nothing.

    Raises:
        FileNotFoundError: the server has no such file.
        ModelLoadError: no server answers, it wants a token, it does not support range requests, or what it has is not GGUF.
    """
    url = remote_url(path)
    if url is None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="llama_moe-") as folder:
        try:
            fetched = _fetch(url, Path(folder), timeout)
        except (FileNotFoundError, ModelLoadError) as error:
            if url != path:  # a reference to the hub, or a mistyped name of a file
                error.args = (f"there is no file {os.fspath(path)!r} here, and on the hub: {error}",)
            raise
        try:
            yield fetched
        except LlamaMoeError as error:
            if folder not in str(error):
                raise
            error.args = (str(error).replace(f"{folder}/", url.split("?")[0].rpartition("/")[0] + "/"),)
            raise


# ---- the header


class _NeedsMoreError(Exception):
    """The header goes on after what is there, at least to byte `end`."""

    def __init__(self, end: int) -> None:
        super().__init__()
        self.end = end


@dataclass(frozen=True)
class _Header:
    end: int
    parts: int


class _Walker:
    """Finds the end of a GGUF header; the format is documented in ggml's docs/gguf.md."""

    _SIZES = (1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)
    _STRING, _ARRAY = 8, 9

    def __init__(self, data: bytes | bytearray, url: str) -> None:
        self._data = data
        self._url = url
        self._at = 0

    def walk(self) -> _Header:
        if self._bytes(4) != b"GGUF":
            raise ModelLoadError(f"{self._url} is not a GGUF file: it does not start with the magic 'GGUF'")
        version = self._number("I")
        if version not in (2, 3):
            raise ModelLoadError(f"{self._url} has GGUF version {version}; versions 2 and 3 can be read")
        tensors, pairs = self._number("Q"), self._number("Q")
        parts = 1
        for _ in range(pairs):
            key = self._string()
            kind = self._number("I")
            if key == b"split.count" and self._size(kind) is not None:
                parts = int.from_bytes(self._bytes(self._size(kind) or 0), "little")
            else:
                self._skip_value(kind)
        for _ in range(tensors):
            self._string()
            dimensions = self._number("I")
            self._skip(8 * dimensions + 4 + 8)
        return _Header(self._at, parts)

    def _size(self, kind: int) -> int | None:
        if kind >= len(self._SIZES):
            raise ModelLoadError(f"{self._url} has a corrupted GGUF header: a value of type {kind}")
        return self._SIZES[kind]

    def _skip_value(self, kind: int) -> None:
        size = self._size(kind)
        if size is not None:
            self._skip(size)
        elif kind == self._STRING:
            self._string()
        else:
            element, count = self._number("I"), self._number("Q")
            element_size = self._size(element)
            if element_size is not None:
                self._skip(element_size * count)
            elif element == self._ARRAY:
                raise ModelLoadError(f"{self._url} has a corrupted GGUF header: an array of arrays")
            else:
                for _ in range(count):
                    self._skip(self._number("Q"))

    def _string(self) -> bytes:
        return self._bytes(self._number("Q"))

    def _number(self, code: str) -> int:
        size = 8 if code == "Q" else 4
        begin = self._at
        self._skip(size)
        return int(struct.unpack_from("<" + code, self._data, begin)[0])

    def _bytes(self, size: int) -> bytes:
        begin = self._at
        self._skip(size)
        return bytes(self._data[begin : self._at])

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > _MOST_BYTES:
            raise ModelLoadError(
                f"{self._url} has a header of more than {format_size(_MOST_BYTES)}, or a corrupted one; no model's is that large"
            )
        if self._at > len(self._data):
            raise _NeedsMoreError(self._at)


def _fetch(url: str, folder: Path, timeout: float) -> Path:
    first, header = _fetch_part(url, folder, timeout)
    split = urllib.parse.urlsplit(url)
    numbered = _FIRST_PART.search(split.path)
    # Other names and numbers are an error that whoever reads the header explains.
    if header.parts > 1 and numbered and int(numbered[1]) == header.parts:
        for number in range(2, header.parts + 1):
            path = _FIRST_PART.sub(rf"-{number:05d}-of-\1.gguf", split.path)
            _fetch_part(urllib.parse.urlunsplit(split._replace(path=path)), folder, timeout)
    return first


def _fetch_part(url: str, folder: Path, timeout: float) -> tuple[Path, _Header]:
    remote = _RemoteFile(url, timeout)
    data = bytearray()
    wanted = _FIRST_BYTES
    while True:
        remote.read_into(data, wanted)
        try:
            header = _Walker(data, url).walk()
            break
        except _NeedsMoreError as more:
            if len(data) >= remote.size:
                raise ModelLoadError(f"{url} is truncated: its header goes beyond byte {remote.size}, where the file ends") from None
            wanted = min(max(2 * len(data), more.end), _MOST_BYTES)
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2] or "model.gguf"
    target = folder / name
    _LOG.info("read the header of %s: %s of %s", url, format_size(len(data)), format_size(remote.size))
    try:
        with target.open("wb") as file:
            file.write(data)
            file.truncate(remote.size)
    except (OSError, OverflowError) as error:
        raise ModelLoadError(f"cannot make a sparse file of {format_size(remote.size)} in {folder}: {error}") from error
    return target, header


# ---- HTTP


class _RemoteFile:
    def __init__(self, url: str, timeout: float) -> None:
        self._url = url
        self._timeout = timeout
        self._opener = urllib.request.build_opener(_Redirects)
        self.size = 0
        """Bytes of the whole file; known once some of it was read."""

    def read_into(self, data: bytearray, end: int) -> None:
        """Appends what follows `data` in the file, up to byte `end` or the file's own; goes on where a connection dropped."""
        for attempt in range(1, _ATTEMPTS + 1):
            before = len(data)
            try:
                with self._open(before, end) as response:
                    end = min(end, self._check(response, before))
                    self._receive(response, data, end)
                if len(data) >= end:
                    return
                reason: object = "the connection ended early"
            except urllib.error.HTTPError as error:
                with error:
                    reason = self._explain(error, before)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                if isinstance(reason, (ssl.SSLCertVerificationError, socket.gaierror)):
                    raise ModelLoadError(f"cannot read {self._url}: {reason}") from error
            if attempt < _ATTEMPTS:
                _LOG.info("reading %s again from byte %d: %s", self._url, len(data), reason)
                time.sleep(0.1 * 2**attempt)  # so that a server that is overwhelmed can recover
        raise ModelLoadError(f"cannot read {self._url}, in {_ATTEMPTS} attempts: {reason or 'it does not answer'}")

    def _open(self, begin: int, end: int) -> Any:
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity", "User-Agent": "llama_moe"}
        try:
            request = urllib.request.Request(self._url, headers=headers)  # noqa: S310 - the scheme was checked
            if _origin(self._url) == _origin(endpoint()) and (token := _token()):
                request.add_unredirected_header("Authorization", f"Bearer {token}")
            return self._opener.open(request, timeout=self._timeout)
        except (ValueError, http.client.InvalidURL) as error:
            raise ModelLoadError(f"{self._url!r} is not a URL that can be read: {error}") from error

    def _check(self, response: Any, begin: int) -> int:
        """The size of the file, by a response that has what was asked for."""
        if response.status != 206:
            raise ModelLoadError(
                f"the server of {self._url} does not support range requests (status {response.status} instead of 206): it would send the "
                "whole file. Download it and give its path"
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ModelLoadError(f"the server of {self._url} compresses what it sends, though it was asked not to")
        content_range = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", content_range.strip())
        if match is None or int(match[1]) != begin:
            raise ModelLoadError(f"the server of {self._url} answered with range {content_range!r} when asked for byte {begin} and on")
        size = int(match[3])
        if self.size not in (0, size):
            raise ModelLoadError(f"{self._url} changed while it was read: it had {self.size} bytes and has {size} now")
        self.size = size
        return size

    def _receive(self, response: IO[bytes], data: bytearray, end: int) -> None:
        deadline = time.monotonic() + self._timeout + (end - len(data)) / _LEAST_BYTES_PER_SECOND
        while len(data) < end:
            piece = response.read1(min(end - len(data), 1 << 16))  # type: ignore[attr-defined]
            if not piece:
                return
            data += piece
            if time.monotonic() > deadline:
                raise ModelLoadError(f"the server of {self._url} is too slow: {len(data)} bytes so far")

    def _explain(self, error: urllib.error.HTTPError, begin: int) -> str:
        """The reason, if trying again may help; raises otherwise."""
        if error.code in (404, 410):
            raise FileNotFoundError(f"no such file: {self._url} (status {error.code})")
        if error.code in (401, 403):
            hint = "its token may not read it" if _token() else "if it is not public, set HF_TOKEN to a token that may read it"
            raise ModelLoadError(f"the server refuses {self._url} (status {error.code}); {hint}")
        if error.code == 416:
            raise ModelLoadError(f"{self._url} is empty or truncated: it has no byte {begin}")
        if error.code in (408, 425, 429) or error.code >= 500:
            return f"status {error.code} {error.reason}"
        raise ModelLoadError(f"cannot read {self._url}: status {error.code} {error.reason}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects within HTTP. Ranges are asked for again there; a token is not, being an unredirected header."""

    def redirect_request(  # noqa: PLR0917 - the signature is the base class's
        self,
        req: urllib.request.Request,
        fp: IO[bytes],  # noqa: ARG002
        code: int,  # noqa: ARG002
        msg: str,  # noqa: ARG002
        headers: Message,  # noqa: ARG002
        newurl: str,
    ) -> urllib.request.Request | None:
        if not re.match(r"https?://", newurl, re.IGNORECASE):
            raise ModelLoadError(f"{req.full_url} redirects to {newurl!r}, which is not HTTP")
        following = urllib.request.Request(newurl, headers=req.headers, origin_req_host=req.origin_req_host, unverifiable=True)  # noqa: S310
        # A renamed repository is redirected within the hub, which wants the token there as well.
        token = req.unredirected_hdrs.get("Authorization")
        if token and _origin(newurl) == _origin(req.full_url):
            following.add_unredirected_header("Authorization", token)
        return following

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def _origin(url: str) -> tuple[str, str]:
    split = urllib.parse.urlsplit(url)
    return split.scheme.lower(), split.netloc.lower()


def endpoint() -> str:
    """The address of the hub."""
    return (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")


def _token() -> str:
    """The token, as the Hugging Face tools look for it; "" if there is none."""
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if token:
        return token.strip()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    try:
        return Path(os.environ.get("HF_TOKEN_PATH") or Path(home).expanduser() / "token").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
