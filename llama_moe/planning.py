"""What a model will take, by device and role, before it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import _core, _logging
from ._options import fill_context
from ._sizes import format_size, parse_rate, parse_size
from .devices import Device
from .inspection import ModelInfo, header_file, inspect
from .lora import as_adapters
from .memory import MemoryReport
from .model import model_options
from .placement import ExpertPlacement, Placement, as_placement
from .speculative import speculation_options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal, SupportsIndex

    from .bandwidth import Bandwidths, DeviceRates
    from .lora import LoraLike
    from .memory import MemoryReportDict, MemoryRow
    from .model import ExpertKernels, HostMemory, StrPath
    from .placement import PlacementLike
    from .prediction import PlacedTensor, Prediction
    from .speculative import Speculative

    class PlanDict(MemoryReportDict):
        """What `Plan.to_dict()` returns."""

        fits: bool
        capacity: dict[str, int]
        shortfall: dict[str, int]


# Of a GPU that is only described, where nothing is stated: the memory bandwidth of a mid-range card of 8 GB (128 bit of GDDR6 at 16 to
# 18 Gbit/s), starting a kernel, and a step to the CPU and back over PCIe.
ASSUMED_BANDWIDTH = 256 * 10**9
_KERNEL_SECONDS = 3e-6
_CROSSING_SECONDS = 30e-6
_CONTEXT_STEP = 256  # llama.cpp rounds contexts up to multiples of this


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A GPU that need not be there, to plan for. It is taken to compute and to lay out memory as CUDA devices do.

    Attributes:
        name: any name but "CPU"; rules and reports call it by it.
        vram: its memory, as bytes or text such as "8GiB".
        overhead: what the driver and its libraries take of that; 0.3 to 0.6 GiB for CUDA with cuBLAS.
        bandwidth: of its memory, as bytes per second or text such as "448GB/s", for predicted speeds; None: `ASSUMED_BANDWIDTH`.
    """

    name: str
    vram: int | str
    _: KW_ONLY
    overhead: int | str = 0
    bandwidth: float | str | None = None

    def _to_native(self) -> _core.DeviceSpec:
        return _core.DeviceSpec(self.name, parse_size(self.vram, "vram"), parse_size(self.overhead, "overhead"))

    def _rates(self) -> DeviceRates:
        from .bandwidth import DeviceRates

        return DeviceRates.stated(
            self.name,
            bytes_per_second=ASSUMED_BANDWIDTH if self.bandwidth is None else parse_rate(self.bandwidth, "bandwidth"),
            operation_seconds=_KERNEL_SECONDS,
            crossing_seconds=_CROSSING_SECONDS,
        )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """What a load would take; made by `plan()`. `str()` of it is a table by device and role.

    Attributes:
        info: the model's header.
        experts: the policy that was planned for.
        memory: bytes by device and role, as the engine's `memory()` will report them; "overhead" is what drivers take.
        placement: the device of every tensor.
        capacity: bytes that each device may use; "CPU" is host memory.
        shortfall: bytes missing on each device that is too small; empty when it fits.
        summary: what "fit" chose, in words; empty for other policies.
        context_tokens: tokens that the KV cache holds, of all sequences.
        layer_devices: the device of each layer and, last, of the output.
        host_memory: how host memory would hold weights.
        repack: whether llama.cpp may rearrange weights on the CPU.
        expert_kernels: what would compute with weights in host memory, as it was asked for.
    """

    info: ModelInfo
    experts: ExpertPlacement
    memory: MemoryReport
    placement: Placement
    capacity: Mapping[str, int]
    shortfall: Mapping[str, int]
    summary: str
    context_tokens: int
    layer_devices: tuple[str, ...]
    host_memory: HostMemory
    repack: bool
    expert_kernels: ExpertKernels
    _layers: tuple[int | None, ...]
    _specs: tuple[DeviceSpec, ...]
    _adapters: tuple[ModelInfo, ...]

    @property
    def rows(self) -> tuple[MemoryRow, ...]:
        """The rows of `memory`."""
        return self.memory.rows

    @property
    def fits(self) -> bool:
        """Whether every device is large enough."""
        return not self.shortfall

    @property
    def device_bytes(self) -> int:
        """Bytes on all accelerators."""
        return sum(size for device, size in self.memory.by_device().items() if device != "CPU")

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory. With "mmap" they are pages of the file that the system may drop and read again."""
        return self.memory.by_device().get("CPU", 0)

    def reduction(self, other: Plan) -> float:
        """The share of `other`'s accelerator memory that this plan does without, from 0 to 1."""
        return 1 - self.device_bytes / other.device_bytes if other.device_bytes else 0.0

    def bandwidths(self) -> Bandwidths:
        """How fast this machine's devices are at what the plan asks of them; measured the first time, which takes seconds."""
        from .bandwidth import ProductKind, bandwidths

        described = {spec.name for spec in self._specs}
        # With a GPU's pinned memory, or over a mapping beside it, llama.cpp leaves host weights as they are.
        repack = self.repack and not described
        reads_disk = self.host_bytes > self.capacity["CPU"] and os.path.exists(self.info.path)  # noqa: PTH110 - it may be a URL
        adapters = self._adapter_tensors(self._weights())
        return bandwidths(
            self.info,
            products=[ProductKind(each.type, each.shape[0], each.role == "experts") for each in adapters if each.role != "embedding"],
            devices=[device for device in self.capacity if device not in described and device != "CPU"],
            repack=repack,
            expert_kernels=self.expert_kernels if repack else "auto",
            disk=self.info.path if reads_disk else None,
        )

    def predict(self, *, context_used: int = 128, bandwidths: Bandwidths | None = None) -> Prediction:
        """Predicts how fast one stream would decode, from the bytes that a token reads and how fast they are read.

        Args:
            context_used: tokens in the context while it decodes.
            bandwidths: what was measured of the real devices; None: `bandwidths()`. A `DeviceSpec` counts with what it states.

        Raises:
            InvalidOptionError: a device cannot compute one of the number formats, or host memory lacks room and the disk's rate is unknown.
        """
        from .prediction import predict_decode

        bandwidths = bandwidths or self.bandwidths()
        described = {spec.name: spec._rates() for spec in self._specs}
        weights = self._weights()
        tokens = max(self.context_tokens, 1)
        heads = _number(self.info, "attention.head_count", 1)
        return predict_decode(
            [*weights, *self._adapter_tensors(weights)],
            {**bandwidths.devices, **described},
            expert_count=self.info.expert_count,
            experts_used=self.info.experts_used,
            kv_bytes_per_token={row.device: row.bytes / tokens for row in self.rows if row.role == "kv_cache"},
            query_heads_per_kv_head=heads / max(_number(self.info, "attention.head_count_kv", heads), 1),
            context_used=context_used,
            ram=self.capacity["CPU"],
            disk_bytes_per_second=bandwidths.disk.bytes_per_second if bandwidths.disk else None,
        )

    def _weights(self) -> list[PlacedTensor]:
        from .prediction import PlacedTensor

        formats = {tensor.name: tensor for tensor in self.info.tensors}
        return [
            PlacedTensor(
                name=tensor.name,
                type=formats[tensor.name].type,
                shape=formats[tensor.name].shape,
                bytes=tensor.bytes,
                device=tensor.device,
                role=tensor.role,
                layer=layer,
            )
            for tensor, layer in zip(self.placement, self._layers, strict=True)
        ]

    def _adapter_tensors(self, weights: Sequence[PlacedTensor]) -> list[PlacedTensor]:
        """The matrices of the LoRA adapters, each beside its weight."""
        by_name = {weight.name: weight for weight in weights}
        result = []
        for tensor in (tensor for adapter in self._adapters for tensor in adapter.tensors):
            name, _, matrix = tensor.name.rpartition(".lora_")
            if (weight := by_name.get(name)) is None:  # a change of a norm, which llama.cpp does not apply
                continue
            # Of an embedding's A one row is read, as of the embedding; B is multiplied with it.
            role = "weights" if weight.role == "embedding" and matrix == "b" else weight.role
            result.append(replace(weight, name=tensor.name, type=tensor.type, shape=tensor.shape, bytes=tensor.bytes, role=role))
        return result

    def to_dict(self) -> PlanDict:
        """The plan as plain data, for JSON."""
        report = self.memory.to_dict()
        return {
            "rows": report["rows"],
            "total_bytes": report["total_bytes"],
            "fits": self.fits,
            "capacity": dict(self.capacity),
            "shortfall": dict(self.shortfall),
        }

    def __str__(self) -> str:
        missing = ", ".join(f"{device} is {format_size(size)} too small" for device, size in self.shortfall.items())
        return f"{self.memory}\n{missing or 'it fits'}"

    def __repr__(self) -> str:
        devices = ", ".join(f"{device} {format_size(size)}" for device, size in self.memory.by_device().items())
        return f"<Plan for {self.info.path!r}: {devices}; {'fits' if self.fits else 'does not fit'}>"


