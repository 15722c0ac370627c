"""CORS headers for scripts on web pages, from `gateway.cors_origins`.

In: HTTP requests. Out: the same replies with CORS headers, and answers to preflight requests. If no origins are
configured, it changes nothing.
"""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.schemas import ErrorDetail, ErrorReply


class _Cors(CORSMiddleware):
    def preflight_response(self, request_headers: Headers) -> Response:
        """Starlette's answer, with errors in OpenAI's format."""
        reply = super().preflight_response(request_headers)
        if reply.status_code < 400:
            return reply
        detail = ErrorDetail(
            message=f"CORS: {bytes(reply.body).decode()}; the allowed origins are gateway.cors_origins of the "
            "configuration",
            type="invalid_request_error",
            code="cors",
        )
        headers = {name: value for name, value in reply.headers.items() if not name.startswith("content-")}
        return JSONResponse(ErrorReply(error=detail).model_dump(), reply.status_code, headers)


class Cors:
    """Middleware of the gateway. The app exists before the configuration: the first request reads `cors_origins`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._inner: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._inner is None:
            gateway: Any = ray_serve.get_replica_context().servable_object
            origins = gateway.cors_origins
            self._inner = (
                _Cors(self._app, allow_origins=origins, allow_methods=("GET", "HEAD", "POST"), allow_headers=("*",))
                if origins
                else self._app
            )
        await self._inner(scope, receive, send)
