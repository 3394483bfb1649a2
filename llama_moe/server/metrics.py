"""`/metrics`: what the server did and does, for Prometheus."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .errors import ERROR_RESPONSES
from .state import State

router = APIRouter(tags=["server"], responses=ERROR_RESPONSES)

_FORMATS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}, "description": "One of Prometheus' text formats."}
}


@router.get("/metrics", status_code=200, response_class=Response, responses=_FORMATS)
async def metrics(request: Request, state: State) -> Response:
    """Gives the server's figures to Prometheus."""
    text, content_type = await state.metrics.exposition(request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": content_type})
