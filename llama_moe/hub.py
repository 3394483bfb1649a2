"""Models of the Hugging Face hub: which file is meant, and fetching it into the cache that the Hugging Face tools share.

huggingface_hub says what a repository has, knows tokens, proxies and the layout of the cache, and transfers. What is done here is what it
leaves to its callers: choosing a quantisation, fetching all files of a split model, looking at the free disk before, and going on with a
download where an earlier one ended. (huggingface_hub itself throws away what it had when a download is interrupted.)
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ._sizes import format_size
from .errors import DownloadError, InvalidOptionError, LlamaMoeError
from .remote import endpoint, hub_reference

if TYPE_CHECKING:
    from typing import TypeAlias

    from .model import StrPath

    DownloadProgress: TypeAlias = Callable[[int, int], object]

__all__ = ["local_model", "pull"]

_LOG = logging.getLogger("llama_moe")

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_READ_BYTES = 1 << 20
_MOST_NAMES = 40


def pull(
    repo: str,
    file: str | None = None,
    *,
    revision: str | None = None,
    folder: StrPath | None = None,
    on_progress: DownloadProgress | None = None,
) -> Path:
    """Fetches a GGUF model from the Hugging Face hub, or from ``$HF_ENDPOINT``; what is there already is not fetched again.

    A download that was interrupted goes on where it ended. All files of a split model are fetched. Nothing has its final name before it is
    complete and its SHA-256 is the hub's. Without a network, what the cache has is found. Tokens, proxies and the cache's place are
    those of huggingface_hub (``$HF_TOKEN``, ``hf auth login``, ``$HF_HOME``).

    Args:
        repo: "OWNER/REPOSITORY"; or "OWNER/REPOSITORY/FILE" without `file`.
        file: a file's name; a pattern such as "*Q4_K_M*"; or a format that is part of one name only, such as "Q4_K_M". None: the only model
            of the repository.
        revision: a branch, tag or commit; None: the main branch.
        folder: put it there, under its name in the repository, and not into the cache of the Hugging Face tools.
        on_progress: called with the bytes that are there and the bytes of all files. An exception from it stops the download.

    Returns:
        The file, of a split model the first one.

    Raises:
        FileNotFoundError: there is no such repository, revision or file; the message lists the GGUF files.
        InvalidOptionError: `repo` is no name of a repository, or several models match `file`.
        DownloadError: the hub cannot be reached or wants a token, or what came is damaged.
        OSError: the disk is too small (errno ENOSPC, said before the download), or cannot be written.
        LlamaMoeError: huggingface_hub is not installed.
    """
    if file is None and (reference := hub_reference(repo)) is not None:
        repo, file = reference
    if not _REPOSITORY.fullmatch(repo):
        raise InvalidOptionError(f"{repo!r} is not a repository of the hub; expected OWNER/REPOSITORY, such as 'ggml-org/models'")
    _hub()
    repository = _Repository.ask(repo, revision)
    chosen = repository.choose(file)
    return _fetch(repository, chosen, None if folder is None else Path(folder), on_progress)


def local_model(path: StrPath, *, on_progress: DownloadProgress | None = None) -> StrPath:
    """The file that `path` stands for: itself, or what `pull` gives for an "OWNER/REPOSITORY/FILE.gguf" that is no file of this machine."""
    reference = hub_reference(path)
    if reference is None:
        return path
    try:
        return pull(*reference, on_progress=on_progress)
    except (FileNotFoundError, LlamaMoeError) as error:
        error.args = (f"there is no file {os.fspath(path)!r} here, and on the hub: {error}",)
        raise


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise LlamaMoeError(f'downloads need huggingface_hub ({error}): pip install "llama-moe[hub]"') from error
    return huggingface_hub


# ---- what a repository has


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size: int | None
    """Bytes; None where only the cache was asked."""
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class _Repository:
    name: str
    revision: str
    commit: str
    files: tuple[_File, ...]
    """Its GGUF files."""
    offline: Exception | None = None
    """Why the hub was not asked; `files` are then those of the cache."""

    @classmethod
    def ask(cls, name: str, revision: str | None) -> _Repository:
        """The files of a repository by the hub's account; by the cache's where there is no network."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

        wanted = revision or "main"
        try:
            info = HfApi(endpoint=endpoint()).model_info(name, revision=wanted, files_metadata=True)
        except GatedRepoError as error:
            raise _gated(name) from error
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"the hub has no repository {name!r}; if it is private, set HF_TOKEN to a token that may read it, or run 'hf auth login'"
            ) from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"repository {name!r} has no revision {wanted!r}") from error
        except HfHubHTTPError as error:
            return cls._of_cache(name, wanted, error)
        except Exception as error:
            if not _is_network(error):
                raise
            return cls._of_cache(name, wanted, error)
        files = [
            _File(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs is not None else None)
            for entry in info.siblings or ()
            if entry.rfilename.endswith(".gguf")
        ]
        return cls(name, wanted, str(info.sha), tuple(sorted(files, key=lambda entry: entry.name)))

    @classmethod
    def _of_cache(cls, name: str, revision: str, reason: Exception) -> _Repository:
        storage = _storage(name)
        commit = revision
        if not _COMMIT.fullmatch(revision):
            with contextlib.suppress(OSError):
                commit = (storage / "refs" / revision).read_text(encoding="utf-8").strip()
        snapshot = storage / "snapshots" / commit
        files = tuple(_File(str(found.relative_to(snapshot)), None) for found in sorted(snapshot.rglob("*.gguf")) if found.exists())
        if not files:
            raise DownloadError(f"cannot ask the hub for {name!r}, and the cache has no file of it: {_one_line(reason)}") from reason
        return cls(name, revision, commit, files, reason)

    def choose(self, wanted: str | None) -> tuple[_File, ...]:
        """The files of the one model that is meant, in order."""
        models = self._models()
        if wanted is None:
            found = [name for name in models if not _is_projector(name)]
        else:
            wanted = wanted.strip()
            found = [name for name, files in models.items() if any(file.name == wanted for file in files)]
            found = found or [name for name in models if _matches(name, wanted)]
        if len(found) == 1:
            return models[found[0]]
        if found:
            raise InvalidOptionError(
                f"{len(found)} models of {self.name!r} match{'' if wanted is None else ' ' + repr(wanted)}; give one: {_listed(found)}"
            )
        where = "the cache" if self.offline is not None else f"repository {self.name!r}"
        reason = "" if self.offline is None else f" (the hub was not asked: {_one_line(self.offline)})"
        if not models:
            raise FileNotFoundError(f"{where} has no GGUF file{reason}")
        missing = "no model" if wanted is None else f"no file {wanted!r}"
        raise FileNotFoundError(f"{where} has {missing}{reason}; its GGUF files are {_listed(list(models))}")

    def _models(self) -> dict[str, tuple[_File, ...]]:
        """The files of each model by the name of the first."""
        by_name = {file.name: file for file in self.files}
        models: dict[str, tuple[_File, ...]] = {}
        for file in self.files:
            numbered = _PART.search(file.name)
            if numbered is None:
                models[file.name] = (file,)
            elif int(numbered[1]) == 1:
                names = [_PART.sub(rf"-{number:05d}-of-\2.gguf", file.name) for number in range(1, int(numbered[2]) + 1)]
                missing = [name for name in names if name not in by_name]
                if missing:
                    _LOG.info("%s: %s is missing, so the model that it belongs to is left out", self.name, missing[0])
                    continue
                models[file.name] = tuple(by_name[name] for name in names)
        return models


