"""Options that `tune()` found best, kept for each model, machine and context, and how `load()` uses them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ._files import written_whole
from ._machine import data_folder, machine_id
from ._placements import parse_placement
from .devices import chosen_accelerators
from .errors import InvalidOptionError, LlamaMoeError
from .inspection import inspect
from .lora import as_adapters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .devices import Device
    from .inspection import ModelInfo
    from .lora import LoraLike
    from .model import DevicesLike, ExpertKernels, HostMemory, StrPath

Objective = Literal["decode", "prompt", "mixed"]

_LOG = logging.getLogger("llama_moe")
_FORMAT = 3
_HOST_MEMORY = ("mmap", "pageable", "pinned", "locked")
_EXPERT_KERNELS = ("auto", "llama_moe", "ggml")


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedOptions:
    """The options of `load()` that tuning varies; its defaults are theirs.

    Attributes:
        experts: a placement as a word: "gpu", "cpu", "fit", "fit:8GiB", or "first:12" for the experts of the first 12 layers in host
            memory.
        micro_batch_size: as for `load()`.
        threads: as for `load()`.
        threads_batch: as for `load()`.
        repack: as for `load()`.
        expert_kernels: as for `load()`.
        host_memory: as for `load()`.
    """

    experts: str = "fit"
    micro_batch_size: int = 512
    threads: int | None = None
    threads_batch: int | None = None
    repack: bool = True
    expert_kernels: ExpertKernels = "auto"
    host_memory: HostMemory = "mmap"

    @classmethod
    def from_dict(cls, data: object) -> TunedOptions:
        """What `dataclasses.asdict` made of some.

        Raises:
            InvalidOptionError: a value is missing or cannot be one.
        """
        if not isinstance(data, dict) or set(data) != {field.name for field in fields(cls)}:
            raise InvalidOptionError(f"options are {data!r}; expected {', '.join(field.name for field in fields(cls))}")
        fine = {
            "experts": isinstance(data["experts"], str),
            "micro_batch_size": _is_count(data["micro_batch_size"]),
            "threads": data["threads"] is None or _is_count(data["threads"]),
            "threads_batch": data["threads_batch"] is None or _is_count(data["threads_batch"]),
            "repack": isinstance(data["repack"], bool),
            "expert_kernels": data["expert_kernels"] in _EXPERT_KERNELS,
            "host_memory": data["host_memory"] in _HOST_MEMORY,
        }
        for name, is_fine in fine.items():
            if not is_fine:
                raise InvalidOptionError(f"{name} cannot be {data[name]!r}")
        parse_placement(data["experts"])
        return cls(**data)

    def __str__(self) -> str:
        threads = "default" if self.threads is None else self.threads
        batch = "" if self.threads_batch is None else f", {self.threads_batch} for prompts"
        return (
            f"experts {self.experts}, micro-batches of {self.micro_batch_size}, {threads} threads{batch}, "
            f"{'repacked' if self.repack else 'not repacked'}, expert kernels {self.expert_kernels}, {self.host_memory}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What a profile holds for.

    Attributes:
        model: `model_fingerprint()` of the file.
        machine: the machine's identity.
        accelerators: which ones are used, in order.
        context_size: tokens for each sequence.
        max_sequences: sequences that are computed at once.
        lora: `model_fingerprint()` of each LoRA adapter.
    """

    model: str
    machine: str
    accelerators: tuple[str, ...]
    context_size: int
    max_sequences: int
    lora: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where its profile is kept."""
        settings = json.dumps([self.machine, self.accelerators, self.context_size, self.max_sequences, self.lora])
        name = f"{self.model[:16]}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.json"
        return data_folder() / "profiles" / name


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A profile's file as an object.

    Attributes:
        key: what it holds for.
        options: what was best.
        objective: what it was best at.
        prompt_tokens_per_second: what was measured with them, the median.
        decode_tokens_per_second: the same for single tokens.
        gain: by which factor that is more than with the defaults, at the objective; None: the defaults did not work.
        model: the file's name, for a person.
        version: of llama_moe.
    """

    key: ProfileKey
    options: TunedOptions
    objective: Objective
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    gain: float | None
    model: str
    version: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {"format": _FORMAT, **asdict(self)}

    def write(self) -> None:
        """Writes it where `load(..., profile="auto")` finds it; the file is complete or not there at all."""
        self.key.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.key.path) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: StrPath) -> Profile:
        """Reads a profile's file.

        Raises:
            FileNotFoundError: no such file.
            InvalidOptionError: it is no profile, or of another version of the format.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise InvalidOptionError(f"{os.fspath(path)}: a profile of format {data['format']!r}; expected {_FORMAT}")
            if data["objective"] not in get_args(Objective):
                raise InvalidOptionError(f"objective is {data['objective']!r}")
            key = data["key"]
            return cls(
                key=ProfileKey(
                    model=str(key["model"]),
                    machine=str(key["machine"]),
                    accelerators=tuple(map(str, key["accelerators"])),
                    context_size=int(key["context_size"]),
                    max_sequences=int(key["max_sequences"]),
                    lora=tuple(map(str, key["lora"])),
                ),
                options=TunedOptions.from_dict(data["options"]),
                objective=data["objective"],
                prompt_tokens_per_second=float(data["prompt_tokens_per_second"]),
                decode_tokens_per_second=float(data["decode_tokens_per_second"]),
                gain=None if data["gain"] is None else float(data["gain"]),
                model=str(data["model"]),
                version=str(data["version"]),
            )
        except (ValueError, KeyError, TypeError, LlamaMoeError) as error:
            raise InvalidOptionError(f"{os.fspath(path)} is no profile of llama_moe: {error}") from None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def model_fingerprint(info: ModelInfo) -> str:
    """64 hexadecimal digits for what a model's or adapter's speed depends on: sizes, tensors and formats, not the name or weights."""
    tensors = [[tensor.name, tensor.type, *tensor.shape] for tensor in info.tensors]
    facts = [info.architecture, info.expert_count, info.experts_used, info.size_bytes, tensors]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def profile_key(path: StrPath, *, accelerators: Sequence[Device], context_size: int, max_sequences: int, lora: LoraLike = ()) -> ProfileKey:
    """What a profile of a model, used like this on this machine, is kept under."""
    info = inspect(path)
    if context_size == 0:
        trained = info.metadata.get(f"{info.architecture}.context_length")
        context_size = trained if isinstance(trained, int) else 0
    return ProfileKey(
        model=model_fingerprint(info),
        machine=machine_id(),
        # The memory of a worker's device may be all that its machine has, which changes with the machine and not with the device.
        accelerators=tuple(
            ":".join([device.backend, device.description] + ([] if device.backend == "RPC" else [str(device.memory_total)]))
            for device in accelerators
        ),
        context_size=context_size,
        max_sequences=max_sequences,
        # As paths: a name is that of a file here, and not of the hub.
        lora=tuple(sorted(model_fingerprint(inspect(Path(adapter.path))) for adapter in as_adapters(lora) if adapter.scale)),
    )


def tuned_options(
    profile: Literal["auto"] | StrPath,
    path: StrPath,
    *,
    devices: DevicesLike | None,
    context_size: int,
    max_sequences: int,
    lora: LoraLike,
) -> TunedOptions | None:
    """The options of a profile's file, or of the one kept for this model and its use ("auto"); None: there is none.

    Raises:
        FileNotFoundError: no such profile, or model.
        InvalidOptionError: the file is no profile, or one of another model.
        PlacementError: a device does not exist.
    """
    if profile == "auto":
        key = profile_key(
            path, accelerators=chosen_accelerators(devices), context_size=context_size, max_sequences=max_sequences, lora=lora
        )
        found = _stored(key)
    else:
        found = Profile.read(profile)
        if found.key.model != model_fingerprint(inspect(path)):
            raise InvalidOptionError(f"profile {os.fspath(profile)!r} is of another model than {os.fspath(path)!r}: of {found.model}")
    if found is None:
        return None
    _LOG.info("profile of %s, best at %s: %s", found.model, found.objective, found.options)
    return found.options


def _stored(key: ProfileKey) -> Profile | None:
    try:
        profile = Profile.read(key.path)
    except FileNotFoundError:
        _LOG.info("no profile of this model, its adapters, machine and context: defaults are used; `llama-moe tune` makes one")
        return None
    except (InvalidOptionError, OSError) as error:
        _LOG.warning("defaults are used: %s", error)
        return None
    return profile if profile.key == key else None
