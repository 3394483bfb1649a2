"""What this system has for GPUs: the processors themselves and the libraries of their drivers."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_DISPLAY_CLASS = "0x03"  # of a PCI device: a display controller
_DRIVER_FOLDERS = ("etc/vulkan/icd.d", "usr/local/share/vulkan/icd.d", "usr/share/vulkan/icd.d")


@dataclass(frozen=True, slots=True)
class Driver:
    """The library through which a backend reaches GPUs.

    Attributes:
        name: "NVIDIA" or "Vulkan".
        library: its file, such as "libcuda.so.1".
        found: whether the system's loader has it.
        version: of the driver (NVIDIA) or of the loader (Vulkan); empty where it does not tell.
        supports: what else counts: the newest CUDA of an NVIDIA driver as ("CUDA 13.0",), the names of Vulkan's drivers.
    """

    name: str
    library: str
    found: bool
    version: str = ""
    supports: tuple[str, ...] = ()


def drivers() -> tuple[Driver, ...]:
    """The drivers' libraries that llama_moe's plug-ins use, there or not."""
    return nvidia_driver(), vulkan_driver()


def gpu_vendors(root: Path = Path("/")) -> tuple[str, ...]:
    """Who made the GPUs of this machine, by what the kernel lists on the PCI bus: "NVIDIA", "AMD", "Intel"."""
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor = _VENDORS.get(_text(device / "vendor").strip())
        if vendor and _text(device / "class").startswith(_DISPLAY_CLASS):
            found.append(vendor)
    return tuple(dict.fromkeys(found))


def nvidia_driver(root: Path = Path("/")) -> Driver:
    """NVIDIA's driver."""
    name = "libcuda.so.1"
    library = _open(name)
    if library is None:
        return Driver("NVIDIA", name, found=False)
    version = re.search(r"\b(\d{3,}\.[\d.]+)", _text(root / "proc/driver/nvidia/version"))
    cuda = _number_from(library, "cuDriverGetVersion", ctypes.c_int())
    supports = (f"CUDA {cuda // 1000}.{cuda % 1000 // 10}",) if cuda else ()
    return Driver("NVIDIA", name, found=True, version=version[1] if version else "", supports=supports)


def vulkan_driver(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> Driver:
    """Vulkan's loader, and the drivers that are registered with it."""
    name = "libvulkan.so.1"
    library = _open(name)
    if library is None:
        return Driver("Vulkan", name, found=False)
    packed = _number_from(library, "vkEnumerateInstanceVersion", ctypes.c_uint32())
    version = f"{packed >> 22 & 0x7F}.{packed >> 12 & 0x3FF}.{packed & 0xFFF}" if packed else ""
    return Driver("Vulkan", name, found=True, version=version, supports=vulkan_drivers(root, environ))


def vulkan_drivers(root: Path, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The names of Vulkan's drivers, by their manifests, such as "radeon" or "lvp": those in the environment, else those installed."""
    chosen = environ.get("VK_DRIVER_FILES") or environ.get("VK_ICD_FILENAMES")
    if chosen:
        files = [Path(file) for file in chosen.split(os.pathsep)]
    else:
        files = [file for folder in _DRIVER_FOLDERS for file in sorted((root / folder).glob("*.json"))]
    return tuple(dict.fromkeys(re.sub(r"_icd$", "", file.name.split(".")[0]) for file in files if file.is_file()))


def _open(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _number_from(library: ctypes.CDLL, function: str, number: ctypes.c_int | ctypes.c_uint32) -> int:
    """The number that a C function writes; 0 when it fails or is not there."""
    ask = getattr(library, function, None)
    return int(number.value) if ask is not None and ask(ctypes.byref(number)) == 0 else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
