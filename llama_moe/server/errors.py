"""Errors as clients get them: in the shape of the API they use, without what is only of the server's concern."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from llama_moe import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fastapi import FastAPI, Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("llama_moe.server")

RETRY_SECONDS = 1


class ApiError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: the HTTP status.
        message: for a person: what was wrong, with the value, and what would be right.
        type: the kind, as the OpenAI API has them, such as "invalid_request_error".
        param: the field of the request that was wrong.
        code: for a program.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,  # noqa: A002 - the API's name
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or ("invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str = Field(description="For a person: what was wrong, and what would be right.")
    type: str = Field(description='The kind, such as "invalid_request_error".')
    param: str | None = Field(default=None, description="The field of the request that was wrong.")
    code: str | None = Field(default=None, description="For a program.")


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, or not allowed."},
    "5XX": {"model": ErrorBody, "description": "The request could not be answered; with `Retry-After` it may be later."},
}
"""For the OpenAPI document of a router."""


def openai_body(error: ApiError) -> dict[str, Any]:
    """The error as the OpenAI API has it."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


# The shapes of other APIs, by the beginning of their paths.
_shapes: dict[str, Callable[[ApiError], dict[str, Any]]] = {}


def register_shape(path: str, shape: Callable[[ApiError], dict[str, Any]]) -> None:
    """Errors of requests whose path is `path`, or below it, have the body that `shape` makes."""
    _shapes[path] = shape


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """The body of an error, in the shape of the API that the request's path belongs to."""
    for prefix, shape in _shapes.items():
        if path == prefix or path.startswith(prefix + "/"):
            return shape(error)
    return openai_body(error)


def error_response(path: str, error: ApiError) -> JSONResponse:
    """The response to a request of `path`."""
    return JSONResponse(error_body(path, error), status_code=error.status, headers=error.headers)


def overloaded(message: str, *, code: str, retry_seconds: int = RETRY_SECONDS) -> ApiError:
    """An error that passes by itself."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_seconds)})


def shutting_down() -> ApiError:
    """What is left of requests when the server is stopped."""
    return overloaded("the server is shutting down", code="shutting_down")


def unloaded(name: str) -> ApiError:
    """The model was closed while a request of it ran."""
    return overloaded(f"the model {name!r} was unloaded before the request ended", code="model_unloaded")


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error; one that is not known is logged, and the client told nothing of it."""
    match error:
        case ApiError():
            return error
        case errors.ContextFullError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case errors.QueueFullError():
            return overloaded(str(error), code="queue_full")
        case errors.RequestTimeoutError():
            return ApiError(504, str(error), type="timeout_error", code="timeout")
        case errors.DoesNotFitError():
            return ApiError(503, str(error), code="model_does_not_fit")
        case errors.InvalidOptionError():
            return ApiError(400, str(error))
        case errors.ClosedError() | errors.CancelledError():
            return shutting_down()
        case errors.DecodeError():
            logger.error("a request failed: %s", error)
            return ApiError(500, f"the computation failed: {error}", code="decode_failed")
    logger.error("a request failed", exc_info=error)
    return internal_error()


def internal_error() -> ApiError:
    """All that clients are told of a bug."""
    return ApiError(500, "the server failed to answer; its log says why", code="internal_error")


class BugGuard:
    """Answers where the application failed with an error that nobody expected, and logs it; an ASGI middleware.

    Starlette's own handler of such errors raises them again, whereupon uvicorn drops a connection that clients want to use again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await error_response(scope["path"], as_api_error(error))(scope, receive, send)


def add_handlers(app: FastAPI) -> None:
    """Makes every error of the application one of the API's."""
    app.add_middleware(BugGuard)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(errors.LlamaMoeError, _on_error)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(request.url.path, as_api_error(error))


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    what = f"{request.method} {request.url.path}"
    messages = {
        # Of bodies; what is no JSON at all is told by _on_invalid().
        400: "the body cannot be read: it is nested too deeply, or has a number with too many digits",
        404: f"there is no {what}",
        405: f"{what} is not allowed",
    }
    message = messages.get(error.status_code, str(error.detail))
    return error_response(request.url.path, ApiError(error.status_code, message, headers=error.headers))


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - what it is registered for
    first, *others = error.errors()
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    if not place and first["type"] == "model_attributes_type":
        message = "the body is not a JSON object, or not sent as one: the header content-type must be application/json"
    if first["type"] == "json_invalid":
        message, param = f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    if others:
        message += f" (and {len(others)} more)"
    return error_response(request.url.path, ApiError(400, message, param=param))
