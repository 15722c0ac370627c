"""Who answers a chat: the order of the models, the reason, and what the reply says about it.

In: a request, its options, and a decision or none. Out: a `Plan` before the answer, a `Note` and headers after it.
Knows nothing of Ray and of connections.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from urllib.parse import quote

from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.router import Candidate, Decision, Reason
from serve.answers import Note, cost_details, token_counts
from serve.arms import Arm, ArmName
from serve.chat import ChatRequest, RouterOptions
from serve.router import Checkpoint
from serve.schemas import candidate_replies
from serve.sessions import Kept, awaits_tool
from serve.upstream import Answer, Attempt, Server, Upstream

PlanReason = Reason | Literal["requested", "off", "min_confidence", "session", "health", "router_unavailable"]


States = dict[tuple[str, EncoderConfig], bytes]  # packed activations rows by fingerprint and configuration


@dataclass(frozen=True)
class Query:
    """What is decided: the text, the requirements and lambda. `known` are states of the text that are computed."""

    text: str
    requirements: Requirements
    lam: float | None
    known: States = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The models to ask, in order, and the reason for the first.

    `decision`: None if the router did not decide. `added_tokens`: estimated input tokens that the encoder did not read.
    `cached`: the model of the session, and the estimated tokens in its prompt cache. `arm`: whose checkpoint decided
    (serve/arms.py); `share`: the probability that this arm decides, None if another arm was drawn.
    """

    requested: str
    order: tuple[str, ...]
    reason: PlanReason
    decision: Decision | None = None
    added_tokens: int = 0
    cached: tuple[str, int] | None = None
    arm: ArmName = "live"
    share: float | None = 1.0

    def candidate(self, model: str) -> Candidate | None:
        """The model's figures in the decision; None without a decision."""
        candidates = () if self.decision is None else self.decision.candidates
        return next((one for one in candidates if one.model == model), None)


def plan_of(
    request: ChatRequest,
    options: RouterOptions,
    arm: Arm,
    default_model: str | None,
) -> Plan | None:
    """The plan of a request that needs no decision; None if the router decides.

    Raises InputError for a model without a server, and for `off` without a default model.
    """
    if request.asked is not None:
        if request.asked not in arm.servers:
            raise InputError(f"model: {request.asked} {arm.missing[request.asked]}; name another model")
        return Plan(request.model, (request.asked,), "requested")
    if not options.off:
        return None
    if default_model is None:
        raise InputError("off: the gateway has no default_model; leave the option out or name a model")
    return Plan(request.model, (default_model,), "off")


def reachable(names: Sequence[str], servers: Mapping[str, Upstream], missing: Mapping[str, str]) -> list[str]:
    """The names with a server. Raises InputError if there is none, with the reason for every model."""
    found = [name for name in names if name in servers]
    if not found:
        reasons = "; ".join(f"{name} {missing[name]}" for name in names)
        raise InputError(f"models: no model can be asked ({reasons}); add endpoints to gateway.endpoints or pool.yaml")
    return found


def decided(requested: str, decision: Decision, min_confidence: float | None) -> Plan:
    """The plan of a decision: its model, then the others by score, then the models that are offered as fallback only.

    The latter are left out with a minimum confidence. Raises InputError if no candidate has the minimum confidence.
    """
    names = [one.model for one in decision.candidates]
    if min_confidence is None:
        names += [one.model for one in decision.excluded if one.fallback]
        return Plan(requested, tuple(names), decision.reason, decision)
    confident = tuple(one.model for one in decision.candidates if one.confidence >= min_confidence)
    if not confident:
        best = max(decision.candidates, key=lambda one: one.confidence)
        raise InputError(
            f"min_confidence: got {min_confidence:g}, but the highest confidence is {best.confidence:.3g} "
            f"({best.model}); give a lower value"
        )
    reason: PlanReason = decision.reason if confident[0] == decision.model else "min_confidence"
    return Plan(requested, confident, reason, decision)


def kept(plan: Plan, session: Kept | None, max_fall: float, awaits_tool: bool) -> Plan:
    """The plan of a later turn: the model of the session first.

    It is left if its confidence has fallen by more than `max_fall`, and if it is no candidate. A model that has called
    a tool answers alone: another one cannot continue.
    """
    own = None if session is None else plan.candidate(session.model)
    if session is None or own is None or session.model not in plan.order:
        return plan
    if awaits_tool:
        return replace(plan, order=(session.model,), reason="session")
    if own.confidence < session.confidence - max_fall or session.model == plan.order[0]:
        return plan
    others = tuple(name for name in plan.order if name != session.model)
    return replace(plan, order=(session.model, *others), reason="session")


def healthy(plan: Plan, left_alone: Collection[str]) -> Plan:
    """The plan without a first model whose server is left alone (serve/breaker.py): these models come last.

    Nothing changes if the first model may be asked, or if none may.
    """
    first = tuple(name for name in plan.order if name not in left_alone)
    if not first or first[0] == plan.order[0]:
        return plan
    last = tuple(name for name in plan.order if name in left_alone)
    return replace(plan, order=(*first, *last), reason="health")


