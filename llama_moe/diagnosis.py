"""What llama_moe found on this machine, what is missing, and what to install."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ._sizes import format_size
from ._table import columns
from .build import build_info
from .devices import Device, devices
from .drivers import Driver, drivers, gpu_vendors
from .plugins import Plugin, plugins

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

    Severity = Literal["broken", "advice"]

_CUDA_MAJOR = 13  # of the plug-in
# Mesa's Vulkan driver that computes on the CPU. llama.cpp passes over it, and it is no GPU to use.
_SOFTWARE_DRIVER = "lvp"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that could be better.

    Attributes:
        severity: "broken": a part of the installation does not work; "advice": all works, and more could.
        problem: what it is.
        remedy: what to do.
    """

    severity: Severity
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is there for llama_moe; `str()` is a text for people.

    Attributes:
        build: `build_info()`.
        devices: `devices()`.
        plugins: the plug-in packages that are installed, loaded or skipped.
        drivers: the libraries of GPU drivers, there or not.
        gpus: the vendors of the GPUs on this machine's PCI bus, with a driver or without.
        findings: what is broken or missing, and what to do.
    """

    build: Mapping[str, str]
    devices: tuple[Device, ...]
    plugins: tuple[Plugin, ...]
    drivers: tuple[Driver, ...]
    gpus: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> bool:
        """Whether a part of the installation does not work."""
        return any(finding.severity == "broken" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        return asdict(self) | {"broken": self.broken}

    def __str__(self) -> str:
        sections = [
            columns(_build_rows(self.build)),
            columns([("device", "backend", "free", "total", "description"), *map(_device_row, self.devices)], right=(2, 3)),
            columns([("plug-in", "version", "state"), *map(_plugin_row, self.plugins)]) if self.plugins else "no plug-in is installed",
            columns([("driver", "library", "state"), *map(_driver_row, self.drivers)]),
        ]
        if self.gpus:
            sections.append("GPUs on the PCI bus: " + ", ".join(self.gpus))
        sections += [f"{finding.severity}: {finding.problem}\n  {finding.remedy}" for finding in self.findings] or ["nothing is missing"]
        return "\n\n".join(sections)


def diagnose() -> Diagnosis:
    """Looks at the build, the devices, the plug-ins and the drivers of this machine.

    Returns:
        A Diagnosis. Its `findings` say what is missing and what to install.
    """
    build = build_info()
    found, installed, libraries, vendors = tuple(devices()), plugins(), drivers(), gpu_vendors()
    return Diagnosis(build, found, installed, libraries, vendors, tuple(findings(build, found, installed, libraries, vendors)))


def findings(
    build: Mapping[str, str], found: Sequence[Device], installed: Sequence[Plugin], libraries: Sequence[Driver], vendors: Sequence[str]
) -> list[Finding]:
    """What is broken, and what could be used but is not.

    Args:
        build: `build_info()`.
        found: the devices.
        installed: the plug-ins.
        libraries: the drivers.
        vendors: who made the machine's GPUs.
    """
    problems = [
        Finding("broken" if plugin.broken else "advice", f"{plugin.package} {plugin.version} is skipped", plugin.reason)
        for plugin in installed
        if not plugin.loaded
    ]
    backends = {device.backend for device in found}
    if "CPU" not in backends:
        problems.append(Finding("broken", "there is no CPU device", "install llama_moe again"))
    driver_of = {driver.name: driver for driver in libraries}
    if ("NVIDIA" in vendors or driver_of["NVIDIA"].found) and "CUDA" not in backends:
        problems += _nvidia_advice(build, driver_of["NVIDIA"], installed)
    if set(vendors) & {"AMD", "Intel"} and "Vulkan" not in backends:
        problems += _vulkan_advice(build, driver_of["Vulkan"], installed)
    return problems


def _nvidia_advice(build: Mapping[str, str], driver: Driver, installed: Sequence[Plugin]) -> list[Finding]:
    if not driver.found:
        return [Finding("advice", "there is an NVIDIA GPU and no driver for it", "install NVIDIA's driver, version 580 or newer")]
    newest = _cuda_of(driver)
    if newest and newest < _CUDA_MAJOR:
        problem = f"the NVIDIA driver {driver.version} is too old: it has {driver.supports[0]}"
        return [Finding("advice", problem, f"install version 580 or newer, which has CUDA {_CUDA_MAJOR}")]
    return _install_advice(build, "an NVIDIA GPU", "cuda13", "GGML_CUDA", installed)


def _vulkan_advice(build: Mapping[str, str], driver: Driver, installed: Sequence[Plugin]) -> list[Finding]:
    if not driver.found or not set(driver.supports) - {_SOFTWARE_DRIVER}:
        remedy = "install the Vulkan loader and the GPU's driver (Debian and Ubuntu: libvulkan1 and mesa-vulkan-drivers)"
        return [Finding("advice", "there is a GPU and no Vulkan driver for it", remedy)]
    return _install_advice(build, "a GPU with a Vulkan driver", "vulkan", "GGML_VULKAN", installed)


def _install_advice(build: Mapping[str, str], what: str, extra: str, option: str, installed: Sequence[Plugin]) -> list[Finding]:
    if any(plugin.package == f"llama-moe-{extra}" for plugin in installed):
        return []  # why it is skipped is said already
    if build["linkage"] == "dynamic":
        remedy = f'pip install "llama-moe[{extra}]"'
    else:
        remedy = f'this llama_moe was built here with its backends linked in: build it again with CMAKE_ARGS="-D{option}=ON"'
    return [Finding("advice", f"there is {what}, and nothing that uses it", remedy)]


def _cuda_of(driver: Driver) -> int:
    return int(driver.supports[0].removeprefix("CUDA ").split(".")[0]) if driver.supports else 0


def _build_rows(build: Mapping[str, str]) -> list[tuple[str, str]]:
    linked_in = "linked in" if build["linkage"] == "static" else build["cpu_variant"]
    return [
        ("llama_moe", build["version"]),
        ("llama.cpp", f"{build['llama_cpp_commit']} ({build['llama_cpp_version']})"),
        ("compiler", build["compiler"]),
        ("backends", f"{build['backends']} ({build['linkage']})"),
        ("CPU variant", linked_in),
        ("CPU features", build["cpu_features"]),
        ("expert kernels", build["expert_kernels"]),
    ]


def _device_row(device: Device) -> tuple[str, ...]:
    return device.name, device.backend, format_size(device.memory_free), format_size(device.memory_total), device.description


def _plugin_row(plugin: Plugin) -> tuple[str, ...]:
    return plugin.package, plugin.version, "loaded" if plugin.loaded else f"skipped: {plugin.reason}"


def _driver_row(driver: Driver) -> tuple[str, ...]:
    state = " ".join(["found", driver.version, *(f"({name})" for name in driver.supports)]) if driver.found else "not found"
    return driver.name, driver.library, " ".join(state.split())
