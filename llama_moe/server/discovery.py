"""Which model files there are: those named, and those in the model folders."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .settings import ServerSettings

logger = logging.getLogger("llama_moe.server")

_MAGIC = b"GGUF"
_SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})")
# Files that go with a model: projectors of its other modalities, and importance matrices.
_NO_MODEL = re.compile(r"(^|[-_.])(mmproj|imatrix)([-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model that can be served.

    Attributes:
        name: what requests call it.
        path: its file; the first one of a split model.
        created: when the file was last changed, in seconds since 1970.
        size_bytes: of all its files.
    """

    name: str
    path: Path
    created: int
    size_bytes: int


def find_models(settings: ServerSettings) -> dict[str, ModelFile]:
    """Every model by its name, those named first, then each folder's in the order of their names.

    Raises:
        FileNotFoundError: a file or folder of the settings is not there.
    """
    found: dict[str, ModelFile] = {}
    for path in map(Path, settings.models):
        _add(found, _model_file(_stem(Path(path.name)), path, _parts(path)))
    for folder in map(Path, settings.model_dirs):
        if not folder.is_dir():
            raise FileNotFoundError(2, "no such folder", str(folder))
    roots = [Path(folder).resolve() for folder in settings.model_dirs]
    for folder in map(Path, settings.model_dirs):
        for path in _files_below(folder):
            model = _usable(folder, path, roots)
            if model is not None:
                _add(found, model)
    return found


def _add(found: dict[str, ModelFile], model: ModelFile) -> None:
    first = found.setdefault(model.name, model)
    if first.path.resolve() != model.path.resolve():
        logger.warning("%s is not served: %s has the same name, %r", model.path, first.path, model.name)


def _files_below(folder: Path) -> Iterator[Path]:
    # Links to folders are not followed: what they lead to inside of the model folders is found there.
    for place, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if name.lower().endswith(_SUFFIX) and not _NO_MODEL.search(name))


def _usable(folder: Path, path: Path, roots: Iterable[Path]) -> ModelFile | None:
    """The model in a file, if it is the first one of a model and all of it lies in the model folders."""
    split = _PART.fullmatch(path.stem)
    if split and int(split["part"]) != 1:
        return None
    try:
        parts = list(_parts(path))
        if not all(_is_inside(part.resolve(strict=True), roots) and _is_gguf(part) for part in parts):
            return None
        return _model_file(_stem(path.relative_to(folder)), path, parts)
    # A dangling link, no permission, a part that is missing, or gone meanwhile; a RuntimeError is a circle of links before Python 3.13.
    except (OSError, RuntimeError):
        return None


def _is_inside(path: Path, roots: Iterable[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():  # opening a pipe would wait for who writes to it
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _stem(path: Path) -> str:
    """A file's name as that of a model."""
    split = _PART.fullmatch(path.stem)
    return path.with_name(split["stem"] if split else path.stem).as_posix()


def _parts(path: Path) -> Iterator[Path]:
    """All files of a model, given the first."""
    split = _PART.fullmatch(path.stem)
    if not split:
        yield path
        return
    for part in range(1, int(split["parts"]) + 1):
        yield path.with_name(f"{split['stem']}-{part:05}-of-{split['parts']}{path.suffix}")


def _model_file(name: str, path: Path, parts: Iterable[Path]) -> ModelFile:
    status = [part.stat() for part in parts]
    return ModelFile(name, path, int(status[0].st_mtime), sum(each.st_size for each in status))
