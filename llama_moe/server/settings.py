"""What a server serves, where, and within which limits."""

from __future__ import annotations

import ipaddress
import math
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llama_moe._sizes import MIB, parse_size
from llama_moe.errors import InvalidOptionError
from llama_moe.lora import as_adapters
from llama_moe.placement import ExpertPlacement, as_placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_moe.lora import LoraLike
    from llama_moe.model import DevicesLike, ExpertKernels, HostMemory, StrPath
    from llama_moe.placement import PlacementLike

DEFAULT_BIND = "127.0.0.1:11435"
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Options of a server; every field but the models has a default.

    Attributes:
        models: GGUF files, each served under its name without ".gguf"; the first one is loaded at the start. Of a split model the first
            file.
        model_dirs: folders in which GGUF files are looked for, subfolders included. A file outside of them is never opened, also where a
            link leads there.
        experts: where the experts go, as for `llama_moe.load`.
        lora: LoRA adapters, as for `llama_moe.load`; only for one of `models` and no `model_dirs`, since an adapter is of one model.
        draft: what drafts tokens that a model verifies: "lookup", or the GGUF file of a smaller model of the same vocabulary, only for one
            of `models` and no `model_dirs`, whose memory is not in the `memory_budget`; None: nothing.
        context_size: tokens for each request, prompt and completion together; 0: what a model was trained for.
        context_pool: tokens of KV cache that all requests of a model share; None: `context_size` for each of `parallel`.
        parallel: requests of a model that are computed at once; more wait.
        max_queue: requests of a model that may wait; more are refused.
        threads: CPU threads for single tokens; None: one for each physical core.
        threads_batch: CPU threads for prompts; None: the same.
        micro_batch_size: most tokens computed at once; None: the default of `llama_moe.load`.
        kv_type: number format of the KV cache.
        host_memory: how host memory holds weights, as for `llama_moe.load`; None: its default.
        repack: whether llama.cpp may rearrange weights for the CPU; None: the default of `llama_moe.load`.
        expert_kernels: what computes with weights in host memory, as for `llama_moe.load`; None: its default.
        devices: accelerators to use; None: all there are.
        profile: as for `llama_moe.load`.
        rpc: "host:port" of workers whose devices are used too.
        bind: "host:port" to listen on; "[address]:port" for IPv6; port 0: any free one.
        api_key: what clients have to send as bearer token or `x-api-key`; None: nothing, which only a loopback address allows.
        ttl: seconds after which a model that nobody uses is unloaded; None: when its memory is needed.
        memory_budget: memory of all loaded models together, as bytes or text such as "24GiB"; None: what each device had free when the
            first model was loaded.
        max_body_bytes: largest request body, as bytes or text such as "8MiB".
        max_prompt_tokens: longest prompt; None: what the context holds.
        max_tokens: most tokens of a completion; a request may ask for less. None: what the context holds.
        max_choices: most completions that one request may ask for, all its prompts together.
        timeout: seconds for one request, the wait for its turn included; None: no limit.
        grace_seconds: what requests that run get to end when the server is stopped.
        trace_routing: count which experts each model chooses, from its load on, which costs speed.

    Raises:
        InvalidOptionError: a value is outside its range, there are no models, or an address that is no loopback address has no key.
        PlacementError: `experts` is the name of no placement.
    """

    models: Sequence[StrPath] = ()
    model_dirs: Sequence[StrPath] = ()
    experts: PlacementLike = field(default_factory=ExpertPlacement.fit)
    lora: LoraLike = ()
    draft: StrPath | Literal["lookup"] | None = None
    context_size: int = 4096
    context_pool: int | None = None
    parallel: int = 4
    max_queue: int = 1024
    threads: int | None = None
    threads_batch: int | None = None
    micro_batch_size: int | None = None
    kv_type: str = "f16"
    host_memory: HostMemory | None = None
    repack: bool | None = None
    expert_kernels: ExpertKernels | None = None
    devices: DevicesLike | None = None
    profile: StrPath | Literal["auto", "none"] | None = None
    rpc: Sequence[str] = ()
    bind: str = DEFAULT_BIND
    api_key: str | None = field(default=None, repr=False)
    ttl: float | None = None
    memory_budget: int | str | None = None
    max_body_bytes: int | str = 16 * MIB
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_choices: int = 16
    timeout: float | None = None
    grace_seconds: float = 10.0
    trace_routing: bool = False

    def __post_init__(self) -> None:
        for name in ("models", "model_dirs", "rpc"):
            value = getattr(self, name)
            if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
                raise TypeError(f"{name} must be a sequence, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("models", "model_dirs"):
            object.__setattr__(self, name, tuple(Path(path) for path in getattr(self, name)))
        if not self.models and not self.model_dirs:
            raise InvalidOptionError("there is nothing to serve: models and model_dirs are both empty")
        as_placement(self.experts)
        object.__setattr__(self, "lora", as_adapters(self.lora))
        if self.lora and (len(self.models) != 1 or self.model_dirs):
            raise InvalidOptionError("lora: an adapter is of one model; give one of models and no model_dirs")
        if self.draft is not None and self.draft != "lookup":
            object.__setattr__(self, "draft", Path(self.draft))
            if len(self.models) != 1 or self.model_dirs:
                raise InvalidOptionError("draft: a draft model is for one model; give one of models and no model_dirs, or 'lookup'")
        object.__setattr__(self, "max_body_bytes", parse_size(self.max_body_bytes, "max_body_bytes"))
        if self.memory_budget is not None:
            object.__setattr__(self, "memory_budget", parse_size(self.memory_budget, "memory_budget"))
        for name, least in _LEAST.items():
            _check_least(name, getattr(self, name), least)
        _check_key(self.api_key)
        host, _ = self.address
        if self.api_key is None and not is_loopback(host):
            raise InvalidOptionError(
                f"bind: {self.bind!r} can be reached by other machines; give an API key, or a loopback address such as {DEFAULT_BIND}"
            )

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port of `bind`."""
        return parse_bind(self.bind)

    @property
    def body_limit(self) -> int:
        """`max_body_bytes` as a number."""
        return parse_size(self.max_body_bytes, "max_body_bytes")

    @property
    def memory_limit(self) -> int | None:
        """`memory_budget` as a number."""
        return None if self.memory_budget is None else parse_size(self.memory_budget, "memory_budget")


