"""What the server did and does, as Prometheus has it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

import llama_moe

from .model_metrics import STATS, model_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from prometheus_client import Metric

    from llama_moe import ChatCompletion, Completion

    from .pool import ServedModel
    from .traces import RoutingTraces

# Seconds. A long prompt on a CPU takes minutes, a token of a small model a millisecond.
_REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class ServerMetrics:
    """The figures of one application.

    Nothing is done for each token: a finished completion tells its times, and the engines' own counts are read when somebody asks.

    Args:
        traces: which models are traced.
    """

    def __init__(self, traces: RoutingTraces) -> None:
        self._traces = traces
        self._past: defaultdict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(STATS, 0.0))  # of engines that are closed
        self._loaded: dict[str, ServedModel] = {}
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "llama_moe_requests", "HTTP requests that were answered.", ["endpoint", "model", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "llama_moe_request_seconds",
            "From a request to the end of its answer.",
            ["endpoint", "model"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._answering = Gauge("llama_moe_requests_in_flight", "HTTP requests that are being answered.", registry=registry)
        self._completions = Counter(
            "llama_moe_completions", "Completions that were given to clients.", ["model", "finish_reason"], registry=registry
        )
        self._queue_seconds = Histogram(
            "llama_moe_queue_seconds",
            "What a completion waited for its turn.",
            ["model"],
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._first_token_seconds = Histogram(
            "llama_moe_time_to_first_token_seconds",
            "From a completion's arrival at the engine to its first token, the wait for its turn included.",
            ["model"],
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._token_seconds = Histogram(
            "llama_moe_time_per_output_token_seconds",
            "Time between two tokens after the first: the mean of each completion.",
            ["model"],
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._loads = Counter("llama_moe_model_loads", "Times that a model was loaded.", ["model"], registry=registry)
        self._unloads = Counter("llama_moe_model_unloads", "Times that a model was unloaded.", ["model"], registry=registry)
        found = llama_moe.build_info()
        Info("llama_moe_build", "What is running.", registry=registry).info(
            {name: found[name] for name in ("version", "llama_cpp_version", "llama_cpp_commit", "backends")}
        )

    def on_load(self, served: ServedModel) -> None:
        """A model was loaded."""
        self._loaded[served.name] = served
        self._loads.labels(served.name).inc()

    def on_unload(self, served: ServedModel) -> None:
        """A model was closed; what it counted stays."""
        self._loaded.pop(served.name, None)
        self._unloads.labels(served.name).inc()
        stats, past = served.engine.stats(), self._past[served.name]
        for name in STATS:
            past[name] += stats[name]

    def on_completion(self, served: ServedModel, completion: Completion | ChatCompletion) -> None:
        """A client was given a completion."""
        timings, model = completion.timings, served.name
        self._completions.labels(model, completion.finish_reason).inc()
        self._queue_seconds.labels(model).observe(timings.queue_seconds)
        if completion.tokens:
            self._first_token_seconds.labels(model).observe(timings.time_to_first_token)
        if len(completion.tokens) > 1:
            self._token_seconds.labels(model).observe(timings.decode_seconds / (len(completion.tokens) - 1))

    def answering(self) -> AbstractContextManager[None]:
        """A request is being answered, inside of the `with` block."""
        return self._answering.track_inprogress()

    def on_request(self, endpoint: str, model: str, status: int, seconds: float) -> None:
        """A request was answered; `model` is empty for one that names none."""
        self._requests.labels(endpoint, model, str(status)).inc()
        self._request_seconds.labels(endpoint, model).observe(seconds)

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """All of it in the format that the Accept header asks for, and that format's content type."""
        encode, content_type = choose_encoder(accept)
        models = list(self._loaded.values())
        past = {name: dict(counts) for name, counts in self._past.items()}
        traces = {served.name: trace for served in models if (trace := self._traces.of(served.name)) is not None}
        # With experts by the thousand this takes a while; other requests go on.
        return await asyncio.to_thread(lambda: (encode(_Collected(self._registry, model_metrics(models, past, traces))), content_type))


class _Collected:
    """A registry and what was collected besides."""

    def __init__(self, registry: CollectorRegistry, more: list[Metric]) -> None:
        self._registry = registry
        self._more = more

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        yield from self._more
