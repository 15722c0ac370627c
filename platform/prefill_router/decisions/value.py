"""The value of policies by a decision log: mean score, mean cost, and utility, with intervals and differences.

In: a `LoggedPolicy`, the probabilities of target policies [decisions, models], and a cost model. Out: `value.json`
(docs/data-formats.md). The utility is (1 - lambda) score - lambda normalised cost at one lambda for all policies
(docs/equations.md, Utility). The logging policy is evaluated as the others are; differences from it are paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.decisions.logged_policy import LoggedPolicy
from prefill_router.decisions.off_policy import (
    Estimate,
    Linear,
    Logged,
    Weights,
    bounds,
    empirical_bernstein,
    estimates,
    intervals,
    weigh,
)
from prefill_router.decisions.outcome_model import recalibrated, rescaled
from prefill_router.decisions.replay import replay
from prefill_router.errors import InputError
from prefill_router.routing.cost import CostModel
from prefill_router.routing.router import NoveltyFallback, Router

LOGGING = "logging policy"
FULL = 1 - 1e-9  # a supported share from which support is complete
Found = dict[str, dict[str, Linear]]


def router_policy(
    policy: LoggedPolicy,
    router: Router,
    lam: float | None = None,
    margin: bool = True,
    fallback: NoveltyFallback | None = None,
) -> Float[np.ndarray, "decisions models"]:
    """The choices of the router, which has read the decisions, at `lam`; None: at the lambda of each decision."""
    target, read = np.zeros(policy.confidence.shape), policy.read
    for one in np.unique(read.lam) if lam is None else [lam]:
        rows = np.arange(len(read.ids)) if lam is not None else np.flatnonzero(read.lam == one)
        (replayed,) = replay(read.take(rows), router, [float(one)], margin, fallback)
        target[rows, replayed.chosen] = 1.0
    return target


def mixed_policy(policy: LoggedPolicy, shares: Mapping[str, float]) -> Float[np.ndarray, "decisions models"]:
    """Models drawn by fixed shares among the candidates of each decision; where none is one, the logging policy's.

    Raises InputError for a model that is not in the pool.
    """
    unknown = sorted(shares.keys() - set(policy.models))
    if unknown:
        raise InputError(f"policies: {unknown[0]!r} is not in the pool; known: {', '.join(policy.models)}")
    wanted = np.array([shares.get(model, 0.0) for model in policy.models])
    target = np.where(np.isnan(policy.confidence), 0.0, wanted)
    total = target.sum(axis=1, keepdims=True)
    return np.where(total > 0, target / np.where(total > 0, total, 1.0), policy.logged.propensities)


@dataclass(frozen=True)
class Outcomes:
    """Scores, costs (USD) and normalised costs of the chosen models, and their predictions for all models.

    `strata`: decisions whose feedback is observed with one rate.
    """

    logged: Logged
    observed: Mapping[str, Float[np.ndarray, " decisions"]]
    predicted: Mapping[str, Float[np.ndarray, "decisions models"]]
    strata: Int[np.ndarray, " decisions"]

    def weights(self, target: np.ndarray, name: str, cap: float | None) -> Weights:
        """The weights of a target policy for an outcome."""
        return weigh(self.logged, target, self.known(name), self.strata, cap)

    def known(self, name: str) -> Bool[np.ndarray, " decisions"]:
        """The decisions whose outcome is observed."""
        return ~np.isnan(self.observed[name])


def outcomes_of(
    policy: LoggedPolicy,
    costs: CostModel,
    correct_from: float | None = None,
    rates_by_model: bool = True,
    recalibrate: bool = True,
) -> Outcomes:
    """The outcomes of a log. Without any recorded cost, the estimated costs are the costs.

    `correct_from`: the score from which an answer is correct, value 1; None: the score itself. `rates_by_model`:
    whether each model has its own rate of feedback. Chats that nobody answered are a stratum of their own.
    `recalibrate`: whether predictions are corrected by the log.
    """
    logged, score, cost = policy.logged, policy.score, policy.cost
    if correct_from is not None:
        score = np.where(np.isnan(score), np.nan, score >= correct_from)
    if np.isnan(cost).all():
        cost = logged.of_chosen(policy.estimated_cost)
    confidence, estimated = policy.confidence, policy.estimated_cost
    if recalibrate:
        confidence, estimated = recalibrated(logged, confidence, score), rescaled(logged, estimated, cost)
    strata = 2 * (logged.chosen if rates_by_model else np.zeros_like(logged.chosen)) + ~policy.answered
    return Outcomes(
        logged,
        {
            "score": score,
            "cost_usd": cost,
            "cost_norm": costs.normalise(cost[:, None], extrapolate=True)[:, 0],
        },
        {
            "score": confidence,
            "cost_usd": estimated,
            "cost_norm": costs.normalise(estimated, extrapolate=True),
        },
        strata,
    )


def values(
    outcomes: Outcomes, targets: Mapping[str, Float[np.ndarray, "decisions models"]], lam: float, cap: float | None
) -> list[dict[str, Any]]:
    """The figures of the logging policy, and of every target policy with its differences (docs/data-formats.md).

    `lam`: lambda of the utility. `cap`: bound on the ratio of probabilities; None: no bound.
    """
    logged = outcomes.logged
    reference = _estimates(outcomes, logged.propensities, lam, None)
    rows = [_figures(outcomes, LOGGING, logged.propensities, reference, None)]
    for name, target in targets.items():
        found = _estimates(outcomes, target, lam, cap)
        row = _figures(outcomes, name, target, found, cap)
        row["difference"] = {
            outcome: {
                estimator: _difference(one, reference[outcome], estimator, row["supported"], logged.clusters).to_json()
                for estimator, one in own.items()
                if estimator in ("dr", "snips", "lower_bound", "upper_bound")
            }
            for outcome, own in found.items()
        }
        rows.append(row)
    return rows


def _estimates(outcomes: Outcomes, target: np.ndarray, lam: float, cap: float | None) -> Found:
    """The estimates of every outcome, with worst-case bounds of score and utility."""
    found: Found = {}
    for name, observed in outcomes.observed.items():
        weights = outcomes.weights(target, name, cap)
        found[name] = estimates(outcomes.logged, target, observed, outcomes.predicted[name], weights)
        if name == "score":
            low, high = bounds(outcomes.logged, target, observed, outcomes.predicted[name], weights)
            found[name] |= {"lower_bound": low, "upper_bound": high}
    normalised = found.pop("cost_norm")
    found["utility"] = {
        name: (1 - lam) * one - lam * normalised.get(name, normalised["dr"]) for name, one in found["score"].items()
    }
    return found


def _figures(outcomes: Outcomes, name: str, target: np.ndarray, found: Found, cap: float | None) -> dict[str, Any]:
    logged, weights = outcomes.logged, outcomes.weights(target, "score", cap)
    row: dict[str, Any] = {
        "policy": name,
        "supported": float(weights.supported.mean()),
        "changed": float(1 - logged.of_chosen(target).mean()),
        "matched": weights.matched,
        "effective_sample_size": weights.effective_sample_size,
        "largest_weight": float(weights.total.max()),
        "clipped": weights.clipped,
    }
    for outcome, own in found.items():
        row[outcome] = {key: one.to_json() for key, one in intervals(own, logged.clusters).items()}
    row["score"]["ips_bernstein"] = empirical_bernstein(logged, outcomes.observed["score"], weights).to_json()
    return row


def _difference(
    one: Linear, reference: Mapping[str, Linear], estimator: str, supported: float, clusters: np.ndarray
) -> Estimate:
    if estimator == "snips" and supported < FULL:
        return Estimate(None, reason="of the supported part only")
    other = reference["dr" if estimator.endswith("bound") else estimator]
    return (one - replace(other, reason=None)).interval(clusters)


def log_figures(policy: LoggedPolicy, outcomes: Outcomes) -> dict[str, Any]:
    """Counts of the log (docs/data-formats.md, value.json)."""
    known = outcomes.known("score")
    chosen = policy.logged.chosen
    return {
        "decisions": len(chosen),
        "drawn": int((policy.logged.propensities.max(axis=1) < FULL).sum()),
        "left_out": dict(policy.left_out),
        "clusters": len(np.unique(policy.logged.clusters)),
        "conversations": policy.conversations,
        "unanswered": int((~policy.answered).sum()),
        "costs": "estimated" if np.isnan(policy.cost).all() else "recorded",
        "feedback": int((known & policy.answered).sum()),
        "models": {
            name: {
                "decisions": int((chosen == place).sum()),
                "feedback": int((known & policy.answered & (chosen == place)).sum()),
                "probability": float(policy.logged.propensities[:, place].mean()),
            }
            for place, name in enumerate(policy.models)
            if policy.logged.propensities[:, place].any()
        },
    }
