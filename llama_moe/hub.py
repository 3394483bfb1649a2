"""Models of the Hugging Face hub: which file is meant, and fetching it into the cache that the Hugging Face tools share.

huggingface_hub says what a repository has, knows tokens, proxies and the layout of the cache, and transfers. What is done here is what it
leaves to its callers: choosing a quantisation, fetching all files of a split model, looking at the free disk before, and going on with a
download where an earlier one ended. (huggingface_hub itself throws away what it had when a download is interrupted.)
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DownloadError, InvalidOptionError, LlamaMoeError
from .hub_transfer import HubFile, fetch, gated, is_network_failure, one_line, storage_folder
from .remote import endpoint, hub_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .hub_transfer import DownloadProgress
    from .model import StrPath

__all__ = ["local_model", "pull"]

_LOG = logging.getLogger("llama_moe")

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
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
    _check_installed()
    repository = _Repository.ask(repo, revision)
    files = repository.choose(file)
    if repository.offline is not None:
        return repository.here(files, None if folder is None else Path(folder), repository.offline)
    path = fetch(repo, repository.commit, files, None if folder is None else Path(folder), on_progress)
    if folder is None and repository.revision != repository.commit:  # so that it is found without a network
        branch = storage_folder(repo) / "refs" / repository.revision
        branch.parent.mkdir(parents=True, exist_ok=True)
        branch.write_text(repository.commit, encoding="utf-8")
    return path


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


def _check_installed() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise LlamaMoeError(f'downloads need huggingface_hub ({error}): pip install "llama-moe[hub]"') from error


# ---- what a repository has


@dataclass(frozen=True, slots=True)
class _Repository:
    name: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]
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
            raise gated(name) from error
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"the hub has no repository {name!r}; if it is private, set HF_TOKEN to a token that may read it, or run 'hf auth login'"
            ) from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"repository {name!r} has no revision {wanted!r}") from error
        except HfHubHTTPError as error:
            return cls._of_cache(name, wanted, error)
        except Exception as error:
            if not is_network_failure(error):
                raise
            return cls._of_cache(name, wanted, error)
        files = [
            HubFile(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs is not None else None)
            for entry in info.siblings or ()
            if entry.rfilename.endswith(".gguf")
        ]
        return cls(name, wanted, str(info.sha), tuple(sorted(files, key=lambda entry: entry.name)))

    @classmethod
    def _of_cache(cls, name: str, revision: str, reason: Exception) -> _Repository:
        storage = storage_folder(name)
        commit = revision
        if not _COMMIT.fullmatch(revision):
            with contextlib.suppress(OSError):
                commit = (storage / "refs" / revision).read_text(encoding="utf-8").strip()
        snapshot = storage / "snapshots" / commit
        files = tuple(HubFile(str(found.relative_to(snapshot)), None) for found in sorted(snapshot.rglob("*.gguf")) if found.exists())
        if not files:
            raise DownloadError(f"cannot ask the hub for {name!r}, and the cache has no file of it: {one_line(reason)}") from reason
        return cls(name, revision, commit, files, reason)

    def here(self, files: Sequence[HubFile], folder: Path | None, reason: Exception) -> Path:
        """The first of files that need not be fetched, where the hub was not asked."""
        root = storage_folder(self.name) / "snapshots" / self.commit if folder is None else folder
        if not all((root / file.name).is_file() for file in files):
            raise DownloadError(f"cannot reach the hub: {one_line(reason)}") from reason
        _LOG.info("the hub was not asked for %s, what is here is used: %s", self.name, one_line(reason))
        return root / files[0].name

    def choose(self, wanted: str | None) -> tuple[HubFile, ...]:
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
        reason = "" if self.offline is None else f" (the hub was not asked: {one_line(self.offline)})"
        if not models:
            raise FileNotFoundError(f"{where} has no GGUF file{reason}")
        missing = "no model" if wanted is None else f"no file {wanted!r}"
        raise FileNotFoundError(f"{where} has {missing}{reason}; its GGUF files are {_listed(list(models))}")

    def _models(self) -> dict[str, tuple[HubFile, ...]]:
        """The files of each model by the name of the first."""
        by_name = {file.name: file for file in self.files}
        models: dict[str, tuple[HubFile, ...]] = {}
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
