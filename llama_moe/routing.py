"""Which experts the routers of a model choose: counts, choices, statistics."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from . import _core
from ._files import written_whole
from .errors import InvalidOptionError

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Self

    from .model import StrPath
    from .routing_cache import CachePolicy, CacheSimulation

_FORMAT = "llama_moe routing 1"
_PER_TOKEN = ("token_ids", "positions", "sequences", "requests")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRouting:
    """How the tokens of one layer were spread over its experts."""

    layer: int
    tokens: int
    """Tokens that the layer computed; of a last layer, those whose logits were wanted."""
    top: tuple[tuple[int, float], ...]
    """The most used experts, the most used one first, each with its share of the layer's tokens, 0 to 1."""
    unused: int
    """Experts that no token chose."""
    entropy: float
    """Shannon entropy of the choices over that of a uniform choice: 1 when all experts are used alike, 0 when one takes all."""
    variation: float
    """Coefficient of variation of the experts' counts, their standard deviation over their mean: 0 when all are used alike."""


@dataclass(frozen=True)
class TraceData:
    """What a trace holds, as arrays; `arrays` has what was recorded for each token."""

    layers: int
    experts: int
    used: int
    moe_layers: list[int]
    tokens: int
    counts: npt.NDArray[np.int64]
    arrays: dict[str, npt.NDArray[np.generic]]