def plan(
    path: StrPath,
    *,
    devices: Sequence[DeviceSpec | Device | str] | DeviceSpec | Device | str | None = None,
    ram: SupportsIndex | str | None = None,
    experts: PlacementLike = "fit",
    context_size: int = 4096,
    context_pool: int | None = None,
    max_sequences: int = 1,
    batch_size: int = 2048,
    micro_batch_size: int = 512,
    kv_type: str = "f16",
    flash_attention: Literal["auto", "on", "off"] = "auto",
    offload_kv: bool = True,
    speculative: Speculative | None = None,
    gpu_layers: int | Literal["all"] = "all",
    host_memory: HostMemory = "mmap",
    repack: bool = True,
    expert_kernels: ExpertKernels = "auto",
    lora: LoraLike = (),
) -> Plan:
    """Says what `load` with the same arguments would take, without reading weights or allocating memory.

    Sizes are those of llama.cpp's own dry run: it places every tensor, the KV cache and the compute buffers, on real devices as they say
    and on a `DeviceSpec` as on a CUDA device. A draft model's own memory is not included.

    Args:
        path: a GGUF file, the first one of a split model; or, read only as far as the header goes, an "https://" URL or a file of a
            Hugging Face repository as "owner/repository/file.gguf".
        devices: accelerators, real ones (`Device` objects or names) or described ones (`DeviceSpec`); None: all there are; []: none.
        ram: host memory that may be used, as bytes or text such as "32GiB"; None: what is available.
        experts: where the experts go, as for `Model`.
        context_size: and what follows: as for `load`.
        context_pool: as for `load`.
        max_sequences: as for `load`.
        batch_size: as for `load`.
        micro_batch_size: as for `load`.
        kv_type: as for `load`.
        flash_attention: as for `load`.
        offload_kv: as for `load`.
        speculative: as for `load`.
        gpu_layers: as for `load`.
        host_memory: as for `load`. "mmap" takes no memory of the process's own; "pageable" and "pinned" take what stands in the plan as
            memory that cannot be dropped, and "locked" keeps the mapping from being dropped. A "pinned" or "locked" that cannot be is
            refused.
        repack: as for `load`.
        expert_kernels: as for `load`.
        lora: as for `load`. The adapters must be files of this machine, and count in the plan and in predicted speeds.

    Returns:
        A plan, of which `fits` says whether every device is large enough.

    Raises:
        DoesNotFitError: "fit" found no placement, or `host_memory` asks for more than there is; the error has the numbers, and what would
            help.
        FileNotFoundError: no such file.
        ModelLoadError: not GGUF, truncated, corrupted or of an unsupported architecture; or a URL cannot be read.
        PlacementError: the placement asks for what the model or the machine does not have.
        InvalidOptionError: an option is outside its range.
    """
    _logging.sync_level()
    chosen = [devices] if isinstance(devices, DeviceSpec | Device | str) else devices
    specs = tuple(device for device in chosen or () if isinstance(device, DeviceSpec))
    engine = fill_context(
        _core.EngineOptions(),
        context_size=context_size,
        context_pool=context_pool,
        max_sequences=max_sequences,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        kv_type=kv_type,
        flash_attention=flash_attention,
        offload_kv=offload_kv,
        **speculation_options(speculative),
    )
    options = model_options(
        devices=None if chosen is None else [device for device in chosen if not isinstance(device, DeviceSpec)],
        gpu_layers=gpu_layers,
        host_memory=host_memory,
        repack=repack,
        expert_kernels=expert_kernels,
        lora=lora,
        fit_for=engine,
    )
    options.hypothetical_devices = [spec._to_native() for spec in specs]
    policy = as_placement(experts)
    usable = None if ram is None else parse_size(ram, "ram")
    with header_file(path) as header:
        info = replace(inspect(header), path=os.fspath(path))
        native = _core.make_plan(header, options, policy._to_native(), usable)
    # As paths: a name is that of a file here, and not of the hub. The plan has checked them.
    adapters = tuple(inspect(Path(adapter.path)) for adapter in as_adapters(lora) if adapter.scale)
    size = context_pool or context_size or _number(info, "context_length", 0)
    rounded = -(-size // _CONTEXT_STEP) * _CONTEXT_STEP
    return Plan(
        info=info,
        experts=policy,
        memory=MemoryReport.of(native.rows),
        placement=Placement._from_native(native.tensors),
        capacity=dict(native.capacities),
        shortfall={missing.device: missing.needed - missing.capacity for missing in native.shortfalls},
        summary=native.summary,
        context_tokens=rounded if context_pool else rounded * max_sequences,
        layer_devices=tuple(native.layer_devices),
        host_memory=host_memory,
        repack=repack,
        expert_kernels=expert_kernels,
        _layers=tuple(layer if layer >= 0 else None for layer in native.tensor_layers),
        _specs=specs,
        _adapters=adapters,
    )


def _number(info: ModelInfo, key: str, otherwise: int) -> int:
    """A number of the architecture; of one for each layer, the largest."""
    value = info.metadata.get(f"{info.architecture}.{key}", otherwise)
    if isinstance(value, list):
        return max((entry for entry in value if isinstance(entry, int)), default=otherwise)
    return value if isinstance(value, int) else otherwise
