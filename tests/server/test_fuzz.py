"""What the server's own OpenAPI document allows and forbids, tried out: no request is a server error, and every answer is as documented."""

from __future__ import annotations

from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, positive_data_acceptance
from schemathesis.config import SchemathesisConfig

from tests.support.servers import ServerProcess

EXAMPLES = 20
TIMEOUT_SECONDS = 120
OPERATIONS = [
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/embeddings",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /v1/placement",
    "GET /v1/routing",
    "GET /metrics",
    "GET /health",
]
ENDLESS = ["GET /v1/routing/stream"]  # goes on until its reader leaves

# What no request may be, whatever is in it, and what every answer has to be.
fuzzing = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def operations(server: ServerProcess) -> dict[str, Any]:
    """Every operation of the document, by its method and path."""
    load_all_checks()
    config = SchemathesisConfig.from_dict({"generation": {"deterministic": True, "database": "none"}})
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=config)
    return {operation.label: operation for operation in (result.ok() for result in cast("Any", document.get_all_operations()))}


def test_every_operation_is_tried(operations: dict[str, Any]) -> None:
    assert sorted(operations) == sorted(OPERATIONS + ENDLESS)


def answerable(body: Any) -> Any:
    """The same request, but of a model that there is, short, and less often one that contradicts itself."""
    if not isinstance(body, dict):
        return body
    changes: dict[str, Any] = {"model": "tools"}
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if type(body.get(name)) is int:
            changes[name] = 1 + body[name] % 4
    for message in body.get("messages") or ():
        if message.get("content") is None:
            message["content"] = "x"
    # Of a zero that is a float, JSON has it that it is an integer, too.
    changes |= {name: int(value) for name, value in body.items() if type(value) is float and value == 0}
    refused = {"previous_response_id", "conversation", "prompt", "background"} if "input" in body else {"n"}
    return {name: value for name, value in (body | changes).items() if name not in refused}


@pytest.mark.parametrize("label", OPERATIONS)
def test_what_the_document_allows_is_answered_as_it_says(operations: dict[str, Any], label: str) -> None:
    statuses = set()

    @fuzzing
    @given(operations[label].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def answer_is_as_documented(case: schemathesis.Case[Any]) -> None:
        case.body = answerable(case.body)
        response = case.call(timeout=TIMEOUT_SECONDS)
        case.validate_response(response, excluded_checks=[positive_data_acceptance])  # it may still contradict itself
        statuses.add(response.status_code)

    answer_is_as_documented()
    assert statuses & {200, 404}, statuses


@pytest.mark.parametrize("label", [label for label in OPERATIONS if label.startswith("POST")])
def test_what_the_document_forbids_is_refused(operations: dict[str, Any], label: str) -> None:
    @fuzzing
    @given(operations[label].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def request_is_refused(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(timeout=TIMEOUT_SECONDS)

    request_is_refused()
