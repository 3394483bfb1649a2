"""How many tokens per second a placement would decode: predicted from what is read for a token and how fast that is.

A token of one stream reads every weight that it uses once, so its time is the sum, over the devices that compute one after the other, of
bytes over rates, plus what operations, attention, steps between devices and the disk take. ``docs/prediction.md`` has the formula.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ._sizes import format_size
from .errors import InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .bandwidth import DeviceRates
    from .placement import TensorRole

_HOST = "CPU"
# Between the products of a layer's attention: rotary embeddings of queries and keys, storing keys and values, attention itself, and the
# addition to what came in.
_ATTENTION_OPERATIONS = 6
# Of a dense block: the activation and the addition.
_DENSE_OPERATIONS = 2
# Of a block of experts: softmax, top-k, gathering and normalising the weights of the chosen (3), the activation, multiplying by the
# weights, the addition; then one addition for each expert after the first.
_EXPERT_OPERATIONS = 9
# Of a weight's LoRA adapter, besides its two products: the scale and the addition.
_LORA_OPERATIONS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedTensor:
    """A tensor and the device that computes with it.

    Attributes:
        name: its name.
        type: ggml's name of its number format, such as "Q4_K".
        shape: its dimensions as GGUF has them, the fastest-changing first.
        bytes: its size.
        device: llama.cpp's name of the device, "CPU" for host memory.
        role: "experts", "weights", "embedding" or "output".
        layer: the transformer block it belongs to, from 0; None: to none.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    device: str
    role: TensorRole
    layer: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted speed of decoding one stream: an estimate, nothing was run.

    Attributes:
        decode_tokens_per_second: predicted tokens per second of one stream.
        seconds: predicted seconds of a token by device ("disk" for reading from it), then by part: "weights", "experts", "output",
            "attention", "operations" and "crossings" ("experts" of "disk").
        bytes_per_token: bytes of weights and KV cache that each device reads for a token.
        context_used: tokens in the KV cache that it is predicted for.
        assumptions: what it rests on, for people.
    """

    decode_tokens_per_second: float
    seconds: Mapping[str, Mapping[str, float]]
    bytes_per_token: Mapping[str, int]
    context_used: int
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON has them, "predicted" among them."""
        return {"predicted": True, **asdict(self), "assumptions": list(self.assumptions)}

    def __str__(self) -> str:
        rate = self.decode_tokens_per_second
        digits = max(0, 1 - math.floor(math.log10(rate))) if rate > 0 else 0
        return f"about {round(rate, digits) if digits else round(rate)} tokens/s (predicted)"


