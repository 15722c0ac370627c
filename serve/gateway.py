"""The gateway deployment: answers HTTP requests and binds each request to one checkpoint.

A request uses the checkpoint that is live on arrival and carries it through encoder and router, which also hold the
previous one: during a swap no request mixes two checkpoints. Knows nothing of models or arrays.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any

import pyarrow as pa
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from prefill_router.errors import InputError, UnavailableError
from serve.cache import keep_serving
from serve.config import GatewayConfig, Live
from serve.cors import Cors
from serve.requests import RouteRequest, read_request
from serve.router import Checkpoint
from serve.schemas import (
    AUTO,
    ErrorDetail,
    ErrorReply,
    Health,
    ModelReply,
    ModelsReply,
    RouteReply,
    Timings,
    invalid,
    rejected,
    route_reply,
)

PROBE = "Is this checkpoint alive?"  # the prompt that tests encoder and router before a checkpoint becomes live
logger = logging.getLogger("ray.serve")
app = FastAPI(title="Prefill Router", docs_url=None, redoc_url=None)
app.add_middleware(Cors)


class ApiError(Exception):
    """An exception that becomes an error reply: HTTP status, error and headers."""

    def __init__(self, status: int, detail: ErrorDetail, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail.message)
        self.status, self.detail, self.headers = status, detail, headers


@app.exception_handler(ApiError)
async def _api_error(_: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(ErrorReply(error=error.detail).model_dump(), error.status, error.headers)


@app.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Errors of Starlette (unknown path or method) in OpenAI's format."""
    detail = ErrorDetail(
        message=f"{request.method} {request.url.path}: {error.detail}; the paths are "
        "POST /v1/route, GET /v1/models, GET /v1/models/ID and GET /healthz",
        type="invalid_request_error",
        code="unknown_url",
    )
    return JSONResponse(ErrorReply(error=detail).model_dump(), error.status_code, error.headers)


@app.exception_handler(Exception)
async def _internal_error(_: Request, error: Exception) -> JSONResponse:
    """Starlette raises the error after this reply, so Serve logs the traceback and counts the error."""
    detail = ErrorDetail(message="internal error; the traceback is in the server's log", type="server_error")
    return JSONResponse(ErrorReply(error=detail).model_dump(), 500)


def _check_models(models: list[str] | None, checkpoint: Checkpoint) -> None:
    """Raises InputError for an unknown model, before the prompt is encoded."""
    for name in models or ():
        if name not in checkpoint.models:
            raise InputError(f"models: {name!r:.80} is not in the pool; known: {', '.join(checkpoint.models)}")


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


# `ingress` copies the app here, so the functions that its handlers call must be defined above.
@ray_serve.ingress(app)
class Gateway:
    """Class of the deployment; `serve.app.build` sets its resources."""

    def __init__(self, encoder: DeploymentHandle, router: DeploymentHandle, config: GatewayConfig) -> None:
        self._encoder, self._router, self._config = encoder, router, config
        self.cors_origins = config.cors_origins  # read by `Cors`
        self._live: Checkpoint | None = None
        self._refused: str | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Makes a checkpoint live after a probe has passed through encoder and router with it."""
        where = Live.model_validate(user_config).checkpoint
        self._refused = await keep_serving(self._go_live(where), where, serving=self._live is not None)

    async def _go_live(self, where: str) -> None:
        checkpoint = await self._router.describe.remote(where)
        await self._router.probe.remote(checkpoint, await self._encode(PROBE, checkpoint))
        self._live = checkpoint

    async def _encode(self, prompt: str, checkpoint: Checkpoint) -> dict[str, pa.Table]:
        replies = [
            self._encoder.encode.remote(prompt, fingerprint, config)
            for fingerprint, config in checkpoint.encoders.items()
        ]
        return dict(zip(checkpoint.encoders, await asyncio.gather(*replies), strict=True))

    @app.post(
        "/v1/route",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": RouteRequest.model_json_schema()}},
            }
        },
    )
    async def route(self, http: Request) -> RouteReply:
        """Chooses a model for a prompt."""
        start = time.perf_counter()
        checkpoint = self._checkpoint()
        request: RouteRequest | None = None
        try:
            request = read_request(await read_body(http, self._config.max_body_bytes, self._config.timeout_s))
            prompt, requirements = request.text, request.requirements
            _check_models(request.models, checkpoint)
            async with asyncio.timeout(self._config.timeout_s):
                rows = await self._encode(prompt, checkpoint)
                encoded = time.perf_counter()
                decision = await self._router.decide.remote(checkpoint, rows, request.lam, requirements)
            if isinstance(decision, InputError):
                raise decision
        except ValidationError as error:
            raise ApiError(400, invalid(error)) from None
        except InputError as error:
            raise ApiError(400, rejected(error, request)) from None
        except BackPressureError:
            raise ApiError(
                503,
                ErrorDetail(
                    message="too many requests are waiting; retry later", type="server_error", code="overloaded"
                ),
                {"Retry-After": "1"},
            ) from None
        except UnavailableError as error:
            logger.error("%s", getattr(error, "cause", error))
            raise ApiError(
                503,
                ErrorDetail(
                    message="the server that encodes prompts does not answer; retry later",
                    type="server_error",
                    code="encoder_unavailable",
                ),
                {"Retry-After": "1"},
            ) from None
        except TimeoutError:
            raise ApiError(
                504,
                ErrorDetail(
                    message=f"no decision within {self._config.timeout_s:g} s; retry later",
                    type="server_error",
                    code="timeout",
                ),
            ) from None
        end = time.perf_counter()
        timings = Timings(encode=1e3 * (encoded - start), route=1e3 * (end - encoded), total=1e3 * (end - start))
        return route_reply(
            decision,
            encoder=list(checkpoint.encoders),
            checkpoint=checkpoint.id,
            timings_ms=timings,
            decision_id=uuid.uuid4().hex,
        )

    @app.get("/v1/models")
    @app.head("/v1/models", include_in_schema=False)
    async def models(self) -> ModelsReply:
        """The models of the pool, and `auto` for the router's choice."""
        return ModelsReply(data=[ModelReply(id=name) for name in (AUTO, *self._checkpoint().models)])

    @app.get("/v1/models/{name:path}")
    @app.head("/v1/models/{name:path}", include_in_schema=False)
    async def model(self, name: str) -> ModelReply:
        """One model of the pool, or `auto`. Names may contain slashes."""
        known = (AUTO, *self._checkpoint().models)
        if name not in known:
            raise ApiError(
                404,
                ErrorDetail(
                    message=f"model: {name!r:.80} is not in the pool; known: {', '.join(known)}",
                    type="invalid_request_error",
                    param="model",
                    code="model_not_found",
                ),
            )
        return ModelReply(id=name)

    @app.get("/healthz")
    @app.head("/healthz", include_in_schema=False)
    async def healthz(self) -> Health:
        """The live checkpoint; 503 if no checkpoint is live yet."""
        return Health(checkpoint=self._checkpoint().id, refused=self._refused)

    def _checkpoint(self) -> Checkpoint:
        if self._live is None:
            raise ApiError(
                503,
                ErrorDetail(message="no checkpoint is loaded yet; retry later", type="server_error", code="not_ready"),
                {"Retry-After": "1"},
            )
        return self._live
