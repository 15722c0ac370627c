"""Off-policy estimators: the mean outcome of a target policy from decisions of a logging policy.

In: the chosen models, the probabilities of the logging and of the target policy [decisions, models], one outcome of
the chosen models (NaN: not observed), and predictions of it for every model. Out: estimates with influences, from which
intervals, differences and sums follow. With w = target / logging probability of the chosen model, o = 1 if the outcome
is observed, e its observed rate, W = o w / e, and the prediction q (docs/off-policy.md, Estimators):

    IPS    mean of W y / mean supported share                       (Horvitz & Thompson 1952)
    SNIPS  sum of W y / sum of W                                    (Swaminathan & Joachims 2015)
    DM     mean of q under the target policy
    DR     DM + mean of W (y - q of the chosen model)               (Dudik, Langford & Li 2011)

A model with a logging probability of 0 has no support: IPS and SNIPS leave it out, DM and DR use its prediction.
Knows nothing of logs, routers and prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit

LEVEL = 0.95
MIN_MATCHED = 10  # outcomes of the target policy's choices, below which IPS, SNIPS and DR have no interval
ESTIMATORS = ("dr", "snips", "ips", "dm")


@dataclass(frozen=True)
class Estimate:
    """An estimate with its interval; None: undefined, and `reason` says why."""

    estimate: float | None
    lower: float | None = None
    upper: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """`{estimate, lower, upper}`, and `reason` if it is set."""
        value: dict[str, Any] = {"estimate": self.estimate, "lower": self.lower, "upper": self.upper}
        return value if self.reason is None else value | {"reason": self.reason}


@dataclass(frozen=True)
class Linear:
    """An estimate that is asymptotically a mean over decisions: its value, and the influence of every decision.

    Influences have mean 0. Sums and differences of two estimates of the same decisions are paired. NaN: undefined.
    `reason`: why it is undefined, or has no interval.
    """

    value: float
    influence: Float[np.ndarray, " decisions"]
    reason: str | None = None

    def __add__(self, other: Linear) -> Linear:
        return Linear(self.value + other.value, self.influence + other.influence, self.reason or other.reason)

    def __sub__(self, other: Linear) -> Linear:
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> Linear:
        return Linear(factor * self.value, factor * self.influence, self.reason)

    def interval(self, clusters: Int[np.ndarray, " decisions"], level: float = LEVEL) -> Estimate:
        """The interval from the variance between clusters, with quantiles of Student's t; None with one cluster."""
        if np.isnan(self.value):
            return Estimate(None, reason=self.reason)
        sums = np.bincount(clusters, self.influence)[np.bincount(clusters) > 0]
        if self.reason is not None or len(sums) < 2:
            return Estimate(self.value, reason=self.reason or "one cluster")
        deviation = np.sqrt(np.square(sums).sum() * len(sums) / (len(sums) - 1)) / len(clusters)
        half = float(stdtrit(len(sums) - 1, (1 + level) / 2) * deviation)
        return Estimate(self.value, self.value - half, self.value + half)


@dataclass(frozen=True)
class Logged:
    """Decisions of the logging policy: the chosen models, the probability of each model, and the clusters.

    Decisions of one cluster, such as a conversation, are dependent. The probability of a chosen model is above 0.
    """

    chosen: Int[np.ndarray, " decisions"]
    propensities: Float[np.ndarray, "decisions models"]
    clusters: Int[np.ndarray, " decisions"]

    def of_chosen(self, values: Float[np.ndarray, "decisions models"]) -> Float[np.ndarray, " decisions"]:
        """The values of the chosen models."""
        return values[np.arange(len(self.chosen)), self.chosen]


@dataclass(frozen=True)
class Weights:
    """The weights of a target policy for one outcome.

    `w` is target / logging probability of the chosen model, at most the cap; `total` is W, 0 where the outcome is not
    observed. `rate`: the observed rate of each decision's stratum. `support` marks the models that are supported,
    `supported` is their share of the target policy by decision. `largest`: the largest W that any supported choice can
    have. `clipped`: the share of the decisions whose w was above the cap.
    """

    w: Float[np.ndarray, " decisions"]
    total: Float[np.ndarray, " decisions"]
    observed: Bool[np.ndarray, " decisions"]
    rate: Float[np.ndarray, " decisions"]
    strata: Int[np.ndarray, " decisions"]
    support: Bool[np.ndarray, "decisions models"]
    supported: Float[np.ndarray, " decisions"]
    largest: float
    clipped: float

    @property
    def matched(self) -> int:
        """The number of decisions with a weight."""
        return int((self.total > 0).sum())

    @property
    def effective_sample_size(self) -> float:
        """Kish's: the number of decisions with equal weights that would have the same variance."""
        squares = float(np.square(self.total).sum())
        return float(self.total.sum()) ** 2 / squares if squares else 0.0


