"""The arguments of `load()` that a profile can fill where the caller left them alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from ._options import Default, option_value

if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    from .lora import LoraLike
    from .model import DevicesLike, ExpertKernels, HostMemory, StrPath
    from .placement import PlacementLike

    ProfileLike: TypeAlias = Literal["auto", "none"] | StrPath | None

_LOG = logging.getLogger("llama_moe")


class Tunable(NamedTuple):
    """Each argument as it was given, or as its `Default`."""

    experts: PlacementLike | Default[PlacementLike]
    micro_batch_size: int | Default[int]
    threads: int | Default[int | None] | None
    threads_batch: int | Default[int | None] | None
    repack: bool | Default[bool]
    expert_kernels: ExpertKernels | Default[ExpertKernels]
    host_memory: HostMemory | Default[HostMemory]


class Chosen(NamedTuple):
    """The same with every value decided."""

    experts: PlacementLike
    micro_batch_size: int
    threads: int | None
    threads_batch: int | None
    repack: bool
    expert_kernels: ExpertKernels
    host_memory: HostMemory


def with_profile(
    profile: ProfileLike,
    path: StrPath,
    arguments: Tunable,
    *,
    devices: DevicesLike | None,
    context_size: int,
    max_sequences: int,
    lora: LoraLike,
) -> Chosen:
    """The values that a load uses: what the caller gave, else what the profile has, else the default.

    Raises:
        FileNotFoundError: no such profile, or model.
        InvalidOptionError: the file is no profile, or one of another model.
    """
    values: dict[str, Any] = {name: option_value(argument) for name, argument in arguments._asdict().items()}
    if profile is not None and profile != "none":
        from ._placements import parse_placement
        from .profiles import tuned_options  # late: it imports much that few loads need

        tuned = tuned_options(profile, path, devices=devices, context_size=context_size, max_sequences=max_sequences, lora=lora)
        left_alone = [name for name, argument in arguments._asdict().items() if isinstance(argument, Default)]
        if tuned is not None:
            values |= {name: getattr(tuned, name) for name in left_alone}
            _LOG.info("used of it: %s", ", ".join(f"{name}={values[name]!r}" for name in left_alone) or "nothing, all is given")
            if "experts" in left_alone:
                values["experts"] = parse_placement(tuned.experts)
    return Chosen(**values)
