"""Backends that other packages bring: found by their entry points, checked, and given to llama.cpp when it starts.

A plug-in is a package with an entry point in the group `llama_moe.backends` that names its Python package. In there is `plugin.json`: the
commit of llama.cpp it was built for, its library, the driver's library that it needs, and libraries of other packages to load before it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from . import _core
from ._logging import logger
from .errors import LlamaMoeError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "llama_moe.backends"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A package that brings a backend, and what came of it.

    Attributes:
        package: its name, such as "llama-moe-cuda13".
        version: its version.
        loaded: whether its devices can be used.
        reason: why it was skipped, and what would help; empty for one that is loaded.
        broken: whether that is a fault of the installation. A machine without the driver is none.
    """

    package: str
    version: str
    loaded: bool = False
    reason: str = ""
    broken: bool = False


class _SkipError(Exception):
    """This machine has not what a plug-in needs."""


class _BrokenError(Exception):
    """A plug-in cannot work as it is installed."""


_plugins: list[Plugin] = []


def plugins() -> tuple[Plugin, ...]:
    """The plug-in packages that are installed, loaded or skipped."""
    _core.build_info()  # starts llama.cpp, and so loads them
    return tuple(_plugins)


def load_all() -> None:
    """Loads every plug-in, and logs one line for each that is skipped. The native core calls it when llama.cpp starts."""
    _plugins.clear()
    build = _core.build_info()
    for entry in entry_points(group=GROUP):
        plugin = _load(entry, build)
        if not plugin.loaded:
            logger.warning("%s %s is skipped: %s", plugin.package, plugin.version, plugin.reason)
        _plugins.append(plugin)


def _load(entry: EntryPoint, build: dict[str, str]) -> Plugin:
    package = entry.dist.name if entry.dist else entry.name
    version = entry.dist.version if entry.dist else ""
    try:
        _load_library(entry.value, package, build)
    except _SkipError as skip:
        return Plugin(package, version, reason=str(skip))
    except _BrokenError as broken:
        return Plugin(package, version, reason=str(broken), broken=True)
    return Plugin(package, version, loaded=True)


def _load_library(module: str, package: str, build: dict[str, str]) -> None:
    folder = _folder_of(module)
    try:
        description = json.loads((folder / "plugin.json").read_text(encoding="utf-8"))
        commit, library, needs, preload = (description[key] for key in ("llama_cpp_commit", "library", "needs", "preload"))
    except (OSError, ValueError, KeyError) as error:
        raise _BrokenError(f"its plugin.json cannot be read ({error}); install it again") from None
    if commit != build["llama_cpp_commit"]:
        raise _BrokenError(
            f"it is for llama.cpp {commit}, and this llama_moe has {build['llama_cpp_commit']}; "
            f'it may help to run: pip install "{package}=={build["version"]}"'
        )
    if not has_library(needs["library"]):
        raise _SkipError(f"{needs['name']} ({needs['library']}) is not on this machine; {needs['advice']}")
    if build["linkage"] != "dynamic":
        raise _BrokenError("this llama_moe was built with its backends linked in, and plug-ins need one from a wheel (make wheel)")
    for path in preload:
        _preload(path)
    try:
        found = _core.load_plugin(str(folder / library))
    except LlamaMoeError as error:
        raise _BrokenError(f"its library does not load: {error}") from None
    if not found:
        raise _SkipError(f"it found no device; {needs['advice']}")


def _folder_of(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise _BrokenError(f"its package {module} is missing; install it again")
    return Path(folders[0])


def has_library(name: str) -> bool:
    """Whether the system's loader has this library; loads it."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _preload(path: str) -> None:
    """Loads a library of another package, which the plug-in's library then finds by its name.

    Where no package has it, the system's loader may: so nothing is said here.
    """
    for folder in sys.path:
        library = Path(folder) / path
        if library.is_file():
            has_library(str(library))
            return
