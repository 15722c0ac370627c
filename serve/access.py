"""Access to the gateway: with configured API keys, requests without one of them are refused.

In: HTTP requests. Out: the same requests, with the name of their key, or a 401.
"""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.http import error_body
from serve.keys import key_name
from serve.schemas import ErrorDetail


class Keys:
    """Middleware of the gateway: without a key, paths under `/v1/` are a 401. Without configured keys it does nothing.

    The name of the key is `key` in the state of the request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            gateway: Any = ray_serve.get_replica_context().servable_object
            if gateway.keys:
                name = key_name(gateway.keys, Headers(scope=scope))
                if name is None:
                    await _refusal(scope["path"])(scope, receive, send)
                    return
                scope.setdefault("state", {})["key"] = name
        await self._app(scope, receive, send)


def _refusal(path: str) -> JSONResponse:
    detail = ErrorDetail(
        message="Authorization: the API key is missing or wrong; send `Authorization: Bearer KEY` or `x-api-key: KEY`",
        type="invalid_request_error",
        code="invalid_api_key",
    )
    return JSONResponse(error_body(path, 401, detail), 401, {"WWW-Authenticate": "Bearer"})
