"""Metrics of the gateway, which Ray exports for Prometheus with the prefix `ray_` (docs/serving.md, Metrics).

In: plans, decisions and answers. Out: counters and histograms. Names of OpenTelemetry's GenAI conventions have
underscores in place of dots, which Ray does not accept. Construct it in a replica: the metrics then name it.
"""

from __future__ import annotations

import asyncio
import time

import aiohttp
import ray
from ray.serve.metrics import Counter, Histogram

from prefill_router.errors import UnavailableError
from serve.answers import Note
from serve.plan import Plan
from serve.schemas import Timings
from serve.traffic import Traffic
from serve.upstream import Attempt

SECONDS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300]
SHARES = [step / 20 for step in range(1, 20)]
TOKENS = [float(4**power) for power in range(11)]
ANSWERED = ("gen_ai_request_model", "gen_ai_response_model")


class Telemetry:
    """The metrics of one gateway replica. `traffic` has those that GET /v1/status reports."""

    def __init__(self) -> None:
        self.traffic = Traffic(time.time())
        self._decisions = _counter("router_decisions", "decisions", "model", "reason", "arm")
        self._observed = _counter("router_observed_decisions", "decisions of other arms for the log", "arm", "outcome")
        self._confidence = _histogram("router_confidence", "confidence of the chosen model", SHARES, "model")
        self._novelty = _histogram("router_novelty", "novelty of the queries", SHARES)
        self._fallbacks = _counter("router_fallbacks", "failed attempts to ask a model", "model", "reason")
        self._errors = _counter("router_errors", "chats that ended with an error", "model")
        self._stopped = _counter("router_canary_stops", "canaries that this replica has taken out of the draw", "band")
        self._refused = _counter("router_refused", "requests over a limit of their API key", "key", "reason")
        self._spent = _counter("router_spent_usd", "cost of the answers, USD", "model")
        self._reference = _counter(
            "router_reference_usd", "cost of the same answers, had one model given them all, USD", "policy"
        )
        self._stages = _histogram("router_stage_seconds", "seconds of encode, route and first_byte", SECONDS, "stage")
        self._tokens = _histogram(
            "gen_ai_client_token_usage", "reported tokens", TOKENS, *ANSWERED, "gen_ai_token_type"
        )
        self._duration = _histogram("gen_ai_client_operation_duration", "seconds of chats", SECONDS, *ANSWERED)
        self._first_token = _histogram(
            "gen_ai_server_time_to_first_token", "seconds until the first bytes of an answer", SECONDS, *ANSWERED
        )

    def stage(self, name: str, seconds: float) -> None:
        """Notes the duration of a stage."""
        self._stages.observe(seconds, {"stage": name})

    def stages(self, timings: Timings) -> None:
        """Notes the durations of a decision."""
        self.stage("encode", timings.encode / 1e3)
        self.stage("route", timings.route / 1e3)

    def decided(self, plan: Plan) -> None:
        """Notes a decision."""
        model = plan.order[0]
        self._decisions.inc(1, {"model": model, "reason": plan.reason, "arm": plan.arm})
        self.traffic.decided(model, plan.reason, time.time())
        own = plan.candidate(model)
        if own is not None:
            self._confidence.observe(own.confidence, {"model": model})
        if plan.decision is not None and plan.decision.novelty is not None:
            self._novelty.observe(plan.decision.novelty)

    def observed(self, arm: str, outcome: str) -> None:
        """Notes an observed decision of another arm: `same` model, `other` model, `failed` or `left_out`."""
        self._observed.inc(1, {"arm": arm, "outcome": outcome})

    def attempted(self, attempts: tuple[Attempt, ...]) -> None:
        """Notes failed attempts."""
        for attempt in attempts:
            reason = attempt.reason if attempt.status is None else f"status {attempt.status}"
            self._fallbacks.inc(1, {"model": attempt.model, "reason": reason})
            self.traffic.attempted(attempt.model, reason)

    def unanswered(self, attempts: tuple[Attempt, ...]) -> None:
        """Notes a chat that nobody answered: an error of the model that was asked last."""
        self.attempted(attempts)
        self._failed(attempts[-1].model)

    def _failed(self, model: str) -> None:
        self._errors.inc(1, {"model": model})
        self.traffic.failed(model)

    def stopped(self, band: str) -> None:
        """Notes that the canary has left the draw, because it is outside a band (serve/trial.py)."""
        self._stopped.inc(1, {"band": band})

    def refused(self, key: str, reason: str) -> None:
        """Notes a request over the limit `reason`, rate or budget, of an API key."""
        self._refused.inc(1, {"key": key, "reason": reason})

    def answered(
        self,
        plan: Plan,
        found: Note,
        tokens: tuple[int, int] | None,
        usd: float | None,
        error: str | None,
        first_byte_s: float,
        seconds: float,
        best_single: str | None,
    ) -> None:
        """Notes an answer: reported tokens and cost (USD), None if the server reported none; durations in seconds.

        The reference costs are estimates for the most expensive candidate and for `best_single`, the best model on the
        training queries; where there is no such candidate, the cost of the answer.
        """
        model = found.model.name
        tags = {"gen_ai_request_model": plan.requested.partition(":")[0], "gen_ai_response_model": model}
        if plan.decision is None:
            tags["gen_ai_request_model"] = model
        self.stage("first_byte", first_byte_s)
        self._first_token.observe(first_byte_s, tags)
        self._duration.observe(seconds, tags)
        if error is not None:
            self._failed(model)
        else:
            self.traffic.answered(model)
        for kind, count in zip(("input", "output"), tokens or (), strict=False):
            self._tokens.observe(count, tags | {"gen_ai_token_type": kind})
        if usd is not None:
            candidates = () if plan.decision is None else plan.decision.candidates
            most = max((one.cost_usd for one in candidates), default=usd)
            best = next((one.cost_usd for one in candidates if one.model == best_single), usd)
            references = {"most_expensive": most, "best_single": best}
            self.traffic.spent(model, usd, references)
            costs = [(self._spent, usd, {"model": model})]
            costs += [(self._reference, cost, {"policy": policy}) for policy, cost in references.items()]
            for counter, cost, own in costs:
                if cost > 0:  # Ray's counters refuse 0
                    counter.inc(cost, own)


def _counter(name: str, description: str, *tags: str) -> Counter:
    return Counter(name, description, tags)  # type: ignore[arg-type]  # Ray's annotation allows a single tag


def _histogram(name: str, description: str, boundaries: list[float], *tags: str) -> Histogram:
    return Histogram(name, description, boundaries, tags)  # type: ignore[arg-type]


async def exported_metrics(timeout_s: float) -> bytes:
    """The metrics of this node, in Prometheus' format. Raises UnavailableError if Ray exports none in time."""
    here = ray.get_runtime_context().get_node_id()
    nodes = await asyncio.to_thread(ray.nodes)
    node = next(node for node in nodes if node["NodeID"] == here)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with aiohttp.ClientSession(timeout=timeout) as client, client.get(url) as reply:
            reply.raise_for_status()
            return await reply.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise UnavailableError(f"metrics: {url}: {error}") from None
