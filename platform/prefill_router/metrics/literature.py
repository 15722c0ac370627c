"""Figures that other router benchmarks report, from the same choices, costs and resamples as the paper's.

In: mean accuracies, costs (USD per query) and operating points per resample, made once in `figures`. Out: arrays
[resamples] by name, NaN where a figure is undefined. Each definition is stated where it is computed, with its source
and whatever the source leaves open; costs are the estimated ones (Eq. 2) throughout.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import KDTree

from prefill_router.metrics import curves
from prefill_router.metrics.confidences import ends_of_runs, mean_over_models, ratio, running_sums

ARENA_USD = (0.0044, 200.0)  # USD per 1,000 queries between which RouterArena measures cost
ARENA_BETA = 0.1
RECOVERED = (20, 50, 80)  # per cent of the performance gap

Values = dict[str, Float[np.ndarray, " resamples"]]


def macro_gains(
    router: Float[np.ndarray, "resamples benchmarks"],
    random: Float[np.ndarray, "resamples benchmarks"],
    best_single: Float[np.ndarray, "resamples benchmarks"],
    oracle: Float[np.ndarray, "resamples benchmarks"],
) -> Values:
    """LLMRouterBench (Li et al., 2026), performance: means over benchmarks, each benchmark counting once.

    `avg_acc`; `gain_over_random`, `gain_over_best_single`: mean of A / A_other - 1; `gap_to_oracle`: mean of
    1 - A / A_oracle. The best single model is the best over all queries. Benchmarks where the other is never right
    do not count.
    """
    return {
        "avg_acc": mean_over_models(router),
        "gain_over_random": mean_over_models(ratio(router, random) - 1),
        "gain_over_best_single": mean_over_models(ratio(router, best_single) - 1),
        "gap_to_oracle": mean_over_models(1 - ratio(router, oracle)),
    }


def cost_tradeoff(
    cost: Float[np.ndarray, "resamples points"],
    accuracy: Float[np.ndarray, "resamples points"],
    best_cost: Float[np.ndarray, " resamples"],
    best_accuracy: Float[np.ndarray, " resamples"],
) -> Values:
    """LLMRouterBench, performance and cost, over the router's sweep.

    `perf_gain`: highest accuracy / the best single model's - 1. `cost_save`: 1 - C / C_best_single, C the lowest cost
    at which the router is at least as accurate as the best single model; NaN where it never is.
    """
    enough = accuracy >= best_accuracy[:, None]
    cheapest = np.where(enough, cost, np.inf).min(axis=1)
    return {
        "perf_gain": ratio(accuracy.max(axis=1), best_accuracy) - 1,
        "cost_save": 1 - ratio(np.where(enough.any(axis=1), cheapest, np.nan), best_cost),
    }


def pareto_distance(
    cost: Float[np.ndarray, "resamples points"],
    accuracy: Float[np.ndarray, "resamples points"],
    own: dict[str, slice],
    at: curves.Anchors,
) -> Values:
    """LLMRouterBench, `pareto_dist` per router: mean distance of its points from the Pareto frontier of all of them.

    The points are those of every router's sweep and the single models; `own` says which are a router's. Distances are
    taken to the nearest point of the frontier in the plane of (C - C_lo) / (C_hi - C_lo) and Y (Eq. 8): the source
    leaves the normalisation open. 0 is a router that makes up the frontier.
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
    """RouterArena (Lu et al., 2025): S = (1 + b) A C / (b A + C), b = 0.1, A the accuracy.

    C = (log2 200 - log2 c) / (log2 200 - log2 0.0044), c the cost in USD per 1,000 queries within [0.0044, 200].
    """
    low, high = np.log2(ARENA_USD)
    c = (high - np.log2(np.clip(1000 * cost, *ARENA_USD))) / (high - low)
    return ratio((1 + ARENA_BETA) * accuracy * c, ARENA_BETA * accuracy + c)


