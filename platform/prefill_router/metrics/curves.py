"""Level 2 of the evaluation: the accuracy-cost curve, its normalised plane and the figures on it (paper 5.2.2).

In: queries with a label for every model, costs in USD per query, and `weights` [resamples queries] (see
`confidences`). A router's choices at each point of its sweep do not depend on the resample: they are computed once, and
accuracies and costs are matrix products. Out: arrays [resamples] or [resamples points], NaN if a figure is undefined.
Anchors are recomputed on every resample.

  X = (1/C - 1/C_hi) / (1/C_lo - 1/C_hi), clipped to [0, 1]      (docs/equations.md, Eq. 7; cheapest model: X = 1)
  Y = (A - A_lo) / (A_oracle - A_lo)                             (Eq. 8; cheapest model: Y = 0, oracle: Y = 1)

Points of equal X are found by exact comparison, so costs should come from `on_exact_grid`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.metrics.confidences import ratio
from prefill_router.metrics.groups import NO_COMPLETE_LABELS
from prefill_router.routing.policy import LAMBDAS, Margin, choose


@dataclass(frozen=True)
class Anchors:
    """The costs (USD per query) and accuracies that define the normalised plane of each resample.

    `cost_lo` and `accuracy_lo` belong to the cheapest model: lowest mean cost, ties go to the more accurate model.
    `cost_hi` is the highest mean cost of a model, `accuracy_best` the highest accuracy.
    """

    cost_lo: Float[np.ndarray, " resamples"]
    cost_hi: Float[np.ndarray, " resamples"]
    accuracy_lo: Float[np.ndarray, " resamples"]
    accuracy_best: Float[np.ndarray, " resamples"]
    accuracy_oracle: Float[np.ndarray, " resamples"]

    def why_undefined(self) -> str:
        """The reason why the plane is undefined on the first resample; '' if it is defined."""
        if np.isnan(self.cost_lo[0]):
            return NO_COMPLETE_LABELS
        if self.cost_hi[0] == self.cost_lo[0]:
            return "all models cost the same on average"
        if self.cost_lo[0] == 0:
            return "the cheapest model costs nothing, so 1/C has no bound"
        if self.accuracy_oracle[0] == self.accuracy_lo[0]:
            return "the oracle is no better than the cheapest model"
        return ""


def on_exact_grid(cost: Float[np.ndarray, "queries models"], n_queries: int) -> Float[np.ndarray, "queries models"]:
    """Costs rounded to a binary grid on which sums of up to `n_queries` costs are exact in float64.

    Equal mean costs then compare equal in any order of summation. A cost changes by less than
    2^-51 x n_queries x the highest cost.
    """
    largest = cost.max(initial=0.0) * n_queries
    if largest == 0:
        return cost
    step = 2.0 ** (np.ceil(np.log2(largest)) - 52)
    return np.round(cost / step) * step


def sweep(
    p: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
    lambdas: Float[np.ndarray, " points"] = LAMBDAS,
    margin: Margin | None = None,
) -> Int[np.ndarray, "points queries"]:
    """The model chosen for each query at each lambda (docs/equations.md, Eq. 3-5 and their tie rules)."""
    return np.stack([choose(p, cost, cost_norm, float(lam), margin=margin) for lam in lambdas])


def picked(
    values: Float[np.ndarray, "queries models"], choices: Int[np.ndarray, "points queries"]
) -> Float[np.ndarray, "queries points"]:
    """values[q, choices[point, q]]."""
    return np.take_along_axis(values, choices.T, axis=1)


def weighted_mean(
    values: Float[np.ndarray, "queries points"], weights: Float[np.ndarray, "resamples queries"]
) -> Float[np.ndarray, "resamples points"]:
    """Weighted mean over the queries; NaN for a resample without queries."""
    return ratio(weights @ values, weights.sum(axis=1)[:, None])


def anchors(
    model_cost: Float[np.ndarray, "resamples models"],
    model_accuracy: Float[np.ndarray, "resamples models"],
    oracle_accuracy: Float[np.ndarray, " resamples"],
) -> Anchors:
    """Anchors from the mean costs and accuracies of the single models and the accuracy of the oracle."""
    cost_lo, accuracy_lo = _cheapest(model_cost, model_accuracy)
    return Anchors(cost_lo, model_cost.max(axis=1), accuracy_lo, model_accuracy.max(axis=1), oracle_accuracy)


def _cheapest(cost: np.ndarray, accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cost, accuracy) of the cheapest model; ties go to the more accurate model."""
    lowest = cost.min(axis=1)
    best = np.where(cost == lowest[:, None], accuracy, -np.inf).max(axis=1)
    return lowest, np.where(np.isnan(lowest), np.nan, best)


