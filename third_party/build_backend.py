"""scikit-build-core's build backend, and the two things that llama_moe needs besides.

- A build that has to fetch llama.cpp needs pip, which an isolated build environment may lack: it is asked for then, and only then.
- A source distribution carries the sources of llama.cpp, so that installing from it needs no network for them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scikit_build_core import build as backend
from scikit_build_core.build import (
    build_editable,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fetch_llama_cpp as llama_cpp

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ConfigSettings = dict[str, list[str] | str]


def get_requires_for_build_wheel(config_settings: ConfigSettings | None = None) -> list[str]:
    """What a wheel needs besides pyproject.toml's requirements."""
    return [*backend.get_requires_for_build_wheel(config_settings), *requires_for_fetch()]


def get_requires_for_build_editable(config_settings: ConfigSettings | None = None) -> list[str]:
    """What an editable install needs besides pyproject.toml's requirements."""
    return [*backend.get_requires_for_build_editable(config_settings), *requires_for_fetch()]


def get_requires_for_build_sdist(config_settings: ConfigSettings | None = None) -> list[str]:
    """What a source distribution needs besides pyproject.toml's requirements."""
    return [*backend.get_requires_for_build_sdist(config_settings), *requires_for_fetch()]


def build_sdist(sdist_directory: str, config_settings: ConfigSettings | None = None) -> str:
    """Build a source distribution that carries llama.cpp."""
    with carried_sources():
        return backend.build_sdist(sdist_directory, config_settings)


def requires_for_fetch() -> list[str]:
    """Pip, when there are no sources on this machine yet."""
    try:
        return [] if llama_cpp.find(llama_cpp.read_pin()) else ["pip"]
    except llama_cpp.FetchError as error:
        raise SystemExit(f"llama_moe: {error}") from None


@contextmanager
def carried_sources() -> Iterator[None]:
    """Have the pinned sources in third_party/llama.cpp for the time of a build, where git ignores them."""
    carried = llama_cpp.CARRIED
    if not llama_cpp.missing_landmarks(carried):  # this is an unpacked source distribution already
        yield
        return
    shutil.rmtree(carried, ignore_errors=True)
    # Never LLAMA_CPP_SOURCE_DIR: a source distribution contains what the pin says.
    environ = {name: value for name, value in os.environ.items() if name != "LLAMA_CPP_SOURCE_DIR"}
    try:
        tree = llama_cpp.fetch(llama_cpp.read_pin(), environ)
    except llama_cpp.FetchError as error:
        raise SystemExit(f"llama_moe: {error}") from None
    try:
        shutil.copytree(tree, carried)
        yield
    finally:
        shutil.rmtree(carried, ignore_errors=True)