def _matches(name: str, wanted: str) -> bool:
    if any(character in wanted for character in "*?["):
        return fnmatch.fnmatchcase(name, wanted)
    whole_word = rf"(?<![A-Za-z0-9]){re.escape(wanted)}(?![A-Za-z0-9_])"
    return not _is_projector(name) and re.search(whole_word, name, re.IGNORECASE) is not None


def _is_projector(name: str) -> bool:
    """Whether it is what a vision model has besides the model."""
    return name.rpartition("/")[2].startswith("mmproj")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


# ---- fetching


@dataclass(slots=True)
class _Transfer:
    """One file on its way."""

    file: _File
    target: Path
    partial: Path
    size: int
    folder: Path | None
    """Where the caller wants it; None: in the cache."""

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


def _fetch(repository: _Repository, files: Sequence[_File], folder: Path | None, on_progress: DownloadProgress | None) -> Path:
    if repository.offline is not None:
        if folder is not None and not all((folder / file.name).is_file() for file in files):
            raise DownloadError(f"cannot reach the hub: {_one_line(repository.offline)}") from repository.offline
        _LOG.info("the hub was not asked for %s, the cache's is used: %s", repository.name, _one_line(repository.offline))
        root = _storage(repository.name) / "snapshots" / repository.commit if folder is None else folder
        return root / files[0].name
    with _explained(repository.name):
        transfers = [_transfer(repository, file, folder) for file in files]
        missing = [transfer for transfer in transfers if not transfer.target.exists()]
        total = sum(transfer.size for transfer in transfers)
        _check_disk(missing)
        here = total - sum(transfer.size - transfer.begun for transfer in missing)
        counter = _Counter(here, total, on_progress)
        counter.update(0)
        for transfer in missing:
            _download(repository, transfer, counter)
        if folder is not None:
            return transfers[0].target
        paths = [_finish(repository, file) for file in files]
        return paths[0]


