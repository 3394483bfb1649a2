"""How fast this machine's devices read weights: measured once, kept, and read again.

What bounds the speed of decoding is how quickly a device gets through the weights of a number format, so that is measured, with ggml's own
kernels, next to what an operation, a graph and a step between devices cost.
"""

from __future__ import annotations

import json
import logging
import math
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _core, _logging
from ._files import written_whole
from ._machine import cpu_name, data_folder, machine_id
from .build import build_info
from .devices import chosen_accelerators
from .devices import devices as all_devices
from .errors import InvalidOptionError
from .model import model_options

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from .devices import Device
    from .inspection import ModelInfo
    from .model import DevicesLike, ExpertKernels

_LOG = logging.getLogger("llama_moe")
# Of the file of measurements: raise it when what is measured, or how, changes.
_FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """How fast one device computes what decoding is made of; made by `bandwidths()`, or `stated()` for a device that is not there.

    Rates are in bytes per second and times in seconds; None is what was not measured, or what the device cannot do.

    Attributes:
        device: llama.cpp's name of it, such as "CPU" or "CUDA0".
        hardware: the model of the processor, or the endpoint of an RPC worker.
        threads: CPU threads that computed, or fed the device.
        layout: how host weights lay, and so what computed with them: "packed" for this package's expert kernels, "repacked" in llama.cpp's
            layouts, or "plain" as in the file; each as far as it has one for a type. Of no meaning for an accelerator.
        products: bytes of weights per second in a matrix-vector product, by ggml type such as "Q4_K", then by the length of a row. Without
            what the device cannot compute.
        expert_products: the same with some of many experts used.
        any_product: for every type that is in neither, if it is stated.
        memory: plain reads of host memory by all threads. Only of the CPU.
        copy: from host memory into the device's. Only of an accelerator.
        attention: keys and values of a 16-bit KV cache, counted once for each query head.
        operation_seconds: one small operation of a graph, such as a norm or an addition over one token's vector.
        graph_seconds: starting a graph and waiting for its end.
        crossing_seconds: one step of a graph from this device to the CPU or back, with one token's vector. Only of an accelerator.
        measured: when, as an ISO 8601 date and time in UTC; "" when stated.
        llama_cpp: commit of the llama.cpp that was measured; "" when stated.
    """

    device: str
    hardware: str = ""
    threads: int = 0
    layout: str = "plain"
    products: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    expert_products: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    any_product: float | None = None
    memory: float | None = None
    copy: float | None = None
    attention: float | None = None
    operation_seconds: float = 0.0
    graph_seconds: float = 0.0
    crossing_seconds: float = 0.0
    measured: str = ""
    llama_cpp: str = ""

    @classmethod
    def stated(
        cls,
        device: str,
        *,
        bytes_per_second: float,
        operation_seconds: float = 0.0,
        crossing_seconds: float = 0.0,
    ) -> DeviceRates:
        """The rates of a device that is not there, as far as its data sheet tells them.

        Args:
            device: a name for it, the one that the placement uses.
            bytes_per_second: memory bandwidth. It stands for weights of every type, and for attention.
            operation_seconds: what a small operation costs; a GPU takes some microseconds.
            crossing_seconds: what a step to the CPU or back costs.

        Raises:
            InvalidOptionError: the bandwidth is not positive, or a time is negative.
        """
        if not bytes_per_second > 0:
            raise InvalidOptionError(f"bytes_per_second is {bytes_per_second}; a bandwidth is more than 0")
        for name, seconds in (("operation_seconds", operation_seconds), ("crossing_seconds", crossing_seconds)):
            if not seconds >= 0:
                raise InvalidOptionError(f"{name} is {seconds}; it must be 0 or more")
        return cls(
            device=device,
            any_product=bytes_per_second,
            memory=bytes_per_second,
            attention=bytes_per_second,
            operation_seconds=operation_seconds,
            crossing_seconds=crossing_seconds,
        )

    def product(self, type_name: str, columns: int, *, experts: bool = False) -> float:
        """Bytes of weights per second of a type in rows of `columns` numbers, or of the nearest length that was measured.

        Raises:
            InvalidOptionError: the type was not measured, or the device cannot compute it.
        """
        lengths = (self.expert_products if experts else self.products).get(type_name)
        if lengths:
            return lengths[min(lengths, key=lambda length: abs(math.log(length / columns)))]
        if self.any_product is None:
            kind = "products with experts" if experts else "products"
            raise InvalidOptionError(
                f"no rate of {kind} in {type_name} is known of {self.device}; measure it with llama_moe.bandwidths(), unless the device "
                "cannot compute it"
            )
        return self.any_product

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON has them."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRate:
    """How fast a file's disk is read, in pieces of 128 KiB from all over it, as the kernel reads a mapped file.

    Attributes:
        bytes_per_second: the rate.
        method: "direct": past the page cache (``O_DIRECT``); "dropped": after asking the system to forget the file's pages; "cached":
            perhaps from the page cache, because neither is possible. A virtual machine's host may hold a cache of its own in any case.
        bytes_read: bytes that were read to measure it.
        measured: when, as an ISO 8601 date and time in UTC.
    """

    bytes_per_second: float
    method: str
    bytes_read: int
    measured: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON has them."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """What was measured of this machine; made by `bandwidths()`.

    Attributes:
        machine: the machine's identity, under which the measurements are kept.
        cpu: the name of its CPU.
        devices: the rates by device name; "CPU" is always there.
        disk: of the file that was asked about, if one was.
    """

    machine: str
    cpu: str
    devices: Mapping[str, DeviceRates]
    disk: DiskRate | None = None

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON has them."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for rates in self.devices.values():
            lines.append(f"{rates.device} ({rates.hardware}, {rates.threads} threads):")
            for title, speeds in (("weights", rates.products), ("experts", rates.expert_products)):
                for name, lengths in sorted(speeds.items()):
                    lines += [f"  {f'{title} {name}, {n}':<24}{speed / 1e9:8.1f} GB/s" for n, speed in sorted(lengths.items())]
            for title, rate in (("memory", rates.memory), ("attention", rates.attention), ("copies to it", rates.copy)):
                lines += [f"  {title:<24}{rate / 1e9:8.1f} GB/s"] if rate else []
            for title, seconds in (("an operation", rates.operation_seconds), ("a crossing", rates.crossing_seconds)):
                lines += [f"  {title:<24}{seconds * 1e6:8.1f} us"] if seconds else []
        if self.disk is not None:
            lines.append(f"disk: {self.disk.bytes_per_second / 1e9:.2f} GB/s ({self.disk.method})")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, order=True)
class ProductKind:
    """A matrix-vector product whose speed is measured.

    Attributes:
        type: ggml's name of the weights' number format, such as "Q4_K".
        columns: numbers in a row of the matrix: short rows take longer for each byte.
        experts: of a tensor of experts, of which some are used.
    """

    type: str
    columns: int = 2048
    experts: bool = False


def product_kinds(model: ModelInfo) -> set[ProductKind]:
    """The products that compute a token of a model."""
    tied = not any(tensor.role == "output" for tensor in model.tensors)
    return {
        ProductKind(tensor.type, tensor.shape[0], tensor.role == "experts")
        for tensor in model.tensors
        if len(tensor.shape) > 1
        and not tensor.name.endswith(".bias")  # those of experts have two dimensions, and are added
        and (tensor.role != "embedding" or (tied and tensor.name == "token_embd.weight"))
    }


def bandwidths(
    model: ModelInfo | None = None,
    *,
    products: Iterable[ProductKind] = (),
    devices: DevicesLike | None = None,
    threads: int | None = None,
    repack: bool = True,
    expert_kernels: ExpertKernels = "auto",
    disk: str | os.PathLike[str] | None = None,
    measure_again: bool = False,
    keep_disturbed: bool = False,
) -> Bandwidths:
    """How fast this machine's devices compute with weights of some number formats.

    What was measured before, with the same threads and the same llama.cpp, is read from the data folder; the rest is measured and kept
    there. A device takes about a second, and each number format and length of rows a quarter of one. What was measured while other
    programs took the cores is returned, with a warning in the log, but not kept.

    Args:
        model: a model's header, whose products are measured.
        products: more of them.
        devices: accelerators besides the CPU; None: all there are.
        threads: CPU threads; None: one for each usable core, as an engine's default.
        repack: as for `load`: with that and what follows, host weights lie as a load with these devices would have them.
        expert_kernels: as for `load`.
        disk: a file of some MiB, such as the model: how fast the disk under it is read.
        measure_again: measure everything that is asked for, though it was measured before.
        keep_disturbed: keep also what was measured while other programs computed: for a machine that is never quiet.

    Raises:
        InvalidOptionError: an unknown number format, one that has no rows of that length, bad `threads`, or a `disk` that is no file of
            1 MiB or more.
        PlacementError: a device does not exist.
        FileNotFoundError: there is no file `disk`.
        DoesNotFitError: a device has no room for the 128 to 512 MiB that measuring takes.
        DecodeError: a device failed.
    """
    _logging.sync_level()
    wanted = set(products) | (product_kinds(model) if model is not None else set())
    if threads is not None and threads < 1:
        raise InvalidOptionError(f"threads is {threads}; it must be 1 or more")
    known = all_devices()
    accelerators = [device.name for device in chosen_accelerators(devices)]
    layout = _core.weight_layout(model_options(devices=accelerators, repack=repack, expert_kernels=expert_kernels))
    store = _Store(forget=measure_again, keep_disturbed=keep_disturbed)
    result: dict[str, DeviceRates] = {}
    for device in [*(d for d in known if d.kind == "cpu"), *(d for d in known if d.name in accelerators)]:
        rates = DeviceRates(device=device.name, hardware=device.description, threads=threads or _core.usable_cores(), layout=layout)
        result[device.name] = store.device(device, rates, wanted)
    return Bandwidths(machine=machine_id(), cpu=cpu_name(), devices=result, disk=None if disk is None else store.disk(Path(disk)))


class _Store:
    """The file of one machine's measurements, which it completes."""

    def __init__(self, *, forget: bool, keep_disturbed: bool) -> None:
        self._path = data_folder() / "bandwidths" / f"{machine_id()}.json"
        build = build_info()
        self._measured_with = {"llama_cpp": build["llama_cpp_commit"], "llama_moe": build["version"]}  # both have kernels
        self._forget = forget
        self._keep_disturbed = keep_disturbed

    def device(self, device: Device, rates: DeviceRates, wanted: set[ProductKind]) -> DeviceRates:
        layout = rates.layout if device.kind == "cpu" else device.backend
        key = f"{device.name if device.kind == 'cpu' else device.description}; {rates.threads} threads; {layout}"
        held = {} if self._forget else self._read("devices", key)
        if any(held.get(name) != version for name, version in self._measured_with.items()):
            held = {}
        known = {ProductKind(type_name, columns, experts): rate for type_name, columns, experts, rate in held.get("products", [])}
        missing = sorted(wanted - set(known))
        if not held or missing:
            kinds = [(kind.type, kind.columns, kind.experts) for kind in missing]
            measured = _core.measure_products(device.name, rates.threads, rates.layout, kinds)
            known |= dict(zip(missing, measured.bytes_per_second, strict=True))
            disturbed = measured.disturbed
            if not held:
                others = _core.measure_device(device.name, rates.threads)
                disturbed |= others.disturbed
                held = {**_entry(others), "measured": _now(), **self._measured_with}
            held["products"] = [[kind.type, kind.columns, kind.experts, rate] for kind, rate in sorted(known.items())]
            held["hardware"] = device.description
            if disturbed and not self._keep_disturbed:
                _LOG.warning("other programs computed while %s was measured: its rates may be too low, and are not kept", device.name)
            else:
                self._write("devices", key, held)
        return replace(
            rates,
            products=_by_type(known, experts=False),
            expert_products=_by_type(known, experts=True),
            memory=held["memory"] or None,
            copy=held["copy"] or None,
            attention=held["attention"] or None,
            operation_seconds=held["operation_seconds"],
            graph_seconds=held["graph_seconds"],
            crossing_seconds=held["crossing_seconds"],
            measured=held["measured"],
            llama_cpp=held["llama_cpp"],
        )

    def disk(self, path: Path) -> DiskRate:
        mount = path.absolute()
        while not mount.is_mount() and mount != mount.parent:
            mount = mount.parent
        held = {} if self._forget else self._read("disks", str(mount))
        if not held or not _is_measurable(path):  # which the measurement refuses, saying why
            measured = _core.measure_disk(str(path))
            rate = DiskRate(
                bytes_per_second=measured.bytes_per_second, method=measured.method, bytes_read=measured.bytes_read, measured=_now()
            )
            self._write("disks", str(mount), rate.to_dict())
            return rate
        return DiskRate(**held)

    def _read(self, section: str, key: str) -> dict[str, Any]:
        entry = self._load().get(section, {}).get(key, {})
        return dict(entry) if isinstance(entry, dict) else {}

    def _load(self) -> dict[str, Any]:
        try:
            held = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _LOG.warning("what was measured of this machine cannot be read and is measured again: %s: %s", self._path, error)
            return {}
        return held if isinstance(held, dict) and held.get("format") == _FORMAT else {}

    def _write(self, section: str, key: str, entry: dict[str, Any]) -> None:
        # Read again: another process may have measured something else meanwhile.
        held = {"format": _FORMAT, "cpu": cpu_name(), **self._load()}
        held.setdefault(section, {})[key] = entry
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self._path) as partial:
                partial.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as error:
            _LOG.warning("what was measured of this machine cannot be kept: %s", error)


def _is_measurable(path: Path) -> bool:
    """Whether it is a file as `bandwidths()` asks for."""
    try:
        status = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size >= 1 << 20


def _entry(measured: _core.DeviceRates) -> dict[str, float]:
    return {
        "memory": measured.memory_bytes_per_second,
        "copy": measured.copy_bytes_per_second,
        "attention": measured.attention_bytes_per_second,
        "operation_seconds": measured.operation_seconds,
        "graph_seconds": measured.graph_seconds,
        "crossing_seconds": measured.crossing_seconds,
    }


def _by_type(rates: Mapping[ProductKind, float], *, experts: bool) -> dict[str, dict[int, float]]:
    result: dict[str, dict[int, float]] = {}
    for kind, rate in rates.items():
        if kind.experts == experts and rate > 0:  # 0: the device cannot
            result.setdefault(kind.type, {})[kind.columns] = rate
    return result


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