def optimality(
    choices: Int[np.ndarray, " queries"],
    correct: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    weights: Float[np.ndarray, "resamples queries"],
) -> Values:
    """RouterArena: the router's choices against the oracle's, the cheapest correct model of each query.

    `optimal_selection`: the share of queries, of those that some model answers, on which a correct model of the lowest
    correct cost was chosen. `optimal_accuracy`: A / A_oracle. `optimal_cost`: C_oracle / C, both over those queries.
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
    return {
        "optimal_selection": ratio(optimal, n),
        "optimal_accuracy": ratio(chosen, n),
        "optimal_cost": ratio(oracle_usd, usd),
    }


def recovered_gap(
    preference: Float[np.ndarray, " queries"],
    strong: Float[np.ndarray, " queries"],
    weak: Float[np.ndarray, " queries"],
    weights: Float[np.ndarray, "resamples queries"],
) -> Values:
    """RouteLLM (Ong et al., 2024): a strong and a weak model alone, queries sent to the strong one by `preference`.

    `preference` is p_strong - p_weak; `strong` and `weak` are 1 where that model is right. PGR is the share of the
    accuracy gap that is recovered when a share of the queries, those of the highest preference, goes to the strong
    model; within equal preference it grows evenly. `apgr`: its mean over all shares (the source takes ten). `cpt_20`,
    `cpt_50`, `cpt_80`: the lowest share of strong calls that recovers so many per cent. NaN where the strong model is
    not better.
    """
    order = np.argsort(-preference, kind="stable")
    ends = ends_of_runs(preference[order])
    by_query, points = weights.T.take(order, axis=0), np.append(True, ends)
    share = running_sums(by_query)[points]
    recovered = running_sums(by_query * (strong - weak)[order][:, None])[points]
    gap = np.where(recovered[-1] > 0, recovered[-1], 0.0)
    share, recovered = ratio(share, share[-1]), ratio(recovered, gap)
    values = {"apgr": (np.diff(share, axis=0) * (recovered[1:] + recovered[:-1])).sum(axis=0) / 2}
    for percent in RECOVERED:
        target = percent / 100
        reached = recovered >= target
        last = reached.argmax(axis=0)[None]
        before = np.maximum(last - 1, 0)
        (s0, s1), (r0, r1) = (
            [np.take_along_axis(curve, where, axis=0)[0] for where in (before, last)] for curve in (share, recovered)
        )
        values[f"cpt_{percent}"] = np.where(reached.any(axis=0), s0 + ratio(target - r0, r1 - r0) * (s1 - s0), np.nan)
    return values


def aiq(
    cost: Float[np.ndarray, "resamples points"], accuracy: Float[np.ndarray, "resamples points"], at: curves.Anchors
) -> Float[np.ndarray, " resamples"]:
    """RouterBench (Hu et al., 2024), average improvement in quality: the mean height of the router's cost-quality hull.

    The hull is the non-decreasing upper convex hull of the sweep's points, averaged over costs between those of the
    cheapest and the dearest model; beyond its last point it stays level, before its first there is nothing.
    """
    c, a = curves.mixture_hull(cost, accuracy)
    lo, hi = at.cost_lo[:, None], at.cost_hi[:, None]
    c0, c1 = np.clip(c[:, :-1], lo, hi), np.clip(c[:, 1:], lo, hi)
    rises = c[:, 1:] > c[:, :-1]
    slope = np.where(rises, np.diff(a, axis=1) / np.where(rises, np.diff(c, axis=1), 1), 0)
    middle = a[:, :-1] + slope * ((c0 + c1) / 2 - c[:, :-1])
    level = (at.cost_hi - np.clip(c[:, -1], at.cost_lo, at.cost_hi)) * a[:, -1]
    return ratio(((c1 - c0) * middle).sum(axis=1) + level, at.cost_hi - at.cost_lo)
