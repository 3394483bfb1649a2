"""Who may ask, and how much: one layer around the application, before anything of a request is read."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from . import web_page
from .bodies import check_body
from .errors import ApiError, error_response, shutting_down

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .state import ServerState

# A body that takes longer holds a connection for nothing.
_BODY_SECONDS = 60.0

OPEN_PATHS = {"/health", *web_page.PATHS}
"""What may be asked for without the key: nothing in there tells of models or requests."""


class Gate:
    """Refuses what must not reach the application; an ASGI middleware.

    - While the server stops, everything.
    - With a key, what comes without it, but for `OPEN_PATHS`.
    - Without a key, what another site made a browser send: a page whose name was made to lead to this machine (DNS rebinding) has that name
      in `Host`, one that just sends requests here has its own in `Origin`.
    - Bodies over the limit, also those that do not tell their length, those that are no text, and those with too many parts.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        settings = state.settings
        self._key = None if settings.api_key is None else settings.api_key.encode()
        self._limit = settings.body_limit
        self._host = settings.address[0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope["path"], headers)
            receive = await self._whole_body(receive, headers)
        except ApiError as error:
            await error_response(scope["path"], error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        if self._state.stopping:
            error = shutting_down()
            error.headers["Connection"] = "close"
            raise error
        if self._key is None:
            self._check_site(headers)
        elif path not in OPEN_PATHS and not self._has_key(headers):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _has_key(self, headers: Headers) -> bool:
        assert self._key is not None  # noqa: S101
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
        equal = [hmac.compare_digest(each.encode("latin-1"), self._key) for each in given]  # both, whatever the first one says
        return any(equal)

    def _check_site(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise ApiError(
                403, f"the host {host!r} is not this server; without an API key only local names are answered", code="wrong_host"
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_ours(origin.partition("://")[2]):
            raise ApiError(403, f"requests from the site {origin!r} are not answered without an API key", code="wrong_origin")

    def _is_ours(self, netloc: str) -> bool:
        """Whether a "host:port" names this machine to itself. Names are compared, never looked up."""
        try:
            name = urlsplit(f"//{netloc}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self._host.lower()):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    async def _whole_body(self, receive: Receive, headers: Headers) -> Receive:
        """Reads the body as far as it may go; what is returned gives it, and then what comes after it."""
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self._limit:
            raise self._too_large()
        body = bytearray()
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), _BODY_SECONDS)
            except asyncio.TimeoutError:
                message_text = f"no more of the request body came for {_BODY_SECONDS:g} s"
                raise ApiError(408, message_text, code="request_timeout", headers={"Connection": "close"}) from None
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                raise self._too_large()
        if more:  # it left in the middle
            pending: list[Message] = [{"type": "http.disconnect"}]
        else:
            await check_body(bytes(body))
            pending = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return replay

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the request body is larger than {self._limit} bytes", code="request_too_large", headers={"Connection": "close"}
        )
