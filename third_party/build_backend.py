"""scikit-build-core's build backend, and the two things that llama_moe needs besides.

- A build that has to fetch llama.cpp needs pip, which an isolated build environment may lack: it is asked for then, and only then.
- A source distribution carries the sources of llama.cpp, so that installing from it needs no network for them.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

# Every hook that is not defined here is scikit-build-core's own.
from scikit_build_core import build as backend
from scikit_build_core.build import *  # noqa: F403

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fetch_llama_cpp as llama_cpp

if TYPE_CHECKING:
    from collections.abc import Iterator

    ConfigSettings = dict[str, str | list[str]] | None


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """What a wheel needs besides pyproject.toml's requirements."""
    return [*backend.get_requires_for_build_wheel(config_settings), *requires_for_fetch()]


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    """What an editable install needs besides pyproject.toml's requirements."""
    return [*backend.get_requires_for_build_editable(config_settings), *requires_for_fetch()]


def get_requires_for_build_sdist(config_settings: ConfigSettings = None) -> list[str]:
    """What a source distribution needs besides pyproject.toml's requirements."""
    return [*backend.get_requires_for_build_sdist(config_settings), *requires_for_fetch()]


def build_sdist(sdist_directory: str, config_settings: ConfigSettings = None) -> str:
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
    environ = {name: value for name, value in llama_cpp.os.environ.items() if name != "LLAMA_CPP_SOURCE_DIR"}
    tree = llama_cpp.fetch(llama_cpp.read_pin(), environ)
    try:
        shutil.copytree(tree, carried)
        yield
    finally:
        shutil.rmtree(carried, ignore_errors=True)