class RoutingTrace:
    """What the routers of a model chose while a trace ran; `Engine.trace_routing()` and `Context.trace_routing()` make one.

    Any thread may read it, while it runs and afterwards, also when the engine is closed. A batch is counted as a whole when it was
    computed; one that was stopped or failed is not. Of a running trace, each attribute is of the moment at which it is read: `snapshot()`
    gives all of one moment.
    """

    def __init__(self, source: _core.RoutingTrace | TraceData) -> None:
        self._source = source

    # ---- what is known of all tokens

    @property
    def layer_count(self) -> int:
        """Layers of the model, those without experts included."""
        return self._source.layers

    @property
    def expert_count(self) -> int:
        """Experts of each layer that has any."""
        return self._source.experts

    @property
    def experts_used(self) -> int:
        """Experts that compute each token."""
        return self._source.used

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        return tuple(self._source.moe_layers)

    @property
    def active(self) -> bool:
        """Whether it still counts."""
        return isinstance(self._source, _core.RoutingTrace) and self._source.active

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How often each expert was chosen, int64 of shape [layer_count, expert_count]; zeros for layers without experts."""
        return self._counted()[1]

    @property
    def tokens(self) -> int:
        """Tokens that were computed. Those of a prompt that were reused from a cache were not; drafted ones that were verified were."""
        return self._counted()[0]

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """Each expert's share of the tokens that its layer computed, shape [layer_count, expert_count], 0 to 1.

        It would be `experts_used / expert_count` everywhere if all experts were used alike.
        """
        counts = self.counts
        shares: npt.NDArray[np.float64] = counts * self.experts_used / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        return shares

    # ---- what is known of each token

    @property
    def choices(self) -> npt.NDArray[np.int32]:
        """The experts of each token in the order of the router, int32 of shape [n_tokens, len(layers), experts_used].

        Tokens are in the order in which they were computed, layers are those of `layers`. -1 where nothing was computed: most models
        compute their last layer only for tokens whose logits are wanted, which of a prompt is the last one.

        Raises:
            InvalidOptionError: they were not asked for.
        """
        recorded = self._recorded("choices")
        choices = recorded.astype(np.int32)
        choices[recorded == _core.NO_EXPERT] = -1
        return choices

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """What the outputs of the chosen experts are multiplied with, float32 of the shape of `choices`; NaN where nothing was computed.

        They are those that the model uses in the end: normalised and scaled if it does that.

        Raises:
            InvalidOptionError: they were not asked for.
        """
        return self._recorded("weights").astype(np.float32, copy=False)

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """The id of each token of `choices` and `weights`, int32 of shape [n_tokens]."""
        return self._recorded("token_ids").astype(np.int32, copy=False)

    @property
    def positions(self) -> npt.NDArray[np.int32]:
        """Each token's position in its sequence, from 0, int32 of shape [n_tokens]; -1: not known."""
        return self._recorded("positions").astype(np.int32, copy=False)

    @property
    def sequences(self) -> npt.NDArray[np.int32]:
        """Each token's sequence in the KV cache, int32 of shape [n_tokens]; -1: not known.

        An engine uses a sequence for one request after another.
        """
        return self._recorded("sequences").astype(np.int32, copy=False)

    @property
    def requests(self) -> npt.NDArray[np.int64]:
        """Each token's request, int64 of shape [n_tokens].

        The first one submitted to the engine after the trace began is 0, the next 1, and so on; several prompts of one call are requests in
        their order. Those submitted before it are below zero, -1 the last one. Of a `Context`, which has no requests, and where the
        sequence is not known, -1.
        """
        return self._recorded("requests").astype(np.int64, copy=False)

    # ---- statistics

    def by_layer(self, *, top: int = 5) -> tuple[LayerRouting, ...]:
        """How the tokens were spread over the experts of each layer that has any, with its `top` most used ones."""
        counts, shares = self.counts, self.shares
        return tuple(self._layer(layer, counts[layer], shares[layer], top) for layer in self.layers)

    def _layer(self, layer: int, counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], top: int) -> LayerRouting:
        total = int(counts.sum())
        used = counts[counts > 0] / max(total, 1)
        order = [int(expert) for expert in np.argsort(-counts, kind="stable")[:top] if counts[expert] > 0]
        return LayerRouting(
            layer=layer,
            tokens=total // self.experts_used,
            top=tuple((expert, float(shares[expert])) for expert in order),
            unused=int((counts == 0).sum()),
            entropy=float(-(used * np.log(used)).sum() / math.log(self.expert_count)) + 0.0 if self.expert_count > 1 else 1.0,
            variation=float(counts.std() / counts.mean()) if total else 0.0,
        )

    def simulate_cache(
        self,
        slots: int,
        policy: CachePolicy = "lru",
        *,
        per_layer: bool = False,
        profile: RoutingTrace | None = None,
    ) -> CacheSimulation:
        """What a cache of experts, such as one in the GPU's memory, would have held when it was asked for.

        The tokens go through the model one after the other, in the order in which they were computed, each through all layers, as they do
        when they are generated. An expert of a layer takes one slot. It is a hit if it is there when a token needs it; if not, it takes the
        place of another.

        Args:
            slots: experts that the cache holds: of all layers together, as they share the GPU's memory.
            policy: which one has to leave: "lru": the one that was not used for longest; "lfu": the one that was used least since the
                beginning, and of those the one that was not used for longest; "static": none, the most used ones of the whole trace are
                there from the beginning to the end, more than which no fixed choice can give.
            per_layer: `slots` for each layer, and no layer takes those of another.
            profile: for "static": another trace of the same model whose most used experts are there instead; it needs no choices.

        Raises:
            InvalidOptionError: the trace has no choices, `slots` is below 1, the policy is unknown, or `profile` is of another model or
                given for another policy.
        """
        from .routing_cache import simulate_cache

        return simulate_cache(self.snapshot(), slots, policy, per_layer=per_layer, profile=profile)

    def plot(self, path: StrPath | None = None, *, title: str | None = None) -> object:
        """Draws a heatmap of layers by experts, without a display and without a word to matplotlib's global state.

        The colour is each expert's load: its share of the tokens of its layer over what it would be if all experts were used alike, which
        is marked on the scale. Needs matplotlib: `pip install 'llama-moe[plot]'`.

        Args:
            path: an image to write, in the format that its suffix says; None: nothing is written.
            title: above it; None: how many tokens were counted.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
            InvalidOptionError: matplotlib knows no such format.
            OSError: the file cannot be written.
        """
        from .routing_plot import plot

        return plot(self.snapshot(), path, title=title)

    # ---- elsewhere

    def snapshot(self) -> RoutingTrace:
        """All it holds now, which does not change any more."""
        source = self._source
        if isinstance(source, TraceData):
            return self
        found = source.records()
        counts, tokens = found.pop("counts"), found.pop("tokens")
        if "requests" in found:
            requests = found["requests"]
            found["requests"] = np.where(requests < 0, np.int64(-1), requests - source.first_request)
        return RoutingTrace(TraceData(source.layers, source.experts, source.used, list(source.moe_layers), tokens, counts, found))

    def save(self, path: StrPath) -> None:
        """Writes it to a file that is complete or not there at all, for `RoutingTrace.load()`; numpy's `.npz`, whatever its name.

        Raises:
            OSError: the file cannot be written.
        """
        saved = cast("TraceData", self.snapshot()._source)
        shape = np.array([saved.layers, saved.experts, saved.used, saved.tokens], dtype=np.int64)
        moe_layers = np.array(saved.moe_layers, dtype=np.int32)
        with written_whole(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file, allow_pickle=False, format=np.array(_FORMAT), shape=shape, moe_layers=moe_layers, counts=saved.counts, **saved.arrays
            )

    @classmethod
    def load(cls, path: StrPath) -> Self:
        """Reads what `save()` wrote.

        Raises:
            InvalidOptionError: it is something else, or damaged.
            OSError: the file cannot be read.
        """
        with Path(path).open("rb") as file:
            try:
                with np.load(file, allow_pickle=False) as archive:
                    arrays = {name: archive[name] for name in archive.files}
                return cls(_from_arrays(arrays))
            except Exception as error:  # numpy and zipfile have many for damaged files
                raise InvalidOptionError(f"{str(path)!r} is not a saved routing trace: {error}") from error

    def to_dict(self) -> dict[str, object]:
        """Counts and statistics for JSON; what is known of each token is left out.

        Returns:
            "tokens", "layer_count", "expert_count", "experts_used", and "layers": for each layer with experts its "layer", "tokens",
            "counts" of the experts, "top", "unused", "entropy" and "variation", as in `LayerRouting`.
        """
        now = self.snapshot()
        counts = now.counts
        layers: list[dict[str, object]] = [asdict(layer) | {"counts": counts[layer.layer].tolist()} for layer in now.by_layer()]
        return {
            "tokens": now.tokens,
            "layer_count": now.layer_count,
            "expert_count": now.expert_count,
            "experts_used": now.experts_used,
            "layers": layers,
        }

    def __repr__(self) -> str:
        state = ", active" if self.active else ""
        return (
            f"<RoutingTrace of {self.tokens} tokens: {len(self.layers)} layers, {self.experts_used} of {self.expert_count} experts{state}>"
        )

    def _counted(self) -> tuple[int, npt.NDArray[np.int64]]:
        source = self._source
        return source.counts() if isinstance(source, _core.RoutingTrace) else (source.tokens, source.counts)

    def _recorded(self, name: str) -> npt.NDArray[np.generic]:
        arrays = cast("TraceData", self.snapshot()._source).arrays
        if name not in arrays:
            option = "weights=True" if name == "weights" else "choices=True" if name == "choices" else "choices=True or weights=True"
            raise InvalidOptionError(f"this trace has no {name}; ask for them with trace_routing({option})")
        return arrays[name]


