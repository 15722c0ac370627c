"""Decisions of the graph: a query through encoder and router, with the checkpoint of an arm.

In: a query and an arm. Out: its decision, or an `ApiError`. The decisions of arms that do not act are logged, and
nobody waits for them. Knows nothing of requests and of servers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpc import RpcError
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from prefill_router.errors import InputError, UnavailableError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.router import Decision
from serve.arms import Arm
from serve.decision_log import DecisionLog
from serve.http import ApiError, NoDecision, retry_later
from serve.plan import Plan, decision_record
from serve.router import Checkpoint
from serve.schemas import ErrorDetail, Timings
from serve.telemetry import Telemetry

PROBE = "Is this checkpoint alive?"  # the prompt that tests encoder and router before a checkpoint becomes live
MAX_WATCHING = 64  # decisions of arms that do not act
States = dict[tuple[str, EncoderConfig], bytes]  # packed activations rows by fingerprint and configuration
# A failed call of a deployment. Calls by gRPC pass its exception on without a RayTaskError.
FAILED = (RayError, RpcError, RuntimeError)
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Query:
    """What is decided: the text, the requirements and lambda. `known` are states of the text that are computed."""

    text: str
    requirements: Requirements
    lam: float | None
    known: States = field(default_factory=dict)


class Decider:
    """Encoder and router of one gateway replica, and the decisions of arms that do not act."""

    def __init__(
        self,
        encoder: DeploymentHandle,
        router: DeploymentHandle,
        timeout_s: float,
        log: DecisionLog,
        telemetry: Telemetry,
    ) -> None:
        self._encoder, self._router, self._timeout_s = encoder, router, timeout_s
        self._log, self._telemetry = log, telemetry
        self._watching: set[asyncio.Task[None]] = set()

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
                decision = await self._router.decide.remote(checkpoint, rows, query.lam, query.requirements)
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

    def watch(self, arms: Sequence[Arm], decision_id: str, plan: Plan, again: Callable[[Arm], Awaitable[Plan]]) -> None:
        """Starts the decisions of `arms`, which `again` makes, about the query of `plan`, and logs them at their ends.

        At most MAX_WATCHING decisions of a replica are under way; further ones are left out, and counted.
        """
        for arm in arms:
            if len(self._watching) >= MAX_WATCHING:
                self._telemetry.watched(arm.name, "left_out")
                continue
            task = asyncio.ensure_future(self._decide_again(arm, decision_id, plan, again))
            self._watching.add(task)
            task.add_done_callback(self._watching.discard)

    async def _decide_again(
        self, arm: Arm, decision_id: str, plan: Plan, again: Callable[[Arm], Awaitable[Plan]]
    ) -> None:
        record: dict[str, Any] = {"arm": arm.name, "share": arm.share}
        try:
            other = replace(await again(arm), arm=arm.name, share=arm.share)
            record |= decision_record(other, arm.checkpoint, None)
            outcome = "same" if other.order[0] == plan.order[0] else "other"
        except (InputError, ApiError) as error:
            record |= {"model": None, "checkpoint": arm.checkpoint.id, "error": " ".join(str(error).split())[:300]}
            outcome = "failed"
        self._log.note(decision_id, "others", record)
        self._telemetry.watched(arm.name, outcome)

    async def _encode(self, prompt: str, checkpoint: Checkpoint, known: States) -> dict[str, bytes]:
        """The states of a prompt by encoder; those in `known` are not computed again, and others are added to it."""
        missing = [encoder for encoder in checkpoint.encoders.items() if encoder not in known]
        replies = [self._encoder.encode.remote(prompt, *encoder) for encoder in missing]
        known.update(zip(missing, await asyncio.gather(*replies), strict=True))
        return {fingerprint: known[fingerprint, config] for fingerprint, config in checkpoint.encoders.items()}
