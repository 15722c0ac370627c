"""Traffic of one gateway replica, for GET /v1/status: counters since its start, and its latest decisions.

In: decisions and answers, as `serve.telemetry` notes them, records of the decision log, and times in Unix seconds. Out:
replies. Counters have one entry per model and reason, and the latest 600 seconds with a decision have one each, so that
memory is bounded. Knows nothing of Ray; Prometheus adds up replicas.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from typing import Any

from serve.breaker import State
from serve.schemas import ReplicaTraffic, SeenDecision, ServerState

WINDOW_S = 600  # period of the requests per 10 s
STEP_S = 10
LATEST = 20  # decisions in a reply


class Traffic:
    """The counters of one replica, for one event loop."""

    def __init__(self, now: float) -> None:
        self._started = now
        self._decisions: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._fallbacks: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._answers, self._errors = Counter[str](), Counter[str]()
        self._spent_usd: defaultdict[str, float] = defaultdict(float)
        self._reference_usd: defaultdict[str, float] = defaultdict(float)
        self._seconds: deque[list[int]] = deque(maxlen=WINDOW_S)  # a second, and its decisions

    def decided(self, model: str, reason: str, now: float) -> None:
        """Counts a decision."""
        self._decisions[model][reason] += 1
        second = int(now)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1][1] += 1
        else:
            self._seconds.append([second, 1])

    def attempted(self, model: str, reason: str) -> None:
        """Counts a failed attempt to ask a model."""
        self._fallbacks[model][reason] += 1

    def failed(self, model: str) -> None:
        """Counts a chat that ended with an error of its last model."""
        self._errors[model] += 1

    def answered(self, model: str) -> None:
        """Counts an answer without an error."""
        self._answers[model] += 1

    def spent(self, model: str, usd: float, references: Mapping[str, float]) -> None:
        """Adds the cost of an answer, and of the same answer by the policies of `references`, USD."""
        self._spent_usd[model] += usd
        for policy, cost in references.items():
            self._reference_usd[policy] += cost

    def reply(self, replica: str, now: float) -> ReplicaTraffic:
        """The counters of the replica whose id is `replica`."""
        steps = [0] * (WINDOW_S // STEP_S)
        for second, count in self._seconds:
            ago = int(now) - second
            if 0 <= ago < WINDOW_S:
                steps[-1 - ago // STEP_S] += count
        return ReplicaTraffic(
            id=replica,
            started=self._started,
            requests_60_s=sum(steps[-60 // STEP_S :]),
            requests_10_min=sum(steps),
            requests_per_10_s=steps,
            decisions={model: dict(reasons) for model, reasons in self._decisions.items()},
            answers=dict(self._answers),
            errors=dict(self._errors),
            fallbacks={model: dict(reasons) for model, reasons in self._fallbacks.items()},
            spent_usd=dict(self._spent_usd),
            reference_usd=dict(self._reference_usd),
        )


def seen_decision(logged: Mapping[str, Any]) -> SeenDecision:
    """The reply for a decision with its answer, as `DecisionLog.latest` returns it."""
    decision, answer = logged["decision"], logged.get("answer", {})
    own: Mapping[str, Any] = next(
        (one for one in decision.get("candidates", ()) if one["model"] == decision["model"]), {}
    )
    return SeenDecision(
        decision_id=logged["decision_id"],
        time=decision["time"],
        model=decision["model"],
        reason=decision["reason"],
        confidence=own.get("confidence"),
        estimated_usd=own.get("cost_usd"),
        served=answer.get("served"),
        failed=answer["error"] is not None if answer else None,
        cost_usd=answer.get("cost_usd"),
        latency_s=answer.get("latency_s"),
    )


def server_state(state: State, wait_s: float) -> ServerState:
    """The reply for a server, from the state of its breaker and `Breaker.wait`."""
    return ServerState(state=state, wait_s=None if math.isinf(wait_s) else round(wait_s, 1))
