"""The state of one gateway replica, which the handlers of its requests share.

Modules of handlers have classes that extend `Replica`; `serve.gateway.Gateway` extends them all, and swaps checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

from fastapi import Request
from ray.serve.handle import DeploymentHandle

from serve.arms import Arm, Arms
from serve.config import GatewayConfig
from serve.decider import Decider, Made
from serve.decision_log import DecisionLog
from serve.follow import Follower
from serve.http import ApiError, NoDecision, read_body, retry_later
from serve.plan import Plan, Query, decision_record
from serve.router import Checkpoint
from serve.schemas import Health
from serve.targets import Target
from serve.telemetry import Telemetry
from serve.trial import NOVEL, Outcome
from serve.upstream import Upstreams

logger = logging.getLogger("ray.serve")


class Replica(ABC):
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
        self._follower = Follower(sessions, self._follow)

    @abstractmethod
    async def _follow(self, target: Target) -> str | None:
        """Makes a target live, and returns why it was refused, or None. `Gateway` defines it."""

    async def _body(self, http: Request) -> bytes:
        return await read_body(http, self._config.max_body_bytes, self._config.timeout_s)

    async def _decide(
        self, arms: Arms, drawn: tuple[Arm, float], key: str, query_of: Callable[[Arm], Query], start: float
    ) -> Made:
        """A decision, as `Decider.decide_by`; its outcomes are reported for the conversation `key`."""
        arm, share = drawn
        try:
            made = await self._decider.decide_by(arms, drawn, query_of, start)
        except NoDecision:
            self._report(arms, arm, share, key, "no_decision", 1.0)
            raise
        self._report(arms, arm, share, key, "no_decision", float(made.arm is not arm))
        if made.arm is arm and made.decision.novelty is not None:
            self._report(arms, arm, share, key, "novelty", float(made.decision.novelty > NOVEL))
        return made

    def _report(self, arms: Arms, arm: Arm, share: float | None, key: str, band: str, loss: float) -> None:
        """Reports an outcome of `arm` for the comparison of canary and live checkpoint.

        Nothing if the arm was not drawn: `share` is 1 if no other could be, and None if another one was.
        """
        if share in (1.0, None) or arms.pair is None or arms.canary is None:
            return
        self._follower.report(arms.pair, Outcome(key[:16], band, arm is arms.canary, arms.canary.share, loss))

    def _note_decision(
        self,
        http: Request,
        decision_id: str,
        plan: Plan,
        checkpoint: Checkpoint,
        prompt: str | None,
        conversation: str,
    ) -> None:
        """Counts and logs a decision. `conversation`: the key of its session, or its id if it belongs to none."""
        self._telemetry.decided(plan)
        logged = prompt if self._config.log.prompts else None
        record = decision_record(plan, checkpoint, logged, conversation)
        self._log.note(decision_id, "decision", record | {"key": getattr(http.state, "key", None)})

    def _health(self) -> Health:
        arms = self._arms()
        ids = {arm.name: arm.checkpoint.id for arm in arms.arms}
        target = self._follower.target
        return Health(
            checkpoint=ids["live"],
            canary=ids.get("canary"),
            shadow=ids.get("shadow"),
            refused=self._refused,
            rollout=None if target is None else target.rollout,
        )

    def _arms(self) -> Arms:
        if self._serving is None:
            raise ApiError(*retry_later("no checkpoint is loaded yet; retry later", "not_ready"))
        return self._serving
