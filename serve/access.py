"""Access to the gateway: with configured API keys, requests without one of them, or over its limits, are refused.

In: HTTP requests. Out: the same requests, with the name of their key, or a 401 or 429. The store counts for all
gateways; if it does not answer or is not deployed, limits do not apply.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.decider import FAILED
from serve.http import error_body, path_of
from serve.keys import ApiKey, key_name
from serve.limits import Verdict
from serve.schemas import ErrorDetail

STORE_S = 1.0  # maximum time that a request waits for the store
ROUTE = "/v1/route"  # costs nothing
LIMITED = ("/v1/chat/completions", "/v1/messages", "/v1/responses", ROUTE)  # POST requests with limits
logger = logging.getLogger("ray.serve")


class Keys:
    """Middleware of the gateway that checks API keys and their limits. Without configured keys it does nothing.

    A request of a path under `/v1/` gets a 401 if it has no valid key. A POST request of a path in LIMITED gets a 429
    if it is over a limit of its key. Other requests pass. The state of a request has the name of its key as `key`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (path := path_of(scope)).startswith("/v1/"):
            gateway: Any = ray_serve.get_replica_context().servable_object
            if gateway.keys:
                name = key_name(gateway.keys, Headers(scope=scope))
                if name is None:
                    await _unknown(scope)(scope, receive, send)
                    return
                scope.setdefault("state", {})["key"] = name
                if scope["method"] == "POST" and path in LIMITED:
                    key, verdict = gateway.keys[name], await gateway.check_limits(name, path)
                    send = _with_rate(send, key, verdict)
                    if verdict.refused is not None:
                        await _refusal(scope, name, key, verdict)(scope, receive, send)
                        return
        await self._app(scope, receive, send)


async def ask_store(store: DeploymentHandle, name: str, key: ApiKey, path: str) -> Verdict:
    """Whether the limits of a key allow a request. They do if the store fails or does not answer within STORE_S."""
    budget = None if path == ROUTE else key.usd_per_day
    if key.requests_per_minute is None and budget is None:
        return Verdict()
    try:
        async with asyncio.timeout(STORE_S):
            return await store.admit.remote(name, key.requests_per_minute, budget)
    except (*FAILED, TimeoutError) as error:
        logger.error("no limits for a request of key %s: %s", name, " ".join(str(error).split())[:300])
        return Verdict()


def _with_rate(send: Send, key: ApiKey, verdict: Verdict) -> Send:
    """`send` with the headers that OpenAI's API has for a rate; unchanged if none was checked."""
    if verdict.remaining is None:
        return send

    async def send_with_rate(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-ratelimit-limit-requests"] = str(key.requests_per_minute)
            headers["x-ratelimit-remaining-requests"] = str(verdict.remaining)
        await send(message)

    return send_with_rate


def _unknown(scope: Scope) -> JSONResponse:
    detail = ErrorDetail(
        message="Authorization: the API key is missing or wrong; send `Authorization: Bearer KEY` or `x-api-key: KEY`",
        type="invalid_request_error",
        code="invalid_api_key",
    )
    return JSONResponse(error_body(scope, 401, detail), 401, {"WWW-Authenticate": "Bearer"})


def _refusal(scope: Scope, name: str, key: ApiKey, verdict: Verdict) -> JSONResponse:
    wait = f"retry in {verdict.retry_after_s} s"
    if verdict.refused == "rate":
        detail = ErrorDetail(
            message=f"requests_per_minute: the API key {name} has sent the {key.requests_per_minute} requests that it "
            f"may send in 60 s; {wait}",
            type="requests",  # as OpenAI's API calls this limit
            code="rate_limited",
        )
    else:
        detail = ErrorDetail(
            message=f"usd_per_day: the answers for the API key {name} have cost the {key.usd_per_day:g} USD of this "
            f"UTC day; {wait}, at midnight UTC",
            type="insufficient_quota",
            code="budget_exhausted",
        )
    return JSONResponse(error_body(scope, 429, detail), 429, {"Retry-After": str(verdict.retry_after_s)})
