"""HTTP of the gateway: its errors, the body of a request, and a relayed stream.

In: requests of Starlette. Out: bytes of a body, or an `ApiError`, whose reply has OpenAI's format, or Anthropic's under
/v1/messages. Knows nothing of Ray and of decisions.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serve.chat import AUTO
from serve.messages import error_of
from serve.schemas import ErrorDetail, ErrorReply
from serve.upstream import NoAnswer


class ApiError(Exception):
    """An exception that becomes an error reply: HTTP status, error and headers."""

    def __init__(self, status: int, detail: ErrorDetail, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail.message)
        self.status, self.detail, self.headers = status, detail, headers


class NoDecision(ApiError):
    """Encoder or router do not decide: they are overloaded, late or do not answer. A later attempt may succeed."""


def path_of(scope: Scope) -> str:
    """The path of a request without the application's `route_prefix`: the path that routes are compared with."""
    return get_route_path(scope)


def error_body(scope: Scope, status: int, detail: ErrorDetail) -> dict[str, Any]:
    """The body of an error reply: in Anthropic's format under /v1/messages, else in OpenAI's."""
    if path_of(scope).startswith("/v1/messages"):
        return error_of(status, detail.message)
    return ErrorReply(error=detail).model_dump()


def retry_later(
    message: str, code: str, after_s: int = 1, status: int = 503
) -> tuple[int, ErrorDetail, dict[str, str]]:
    """The arguments of an `ApiError` with Retry-After: a later request may succeed."""
    return status, ErrorDetail(message=message, type="server_error", code=code), {"Retry-After": str(after_s)}


def unknown_model(name: str, models: Sequence[str]) -> ApiError:
    """The error of a model that is not in the pool."""
    known = ", ".join((AUTO, *models))
    return ApiError(
        404,
        ErrorDetail(
            message=f"model: {name!r:.80} is not in the pool; known: {known}",
            type="invalid_request_error",
            param="model",
            code="model_not_found",
        ),
    )


def no_answer(failed: NoAnswer, decision_id: str) -> ApiError:
    """504 if the last attempt missed a deadline, else 502; Retry-After if every server asks for it."""
    waits = [one.retry_after_s for one in failed.attempts]
    known = [wait for wait in waits if wait is not None]
    headers = {"x-router-decision-id": decision_id}
    if len(known) == len(waits):
        headers["Retry-After"] = str(math.ceil(min(known)))
    status = 504 if failed.attempts[-1].reason == "deadline" else 502
    return upstream_error(status, f"no model answered ({failed}); retry later", headers)


def upstream_error(status: int, message: str, headers: dict[str, str] | None = None) -> ApiError:
    """The error of a chat that the servers of the models did not answer."""
    return ApiError(status, ErrorDetail(message=message, type="server_error", code="upstream_failed"), headers)


async def read_body(http: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The request body.

    Raises ApiError for a compressed body, one that is not complete after `timeout_s` seconds, and as soon as it exceeds
    `max_bytes`.
    """
    coding = http.headers.get("content-encoding", "")
    if coding.lower() not in ("", "identity"):
        raise ApiError(
            415,
            _invalid_body(
                f"Content-Encoding: got {coding!r:.80}, expected none; send the body uncompressed",
                "unsupported_encoding",
            ),
        )
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in http.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise ApiError(
                        413,
                        _invalid_body(
                            f"body: larger than {max_bytes} bytes, the limit; send a shorter prompt", "body_too_large"
                        ),
                    )
    except TimeoutError:
        raise ApiError(
            408, _invalid_body(f"body: not complete after {timeout_s:g} s; send it faster", "body_timeout")
        ) from None
    return bytes(body)


def _invalid_body(message: str, code: str) -> ErrorDetail:
    return ErrorDetail(message=message, type="invalid_request_error", code=code)


class RelayedStream(StreamingResponse):
    """A stream that calls `release` at its end, also if the client leaves before the first event is taken."""

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str], release: Callable[[], None]) -> None:
        super().__init__(events, headers=headers)
        self.events, self.release = events, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error_body(request.scope, error.status, error.detail), error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Errors of Starlette: unknown path or method."""
    detail = ErrorDetail(
        message=f"{request.method} {request.url.path}: {error.detail}; the paths are POST /v1/chat/completions, "
        "POST /v1/messages, POST /v1/messages/count_tokens, POST /v1/responses, POST /v1/route, POST /v1/feedback, "
        "GET /v1/decisions/ID, GET /v1/models, GET /v1/models/ID, GET /v1/status, GET /healthz, GET /readyz and "
        "GET /metrics",
        type="invalid_request_error",
        code="unknown_url",
    )
    return JSONResponse(error_body(request.scope, error.status_code, detail), error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette raises the error after this reply, so Serve logs the traceback and counts the error."""
    detail = ErrorDetail(message="internal error; the traceback is in the server's log", type="server_error")
    return JSONResponse(error_body(request.scope, 500, detail), 500)


EXCEPTION_HANDLERS: dict[Any, Any] = {
    ApiError: _api_error,
    HTTPException: _http_error,
    Exception: _internal_error,
}