_LEAST: dict[str, float] = {
    "context_size": 0,
    "parallel": 1,
    "max_queue": 1,
    "ttl": 0,
    "max_body_bytes": 1,
    "max_prompt_tokens": 1,
    "max_tokens": 1,
    "max_choices": 1,
    "timeout": 0,
    "grace_seconds": 0,
}


def _check_least(name: str, value: object, least: float) -> None:
    if value is None and name in ("ttl", "max_prompt_tokens", "max_tokens", "timeout"):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or value < least or (name == "timeout" and not value):
        raise InvalidOptionError(
            f"{name}: {value} is out of range; it must be {'more than 0' if name == 'timeout' else f'{least} or more'}"
        )


def _check_key(key: str | None) -> None:
    if key is None:
        return
    # What a header can carry as it is; anything else could never be sent.
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise InvalidOptionError("api_key: it must be printable ASCII, without spaces around it, and not empty")


def parse_bind(bind: str) -> tuple[str, int]:
    """The host and the port of "host:port" or "[address]:port".

    Raises:
        InvalidOptionError: it is not of that form.
    """
    host, colon, port = bind.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""  # an IPv6 address without brackets, whose end may not be a port
    if not (host and colon and port.isascii() and port.isdigit() and int(port) <= _MAX_PORT):
        raise InvalidOptionError(f"bind: {bind!r} is not an address; expected host:port, such as {DEFAULT_BIND}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host's addresses.

    Raises:
        InvalidOptionError: the host has no address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InvalidOptionError(f"bind: {host!r} has no address ({error})") from None
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)
