"""The logging policy of a decision log: what was chosen, with which probability, and what came of it.

In: decisions of a log (decisions/log.py) and a router. Out: `LoggedPolicy`: arrays [decisions, models] for the
estimators of decisions/off_policy.py, and the decisions as one checkpoint read them, from its own record or from its
observed one: a shadow or canary need not have decided. Left out are decisions whose choice was not a draw between
routers: named models, sessions, servers that were left alone. The score of a decision is its last feedback.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float

from prefill_router.decisions.off_policy import Logged
from prefill_router.decisions.replay import LoggedDecisions, logged_decisions
from prefill_router.errors import InputError
from prefill_router.routing.router import Reason, Router

LEFT_OUT = {
    "not_routed": "no router decided",
    "unknown_propensity": "the propensity is unknown",
    "moved": "a session, a health check or a minimum confidence moved the choice",
    "not_read": "the checkpoint did not read them",
}
SHARES = 1e-6  # by which the probabilities of the models may differ from a sum of 1


@dataclass(frozen=True)
class LoggedPolicy:
    """Decisions with their propensities and outcomes.

    `models` are those of the router's pool, then those that only another arm's pool has. `logged` has one cluster per
    conversation; without `conversations` in the log every decision is its own. `score` is the last feedback in [0, 1],
    NaN without feedback; `cost` (USD) is that of the answer, NaN if unknown; both are 0 if nobody `answered`.
    `confidence` and `estimated_cost` (USD) are those of the checkpoint, and of the arm that decided for models that are
    no candidates of the checkpoint. `read` are the decisions of the checkpoint. `left_out` counts by LEFT_OUT.
    """

    models: tuple[str, ...]
    logged: Logged
    score: Float[np.ndarray, " decisions"]
    cost: Float[np.ndarray, " decisions"]
    answered: Bool[np.ndarray, " decisions"]
    confidence: Float[np.ndarray, "decisions models"]
    estimated_cost: Float[np.ndarray, "decisions models"]
    read: LoggedDecisions
    conversations: bool
    left_out: Mapping[str, int]

    def read_by(self, read: LoggedDecisions) -> LoggedPolicy:
        """The same decisions, as another checkpoint read them."""
        confidence, cost, pool = self.confidence.copy(), self.estimated_cost.copy(), read.p.shape[1]
        confidence[:, :pool] = np.where(read.allowed, read.p, confidence[:, :pool])
        cost[:, :pool] = np.where(read.allowed, read.cost, cost[:, :pool])
        return replace(self, confidence=confidence, estimated_cost=cost, read=read)


def logged_policy(log: Mapping[str, Mapping[str, Any]], router: Router, checkpoint: str | None = None) -> LoggedPolicy:
    """The decisions of the log that checkpoint `checkpoint` made or observed.

    None: the router's checkpoint if the log has it, otherwise the one with the most decisions. Raises InputError if
    none of them has a propensity, none has feedback, or a candidate is not in the router's pool.
    """
    if checkpoint is None:
        known = checkpoints(log)
        checkpoint = router.id if router.id in known else known.most_common(1)[0][0] if known else router.id
    left_out = dict.fromkeys(LEFT_OUT, 0)
    kept: dict[str, Mapping[str, Any]] = {}
    views: dict[str, dict[str, Any]] = {}
    for name, one in log.items():
        reason, view = _reading(one, checkpoint)
        if view is None:
            left_out[reason] += 1
        else:
            kept[name], views[name] = one, {"decision": view}
    if not kept:
        raise InputError(_nothing(log, left_out, checkpoint))
    read = logged_decisions(views, router.pool.names, checkpoint)
    shares = [_propensities(one) for one in kept.values()]
    models = tuple(dict.fromkeys([*router.pool.names, *(model for own in shares for model in own)]))
    position = {model: place for place, model in enumerate(models)}
    propensities, confidence, cost = (np.zeros((len(kept), len(models))) for _ in range(3))
    confidence[:], cost[:] = np.nan, np.nan
    for row, (one, own) in enumerate(zip(kept.values(), shares, strict=True)):
        for model, share in own.items():
            propensities[row, position[model]] = share
        for candidate in _candidates(one):
            if candidate["model"] in position:
                place = position[candidate["model"]]
                confidence[row, place], cost[row, place] = candidate["confidence"], candidate["cost_usd"]
    chosen = np.array([position[one["decision"]["model"]] for one in kept.values()])
    score = np.array([_score(one) for one in kept.values()])
    if np.isnan(score).all():
        raise InputError(
            f"log: none of its {len(kept):,} decisions with a known propensity has feedback; send it to "
            "POST /v1/feedback"
        )
    conversations = [one["decision"].get("conversation") for one in kept.values()]
    names = [conversation or name for conversation, name in zip(conversations, kept, strict=True)]
    found = LoggedPolicy(
        models,
        Logged(chosen, propensities, np.unique(names, return_inverse=True)[1]),
        score,
        np.array([_cost(one) for one in kept.values()]),
        np.array([not _failed(one) for one in kept.values()]),
        confidence,
        cost,
        read,
        any(conversations),
        left_out,
    )
    return found.read_by(read)


def checkpoints(log: Mapping[str, Mapping[str, Any]]) -> Counter[str]:
    """The checkpoints that decided or observed decisions of the log, with the number of these decisions."""
    return Counter(record["checkpoint"] for one in log.values() for record in _records(one) if record.get("candidates"))


def _reading(one: Mapping[str, Any], checkpoint: str) -> tuple[str, dict[str, Any] | None]:
    """The decision as the checkpoint read it, with its prompt; or None, and why it is left out."""
    own = one["decision"]
    if not own.get("candidates"):
        return "not_routed", None
    if not own.get("propensity"):
        return "unknown_propensity", None
    acting = [record for record in _records(one) if record is own or record.get("share")]
    # The arms share the rule, so that which decisions are left out does not depend on the arm that was drawn.
    if any(record.get("reason") not in get_args(Reason) for record in acting):
        return "moved", None
    for record in _records(one):
        if record["checkpoint"] == checkpoint and record.get("candidates"):
            return "", {**record, "prompt": own.get("prompt")}
    return "not_read", None


def _records(one: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield one["decision"]
    yield from one.get("observed", ())


def _candidates(one: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The candidates of all arms; those of the arm that decided come last."""
    for record in reversed(list(_records(one))):
        yield from record.get("candidates", ())


