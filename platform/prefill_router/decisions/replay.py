"""Replay: the decisions of a log, chosen again at other lambdas, without margin, or by another checkpoint.

In: decisions of a log (decisions/log.py) and a router. Out: the choice, confidence and estimated cost of every decision
at every lambda. With the checkpoint that made them, the recorded confidences and costs are used, and the choices at the
recorded lambdas are those that were made, bit for bit. Another checkpoint reads the recorded prompts. The candidates
are the recorded ones. Nothing here says how often another choice would have been right: a log has only the answers of
the models that were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from prefill_router.controller import LocalRouter
from prefill_router.errors import InputError
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.router import NoveltyFallback, Router

BATCH = 256  # prompts that another checkpoint reads at once


@dataclass(frozen=True)
class LoggedDecisions:
    """Decisions of one checkpoint, as arrays [decisions, models of the pool]; NaN for models that were no candidate.

    `made` is the position of the router's model. The server asked another one where a session or a minimum confidence
    decided. `added_tokens`: estimated input tokens that the encoder did not read. `cached`: the model of the
    conversation, and the estimated input tokens in its prompt cache.
    """

    ids: tuple[str, ...]
    checkpoint: str
    lam: Float[np.ndarray, " decisions"]
    p: Float[np.ndarray, "decisions models"]
    cost: Float[np.ndarray, "decisions models"]
    scores: Float[np.ndarray, "decisions models"]
    novelty: Float[np.ndarray, " decisions"]
    made: Int[np.ndarray, " decisions"]
    prompts: tuple[str | None, ...]
    added_tokens: tuple[int, ...]
    cached: tuple[tuple[str, int] | None, ...]

    @property
    def allowed(self) -> Bool[np.ndarray, "decisions models"]:
        """The candidates."""
        return ~np.isnan(self.p)

    def take(self, rows: Int[np.ndarray, " taken"]) -> LoggedDecisions:
        """The decisions at these positions."""
        taken: dict[str, Any] = {
            name: values[rows] if isinstance(values, np.ndarray) else tuple(values[row] for row in rows)
            for name, values in vars(self).items()
            if name != "checkpoint"
        }
        return replace(self, **taken)


def logged_decisions(log: Mapping[str, Mapping[str, Any]], models: Sequence[str], checkpoint: str) -> LoggedDecisions:
    """The decisions of the log that checkpoint `checkpoint` made; `models` are the names of the pool.

    Raises InputError if there is none, or if a candidate is not in the pool.
    """
    chosen = {name: one["decision"] for name, one in log.items() if one["decision"].get("candidates")}
    found = {name: one for name, one in chosen.items() if one["checkpoint"] == checkpoint}
    if not found:
        made_by = sorted({one["checkpoint"] for one in chosen.values()})
        raise InputError(
            f"made_by: no decision of the log was made by checkpoint {checkpoint}; it has decisions of "
            f"{', '.join(made_by) or 'none'}"
        )
    position = {name: index for index, name in enumerate(models)}
    shape = (len(found), len(models))
    p, cost, scores = (np.full(shape, np.nan) for _ in range(3))
    for row, (name, one) in enumerate(found.items()):
        for candidate in one["candidates"]:
            if candidate["model"] not in position:
                raise InputError(
                    f"checkpoint: its pool lacks {candidate['model']!r}, a candidate of decision {name}; use a "
                    f"checkpoint with the models of {checkpoint}"
                )
            column = position[candidate["model"]]
            p[row, column], cost[row, column] = candidate["confidence"], candidate["cost_usd"]
            scores[row, column] = candidate["score"]
    records = list(found.values())
    return LoggedDecisions(
        tuple(found),
        checkpoint,
        np.array([one["lambda"] for one in records], dtype=np.float64),
        p,
        cost,
        scores,
        np.array([np.nan if one["novelty"] is None else one["novelty"] for one in records], dtype=np.float64),
        np.array([position[one["candidates"][0]["model"]] for one in records]),
        tuple(one.get("prompt") for one in records),
        tuple(one.get("added_tokens", 0) for one in records),
        tuple((one["cached"][0], one["cached"][1]) if one.get("cached") else None for one in records),
    )


@dataclass(frozen=True)
class Replayed:
    """Choices [decisions] at one lambda, with the confidence and the estimated cost (USD) of the chosen models."""

    lam: float
    chosen: Int[np.ndarray, " decisions"]
    confidence: Float[np.ndarray, " decisions"]
    cost: Float[np.ndarray, " decisions"]


def replay(
    logged: LoggedDecisions,
    router: Router,
    lambdas: Sequence[float],
    margin: bool = True,
    fallback: NoveltyFallback | None = None,
) -> list[Replayed]:
    """The choices of the router at every lambda. `margin`: whether the router's margin counts.

    Raises InputError for a lambda outside [0, 1], or if another checkpoint than the router's made the decisions and a
    prompt is not in the log.
    """
    if fallback is not None:
        router.check_fallback(fallback)
    if router.id != logged.checkpoint:
        logged = read_again(logged, router)
    if not margin:
        router = replace(router, margin=None)
    return [_at(logged, router, lam, fallback) for lam in lambdas]


def reproduced(
    logged: LoggedDecisions, router: Router, fallback: NoveltyFallback | None = None
) -> Bool[np.ndarray, " decisions"]:
    """Whether the router chooses the recorded model at the recorded lambda with the recorded scores, bit for bit."""
    same = np.zeros(len(logged.ids), dtype=bool)
    for lam in np.unique(logged.lam):
        rows = np.flatnonzero(logged.lam == lam)
        choice = router.choose(
            np.nan_to_num(logged.p[rows]),
            np.nan_to_num(logged.cost[rows]),
            float(lam),
            logged.allowed[rows],
            logged.novelty[rows],
            fallback,
        )
        equal = (choice.scores == logged.scores[rows]) | ~logged.allowed[rows]
        same[rows] = (np.array(choice.chosen) == logged.made[rows]) & equal.all(axis=1)
    return same


def figures(logged: LoggedDecisions, router: Router, replayed: Sequence[Replayed]) -> dict[str, Any]:
    """Figures of the decisions made and replayed (docs/data-formats.md, replay.json); costs in USD."""

    def of(one: Replayed) -> dict[str, Any]:
        counts = np.bincount(one.chosen, minlength=len(router.pool.names))
        return {
            "mean_confidence": float(one.confidence.mean()),
            "cost_usd": float(one.cost.sum()),
            "changed": int((one.chosen != logged.made).sum()),
            "models": {name: int(n) for name, n in zip(router.pool.names, counts, strict=True) if n},
        }

    return {
        "decisions": len(logged.ids),
        "made_by": logged.checkpoint,
        "decided_by": router.id,
        "made": of(_made(logged)),
        "replayed": [{"lambda": one.lam} | of(one) for one in replayed],
    }


def choices_table(logged: LoggedDecisions, router: Router, replayed: Sequence[Replayed]) -> pa.Table:
    """A row per decision and lambda (docs/data-formats.md, replay.parquet)."""
    names = np.array(router.pool.names, dtype=object)
    parts = [
        pa.table(
            {
                "decision_id": pa.array(logged.ids, pa.string()),
                "made": pa.array(names[logged.made], pa.string()),
                "lambda": pa.array(np.full(len(logged.ids), one.lam)),
                "model": pa.array(names[one.chosen], pa.string()),
                "confidence": pa.array(one.confidence),
                "cost_usd": pa.array(one.cost),
            }
        )
        for one in replayed
    ]
    return pa.concat_tables(parts)


def _made(logged: LoggedDecisions) -> Replayed:
    rows = np.arange(len(logged.ids))
    return Replayed(float("nan"), logged.made, logged.p[rows, logged.made], logged.cost[rows, logged.made])


def _at(logged: LoggedDecisions, router: Router, lam: float, fallback: NoveltyFallback | None) -> Replayed:
    known_p, known_cost = np.nan_to_num(logged.p), np.nan_to_num(logged.cost)
    chosen = np.array(router.choose(known_p, known_cost, lam, logged.allowed, logged.novelty, fallback).chosen)
    rows = np.arange(len(chosen))
    return Replayed(lam, chosen, known_p[rows, chosen], known_cost[rows, chosen])


def read_again(
    logged: LoggedDecisions, router: Router, progress: Callable[[Sequence[int]], Iterable[int]] = iter
) -> LoggedDecisions:
    """The decisions with the confidences, costs and novelties of the router, which reads their prompts.

    `progress` wraps the sequence of batches. Raises InputError if a prompt is not in the log.
    """
    missing = sum(prompt is None for prompt in logged.prompts)
    if missing:
        raise InputError(
            f"checkpoint: {router.id} did not make the decisions, and the log lacks {missing:,} of their "
            f"{len(logged.prompts):,} prompts; log them with gateway.log.prompts, or give checkpoint "
            f"{logged.checkpoint}"
        )
    p, cost = np.full(logged.p.shape, np.nan), np.full(logged.p.shape, np.nan)
    novelty = np.full(len(logged.ids), np.nan)
    # The recorded candidates replace the limits of the pool.
    open_pool = router.pool.model_copy(
        update={"models": tuple(one.model_copy(update={"context_tokens": None}) for one in router.pool.models)}
    )
    with LocalRouter(replace(router, pool=open_pool)) as local:
        for start in progress(range(0, len(logged.prompts), BATCH)):
            prompts = [prompt or "" for prompt in logged.prompts[start : start + BATCH]]
            encoded = local.encode(prompts)
            for row in range(start, start + len(prompts)):
                own = {name: table.slice(row - start, 1) for name, table in encoded.items()}
                (decision,) = local.decide(
                    own, 0.0, Requirements(added_tokens=logged.added_tokens[row], cached=logged.cached[row])
                )
                novelty[row] = np.nan if decision.novelty is None else decision.novelty
                for one in decision.candidates:
                    column = router.pool.names.index(one.model)
                    p[row, column], cost[row, column] = one.confidence, one.cost_usd
    allowed = logged.allowed
    p, cost = np.where(allowed, p, np.nan), np.where(allowed, cost, np.nan)
    return replace(logged, checkpoint=router.id, p=p, cost=cost, novelty=novelty)