def weigh(
    logged: Logged,
    target: Float[np.ndarray, "decisions models"],
    observed: Bool[np.ndarray, " decisions"],
    strata: Int[np.ndarray, " decisions"],
    cap: float | None = None,
) -> Weights:
    """The weights of `target` for an outcome that is `observed` at random within each of `strata`.

    A model with a stratum in which no outcome is observed has no support. `cap` bounds w.
    """
    counts, seen = np.bincount(strata), np.bincount(strata, observed)
    rate = (seen / np.maximum(counts, 1))[strata]
    support = logged.propensities > 0
    support[:, np.unique(logged.chosen[rate == 0])] = False
    possible = np.where(support, target / np.where(support, logged.propensities, 1.0), 0.0)
    w, limit = logged.of_chosen(possible), np.inf if cap is None else cap
    clipped = float(np.mean(w > limit))
    w, possible = np.minimum(w, limit), np.minimum(possible, limit)
    total = np.where(observed, w / np.where(rate > 0, rate, 1.0), 0.0)
    smallest = rate[rate > 0].min() if (rate > 0).any() else 1.0
    return Weights(
        w,
        total,
        observed,
        rate,
        strata,
        support,
        np.where(support, target, 0.0).sum(axis=1),
        float(possible.max() / smallest),
        clipped,
    )


def estimates(
    logged: Logged,
    target: Float[np.ndarray, "decisions models"],
    outcome: Float[np.ndarray, " decisions"],
    predicted: Float[np.ndarray, "decisions models"],
    weights: Weights,
) -> dict[str, Linear]:
    """The estimates of ESTIMATORS. `outcome` is NaN where it is not observed.

    `predicted` is read where the target policy has a positive probability, and at the chosen models. IPS and SNIPS are
    of the supported part of the target policy, DM and DR of all of it.
    """
    y = np.nan_to_num(outcome)
    share = float(weights.supported.mean())
    model = np.where(target > 0, target * np.where(target > 0, predicted, 0.0), 0.0).sum(axis=1)
    residual = np.where(weights.total > 0, y - logged.of_chosen(predicted), 0.0)
    corrected = model + weights.total * residual
    dr, snips, ips = float(corrected.mean()), np.nan, np.nan
    if weights.matched:
        snips = float((weights.total * y).sum() / weights.total.sum())
        ips = float((weights.total * y).mean() / share)
    few = None
    if weights.matched < MIN_MATCHED:
        few = f"{weights.matched} observed outcomes of the policy's choices, {MIN_MATCHED} are needed"
    no_match = few if weights.matched else "no observed outcome of the policy's choices"
    scale = max(float(weights.total.mean()), np.finfo(float).tiny)
    return {
        "dr": Linear(dr, corrected - dr - _of_rates(weights, residual), few if share else None),
        "snips": Linear(snips, (weights.total * (y - snips) - _of_rates(weights, y - snips)) / scale, no_match),
        "ips": Linear(
            ips,
            (weights.total * y - ips * weights.supported - _of_rates(weights, y)) / max(share, np.finfo(float).tiny),
            no_match,
        ),
        "dm": Linear(float(model.mean()), model - model.mean()),
    }


def bounds(
    logged: Logged,
    target: Float[np.ndarray, "decisions models"],
    outcome: Float[np.ndarray, " decisions"],
    predicted: Float[np.ndarray, "decisions models"],
    weights: Weights,
    smallest: float = 0.0,
    largest: float = 1.0,
) -> tuple[Linear, Linear]:
    """The worst-case bounds of DR: outcomes without support are all `smallest`, or all `largest` (Manski 1990).

    Without support for a part of the target policy no estimate is consistent, but its value lies between the bounds.
    """

    def at(end: float) -> Linear:
        return estimates(logged, target, outcome, np.where(weights.support, predicted, end), weights)["dr"]

    return at(smallest), at(largest)


def empirical_bernstein(
    logged: Logged, outcome: Float[np.ndarray, " decisions"], weights: Weights, level: float = LEVEL
) -> Estimate:
    """IPS of an outcome in [0, 1] with an interval for every sample size (Maurer & Pontil 2009, Theorem 11).

    It needs bounded weights and treats the observed rates as known. It is much wider than the asymptotic interval.
    """
    share = float(weights.supported.mean())
    sizes = np.bincount(logged.clusters)
    sums = np.bincount(logged.clusters, weights.total * np.nan_to_num(outcome))[sizes > 0]
    n = len(sums)
    if n < 2 or not share or not weights.matched:
        return Estimate(None, reason="no observed outcome of the policy's choices" if n > 1 else "one cluster")
    parts = sums * n / len(logged.chosen) / share
    largest = weights.largest * sizes.max() * n / len(logged.chosen) / share
    log = np.log(4 / (1 - level))  # both sides
    half = float(np.sqrt(2 * parts.var(ddof=1) * log / n) + 7 * largest * log / (3 * (n - 1)))
    value = float(parts.mean())
    return Estimate(value, value - half, value + half)


def intervals(found: Mapping[str, Linear], clusters: Int[np.ndarray, " decisions"]) -> dict[str, Estimate]:
    """The intervals of estimates of the same decisions."""
    return {name: one.interval(clusters) for name, one in found.items()}


def _of_rates(weights: Weights, residual: Float[np.ndarray, " decisions"]) -> Float[np.ndarray, " decisions"]:
    """The part of the influence that estimated rates cancel: (o - e) / e times the stratum's mean of w r, where r is
    the residual of observed outcomes. It is 0 if all outcomes are observed."""
    weighted = np.where(weights.observed, weights.w * residual, 0.0)
    means = np.bincount(weights.strata, weighted) / np.maximum(np.bincount(weights.strata, weights.observed), 1)
    rate = np.where(weights.rate > 0, weights.rate, 1.0)
    return means[weights.strata] * (weights.observed - weights.rate) / rate