def _from_arrays(arrays: dict[str, npt.NDArray[np.generic]]) -> TraceData:
    """A trace from the arrays of its file; a ValueError says what is wrong with them."""

    def take(name: str, dtype: type[np.generic], *shape: int) -> npt.NDArray[np.generic]:
        if name not in arrays:
            raise ValueError(f"it has no {name}")
        array = arrays.pop(name)
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; it must be {np.dtype(dtype)} of shape {shape}")
        return array

    if str(arrays.pop("format", "")) != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT!r}")
    layers, experts, used, tokens = map(int, take("shape", np.int64, 4))
    moe_layers = [int(layer) for layer in np.atleast_1d(arrays["moe_layers"])]
    take("moe_layers", np.int32, len(moe_layers))
    if not all(0 <= layer < layers for layer in moe_layers):
        raise ValueError(f"moe_layers are {moe_layers} of {layers}")
    counts = cast("npt.NDArray[np.int64]", take("counts", np.int64, layers, experts))
    found: dict[str, npt.NDArray[np.generic]] = {}
    kinds: dict[str, type[np.generic]] = {"choices": np.uint16, "weights": np.float32}
    for name in kinds.keys() & arrays.keys():
        found[name] = take(name, kinds[name], tokens, len(moe_layers), used)
    if found:
        for name in _PER_TOKEN:
            found[name] = take(name, np.int64 if name == "requests" else np.int32, tokens)
    return TraceData(layers, experts, used, moe_layers, tokens, counts, found)
