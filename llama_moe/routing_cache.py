"""What a cache of experts would be worth: routing traces played to caches of a given size."""

from __future__ import annotations

import heapq
import operator
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, get_args

import numpy as np

from .errors import InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import numpy.typing as npt

    from .routing import RoutingTrace

CachePolicy: TypeAlias = Literal["lru", "lfu", "static"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSimulation:
    """How often experts were in a simulated cache when they were needed."""

    policy: CachePolicy
    slots: int
    per_layer: bool
    """Whether each layer had `slots` of its own."""
    hits: int
    misses: int
    layer_hit_rates: Mapping[int, float]
    """Hits over uses, 0 to 1, of each layer with experts; 0 where there was no use."""

    @property
    def hit_rate(self) -> float:
        """Hits over uses, 0 to 1; 0 when there was no use."""
        return self.hits / max(self.hits + self.misses, 1)


class _Cache(Protocol):
    def use(self, expert: int) -> bool:
        """Uses an expert; returns whether it was there."""


class _LeastRecentlyUsed:
    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._held: OrderedDict[int, None] = OrderedDict()

    def use(self, expert: int) -> bool:
        if expert in self._held:
            self._held.move_to_end(expert)
            return True
        if len(self._held) == self._slots:
            self._held.popitem(last=False)
        self._held[expert] = None
        return False


class _LeastFrequentlyUsed:
    """Uses count from the beginning, also those from before an expert had to leave."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._time = 0
        self._uses: defaultdict[int, int] = defaultdict(int)
        self._last: dict[int, int] = {}  # of the experts that are held
        self._heap: list[tuple[int, int, int]] = []  # (uses, last use, expert); only the newest entry of an expert counts

    def use(self, expert: int) -> bool:
        self._time += 1
        self._uses[expert] += 1
        hit = expert in self._last
        if not hit and len(self._last) == self._slots:
            self._drop_one()
        self._last[expert] = self._time
        heapq.heappush(self._heap, (self._uses[expert], self._time, expert))
        if len(self._heap) > 4 * len(self._last) + 64:  # a hit leaves an old entry behind, which only a full cache would pop
            self._heap = [(self._uses[held], last, held) for held, last in self._last.items()]
            heapq.heapify(self._heap)
        return hit

    def _drop_one(self) -> None:
        while True:
            _, last, expert = heapq.heappop(self._heap)
            if self._last.get(expert) == last:
                del self._last[expert]
                return


class _Pinned:
    def __init__(self, held: Iterable[int]) -> None:
        self._held = frozenset(held)

    def use(self, expert: int) -> bool:
        return expert in self._held


def simulate_cache(
    trace: RoutingTrace, slots: int, policy: CachePolicy, *, per_layer: bool, profile: RoutingTrace | None
) -> CacheSimulation:
    """See `RoutingTrace.simulate_cache()`."""
    slots = operator.index(slots)
    if slots < 1:
        raise InvalidOptionError(f"slots is {slots}; it must be 1 or more")
    if policy not in get_args(CachePolicy):
        raise InvalidOptionError(f"policy is {policy!r}; it must be one of {', '.join(get_args(CachePolicy))}")
    if profile is not None and policy != "static":
        raise InvalidOptionError(f"a profile is for the policy 'static', not for {policy!r}")
    if profile is not None and (profile.layers, profile.expert_count) != (trace.layers, trace.expert_count):
        raise InvalidOptionError("the profile is of a model with other layers or experts")
    choices = trace.choices
    cache_of = _caches(trace, slots, policy, per_layer, profile if profile is not None else trace)
    layers = len(trace.layers)
    hits, uses = [0] * layers, [0] * layers
    for layer, expert in _uses(choices):
        uses[layer] += 1
        hits[layer] += cache_of(layer).use(layer * trace.expert_count + expert)
    return CacheSimulation(
        policy=policy,
        slots=slots,
        per_layer=per_layer,
        hits=sum(hits),
        misses=sum(uses) - sum(hits),
        layer_hit_rates={number: hits[layer] / max(uses[layer], 1) for layer, number in enumerate(trace.layers)},
    )


def _uses(choices: npt.NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """(index of the layer, expert) in the order of use: token by token, layer by layer, as the router has them."""
    for token in choices:  # one at a time: a list of all would be many times the array
        for layer, experts in enumerate(token.tolist()):
            for expert in experts:
                if expert >= 0:
                    yield layer, expert


def _caches(trace: RoutingTrace, slots: int, policy: CachePolicy, per_layer: bool, profile: RoutingTrace) -> Callable[[int], _Cache]:
    """The cache that serves a layer, by the layer's index."""
    layers = len(trace.layers)
    if policy == "static":
        if profile is trace:
            # What is played, not what was counted: of a last layer, more may be counted than is known by token.
            counts = np.zeros((layers, trace.expert_count), dtype=np.int64)
            for layer, expert in _uses(trace.choices):
                counts[layer, expert] += 1
        else:
            counts = profile.counts[list(trace.layers)]
        # Of equal counts the first layer's first expert.
        if per_layer:
            kept = [layer * trace.expert_count + expert for layer in range(layers) for expert in _most(counts[layer], slots)]
        else:
            kept = _most(counts.reshape(-1), slots)
        pinned = _Pinned(kept)
        return lambda _layer: pinned
    kind = _LeastRecentlyUsed if policy == "lru" else _LeastFrequentlyUsed
    caches: list[_Cache] = [kind(slots) for _ in range(layers if per_layer else 1)]
    return lambda layer: caches[layer if per_layer else 0]


def _most(counts: npt.NDArray[np.int64], slots: int) -> list[int]:
    return [int(index) for index in np.argsort(-counts, kind="stable")[:slots]]
