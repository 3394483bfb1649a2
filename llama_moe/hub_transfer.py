"""Fetching files of the Hugging Face hub: complete or not under their names, and going on where an earlier transfer ended."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ._sizes import format_size
from .errors import DownloadError, InvalidOptionError
from .remote import endpoint

if TYPE_CHECKING:
    from typing import TypeAlias

    DownloadProgress: TypeAlias = Callable[[int, int], object]

__all__ = ["HubFile", "fetch", "gated", "is_network_failure", "one_line", "storage_folder"]

_LOG = logging.getLogger("llama_moe")

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository.

    Attributes:
        name: its path there.
        size: bytes; None where only the cache was asked.
        sha256: of its content, if the hub says it.
    """

    name: str
    size: int | None
    sha256: str | None = None


@dataclass(slots=True)
class _Transfer:
    """One file on its way."""

    repository: str
    commit: str
    file: HubFile
    target: Path
    partial: Path
    size: int
    folder: Path | None
    """Where the caller wants it; None: in the cache."""

    @property
    def url(self) -> str:
        return _url(self.repository, self.commit, self.file)

    @property
    def begun(self) -> int:
        """Bytes of it that an earlier download left."""
        try:
            size = self.partial.stat().st_size
        except OSError:
            return 0
        return size if size <= self.size else 0


@dataclass(slots=True)
class _Counter:
    """What huggingface_hub takes for a progress bar."""

    done: int
    total: int
    report: DownloadProgress | None

    def update(self, size: int) -> None:
        self.done += size
        if self.report is not None:
            self.report(self.done, self.total)


def fetch(repository: str, commit: str, files: Sequence[HubFile], folder: Path | None, on_progress: DownloadProgress | None) -> Path:
    """Makes files of one commit be here: in the cache of the Hugging Face tools, or in a folder. Returns the first one's path."""
    with _explained(repository):
        transfers = [_transfer(repository, commit, file, folder) for file in files]
        missing = [transfer for transfer in transfers if not transfer.target.exists()]
        total = sum(transfer.size for transfer in transfers)
        _check_disk(missing)
        counter = _Counter(total - sum(transfer.size - transfer.begun for transfer in missing), total, on_progress)
        counter.update(0)
        for transfer in missing:
            _download(transfer, counter)
        paths = [transfer.target if folder is not None else _named_in_cache(transfer) for transfer in transfers]
        return paths[0]


def _transfer(repository: str, commit: str, file: HubFile, folder: Path | None) -> _Transfer:
    if folder is not None:
        target = folder / file.name
        if target.exists() and file.size is not None and target.stat().st_size != file.size:
            raise InvalidOptionError(
                f"{str(target)!r} is there and has {target.stat().st_size} bytes, not the {file.size} of the hub's; remove it first"
            )
        return _Transfer(repository, commit, file, target, target.with_name(f".{target.name}.partial"), file.size or 0, folder)
    from huggingface_hub import get_hf_file_metadata

    cached = storage_folder(repository) / "snapshots" / commit / file.name
    if cached.exists():
        return _Transfer(repository, commit, file, cached, cached, cached.stat().st_size, None)
    metadata = get_hf_file_metadata(_url(repository, commit, file), headers=_headers())
    if metadata.etag is None:
        raise DownloadError(f"the server of {repository!r} is no hub: it gives no ETag for {file.name!r}")
    blob = storage_folder(repository) / "blobs" / metadata.etag
    # The name that older versions of huggingface_hub gave to what is not complete: what they left is used as well.
    return _Transfer(repository, commit, file, blob, blob.with_name(f"{blob.name}.incomplete"), metadata.size or file.size or 0, None)


def _check_disk(missing: Sequence[_Transfer]) -> None:
    if not missing:
        return
    folder = missing[0].target.parent
    needed = sum(transfer.size - transfer.begun for transfer in missing)
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the disk is too small: {format_size(needed)} to download, {format_size(free)} free; remove something, or choose another "
            "folder (--to, folder=, or HF_HOME)",
            str(existing),
        )