def predict_decode(
    tensors: Sequence[PlacedTensor],
    rates: Mapping[str, DeviceRates],
    *,
    expert_count: int = 0,
    experts_used: int = 0,
    kv_bytes_per_token: Mapping[str, float] | None = None,
    query_heads_per_kv_head: float = 1.0,
    context_used: int = 128,
    operations_per_token: int | None = None,
    ram: int | None = None,
    disk_bytes_per_second: float | None = None,
) -> Prediction:
    """Predicts how fast one stream decodes.

    Args:
        tensors: the model's tensors and where they are; a tied embedding that is also the output on another device is there twice. The
            matrices of LoRA adapters are tensors too, by their own names ("….lora_a" and "….lora_b"), with the device, role and layer of
            the weight that they change; of an embedding's, that is A, and B, which is read whole, has the role "weights".
        rates: how fast each device is, by its name; see `llama_moe.bandwidths` and `DeviceRates.stated`.
        expert_count: routed experts of a layer; 0: a dense model.
        experts_used: how many of them compute a token.
        kv_bytes_per_token: bytes of KV cache of one token in the context, by device.
        query_heads_per_kv_head: how many query heads read the same keys and values.
        context_used: tokens in the context while it decodes. The default is a short answer's, as ``llama-bench -n 128`` ends with; a long
            context slows attention down.
        operations_per_token: small operations of the whole graph, where they were counted; None: estimated from the tensors, as a
            transformer has them.
        ram: bytes of host memory for weights; what does not fit is read from the disk again and again. None: all fits.
        disk_bytes_per_second: how fast, where not all fits.

    Raises:
        InvalidOptionError: a device or a number format has no rate; numbers that make no sense; not all fits `ram` and the disk's rate is
            missing.
    """
    _validate(expert_count, experts_used, context_used)
    share = experts_used / expert_count if expert_count else 1.0
    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    read: dict[str, float] = defaultdict(float)
    products: dict[str, int] = defaultdict(int)
    vectors: dict[str, int] = defaultdict(int)
    for tensor in _computed(tensors):
        device = _rates_of(rates, tensor.device)
        if len(tensor.shape) < 2 or tensor.name.endswith(".bias"):  # the biases of experts have two dimensions, and are added
            vectors[tensor.device] += 1
            continue
        experts = tensor.role == "experts"
        size = tensor.bytes * (share if experts else 1.0)
        part = "experts" if experts else "output" if tensor.role in ("output", "embedding") else "weights"
        parts[tensor.device][part] += size / device.product(tensor.type, tensor.shape[0], experts=experts)
        read[tensor.device] += size
        products[tensor.device] += 1

    for name, count in _operations(tensors, experts_used, operations_per_token, products, vectors).items():
        parts[name]["operations"] += count * _rates_of(rates, name).operation_seconds
    for name, kv_bytes in (kv_bytes_per_token or {}).items():
        device = _rates_of(rates, name)
        rate = device.attention or device.memory or device.product("F16", 128)
        parts[name]["attention"] += kv_bytes * context_used * query_heads_per_kv_head / rate
        read[name] += kv_bytes * context_used
    for name, count in _crossings(tensors).items():
        parts[name]["crossings"] += count * _rates_of(rates, name).crossing_seconds
    assumptions = _assumptions(rates, expert_count, experts_used, context_used, operations_per_token)
    seconds_of_disk, note = _disk_seconds(tensors, share, ram, disk_bytes_per_second)
    if note:
        parts["disk"]["experts"] += seconds_of_disk
        assumptions.append(note)
    total = sum(sum(part.values()) for part in parts.values())
    if total <= 0:
        raise InvalidOptionError("nothing is computed for a token; `tensors` has no weights")
    return Prediction(
        decode_tokens_per_second=1 / total,
        seconds={name: dict(part) for name, part in parts.items()},
        bytes_per_token={name: round(size) for name, size in read.items()},
        context_used=context_used,
        assumptions=tuple(assumptions),
    )


def _validate(expert_count: int, experts_used: int, context_used: int) -> None:
    if not 0 <= experts_used <= expert_count or (expert_count > 0 and experts_used == 0):
        raise InvalidOptionError(f"experts_used is {experts_used}; of {expert_count} experts, 1 to {expert_count} can be used for a token")
    if context_used < 0:
        raise InvalidOptionError(f"context_used is {context_used}; it must be 0 or more")


def _rates_of(rates: Mapping[str, DeviceRates], device: str) -> DeviceRates:
    if device not in rates:
        raise InvalidOptionError(f"no rates of device {device!r}; there are those of {', '.join(rates) or 'none'}")
    return rates[device]


def _computed(tensors: Iterable[PlacedTensor]) -> list[PlacedTensor]:
    """All but the input embedding, of which a token reads one row, unless it is the output as well."""
    tied = not any(tensor.role == "output" for tensor in tensors)
    return [tensor for tensor in tensors if tensor.role != "embedding" or (tied and tensor.name == "token_embd.weight")]


def _layer_devices(tensors: Iterable[PlacedTensor]) -> dict[int, str]:
    """The device of each layer: where most of what is not experts is."""
    sizes: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for tensor in tensors:
        if tensor.layer is not None and tensor.role == "weights":
            sizes[tensor.layer][tensor.device] += tensor.bytes
    return {layer: max(devices, key=devices.__getitem__) for layer, devices in sorted(sizes.items())}


