"""What one gateway replica holds, for the handlers of its requests.

Modules of handlers have classes that extend `Replica`; `serve.gateway.Gateway` extends them all. Knows nothing of
checkpoints that come and go.
"""

from __future__ import annotations

import asyncio
import logging

from fastapi import Request
from ray.serve.handle import DeploymentHandle

from serve.arms import Arms
from serve.config import GatewayConfig
from serve.decider import Decider
from serve.decision_log import DecisionLog
from serve.http import ApiError, read_body, retry_later
from serve.plan import Plan, decision_record
from serve.router import Checkpoint
from serve.schemas import Health
from serve.telemetry import Telemetry
from serve.upstream import Upstreams

logger = logging.getLogger("ray.serve")


class Replica:
    """The state of a replica. `max_fall`: fall of a session's confidence above which its model is left."""

    def __init__(
        self,
        encoder: DeploymentHandle,
        router: DeploymentHandle,
        sessions: DeploymentHandle,
        config: GatewayConfig,
        max_fall: float,
    ) -> None:
        self._sessions, self._config = sessions, config
        self._max_fall = max_fall
        self.cors_origins, self.keys = config.cors_origins, config.keys  # read by the middleware
        self._serving: Arms | None = None
        self._upstreams = Upstreams(config.upstream)
        self._log = DecisionLog(config.log)
        self._telemetry = Telemetry()
        self._decider = Decider(encoder, router, config.timeout_s, self._log, self._telemetry)
        self._searching = asyncio.Lock()
        self._refused: str | None = None

    async def _body(self, http: Request) -> bytes:
        return await read_body(http, self._config.max_body_bytes, self._config.timeout_s)

    def _note_decision(
        self, http: Request, decision_id: str, plan: Plan, checkpoint: Checkpoint, prompt: str | None
    ) -> None:
        self._telemetry.decided(plan)
        logged = prompt if self._config.log.prompts else None
        record = decision_record(plan, checkpoint, logged)
        self._log.note(decision_id, "decision", record | {"key": getattr(http.state, "key", None)})

    def _health(self) -> Health:
        arms = self._arms()
        ids = {arm.name: arm.checkpoint.id for arm in arms.arms}
        return Health(checkpoint=ids["live"], canary=ids.get("canary"), shadow=ids.get("shadow"), refused=self._refused)

    def _arms(self) -> Arms:
        if self._serving is None:
            raise ApiError(*retry_later("no checkpoint is loaded yet; retry later", "not_ready"))
        return self._serving