def _transfer(repository: _Repository, file: _File, folder: Path | None) -> _Transfer:
    if folder is not None:
        target = folder / file.name
        if target.exists() and file.size is not None and target.stat().st_size != file.size:
            raise InvalidOptionError(
                f"{str(target)!r} is there and has {target.stat().st_size} bytes, not the {file.size} of the hub's; remove it first"
            )
        return _Transfer(file, target, target.with_name(f".{target.name}.partial"), file.size or 0, folder)
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    cached = _storage(repository.name) / "snapshots" / repository.commit / file.name
    if cached.exists():
        return _Transfer(file, cached, cached, cached.stat().st_size, None)
    url = hf_hub_url(repository.name, file.name, revision=repository.commit, endpoint=endpoint())
    metadata = get_hf_file_metadata(url, headers=_headers())
    if metadata.etag is None:
        raise DownloadError(f"the server of {repository.name!r} is no hub: it gives no ETag for {file.name!r}")
    blob = _storage(repository.name) / "blobs" / metadata.etag
    # The name that older versions of huggingface_hub gave to what is not complete: what they left is used as well.
    return _Transfer(file, blob, blob.with_name(f"{blob.name}.incomplete"), metadata.size or file.size or 0, None)


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


def _download(repository: _Repository, transfer: _Transfer, counter: _Counter) -> None:
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # it is there, without being marked as exported

    if transfer.size > constants.MAX_HTTP_DOWNLOAD_SIZE:  # the hub sends such files by a protocol of its own, which does not go on
        hf_hub_download(repository.name, transfer.file.name, revision=repository.commit, local_dir=transfer.folder, endpoint=endpoint())
        counter.update(transfer.size)
        return
    transfer.partial.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(_lock_of(repository, transfer)):
        begun = transfer.begun
        if transfer.target.exists():  # another process was quicker
            counter.update(transfer.size - begun)
            return
        if begun:
            _LOG.info("%s: going on at %s of %s", transfer.file.name, format_size(begun), format_size(transfer.size))
        with transfer.partial.open("r+b" if begun else "wb") as file:
            file.seek(0, os.SEEK_END)
            http_get(
                hf_hub_url(repository.name, transfer.file.name, revision=repository.commit, endpoint=endpoint()),
                file,
                resume_size=begun,
                headers=_headers() | {"Accept-Encoding": "identity"},
                expected_size=transfer.size or None,
                _tqdm_bar=cast("Any", counter),
            )
            file.flush()
            os.fsync(file.fileno())
        _check_content(transfer)
        transfer.partial.replace(transfer.target)


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


def _finish(repository: _Repository, file: _File) -> Path:
    """Gives a file that the cache holds its name there."""
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repository.name, file.name, revision=repository.commit, endpoint=endpoint()))
    if repository.revision != repository.commit:  # so that it is found without a network
        reference = _storage(repository.name) / "refs" / repository.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(repository.commit, encoding="utf-8")
    return path


def _headers() -> dict[str, str]:
    """With the token, if there is one."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # as above

    return build_hf_headers()


def _storage(repository: str) -> Path:
    """The folder of a repository in the cache of the Hugging Face tools."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


def _lock_of(repository: _Repository, transfer: _Transfer) -> Path:
    """The lock that huggingface_hub takes for the same file of the cache, or one like it."""
    storage = _storage(repository.name)
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
        raise _gated(repository) from error
    except HfHubHTTPError as error:
        if isinstance(error, EntryNotFoundError):
            raise FileNotFoundError(f"a file of {repository!r} is gone: {_one_line(error)}") from error
        raise DownloadError(f"the hub refuses to send {repository!r}: {_one_line(error)}") from error
    except Exception as error:
        if not _is_network(error):
            raise
        raise DownloadError(
            f"the download of {repository!r} was interrupted: {_one_line(error)}; the next one goes on from there"
        ) from error


def _gated(repository: str) -> DownloadError:
    from huggingface_hub import get_token

    page = f"{endpoint()}/{repository}"
    hint = f"ask for access at {page}" if get_token() else f"accept its terms at {page} and set HF_TOKEN, or run 'hf auth login'"
    return DownloadError(f"repository {repository!r} is gated: {hint}")


def _is_network(error: Exception) -> bool:
    """Whether it is a failure of the network: those of huggingface_hub's HTTP library have no common name between its versions."""
    if type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "requests", "urllib3"}:
        return True
    return isinstance(error, ConnectionError) or (type(error) is OSError and "Consistency check failed" in str(error))


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line) or type(error).__name__