def _operations(
    tensors: Sequence[PlacedTensor],
    experts_used: int,
    counted: int | None,
    products: Mapping[str, int],
    vectors: Mapping[str, int],
) -> dict[str, float]:
    """Operations of a token by device: one for each product and each vector of weights (a norm), and those between and beside them."""
    result: dict[str, float] = defaultdict(float)
    for counts in (products, vectors):
        for name, count in counts.items():
            result[name] += count
    for tensor in tensors:
        if tensor.name.endswith(".lora_b"):
            result[tensor.device] += _LORA_OPERATIONS
    with_experts = {tensor.layer for tensor in tensors if tensor.role == "experts"}
    for layer, device in _layer_devices(tensors).items():
        result[device] += _ATTENTION_OPERATIONS
        result[device] += _EXPERT_OPERATIONS + experts_used - 1 if layer in with_experts else _DENSE_OPERATIONS
    if counted is not None and result:
        scale = counted / sum(result.values())
        return {name: count * scale for name, count in result.items()}
    return result


def _crossings(tensors: Sequence[PlacedTensor]) -> dict[str, int]:
    """Steps between devices for a token, by the accelerator that takes part; between two of them each counts one."""
    result: dict[str, int] = defaultdict(int)

    def cross(source: str, target: str, times: int = 1) -> None:
        for name in {source, target} - {_HOST} if source != target else set[str]():
            result[name] += times

    layers = _layer_devices(tensors)
    path = [_HOST, *layers.values()]
    path += [tensor.device for tensor in _computed(tensors) if tensor.role in ("output", "embedding") and len(tensor.shape) > 1][:1]
    for source, target in zip(path, [*path[1:], _HOST], strict=True):
        cross(source, target)
    away = {(tensor.layer, tensor.device) for tensor in tensors if tensor.role == "experts" and tensor.layer in layers}
    for layer, device in away:
        if layer is not None:
            cross(layers[layer], device, 2)
    return result


def _disk_seconds(tensors: Sequence[PlacedTensor], share: float, ram: int | None, rate: float | None) -> tuple[float, str]:
    """Seconds of a token's reads from the disk, and the assumption behind them; "" when everything fits.

    What every token uses stays in memory, because it was used last. What is left of the memory holds a part of the experts; if all are
    equally likely, that part of what a token uses is there.
    """
    host = [tensor for tensor in tensors if tensor.device == _HOST]
    needed = sum(tensor.bytes for tensor in host)
    if ram is None or needed <= ram:
        return 0.0, ""
    # Adapters are no part of the file that is read again: they stay where they are.
    experts = sum(tensor.bytes for tensor in host if tensor.role == "experts" and not tensor.name.endswith((".lora_a", ".lora_b")))
    if not rate or rate <= 0:
        raise InvalidOptionError(
            f"{format_size(needed)} of weights in host memory do not fit {format_size(ram)}; predicting takes disk_bytes_per_second"
        )
    others = needed - experts
    missing = min(1.0, (needed - ram) / experts) if experts else 0.0
    always = max(0, others - ram)  # not even those fit
    note = (
        f"{format_size(needed - ram)} of the host's weights do not fit its memory: the disk is read at {rate / 1e9:.2f} GB/s, every expert "
        "being equally likely"
    )
    return (experts * share * missing + always) / rate, note


def _assumptions(
    rates: Mapping[str, DeviceRates], expert_count: int, experts_used: int, context_used: int, operations: int | None
) -> list[str]:
    result = [f"one stream, {context_used} tokens in the context", "nothing else runs on the machine"]
    if expert_count:
        result.append(f"a token reads {experts_used} of {expert_count} experts in each layer")
    result += [
        f"{rate.device}: measured {rate.measured} with {rate.threads} threads" if rate.measured else f"{rate.device}: rates as stated"
        for rate in rates.values()
    ]
    if operations is None:
        result.append("small operations are counted as those of a transformer with flash attention")
    return result
