"""Decisions of the graph: a query through encoder and router, with the checkpoint of an arm.

In: a query and an arm. Out: its decision, or an `ApiError`. Other arms decide the same query for the log: these
decisions are observed, and no reply waits for them. Knows nothing of requests and of servers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpc import RpcError
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from prefill_router.errors import InputError, UnavailableError
from prefill_router.routing.router import Decision
from serve.arms import Arm, Arms
from serve.decision_log import DecisionLog
from serve.http import ApiError, NoDecision, retry_later
from serve.plan import Plan, Query, States, decision_record
from serve.router import Checkpoint
from serve.schemas import ErrorDetail, Timings
from serve.telemetry import Telemetry

PROBE = "Is this checkpoint alive?"  # the prompt that tests encoder and router before a checkpoint becomes live
MAX_OBSERVED = 64  # queries that other arms decide
# A failed call of a deployment. Calls by gRPC pass its exception on without a RayTaskError. RayServeException is that
# of a deployment that failed to deploy, and of a full queue.
FAILED = (RayError, RayServeException, RpcError, RuntimeError)
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Made:
    """A decision, the arm that made it, and the probability that this arm decides; None: another arm was drawn."""

    arm: Arm
    share: float | None
    query: Query
    decision: Decision
    timings: Timings


class Decider:
    """Encoder and router as one gateway replica calls them, and the observed decisions of other arms."""

    def __init__(
        self,
        encoder: DeploymentHandle,
        router: DeploymentHandle,
        timeout_s: float,
        log: DecisionLog,
        telemetry: Telemetry,
    ) -> None:
        self._router, self._timeout_s = router, timeout_s
        # Kept, because Serve makes a new handle whenever a method of a handle is read.
        self._encode_handle, self._decide_handle = encoder.encode, router.decide
        self._log, self._telemetry = log, telemetry
        self._observed: set[asyncio.Task[None]] = set()

    async def describe(self, where: str) -> Checkpoint:
        """Loads the checkpoint at `where`, and lets it decide a probe. Raises what either raises."""
        checkpoint: Checkpoint = await self._router.describe.remote(where)
        await self.probe(checkpoint)
        return checkpoint

    async def probe(self, checkpoint: Checkpoint) -> None:
        """Lets the checkpoint decide a probe, which no requirement restricts."""
        await self._router.probe.remote(checkpoint, await self._encode(PROBE, checkpoint, {}))

    async def decide(self, checkpoint: Checkpoint, query: Query, start: float) -> tuple[Decision, Timings]:
        """The decision, and its durations since `start`.

        Raises InputError if the request is at fault, NoDecision if encoder or router do not decide.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                rows = await self._encode(query.text, checkpoint, query.known)
                encoded = time.perf_counter()
                decision = await self._decide_handle.remote(
                    checkpoint.id, checkpoint.where, rows, query.lam, query.requirements
                )
            if isinstance(decision, InputError):
                raise decision
        except BackPressureError:
            raise NoDecision(
                *retry_later("too many requests are waiting; retry later", "overloaded", status=429)
            ) from None
        except UnavailableError as error:
            logger.error("%s", getattr(error, "cause", error))
            raise NoDecision(
                *retry_later("the server that encodes prompts does not answer; retry later", "encoder_unavailable")
            ) from None
        except FAILED as error:
            logger.error("%s", " ".join(str(error).split()))
            raise NoDecision(
                *retry_later("the encoder or the router has stopped; retry later", "router_unavailable")
            ) from None
        except TimeoutError:
            raise NoDecision(
                504,
                ErrorDetail(
                    message=f"no decision within {self._timeout_s:g} s; retry later",
                    type="server_error",
                    code="timeout",
                ),
            ) from None
        end = time.perf_counter()
        return decision, Timings(encode=1e3 * (encoded - start), route=1e3 * (end - encoded), total=1e3 * (end - start))

    async def decide_by(
        self, arms: Arms, drawn: tuple[Arm, float], query_of: Callable[[Arm], Query], start: float
    ) -> Made:
        """The decision of the drawn arm, or of the live one if the drawn arm does not decide. Raises as `decide`."""
        arm, share = drawn
        query = query_of(arm)
        try:
            return Made(arm, share, query, *await self.decide(arm.checkpoint, query, start))
        except NoDecision as error:
            if arm is arms.live:
                raise
            logger.error("the %s does not decide, the live checkpoint does: %s", arm.name, error)
        query = query_of(arms.live)
        return Made(arms.live, None, query, *await self.decide(arms.live.checkpoint, query, start))

    def observe(
        self, arms: Sequence[Arm], decision_id: str, plan: Plan, plan_by: Callable[[Arm], Awaitable[Plan]]
    ) -> None:
        """Starts the decisions of `arms` about the query of `plan`, one after another, and logs each at its end.

        At most MAX_OBSERVED queries of a replica are under way; further ones are left out, and counted.
        """
        if not arms:
            return
        if len(self._observed) >= MAX_OBSERVED:
            for arm in arms:
                self._telemetry.observed(arm.name, "left_out")
            return
        task = asyncio.ensure_future(self._observe(arms, decision_id, plan, plan_by))
        self._observed.add(task)
        task.add_done_callback(self._observed.discard)

    async def _observe(
        self, arms: Sequence[Arm], decision_id: str, plan: Plan, plan_by: Callable[[Arm], Awaitable[Plan]]
    ) -> None:
        for arm in arms:  # one after another: states that two of them read are computed once
            record: dict[str, Any] = {"arm": arm.name, "share": arm.share}
            try:
                own = replace(await plan_by(arm), arm=arm.name, share=arm.share)
                record = decision_record(own, arm.checkpoint, None) | {"propensity": None}
                outcome = "same" if own.order[0] == plan.order[0] else "other"
            except (InputError, ApiError) as error:
                record |= {"model": None, "checkpoint": arm.checkpoint.id, "error": " ".join(str(error).split())[:300]}
                outcome = "failed"
            self._log.note(decision_id, "observed", record)
            self._telemetry.observed(arm.name, outcome)

    async def _encode(self, prompt: str, checkpoint: Checkpoint, known: States) -> dict[str, bytes]:
        """The states of a prompt by encoder; those in `known` are not computed again, and others are added to it."""
        missing = [encoder for encoder in checkpoint.encoders.items() if encoder not in known]
        replies = [self._encode_handle.remote(prompt, *encoder) for encoder in missing]
        known.update(zip(missing, await asyncio.gather(*replies), strict=True))
        return {fingerprint: known[fingerprint, config] for fingerprint, config in checkpoint.encoders.items()}