def normalise(
    cost: Float[np.ndarray, "resamples points"], accuracy: Float[np.ndarray, "resamples points"], at: Anchors
) -> tuple[Float[np.ndarray, "resamples points"], Float[np.ndarray, "resamples points"]]:
    """Mean costs and accuracies as (X, Y), docs/equations.md, Eq. 7-8. NaN if the anchors define no plane."""
    lo, hi = at.cost_lo[:, None], at.cost_hi[:, None]
    x = ratio(lo * (hi - cost), cost * (hi - lo))  # Eq. 7 without the reciprocals
    x = np.where(lo > 0, np.clip(x, 0.0, 1.0), np.nan)
    y = ratio(accuracy - at.accuracy_lo[:, None], (at.accuracy_oracle - at.accuracy_lo)[:, None])
    return x, y


def area(
    x: Float[np.ndarray, "resamples points"], y: Float[np.ndarray, "resamples points"]
) -> Float[np.ndarray, " resamples"]:
    """P-AUCCC: area under the points, by the trapezoidal rule over X (docs/equations.md, P-AUCCC).

    Of points with equal X the highest Y counts. The curve is constant from X = 0 to its first point and ends at its
    last point.
    """
    order = np.lexsort((y, x), axis=-1)
    x, y = np.take_along_axis(x, order, axis=1), np.take_along_axis(y, order, axis=1)
    n = x.shape[1]
    ends_here = np.ones(x.shape, dtype=bool)
    ends_here[:, :-1] = x[:, 1:] != x[:, :-1]
    last_of_equals = np.minimum.accumulate(np.where(ends_here, np.arange(n), n)[:, ::-1], axis=1)[:, ::-1]
    y = np.take_along_axis(y, last_of_equals, axis=1)
    return x[:, 0] * y[:, 0] + (np.diff(x, axis=1) * (y[:, 1:] + y[:, :-1])).sum(axis=1) / 2


def area_along(
    x: Float[np.ndarray, "resamples points"], y: Float[np.ndarray, "resamples points"]
) -> Float[np.ndarray, " resamples"]:
    """The same as `area`, but fast if the points are sorted by X and points of equal X differ in Y only at X = 0 or 1.

    The points of a sweep over lambda have this order if `cost_norm` rises with the cost within each query. Other points
    are sorted first.
    """
    for edge in (0.0, 1.0):
        at_edge = x == edge
        if at_edge.any():
            highest = np.where(at_edge, y, -np.inf).max(axis=1, keepdims=True)
            y = np.where(at_edge, highest, y)
    steps = np.diff(x, axis=1)
    if (steps < 0).any() or ((steps == 0) & (y[:, 1:] != y[:, :-1])).any():
        return area(x, y)
    return x[:, 0] * y[:, 0] + np.einsum("rp,rp->r", steps, y[:, 1:] + y[:, :-1]) / 2


def efficacy(
    x: Float[np.ndarray, "resamples points"],
    y: Float[np.ndarray, "resamples points"],
    where: Bool[np.ndarray, "resamples points"] | None = None,
) -> Float[np.ndarray, " resamples"]:
    """Router efficacy (docs/equations.md, Eq. 10): mean distance of the points from (1, 1); lower is better."""
    distance = np.hypot(1 - x, 1 - y)
    if where is None:
        return distance.mean(axis=1)
    return ratio((distance * where).sum(axis=1), where.sum(axis=1).astype(np.float64))


def pareto(
    cost: Float[np.ndarray, "resamples models"], accuracy: Float[np.ndarray, "resamples models"]
) -> Bool[np.ndarray, "resamples models"]:
    """Pareto-optimal models.

    No other model is at most as expensive and at least as accurate, and strictly better in one of the two.
    """
    cost_of, accuracy_of = cost[:, :, None], accuracy[:, :, None]
    cost_by, accuracy_by = cost[:, None, :], accuracy[:, None, :]
    beaten = (cost_by <= cost_of) & (accuracy_by >= accuracy_of) & ((cost_by < cost_of) | (accuracy_by > accuracy_of))
    return np.logical_not(beaten.any(axis=2))


