"""Which device each tensor of a model goes to: what one asks for, and what came of it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, overload

from . import _core, _table
from ._sizes import MIB, format_size, parse_size
from .devices import Device, device_name
from .errors import PlacementError

if TYPE_CHECKING:
    from typing import Literal, SupportsIndex, TypeAlias

    PlacementKind: TypeAlias = Literal["gpu", "cpu", "cpu_first", "cpu_last", "cpu_layers", "rules", "fit"]
    Projection: TypeAlias = Literal["up", "gate", "down"]
    TensorRole: TypeAlias = Literal["experts", "weights", "embedding", "output"]
    PlacementLike: TypeAlias = "ExpertPlacement | Literal['gpu', 'cpu', 'fit']"

ROLES = ("experts", "weights", "embedding", "output")
_PROJECTIONS: tuple[Projection, ...] = ("up", "gate", "down")
_RESERVE = 512 * MIB


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExpertPlacement:
    """A policy for where expert weights go; everything else follows the layers.

    Made by its class methods, not by the constructor. A policy is a value that knows nothing of a model: equal policies compare equal,
    and one policy serves many models. It is checked against a model when that is loaded, before any weight is read.

    `projections` limits a policy to some of each expert's matrices: "up", "gate" and "down". A merged
    `gate_up` matrix goes where either is sent.
    """

    kind: PlacementKind
    count: int = 0
    layers: tuple[int, ...] = ()
    projections: tuple[Projection, ...] = _PROJECTIONS
    patterns: tuple[tuple[str, str], ...] = ()
    vram: int | None = None
    ram: int | None = None
    reserve: int = _RESERVE

    @classmethod
    def gpu(cls) -> ExpertPlacement:
        """Experts on the accelerator of their layer, like all its weights."""
        return cls(kind="gpu")

    @classmethod
    def cpu(cls, *, projections: Sequence[Projection] = _PROJECTIONS) -> ExpertPlacement:
        """Experts of all layers in host memory; llama.cpp's `--cpu-moe`."""
        return cls(kind="cpu", projections=_check_projections(projections))

    @classmethod
    def cpu_first(cls, n: SupportsIndex, *, projections: Sequence[Projection] = _PROJECTIONS) -> ExpertPlacement:
        """Experts of the first `n` layers in host memory; llama.cpp's `--n-cpu-moe n`."""
        return cls(kind="cpu_first", count=_check_number(n, "n"), projections=_check_projections(projections))

    @classmethod
    def cpu_last(cls, n: SupportsIndex, *, projections: Sequence[Projection] = _PROJECTIONS) -> ExpertPlacement:
        """Experts of the last `n` layers in host memory."""
        return cls(kind="cpu_last", count=_check_number(n, "n"), projections=_check_projections(projections))

    @classmethod
    def cpu_layers(cls, layers: Iterable[SupportsIndex], *, projections: Sequence[Projection] = _PROJECTIONS) -> ExpertPlacement:
        """Experts of the given layers, counted from 0, in host memory."""
        numbers = tuple(sorted({_check_number(layer, "layer") for layer in layers}))
        return cls(kind="cpu_layers", layers=numbers, projections=_check_projections(projections))

    @classmethod
    def match(cls, regex: str, device: Device | str = "CPU") -> ExpertPlacement:
        r"""Every tensor whose name matches `regex` goes to `device`.

        Args:
            regex: an ECMAScript regular expression, found anywhere in the tensor's name, such as r"blk\.[0-9]\.ffn_.*_exps". All
                tensors can be matched, not only experts.
            device: a device, its name, or an RPC worker's endpoint; "CPU" is host memory.
        """
        return cls(kind="rules", patterns=(_check_rule((regex, device)),))

    @classmethod
    def rules(cls, rules: Iterable[tuple[str, Device | str]]) -> ExpertPlacement:
        """Several of `match()`, as `(regex, device)`; the first whose expression matches a tensor's name decides.

        llama.cpp's `--override-tensor` works the same way.
        """
        return cls(kind="rules", patterns=tuple(_check_rule(rule) for rule in rules))

    @classmethod
    def fit(
        cls,
        *,
        vram: SupportsIndex | str | None = None,
        ram: SupportsIndex | str | None = None,
        reserve: SupportsIndex | str = _RESERVE,
        rules: Iterable[tuple[str, Device | str]] = (),
    ) -> ExpertPlacement:
        """As many experts on the accelerators as fit, the rest in host memory: the fewer bytes the CPU reads for a token, the quicker.

        Weights, KV cache and compute buffers are what llama.cpp's dry run says of the model and the engine it is loaded for, so what fits
        also loads. Whole layers stay on their accelerator, from its last one down, and of the first that does not fit what does. Layers
        are shared out among several accelerators so that most experts stay. Everything else is as the caller fixed it: `gpu_layers`, the
        place of the KV cache, `rules`. When that leaves no placement, loading raises `DoesNotFitError`, which says what is missing where,
        and what would help.

        Args:
            vram: memory to use on each accelerator, as bytes or text such as "8GiB", of what is free; default: all that is free.
            ram: host memory to use; default: what is available.
            reserve: memory to leave free on each accelerator; default: "512MiB".
            rules: tensors that have a place already, as for `rules()`.

        Raises:
            InvalidOptionError: a size is negative or no size.
        """
        return cls(
            kind="fit",
            vram=None if vram is None else parse_size(vram, "vram"),
            ram=None if ram is None else parse_size(ram, "ram"),
            reserve=parse_size(reserve, "reserve"),
            patterns=tuple(_check_rule(rule) for rule in rules),
        )

    def __repr__(self) -> str:
        arguments: list[str] = []
        if self.kind in ("cpu_first", "cpu_last"):
            arguments.append(str(self.count))
        elif self.kind == "cpu_layers":
            arguments.append(str(list(self.layers)))
        elif self.kind == "rules":
            arguments.append(str(list(self.patterns)))
        elif self.kind == "fit":
            sizes = (("vram", self.vram), ("ram", self.ram), ("reserve", self.reserve))
            arguments += [f"{name}={size}" for name, size in sizes if size is not None]
            arguments += [f"rules={list(self.patterns)}"] if self.patterns else []
        if self.projections != _PROJECTIONS:
            arguments.append(f"projections={self.projections}")
        return f"ExpertPlacement.{self.kind}({', '.join(arguments)})"

    def _to_native(self) -> _core.PlacementPolicy:
        policy = _core.PlacementPolicy
        projections: list[str] = list(self.projections)
        if self.kind == "gpu":
            return policy.gpu()
        if self.kind == "cpu":
            return policy.cpu(projections)
        if self.kind == "cpu_first":
            return policy.cpu_first(self.count, projections)
        if self.kind == "cpu_last":
            return policy.cpu_last(self.count, projections)
        if self.kind == "cpu_layers":
            return policy.cpu_layers(list(self.layers), projections)
        if self.kind == "rules":
            return policy.rules(list(self.patterns))
        return policy.fit(self.vram, self.ram, self.reserve, list(self.patterns))


