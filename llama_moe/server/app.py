"""The ASGI application: routes, errors and the gate in front of them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

import llama_moe

from . import chat, completions, embeddings, health, messages, metrics, models, placement, responses, routing, tokens, web_page
from .discovery import find_models
from .errors import add_handlers
from .figures import ServerMetrics
from .pool import ModelPool
from .request_meter import RequestMeter
from .security import Gate
from .state import ServerState
from .traces import RoutingTraces

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .settings import ServerSettings

ROUTERS = (
    chat.router,
    completions.router,
    responses.router,
    messages.router,
    embeddings.router,
    models.router,
    tokens.router,
    placement.router,
    routing.router,
    metrics.router,
    health.router,
    web_page.router,
)

# What checks the key is the gate; this is how the OpenAPI document knows of it.
_bearer = HTTPBearer(auto_error=False, description="The server's API key.")


def create_app(settings: ServerSettings) -> FastAPI:
    """The application; see `llama_moe.server.create_app`."""
    find_models(settings)  # what is not there is said now
    traces = RoutingTraces(always=settings.trace_routing)
    figures = ServerMetrics(traces)
    state = ServerState(settings, ModelPool(settings, [traces, figures]), traces, figures, observers=[figures.on_completion])

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await state.pool.start()
            yield
        finally:
            await state.pool.close()

    app = FastAPI(
        title="llama-moe",
        summary="Mixture-of-Experts models behind the OpenAI API.",
        version=llama_moe.__version__,
        lifespan=lifespan,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        dependencies=[] if settings.api_key is None else [Depends(_key)],
    )
    app.state.server = state
    app.add_middleware(Gate, state=state)
    add_handlers(app)
    app.add_middleware(RequestMeter, metrics=figures)  # around the gate: what that refuses is counted too
    for router in ROUTERS:
        app.include_router(router)
    return app


async def _key(_: Annotated[object, Depends(_bearer)]) -> None:
    """Documents that a key is needed."""