def _download(transfer: _Transfer, counter: _Counter) -> None:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # it is there, without being marked as exported

    if transfer.size > constants.MAX_HTTP_DOWNLOAD_SIZE:  # the hub sends such files by a protocol of its own, which does not go on
        hf_hub_download(transfer.repository, transfer.file.name, revision=transfer.commit, local_dir=transfer.folder, endpoint=endpoint())
        counter.update(transfer.size)
        return
    transfer.partial.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(_lock_of(transfer)):
        if transfer.target.exists():  # another process was quicker
            counter.update(transfer.size - transfer.begun)
            return
        while True:
            begun = transfer.begun
            try:
                _receive(transfer, counter)
                break
            except Exception as error:
                if not (is_network_failure(error) and transfer.begun > begun):  # without progress, it would not end
                    raise
                _LOG.info("%s: the connection broke off: %s", transfer.file.name, one_line(error))
        _check_content(transfer)
        transfer.partial.replace(transfer.target)


def _receive(transfer: _Transfer, counter: _Counter) -> None:
    """Appends to the partial file what it lacks."""
    from huggingface_hub.file_download import http_get

    begun = transfer.begun
    if begun:
        _LOG.info("%s: going on at %s of %s", transfer.file.name, format_size(begun), format_size(transfer.size))
    with transfer.partial.open("r+b" if begun else "wb") as file:
        file.seek(0, os.SEEK_END)
        http_get(
            transfer.url,
            file,
            resume_size=begun,
            headers=_headers() | {"Accept-Encoding": "identity"},
            expected_size=transfer.size or None,
            _tqdm_bar=cast("Any", counter),
        )
        file.flush()
        os.fsync(file.fileno())


def _check_content(transfer: _Transfer) -> None:
    if transfer.file.sha256 is None:
        return
    digest = hashlib.sha256()
    with transfer.partial.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    if digest.hexdigest() != transfer.file.sha256:
        transfer.partial.unlink()
        raise DownloadError(
            f"{transfer.file.name!r} came damaged: its SHA-256 is {digest.hexdigest()}, the hub says {transfer.file.sha256}; try again"
        )


def _named_in_cache(transfer: _Transfer) -> Path:
    """The path of a file that the cache holds, which gets its name there."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(transfer.repository, transfer.file.name, revision=transfer.commit, endpoint=endpoint()))


def _url(repository: str, commit: str, file: HubFile) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository, file.name, revision=commit, endpoint=endpoint())


def _headers() -> dict[str, str]:
    """With the token, if there is one."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # as above

    return build_hf_headers()


def storage_folder(repository: str) -> Path:
    """The folder of a repository in the cache of the Hugging Face tools."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


def _lock_of(transfer: _Transfer) -> Path:
    """The lock that huggingface_hub takes for the same file of the cache, or one like it."""
    storage = storage_folder(transfer.repository)
    name = transfer.target.name if transfer.folder is None else hashlib.sha256(os.fsencode(transfer.target.absolute())).hexdigest()
    lock = storage.parent / ".locks" / storage.name / f"{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return lock


# ---- errors


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Says what went wrong on the way in our own errors; what was received stays, to go on with."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError

    try:
        yield
    except GatedRepoError as error:
        raise gated(repository) from error
    except HfHubHTTPError as error:
        if isinstance(error, EntryNotFoundError):
            raise FileNotFoundError(f"a file of {repository!r} is gone: {one_line(error)}") from error
        raise DownloadError(f"the hub refuses to send {repository!r}: {one_line(error)}") from error
    except Exception as error:
        if not is_network_failure(error):
            raise
        raise DownloadError(
            f"the download of {repository!r} was interrupted: {one_line(error)}; the next one goes on from there"
        ) from error


def gated(repository: str) -> DownloadError:
    """The error of a repository that wants its terms accepted."""
    from huggingface_hub import get_token

    page = f"{endpoint()}/{repository}"
    hint = f"ask for access at {page}" if get_token() else f"accept its terms at {page} and set HF_TOKEN, or run 'hf auth login'"
    return DownloadError(f"repository {repository!r} is gated: {hint}")


def is_network_failure(error: Exception) -> bool:
    """Whether it is a failure of the network: those of huggingface_hub's HTTP library have no common name between its versions."""
    if type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "requests", "urllib3"}:
        return True
    return isinstance(error, ConnectionError) or (type(error) is OSError and "Consistency check failed" in str(error))


def one_line(error: BaseException) -> str:
    """What it says, without line breaks."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line) or type(error).__name__