def _check_number(value: SupportsIndex, what: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an int, not {value!r}")
    number = operator.index(value)
    if not 0 <= number < 1 << 31:
        raise PlacementError(f"{what} = {number} is out of range; layers are counted from 0")
    return number


def _check_projections(projections: Sequence[Projection]) -> tuple[Projection, ...]:
    chosen = (projections,) if isinstance(projections, str) else tuple(projections)
    for projection in chosen:
        if projection not in _PROJECTIONS:
            raise PlacementError(f"unknown projection {projection!r}; expected some of {', '.join(map(repr, _PROJECTIONS))}")
    if not chosen:
        raise PlacementError(f"no projection given; expected some of {', '.join(map(repr, _PROJECTIONS))}")
    return tuple(projection for projection in _PROJECTIONS if projection in chosen)


def _check_rule(rule: Sequence[object]) -> tuple[str, str]:
    # A str of two characters would unpack too.
    if isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[0], str):
        raise TypeError(f"a placement rule must be (regex, device), not {rule!r}")
    return rule[0], device_name(rule[1])


def as_placement(experts: PlacementLike) -> ExpertPlacement:
    """The policy that an `experts` argument stands for."""
    if isinstance(experts, ExpertPlacement):
        return experts
    if isinstance(experts, str):
        if experts in ("gpu", "cpu", "fit"):
            return ExpertPlacement(kind=experts)
        raise PlacementError(f"unknown expert placement {experts!r}; expected 'gpu', 'cpu', 'fit' or an ExpertPlacement")
    raise TypeError(f"experts must be an ExpertPlacement, 'gpu', 'cpu' or 'fit', not {experts!r}")


@dataclass(frozen=True, slots=True)
class TensorPlacement:
    """Where one tensor is.

    Attributes:
        name: the tensor's name in the model file.
        device: name of the device that holds it.
        role: "experts", "weights", "embedding" or "output".
        bytes: its size there.
    """

    name: str
    device: str
    role: TensorRole
    bytes: int


class Placement(Sequence[TensorPlacement]):
    """The device of every tensor of a model, in the order of its file; `str()` of it is a table by device and role.

    A tied embedding stands here twice where the model uses it on two devices: as "embedding" and as "output".
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Iterable[TensorPlacement]) -> None:
        self._tensors = tuple(tensors)

    @classmethod
    def _from_native(cls, tensors: Iterable[_core.TensorPlacement]) -> Placement:
        return cls(TensorPlacement(tensor.name, tensor.device, cast("TensorRole", tensor.role), tensor.bytes) for tensor in tensors)

    @overload
    def __getitem__(self, index: int) -> TensorPlacement: ...
    @overload
    def __getitem__(self, index: slice) -> Placement: ...
    def __getitem__(self, index: int | slice) -> TensorPlacement | Placement:
        return Placement(self._tensors[index]) if isinstance(index, slice) else self._tensors[index]

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        return self._tensors == other._tensors if isinstance(other, Placement) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._tensors)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self._tensors)

    def by_device(self) -> dict[str, int]:
        """Bytes on each device."""
        return _table.totals((tensor.device, tensor.bytes) for tensor in self._tensors)

    def by_role(self) -> dict[TensorRole, int]:
        """Bytes of each role."""
        return _table.totals((tensor.role, tensor.bytes) for tensor in self._tensors)

    def __str__(self) -> str:
        return _table.size_table(((tensor.device, tensor.role, tensor.bytes) for tensor in self._tensors), ROLES)

    def __repr__(self) -> str:
        devices = ", ".join(f"{device} {format_size(size)}" for device, size in self.by_device().items())
        return f"<Placement of {len(self)} tensors, {format_size(self.total_bytes)}: {devices}>"
