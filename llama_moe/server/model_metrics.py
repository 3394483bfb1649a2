"""What is read from the engines and traces when somebody asks for metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prometheus_client import Metric

    from llama_moe.routing import RoutingTrace

    from .pool import ServedModel

STATS: Mapping[str, tuple[str, str]] = {
    "prompt_tokens": ("llama_moe_prompt_tokens", "Prompt tokens that were computed."),
    "cached_tokens": ("llama_moe_cached_prompt_tokens", "Prompt tokens that were not computed, since an earlier request had them."),
    "generated_tokens": ("llama_moe_generated_tokens", "Tokens that were generated."),
    "draft_tokens": ("llama_moe_draft_tokens", "Tokens that were drafted."),
    "draft_tokens_accepted": ("llama_moe_accepted_draft_tokens", "Drafted tokens that the model chose too."),
    "requests_preempted": ("llama_moe_preemptions", "Completions that went back to the queue because the context pool was full."),
    "decode_calls": ("llama_moe_decode_calls", "Calls of llama.cpp, each with the tokens of all running completions."),
    "decode_seconds": ("llama_moe_decode_seconds", "Time in those calls."),
    "sample_seconds": ("llama_moe_sample_seconds", "Time in choosing tokens."),
}
"""Of `Engine.stats()` what only grows: the name and the help of its metric."""


def model_metrics(
    models: Sequence[ServedModel], past: Mapping[str, Mapping[str, float]], traces: Mapping[str, RoutingTrace]
) -> list[Metric]:
    """The metrics of models.

    Args:
        models: those that are loaded.
        past: the statistics of engines that are closed, by model.
        traces: the running traces, by model.
    """
    return [*_counts(models, past), *_now(models), *_routing(traces)]


def _counts(models: Sequence[ServedModel], past: Mapping[str, Mapping[str, float]]) -> list[Metric]:
    totals = {name: dict(counts) for name, counts in past.items()}
    for served in models:
        stats, before = served.engine.stats(), totals.get(served.name, {})
        totals[served.name] = {name: before.get(name, 0) + stats[name] for name in STATS}
    families: list[Metric] = []
    for name, (metric, text) in STATS.items():
        family = CounterMetricFamily(metric, text, labels=["model"])
        for model, counts in totals.items():
            family.add_metric([model], counts[name])
        families.append(family)
    return families


def _now(models: Sequence[ServedModel]) -> list[Metric]:
    loaded = GaugeMetricFamily("llama_moe_models_loaded", "Models in memory.", value=len(models))
    running = GaugeMetricFamily("llama_moe_completions_running", "Completions that are being computed.", labels=["model"])
    waiting = GaugeMetricFamily("llama_moe_completions_waiting", "Completions that wait for their turn.", labels=["model"])
    memory = GaugeMetricFamily("llama_moe_memory_bytes", "Memory of a loaded model.", labels=["model", "device", "role"])
    for served in models:
        stats = served.engine.stats()
        running.add_metric([served.name], stats["requests_running"])
        waiting.add_metric([served.name], stats["requests_waiting"])
        for device, role, size in served.memory.rows:
            memory.add_metric([served.name, device, role], size)
    return [loaded, running, waiting, memory]


def _routing(traces: Mapping[str, RoutingTrace]) -> list[Metric]:
    tokens = CounterMetricFamily("llama_moe_traced_tokens", "Tokens whose experts were counted, since the trace began.", labels=["model"])
    choices = CounterMetricFamily(
        "llama_moe_expert_choices", "Tokens that an expert was chosen for, since the trace began.", labels=["model", "layer", "expert"]
    )
    entropy = GaugeMetricFamily(
        "llama_moe_expert_entropy", "1 when a layer's experts are used alike, 0 when one takes all.", labels=["model", "layer"]
    )
    for model, trace in traces.items():
        now = trace.snapshot()
        counts = now.counts
        tokens.add_metric([model], now.tokens)
        for layer in now.by_layer(top=0):
            entropy.add_metric([model, str(layer.layer)], layer.entropy)
            for expert, count in enumerate(counts[layer.layer].tolist()):
                choices.add_metric([model, str(layer.layer), str(expert)], count)
    return [tokens, choices, entropy] if traces else []
