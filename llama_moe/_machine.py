"""What this machine is, and where llama_moe keeps files for it."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from . import _core

_GIB = 1 << 30
# /proc/cpuinfo names the model differently on each architecture; Arm often gives numbers only, which together name a core.
_NAME_KEYS = ("model name", "Hardware", "cpu model", "cpu", "uarch")
_ARM_KEYS = ("CPU implementer", "CPU part")
_MODEL_KEYS = ("cpu family", "model", "stepping")


def data_folder() -> Path:
    """Returns the folder of what is fetched, generated or measured once.

    It is ``$LLAMA_MOE_CACHE``, or ``llama_moe`` in ``$XDG_CACHE_HOME``, or ``~/.cache/llama_moe``. It need not exist yet.
    """
    own = os.environ.get("LLAMA_MOE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "llama_moe"


def cpu_name() -> str:
    """Returns what the CPU calls itself, such as "AMD EPYC 9354 32-Core Processor"; its architecture where it has no name."""
    return _name_in(_cpuinfo()) or platform.processor() or platform.machine() or "unknown CPU"


def ram_bytes() -> int:
    """Returns the bytes of physical memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def machine_id() -> str:
    """Returns twelve hexadecimal digits for the CPU's name and model, the cores this process may use and the memory in whole GiB.

    Speeds that were measured on one machine hold on every machine with this identity, whatever its name in a network. Accelerators are not
    part of it: what is measured of them is kept by their names.
    """
    fields = _cpuinfo()
    # Virtual machines shorten the name to a brand; the numbers tell its generations apart.
    cpu = " ".join([cpu_name(), *(f"{key} {fields[key]}" for key in _MODEL_KEYS if fields.get(key))])
    return _identity(cpu, _core.usable_cores(), ram_bytes())


def _identity(cpu: str, cores: int, ram: int) -> str:
    # Firmware and kernel keep a little for themselves, a different little after each update: rounded up to what is built in.
    return hashlib.sha256(f"{cpu}\n{cores}\n{-(-ram // _GIB)}".encode()).hexdigest()[:12]


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; none where there is no such file."""
    try:
        return _fields(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def _fields(cpuinfo: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _name_in(fields: Mapping[str, str]) -> str:
    for key in _NAME_KEYS:
        if fields.get(key):
            return " ".join(fields[key].split())
    return " ".join(f"{key} {fields[key]}" for key in _ARM_KEYS if fields.get(key))
