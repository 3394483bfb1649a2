"""What `/metrics` counts, compared with what was asked of the server."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llama_moe.server import ServerSettings
from tests.support.servers import ServerProcess, local_server
from tests.support.waiting import eventually

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Metrics:
    """The figures of a server, as they are when it is asked."""

    def __init__(self, client: httpx.Client) -> None:
        self._samples = samples_of(client.get("/metrics").raise_for_status().text)

    def __call__(self, name: str, **labels: str) -> float:
        return self._samples.get((f"llama_moe_{name}", frozenset(labels.items())), 0)

    def labels(self, name: str, label: str) -> set[str]:
        return {dict(labels)[label] for found, labels in self._samples if found == f"llama_moe_{name}"}

    def sum(self, name: str, **labels: str) -> float:
        wanted = set(labels.items())
        return sum(value for (found, having), value in self._samples.items() if found == f"llama_moe_{name}" and wanted <= having)


def complete(client: httpx.Client, model: str, tokens: int = 8) -> dict[str, int]:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens}
    usage: dict[str, int] = client.post("/v1/chat/completions", json=body).raise_for_status().json()["usage"]
    return usage


@pytest.fixture
def client(server: ServerProcess) -> httpx.Client:
    return server.client


def test_a_completion_is_counted_with_its_tokens_and_times(client: httpx.Client) -> None:
    before = Metrics(client)
    usage = complete(client, "chat")
    after = Metrics(client)

    def gained(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]  # type: ignore[index]
    assert gained("prompt_tokens_total", model="chat") == computed
    assert gained("generated_tokens_total", model="chat") == usage["completion_tokens"]
    assert after.sum("completions_total", model="chat") - before.sum("completions_total", model="chat") == 1
    assert gained("requests_total", endpoint="/v1/chat/completions", model="chat", status="200") == 1
    for name in ("queue_seconds", "time_to_first_token_seconds"):
        assert gained(f"{name}_count", model="chat") == 1
    assert gained("time_per_output_token_seconds_count", model="chat") == (usage["completion_tokens"] > 1)
    assert gained("request_seconds_count", endpoint="/v1/chat/completions", model="chat") == 1
    assert gained("request_seconds_sum", endpoint="/v1/chat/completions", model="chat") > gained(
        "time_to_first_token_seconds_sum", model="chat"
    )


def test_a_streamed_completion_is_counted_too(client: httpx.Client) -> None:
    before = Metrics(client)
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
    client.post("/v1/chat/completions", json=body).raise_for_status()
    assert Metrics(client).sum("completions_total") == before.sum("completions_total") + 1


def test_memory_is_that_of_the_placement(client: httpx.Client) -> None:
    metrics = Metrics(client)
    models = client.get("/v1/placement").json()["models"]
    assert metrics("models_loaded") == len(models)
    for model in models:
        for row in model["memory"]["rows"]:
            assert metrics("memory_bytes", model=model["model"], device=row["device"], role=row["role"]) == row["bytes"] > 0
        assert metrics.sum("memory_bytes", model=model["model"]) == model["memory"]["total_bytes"]


def test_what_clients_make_up_is_no_label(client: httpx.Client) -> None:
    assert client.get("/no/such/path").status_code == 404
    body = {"model": "made-up", "messages": [{"role": "user", "content": "Hello"}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 404
    metrics = Metrics(client)
    assert metrics("requests_total", endpoint="other", model="", status="404") >= 1
    assert metrics("requests_total", endpoint="/v1/chat/completions", model="", status="404") >= 1
    assert metrics.labels("requests_total", "model") <= {"", "chat", "thinks", "tools"}


def test_each_metric_says_what_it_is(client: httpx.Client) -> None:
    for family in text_string_to_metric_families(client.get("/metrics").text):
        assert family.documentation, family.name
        assert family.type != "unknown", family.name


def test_openmetrics_is_given_to_who_asks_for_it(client: httpx.Client) -> None:
    answer = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_experts_are_counted_only_when_traced(client: httpx.Client) -> None:
    complete(client, "chat")
    assert not Metrics(client).labels("expert_choices_total", "layer")


def test_traced_experts_are_counted_by_layer(models_dir: Path, dense: Path) -> None:
    with ServerProcess("--model", models_dir / "chat.gguf", "--model", dense, "--ctx", 256, "--threads", 1, "--trace-routing") as server:
        client = server.client
        complete(client, "chat")
        complete(client, "dense")
        (report,) = [model for model in client.get("/v1/routing").json()["models"] if model["tracing"]]
        metrics = Metrics(client)
        assert report["model"] == "chat"
        assert metrics("traced_tokens_total", model="chat") == report["tokens"] > 0
        assert metrics.labels("expert_choices_total", "model") == {"chat"}
        for layer in report["layers"]:
            labels = {"model": "chat", "layer": str(layer["layer"])}
            experts = range(report["expert_count"])
            assert [metrics("expert_choices_total", expert=str(expert), **labels) for expert in experts] == layer["counts"]
            assert metrics("expert_entropy", **labels) == pytest.approx(layer["entropy"])


def settings(models_dir: Path, *, ttl: float | None = None, api_key: str | None = None) -> ServerSettings:
    return ServerSettings(models=[models_dir / "chat.gguf"], context_size=256, threads=1, ttl=ttl, api_key=api_key)


def test_counts_outlive_their_model(models_dir: Path) -> None:
    with local_server(settings(models_dir, ttl=0)) as server:
        client = server.client
        generated = complete(client, "chat")["completion_tokens"]
        assert eventually(lambda: Metrics(client)("models_loaded") == 0)
        metrics = Metrics(client)
        assert metrics("generated_tokens_total", model="chat") == generated
        assert metrics("model_unloads_total", model="chat") >= 1
        assert metrics.sum("memory_bytes") == 0
        generated += complete(client, "chat")["completion_tokens"]
        assert Metrics(client)("generated_tokens_total", model="chat") == generated


def test_two_applications_of_a_process_count_apart(models_dir: Path) -> None:
    with local_server(settings(models_dir)) as one, local_server(settings(models_dir)) as other:
        complete(one.client, "chat")
        assert Metrics(one.client).sum("completions_total") == 1
        assert Metrics(other.client).sum("completions_total") == 0


def test_metrics_need_the_key(models_dir: Path) -> None:
    with local_server(settings(models_dir, api_key="secret")) as server:
        assert server.client.get("/metrics").status_code == 401
        server.client.headers["Authorization"] = "Bearer secret"
        assert Metrics(server.client)("requests_total", endpoint="other", model="", status="401") == 1