def _propensities(one: Mapping[str, Any]) -> dict[str, float]:
    """The probability of every model that an arm with a share chose."""
    own = one["decision"]
    if own["propensity"] > 1 - SHARES:
        return {own["model"]: 1.0}
    found = {own["model"]: 0.0}
    for record in _records(one):
        if record is own or record.get("share"):
            found[record["model"]] = found.get(record["model"], 0.0) + record["share"]
    return found


def _score(one: Mapping[str, Any]) -> float:
    if one.get("feedback"):
        return float(one["feedback"][-1]["score"])
    return 0.0 if _failed(one) else np.nan


def _failed(one: Mapping[str, Any]) -> bool:
    """Whether nobody answered."""
    return "answer" in one and one["answer"]["served"] is None


def _cost(one: Mapping[str, Any]) -> float:
    value = one.get("answer", {}).get("cost_usd")
    if value is not None:
        return float(value)
    return 0.0 if _failed(one) else np.nan


def _nothing(log: Mapping[str, Any], left_out: Mapping[str, int], checkpoint: str) -> str:
    why = ", ".join(f"{count:,}: {LEFT_OUT[name]}" for name, count in left_out.items() if count)
    known = ", ".join(sorted(checkpoints(log))) or "none"
    return (
        f"log: none of its {len(log):,} decisions can be evaluated with checkpoint {checkpoint} ({why}); checkpoints "
        f"that decided or observed: {known}; give one as made_by"
    )