@dataclass(frozen=True)
class Turn:
    """A chat that an arm decides.

    `session`: the model of the conversation, None at its first turn. `max_fall`: fall of its confidence above which it
    is left. `left_alone`: the servers that are not asked now. `known`: states of the routed text, for all arms.
    """

    request: ChatRequest
    options: RouterOptions
    session: Kept | None
    max_fall: float
    left_alone: Collection[Server]
    known: States = field(default_factory=dict)

    def query(self, arm: Arm) -> Query:
        """The query for an arm. Raises InputError if it has no server that could answer."""
        names = reachable(self.options.models or arm.checkpoint.models, arm.servers, arm.missing)
        asked = self.request.query(self.options, names)
        cached = None if self.session is None else (self.session.model, asked.earlier_tokens)
        return Query(asked.text, replace(asked.requirements, cached=cached), asked.lam, self.known)

    def plan(self, arm: Arm, query: Query, decision: Decision) -> Plan:
        """The plan that follows from a decision of `arm`. Raises InputError as `decided`."""
        plan = decided(self.request.model, decision, self.options.min_confidence)
        plan = replace(plan, added_tokens=query.requirements.added_tokens, cached=query.requirements.cached)
        plan = kept(plan, self.session, self.max_fall, awaits_tool(self.request.messages))
        return healthy(plan, [name for name in plan.order if arm.servers[name].server in self.left_alone])


def note(
    plan: Plan, answer: Answer, checkpoint: Checkpoint, decision_id: str, overhead_ms: float, explain: bool
) -> Note:
    """What the reply says about the plan and its answer; with `explain` also all models of the decision."""
    served, decision = answer.upstream.name, plan.decision
    own = plan.candidate(served)
    router: dict[str, Any] = {
        "decision_id": decision_id,
        "requested": plan.requested,
        "selected": plan.order[0],
        "served": served,
        "reason": plan.reason,
        "confidence": None if own is None else own.confidence,
        "novelty": None if decision is None else decision.novelty,
        "cost_usd": None if own is None else own.cost_usd,
        "lambda": None if decision is None else decision.lam,
        "fallbacks": [asdict(attempt) for attempt in answer.attempts],
        "checkpoint": checkpoint.id,
        "overhead_ms": round(overhead_ms, 3),
    }
    if explain and decision is not None:
        candidates, excluded = candidate_replies(decision)
        router["candidates"] = [one.model_dump() for one in candidates]
        router["excluded"] = [one.model_dump() for one in excluded]
    model = next(model for model in checkpoint.pool.models if model.name == served)
    return Note(model, None if own is None else own.cost_usd, router)


def decision_record(
    plan: Plan, checkpoint: Checkpoint, prompt: str | None, conversation: str | None = None
) -> dict[str, Any]:
    """What the log says about a decision.

    `prompt` is the routed text, None if it is not logged; `conversation` the key of its session, a hash, or the id
    of a decision that belongs to none; None for an observed decision.
    """
    decision = plan.decision
    record: dict[str, Any] = {
        "requested": plan.requested,
        "model": plan.order[0],
        "order": plan.order,
        "reason": plan.reason,
        "arm": plan.arm,
        "share": plan.share,
        "propensity": 1.0 if plan.share == 1 else None,  # known when the other arms have decided too
        "checkpoint": checkpoint.id,
        "encoders": list(checkpoint.encoders),
    }
    if decision is not None:
        candidates, excluded = candidate_replies(decision)
        record |= {
            "lambda": decision.lam,
            "novelty": decision.novelty,
            "unknown_share": decision.unknown_share,
            "added_tokens": plan.added_tokens,
            "cached": plan.cached,
            "candidates": [one.model_dump() for one in candidates],
            "excluded": [one.model_dump() for one in excluded],
        }
    known = {"conversation": conversation, "prompt": prompt}
    return record | {name: value for name, value in known.items() if value is not None}


def answer_record(found: Note, status: int, usage: Any, error: str | None, seconds: float) -> dict[str, Any]:
    """What the log says about an answer: who gave it, tokens, cost in USD, and its duration in seconds.

    Tokens and cost are None if no usage was reported.
    """
    counts, cost = token_counts(usage), cost_details(found.model, usage)
    return {
        "served": found.model.name,
        "status": status,
        "error": error,
        "fallbacks": found.router["fallbacks"],
        "input_tokens": None if counts is None else counts[0],
        "output_tokens": None if counts is None else counts[1],
        "cost_usd": None if cost is None else sum(cost.values()),
        "latency_s": round(seconds, 4),
    }


def no_answer_record(error: str, attempts: Sequence[Attempt], seconds: float) -> dict[str, Any]:
    """What the log says about a chat that nobody answered: the failed attempts and its duration in seconds."""
    return {
        "served": None,
        "error": error,
        "fallbacks": [asdict(attempt) for attempt in attempts],
        "latency_s": round(seconds, 4),
    }


def note_headers(found: Note) -> dict[str, str]:
    """The headers of a reply. `x-router-cost` is the estimate before the answer, in USD."""
    router = found.router
    values = {
        "decision-id": router["decision_id"],
        "model": quote(router["served"], safe="/:@+ "),
        "reason": router["reason"],
        "confidence": router["confidence"],
        "lambda": router["lambda"],
        "version": router["checkpoint"],
        "overhead-ms": router["overhead_ms"],
        "attempted-fallbacks": len(router["fallbacks"]),
        "cost": router["cost_usd"],
    }
    return {f"x-router-{name}": str(value) for name, value in values.items() if value is not None}
