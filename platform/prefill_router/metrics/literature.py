"""Figures of other router benchmarks, computed from the same choices, costs and resamples as the paper's figures.

In: mean accuracies, costs (USD per query) and operating points per resample. Out: arrays [resamples], NaN if a figure
is undefined. Each docstring gives the definition, its source and our choice if the source leaves something open. All
costs are estimated costs (docs/equations.md, Eq. 2).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import KDTree

from prefill_router.metrics import curves
from prefill_router.metrics.confidences import ends_of_runs, mean_over_models, ratio, running_sums
from prefill_router.metrics.groups import CostTradeoff, Draws, MacroGains, Optimality, RouteLLMFigures

ARENA_USD = (0.0044, 200.0)  # RouterArena's range of costs, USD per 1,000 queries
ARENA_BETA = 0.1


def macro_gains(
    router: Float[np.ndarray, "resamples benchmarks"],
    random: Float[np.ndarray, "resamples benchmarks"],
    best_single: Float[np.ndarray, "resamples benchmarks"],
    oracle: Float[np.ndarray, "resamples benchmarks"],
) -> MacroGains[Draws]:
    """LLMRouterBench (Li et al., 2026), performance: means over benchmarks with equal weights.

    `avg_acc`: mean accuracy. `gain_over_random`, `gain_over_best_single`: mean of A / A_other - 1. `gap_to_oracle`:
    mean of 1 - A / A_oracle. The best single model is the best over all queries. A mean leaves out the benchmarks in
    which its denominator is 0.
    """
    return MacroGains(
        avg_acc=mean_over_models(router),
        gain_over_random=mean_over_models(ratio(router, random) - 1),
        gain_over_best_single=mean_over_models(ratio(router, best_single) - 1),
        gap_to_oracle=mean_over_models(1 - ratio(router, oracle)),
    )


def cost_tradeoff(
    cost: Float[np.ndarray, "resamples points"],
    accuracy: Float[np.ndarray, "resamples points"],
    best_cost: Float[np.ndarray, " resamples"],
    best_accuracy: Float[np.ndarray, " resamples"],
) -> CostTradeoff[Draws]:
    """LLMRouterBench, performance and cost along the router's sweep.

    `perf_gain`: highest accuracy / accuracy of the best single model - 1. `cost_save`: 1 - C / C_best_single; C is the
    lowest cost at which the router is at least as accurate as the best single model, NaN if it never is.
    """
    enough = accuracy >= best_accuracy[:, None]
    cheapest = np.where(enough, cost, np.inf).min(axis=1)
    return CostTradeoff(
        perf_gain=ratio(accuracy.max(axis=1), best_accuracy) - 1,
        cost_save=1 - ratio(np.where(enough.any(axis=1), cheapest, np.nan), best_cost),
    )


def pareto_distance(
    cost: Float[np.ndarray, "resamples points"],
    accuracy: Float[np.ndarray, "resamples points"],
    own: dict[str, slice],
    at: curves.Anchors,
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """LLMRouterBench, `pareto_dist` per router: mean distance of the router's points from the Pareto frontier.

    The frontier is that of all points: the single models and the sweeps of all routers. `own` gives the points of each
    router. The distance is Euclidean, to the nearest Pareto-optimal point, in the plane of
    (C - C_lo) / (C_hi - C_lo) and Y (docs/equations.md, Eq. 8); the source leaves the normalisation open. It is 0 if
    all points of the router are Pareto-optimal.
    """
    u = ratio(cost - at.cost_lo[:, None], (at.cost_hi - at.cost_lo)[:, None])
    v = ratio(accuracy - at.accuracy_lo[:, None], (at.accuracy_oracle - at.accuracy_lo)[:, None])
    distances = {name: np.full(len(u), np.nan) for name in own}
    for row in np.flatnonzero(np.isfinite(u).all(axis=1) & np.isfinite(v).all(axis=1)):
        points = np.column_stack([u[row], v[row]])
        order = np.lexsort((-points[:, 1], points[:, 0]))
        climbs = np.maximum.accumulate(points[order, 1])
        frontier = points[order[np.append(True, climbs[1:] > climbs[:-1])]]
        nearest, _ = KDTree(frontier).query(points)
        for name, part in own.items():
            distances[name][row] = nearest[part].mean()
    return distances


def arena(
    accuracy: Float[np.ndarray, " resamples"], cost: Float[np.ndarray, " resamples"]
) -> Float[np.ndarray, " resamples"]:
    """RouterArena (Lu et al., 2025): S = (1 + b) A K / (b A + K), with b = 0.1 and the accuracy A.

    K = (log2 200 - log2 c) / (log2 200 - log2 0.0044); c is the cost in USD per 1,000 queries, clipped to
    [0.0044, 200]. `cost` is in USD per query.
    """
    low, high = np.log2(ARENA_USD)
    k = (high - np.log2(np.clip(1000 * cost, *ARENA_USD))) / (high - low)
    return ratio((1 + ARENA_BETA) * accuracy * k, ARENA_BETA * accuracy + k)


def optimality(
    choices: Int[np.ndarray, " queries"],
    correct: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    weights: Float[np.ndarray, "resamples queries"],
) -> Optimality[Draws]:
    """RouterArena: the router's choices compared with the oracle's, which is the cheapest correct model per query.

    All figures are over the queries that some model answers correctly. `optimal_selection`: share of them for which
    the router chooses a correct model of the lowest cost among the correct models. `optimal_accuracy`: A / A_oracle.
    `optimal_cost`: C_oracle / C.
    """
    at = np.arange(len(correct))
    right = correct == 1
    lowest = np.where(right, cost, np.inf).min(axis=1)
    answered = right.any(axis=1)
    chosen_cost, chosen_right = cost[at, choices], right[at, choices]
    n, optimal, chosen, oracle_usd, usd = (
        weights
        @ np.column_stack(
            [
                answered,
                chosen_right & (chosen_cost == lowest),
                chosen_right,
                np.where(answered, lowest, 0),
                np.where(answered, chosen_cost, 0),
            ]
        )
    ).T
    return Optimality(
        optimal_selection=ratio(optimal, n), optimal_accuracy=ratio(chosen, n), optimal_cost=ratio(oracle_usd, usd)
    )


def recovered_gap(
    preference: Float[np.ndarray, " queries"],
    strong: Float[np.ndarray, " queries"],
    weak: Float[np.ndarray, " queries"],
    weights: Float[np.ndarray, "resamples queries"],
) -> RouteLLMFigures[Draws]:
    """RouteLLM (Ong et al., 2024): routing between a strong and a weak model only.

    `preference` is p_strong - p_weak; `strong` and `weak` are the labels of the two models. A share of the queries, in
    descending order of preference, goes to the strong model. PGR is the share of the accuracy gap between the two
    models that this recovers; it grows linearly within queries of equal preference. `apgr`: mean PGR over all shares
    (the source takes ten). `cpt_20`, `cpt_50`, `cpt_80`: lowest share of strong calls that recovers 20, 50 or 80 % of
    the gap. NaN if the strong model is not better than the weak one.
    """
    order = np.argsort(-preference, kind="stable")
    ends = ends_of_runs(preference[order])
    by_query, points = weights.T.take(order, axis=0), np.append(True, ends)
    share = running_sums(by_query)[points]
    recovered = running_sums(by_query * (strong - weak)[order][:, None])[points]
    gap = np.where(recovered[-1] > 0, recovered[-1], 0.0)
    share, recovered = ratio(share, share[-1]), ratio(recovered, gap)

    def calls_to_recover(target: float) -> Draws:
        reached = recovered >= target
        last = reached.argmax(axis=0)[None]
        before = np.maximum(last - 1, 0)
        (s0, s1), (r0, r1) = (
            [np.take_along_axis(curve, where, axis=0)[0] for where in (before, last)] for curve in (share, recovered)
        )
        return np.where(reached.any(axis=0), s0 + ratio(target - r0, r1 - r0) * (s1 - s0), np.nan)

    apgr = (np.diff(share, axis=0) * (recovered[1:] + recovered[:-1])).sum(axis=0) / 2
    return RouteLLMFigures(apgr, calls_to_recover(0.2), calls_to_recover(0.5), calls_to_recover(0.8))


def aiq(
    cost: Float[np.ndarray, "resamples points"], accuracy: Float[np.ndarray, "resamples points"], at: curves.Anchors
) -> Float[np.ndarray, " resamples"]:
    """RouterBench (Hu et al., 2024), average improvement in quality: mean height of the router's cost-quality hull.

    The hull is the non-decreasing upper convex hull of the sweep's points. The mean is over the costs from the cheapest
    to the most expensive model; the hull is constant to the right of its last point and 0 to the left of its first.
    """
    c, a = curves.mixture_hull(cost, accuracy)
    lo, hi = at.cost_lo[:, None], at.cost_hi[:, None]
    c0, c1 = np.clip(c[:, :-1], lo, hi), np.clip(c[:, 1:], lo, hi)
    rises = c[:, 1:] > c[:, :-1]
    slope = np.where(rises, np.diff(a, axis=1) / np.where(rises, np.diff(c, axis=1), 1), 0)
    middle = a[:, :-1] + slope * ((c0 + c1) / 2 - c[:, :-1])
    level = (at.cost_hi - np.clip(c[:, -1], at.cost_lo, at.cost_hi)) * a[:, -1]
    return ratio(((c1 - c0) * middle).sum(axis=1) + level, at.cost_hi - at.cost_lo)