def area_of_models(
    x: Float[np.ndarray, "resamples models"],
    y: Float[np.ndarray, "resamples models"],
    optimal: Bool[np.ndarray, "resamples models"],
) -> Float[np.ndarray, " resamples"]:
    """P-AUCCC of the pool: `area` of the Pareto-optimal single models."""
    first = optimal.argmax(axis=1)[:, None]  # replaces the other models; a repeated point adds no area
    return area(
        np.where(optimal, x, np.take_along_axis(x, first, axis=1)),
        np.where(optimal, y, np.take_along_axis(y, first, axis=1)),
    )


def mixture_hull(
    cost: Float[np.ndarray, "resamples models"], accuracy: Float[np.ndarray, "resamples models"]
) -> tuple[Float[np.ndarray, "resamples vertices"], Float[np.ndarray, "resamples vertices"]]:
    """Vertices of the upper convex hull in the cost-accuracy plane, from the cheapest model to the most accurate.

    A point between two vertices is a mixture: each query goes to one of two models at random. The hull ends at the most
    accurate model, because no more expensive mixture is better. Rows are padded by repeating their last vertex.
    """
    here_cost, here = _cheapest(cost, accuracy)
    costs, accuracies = [here_cost], [here]
    while True:
        above = cost > here_cost[:, None]
        slope = np.where(above, ratio(accuracy - here[:, None], cost - here_cost[:, None]), -np.inf)
        steepest = slope.argmax(axis=1)[:, None]
        climbs = np.take_along_axis(slope, steepest, axis=1)[:, 0] > 0
        if not climbs.any():
            break
        here_cost = np.where(climbs, np.take_along_axis(cost, steepest, axis=1)[:, 0], here_cost)
        here = np.where(climbs, np.take_along_axis(accuracy, steepest, axis=1)[:, 0], here)
        costs.append(here_cost)
        accuracies.append(here)
    return np.stack(costs, axis=1), np.stack(accuracies, axis=1)


def area_of_hull(
    cost: Float[np.ndarray, "resamples vertices"], accuracy: Float[np.ndarray, "resamples vertices"], at: Anchors
) -> Float[np.ndarray, " resamples"]:
    """Area under the mixture hull in (X, Y); constant from X = 0 to its first point; vertices from `mixture_hull`.

    On an edge the accuracy is linear in the cost, so the integral of Y over X has a closed form with a logarithm.
    """
    x, y = normalise(cost, accuracy, at)
    c0, c1, y0 = cost[:, :-1], cost[:, 1:], y[:, :-1]
    slope = np.where(c1 > c0, np.diff(y, axis=1) / np.where(c1 > c0, c1 - c0, 1), 0)
    scale = ratio(at.cost_lo * at.cost_hi, at.cost_hi - at.cost_lo)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # a free model leaves the plane undefined: scale or y is NaN
        edges = scale * ((y0 - slope * c0) * (1 / c0 - 1 / c1) + slope * np.log(c1 / c0))
    return x[:, -1] * y[:, -1] + edges.sum(axis=1)


def most_accurate(
    cost: Float[np.ndarray, "resamples points"], accuracy: Float[np.ndarray, "resamples points"]
) -> tuple[Float[np.ndarray, " resamples"], Float[np.ndarray, " resamples"]]:
    """(cost, accuracy) of the most accurate point; ties go to the cheaper point."""
    best = accuracy.max(axis=1)
    cheapest = np.where(accuracy == best[:, None], cost, np.inf).min(axis=1)
    return np.where(np.isnan(best), np.nan, cheapest), best


def headroom_captured(accuracy: Float[np.ndarray, " resamples"], at: Anchors) -> Float[np.ndarray, " resamples"]:
    """(A - A_best) / (A_oracle - A_best) on every resample; A_best is the accuracy of the resample's best single model.

    NaN in resamples in which the oracle is no better than that model.
    """
    return ratio(accuracy - at.accuracy_best, at.accuracy_oracle - at.accuracy_best)


def cost_saving(cost: Float[np.ndarray, " resamples"], at: Anchors) -> Float[np.ndarray, " resamples"]:
    """1 - C / C_hi; NaN if every model is free."""
    return 1 - ratio(cost, at.cost_hi)
