"""The gateway deployment: answers HTTP requests and binds each request to one checkpoint.

A request uses the checkpoint that is live on arrival and carries it through encoder and router, which also hold the
previous one: during a swap no request mixes two checkpoints. A chat goes to the server of the chosen model, or of the
next candidate if it does not answer. Knows nothing of arrays.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from dataclasses import replace
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from ray import serve as ray_serve

from prefill_router.errors import InputError
from prefill_router.routing.router import Decision
from serve.access import ask_store
from serve.api import QUESTION, app
from serve.arms import Arm, ArmName, arms_of, check_models
from serve.cache import keep_serving
from serve.chat import AUTO
from serve.chats import ChatHandlers
from serve.http import ApiError
from serve.limits import Verdict
from serve.live import Live
from serve.logged import LogHandlers
from serve.openapi import body_of
from serve.plan import Plan, Query, decided
from serve.replica import logger
from serve.requests import RouteRequest, read_request
from serve.router import Checkpoint
from serve.schemas import RouteReply, invalid, rejected, route_reply
from serve.status import StatusHandlers
from serve.targets import Target


def _asks(configured: Live) -> bool:
    """Whether a gateway asks the store about a configuration."""
    return configured.followed or configured.compared


# `ingress` copies the app here: modules of handlers must be imported above.
@ray_serve.ingress(app)
class Gateway(ChatHandlers, LogHandlers, StatusHandlers):
    """Class of the deployment; `serve.app.build` sets its resources."""

    async def __del__(self) -> None:
        """Serve awaits it when the replica stops, after the last request."""
        self._follower.stop()
        await asyncio.to_thread(self._log.close)
        await self._upstreams.close()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Makes checkpoints live after a probe has passed through encoder and router with each of them.

        If one is refused, the earlier ones stay, and so do their aliases and their comparison. A replica that starts
        serves the live checkpoint alone then.
        """
        live, starts = Live.model_validate(user_config), self._serving is None
        self._refused = await keep_serving(
            self._configure(live), ", ".join(live.sources), serving=not starts or live.beside
        )
        if self._refused is not None and not starts and (earlier := self._follower.restore()) is not None:
            if _asks(earlier):
                self._follower.run(earlier)
            return
        target = self._follower.target
        if self._refused is not None and starts:
            alone = live if target is None else target.live
            await self._go_live([("live", await self._decider.describe(alone.checkpoint))], 0.0)
        if _asks(live):
            self._follower.run(live, self._refused is not None)

    async def _configure(self, configured: Live) -> None:
        live = (await self._follower.ask(configured, _asks(configured))).live
        found = [(name, await self._decider.describe(place)) for name, place in live.arms]
        await self._go_live(found, 0.0 if live.canary is None else live.canary.share)

    async def _go_live(self, found: list[tuple[ArmName, Checkpoint]], share: float) -> None:
        shares: dict[ArmName, float] = {"live": 1 - share, "canary": share, "shadow": 0.0}
        given = [(name, shares[name], checkpoint) for name, checkpoint in found]
        self._serving = arms_of(given, os.environ, self._config.endpoints, self._config.default_model)

    async def _follow(self, target: Target) -> str | None:
        """Makes a target live. If its live checkpoint is refused, the present one stays; another arm is left out."""
        live, before = target.live, self._arms()
        known = {arm.checkpoint.place: arm.checkpoint for arm in before.arms}
        reasons: list[str | None] = []

        async def describe(place: str) -> None:
            known[place] = await self._decider.describe(place)

        for _, place in live.arms:
            if place not in known:
                reasons.append(await keep_serving(describe(place), place, serving=True))
        found = [(name, known[place]) for name, place in live.arms if place in known]
        if live.checkpoint not in known:
            found.insert(0, ("live", before.live.checkpoint))
        share = live.canary.share if live.canary is not None and live.canary.checkpoint in known else 0.0
        reasons.append(await keep_serving(self._go_live(found, share), ", ".join(live.sources), serving=True))
        if reasons[-1] is not None and len(found) > 1:  # the other arms must not keep a live checkpoint from its place
            reasons.append(await keep_serving(self._go_live(found[:1], 0.0), live.checkpoint, serving=True))
        self._refused = "; ".join(reason for reason in reasons if reason is not None) or None
        stopped = target.rollout if target.rollout is not None and target.rollout.state == "stopped" else None
        if stopped is not None and before.canary is not None and before.canary.checkpoint.place == stopped.canary:
            logger.error("the canary %s is stopped: %s", stopped.canary, stopped.reason)
            self._telemetry.stopped((stopped.reason or "").partition(":")[0])
        return self._refused

    @app.post("/v1/route", openapi_extra=body_of(RouteRequest, {"prompt": QUESTION, "lambda": 0.2}))
    async def route(self, http: Request) -> RouteReply:
        """Chooses a model for a prompt."""
        start = time.perf_counter()
        arms, decision_id = self._arms(), uuid.uuid4().hex
        request: RouteRequest | None = None
        try:
            request = read_request(await self._body(http))
            models = request.models or ()
            check_models(models, arms.live)
            query = Query(request.text, request.requirements, request.lam)
            drawn = arms.drawn(lambda: decision_id, models, asks=False)
            made = await self._decide(arms, drawn, decision_id, lambda _: query, start)
            arm, decision = made.arm, made.decision
        except ValidationError as error:
            raise ApiError(400, invalid(error)) from None
        except InputError as error:
            raise ApiError(400, rejected(error, request)) from None

        def planned(decision: Decision) -> Plan:
            return replace(decided(AUTO, decision, None), added_tokens=query.requirements.added_tokens)

        async def plan_by(other: Arm) -> Plan:
            return planned((await self._decider.decide(other.checkpoint, query, time.perf_counter()))[0])

        self._telemetry.stages(made.timings)
        plan = replace(planned(decision), arm=arm.name, share=made.share)
        self._note_decision(http, decision_id, plan, arm.checkpoint, query.text, decision_id)
        self._decider.observe(arms.observing(arm, models, asks=False), decision_id, plan, plan_by)
        return route_reply(
            decision,
            encoder=list(arm.checkpoint.encoders),
            checkpoint=arm.checkpoint.id,
            timings_ms=made.timings,
            decision_id=decision_id,
        )

    async def check_limits(self, key: str, path: str) -> Verdict:
        """Whether the limits of an API key allow a request. The middleware calls it."""
        verdict = await ask_store(self._sessions, key, self.keys[key], path)
        if verdict.refused is not None:
            self._telemetry.refused(key, verdict.refused)
        return verdict
