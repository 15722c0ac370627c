"""Handlers that say what is served: models, health, traffic, metrics and the page.

In: the arms, the log and the counters of one replica. Out: replies; no request changes anything.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError

from prefill_router.errors import UnavailableError
from serve.api import app
from serve.arms import Arm
from serve.chat import AUTO
from serve.decider import FAILED
from serve.http import ApiError, retry_later, unknown_model
from serve.replica import Replica, logger
from serve.schemas import Health, ModelReply, ModelsReply, ServerState, StatusReply, model_reply
from serve.telemetry import exported_metrics
from serve.traffic import LATEST, seen_decision, server_state

READY_S = 5.0  # maximum time of the decision that GET /readyz waits for
PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
# The page has its script and style in itself, and talks to this server only.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class StatusHandlers(Replica):
    """The handlers of GET /v1/models, /v1/status, /healthz, /readyz, /metrics and /."""

    @app.get("/v1/models")
    @app.head("/v1/models", include_in_schema=False)
    async def models(self) -> ModelsReply:
        """The models of the pool, and `auto` for the router's choice."""
        return ModelsReply(data=list(self._models().values()))

    @app.get("/v1/models/{name:path}")
    @app.head("/v1/models/{name:path}", include_in_schema=False)
    async def model(self, name: str) -> ModelReply:
        """One model of the pool, or `auto`. Names may contain slashes."""
        models = self._models()
        if name not in models:
            raise unknown_model(name, self._arms().live.checkpoint.models)
        return models[name]

    @app.get("/v1/status")
    @app.head("/v1/status", include_in_schema=False)
    async def status(self, http: Request) -> StatusReply:
        """What this replica has seen: traffic, spend, state of the servers, latest decisions of the API key."""
        health, now = self._health(), time.time()
        acting = [arm for arm in reversed(self._arms().arms) if arm.share > 0]  # the live arm last: its states count
        replica = ray_serve.get_replica_context().replica_tag
        return StatusReply(
            **health.model_dump(),
            time=now,
            replica=self._telemetry.traffic.reply(replica, now),
            servers={name: state for arm in acting for name, state in self._states(arm).items()},
            latest=[seen_decision(one) for one in self._log.latest(LATEST, getattr(http.state, "key", None))],
        )

    def _states(self, arm: Arm) -> dict[str, ServerState]:
        """The state of the server of each model in the pool of `arm`."""
        missing = {name: ServerState(state="missing", reason=reason) for name, reason in arm.missing.items()}
        return {
            name: missing.get(name) or server_state(*self._upstreams.state(arm.servers[name]))
            for name in arm.checkpoint.models
        }

    @app.get("/", include_in_schema=False)
    async def page(self) -> HTMLResponse:
        """A page that shows decisions and answers."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(self) -> Response:
        """The metrics of this node, in Prometheus' format."""
        try:
            return Response(await exported_metrics(READY_S), media_type="text/plain; version=0.0.4")
        except UnavailableError as error:
            logger.error("%s", error)
            raise ApiError(
                *retry_later("Ray exports no metrics on this node; retry later", "no_metrics", after_s=10)
            ) from None

    @app.get("/healthz")
    @app.head("/healthz", include_in_schema=False)
    async def healthz(self) -> Health:
        """The live checkpoint; 503 if no checkpoint is live yet."""
        return self._health()

    @app.get("/readyz")
    @app.head("/readyz", include_in_schema=False)
    async def readyz(self) -> Health:
        """The live checkpoint, after a decision of encoder and router; 503 if they do not decide."""
        checkpoint, health = self._arms().live.checkpoint, self._health()
        try:
            async with asyncio.timeout(READY_S):
                await self._decider.probe(checkpoint)
        except (*FAILED, BackPressureError, TimeoutError) as error:
            logger.error("not ready: %s", " ".join(str(getattr(error, "cause", error)).split())[:300])
            raise ApiError(*retry_later("encoder and router do not decide; retry later", "not_ready")) from None
        return health

    def _models(self) -> dict[str, ModelReply]:
        live = self._arms().live
        return {AUTO: ModelReply(id=AUTO)} | {
            model.name: model_reply(model, model.name in live.servers) for model in live.checkpoint.pool.models
        }
