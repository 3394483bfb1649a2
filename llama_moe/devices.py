"""The devices that can hold weights and compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from . import _core, _logging
from ._sizes import format_size
from .errors import PlacementError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from .model import DevicesLike

    DeviceKind = Literal["cpu", "gpu", "integrated_gpu", "accelerator"]


@dataclass(frozen=True, slots=True)
class Device:
    """A processor with its memory, as llama.cpp sees it.

    Attributes:
        name: llama.cpp's name, such as "CPU", "CUDA0" or "RPC0"; placements refer to devices by it.
        description: the model of the processor, or the endpoint of an RPC worker.
        kind: "cpu", "gpu" (a GPU, or an RPC worker), "integrated_gpu", or "accelerator" (a helper of the CPU with no memory of its own).
        backend: llama.cpp's backend, such as "CPU", "CUDA", "Vulkan" or "RPC".
        memory_free: bytes that were free when this was asked.
        memory_total: bytes.
    """

    name: str
    description: str
    kind: DeviceKind
    backend: str
    memory_free: int
    memory_total: int

    def __str__(self) -> str:
        return f"{self.name} ({self.description}, {format_size(self.memory_free)} of {format_size(self.memory_total)} free)"


def _from_native(device: _core.Device) -> Device:
    return Device(
        name=device.name,
        description=device.description,
        kind=cast("DeviceKind", device.kind),
        backend=device.backend,
        memory_free=device.memory_free,
        memory_total=device.memory_total,
    )


def devices() -> list[Device]:
    """Every device of this process: the CPU, accelerators, and the RPC workers added so far, with their memory as it is now."""
    _logging.sync_level()
    return [_from_native(device) for device in _core.devices()]


def add_rpc_device(endpoint: str, *, answer_timeout: float = 300.0) -> list[Device]:
    """Connects to a llama.cpp RPC worker and makes its devices usable in this process.

    A second call with the same endpoint returns the same devices, and sets their `answer_timeout`.

    Args:
        endpoint: "host:port". The protocol has no authentication and no encryption: use it within a network you trust.
        answer_timeout: seconds for which a call, such as one step of an engine, waits for the worker. Then the worker is asked whether it
            still answers, and given 5 s more. One that does not counts as failed: who waits for it gets a `DecodeError` that names it, and
            this process does not use it again. It must be longer than the longest time the worker computes for one micro-batch.

    Returns:
        The worker's devices, named "RPC0", "RPC1" and so on in order of registration.

    Raises:
        InvalidOptionError: `endpoint` is not "host:port", or `answer_timeout` is not above 0.
        LlamaMoeError: no worker answers there, or it speaks another version of the protocol.
    """
    _logging.sync_level()
    return [_from_native(device) for device in _core.add_rpc_device(endpoint, answer_timeout)]


def device_name(device: object) -> str:
    """The name that native options know a device by."""
    if isinstance(device, Device):
        return device.name
    if isinstance(device, str):
        return device
    raise TypeError(f"a device must be a llama_moe.Device or its name, not {device!r}")


def chosen_accelerators(chosen: DevicesLike | None) -> list[Device]:
    """The devices with memory of their own that a `devices` argument stands for, each once, in its order, as a load finds them.

    Args:
        chosen: `Device` objects, or names or endpoints of workers in upper or lower case; None: all there are. The CPU and its helpers,
            which are always used, may be among them.

    Raises:
        PlacementError: there is no such device.
        TypeError: one is neither a `Device` nor a name.
    """
    known = devices()
    if chosen is None:
        wanted = known
    else:
        wanted = [_find(device_name(each), known) for each in ([chosen] if isinstance(chosen, Device | str) else chosen)]
    usable = {device.name: device for device in wanted if device.kind in ("gpu", "integrated_gpu")}
    return list(usable.values())


def _find(name: str, known: Sequence[Device]) -> Device:
    for device in known:
        if name.lower() in (device.name.lower(), device.description.lower() if device.backend == "RPC" else None):
            return device
    raise PlacementError(f"no device {name!r}; there are: {', '.join(device.name for device in known)}")
