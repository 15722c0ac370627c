"""metrics.json compared with slow figures in plain Python, written from docs/metrics.md and not from the code."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean as mean
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from evaluation_pool import made_up

from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import read_predictions, write_predictions

Points = list[tuple[float, float]]


class Cell(NamedTuple):
    """One model on one query, for one router: label (NaN if missing), confidence, cost, normalised cost."""

    y: float
    p: float
    c: float
    h: float


class Query(NamedTuple):
    """One query of one router: its choices at the 101 points, and its path as (lambda, choice).

    `means` holds each model's accuracy and mean normalised cost on the training queries.
    """

    cells: list[Cell]
    means: list[tuple[float, float]]
    grid: list[int]
    second: int
    chosen: int
    path: list[tuple[float, int]]


def choice(cells: list[Cell], lam: float, without: int = -1) -> int:
    score = {m: (1 - lam) * v.p - lam * v.h for m, v in enumerate(cells) if m != without}
    top = max(score.values())
    return min((m for m in score if score[m] >= top - 1e-12), key=lambda m: (cells[m].c, -cells[m].p, m))


def path(cells: list[Cell]) -> list[tuple[float, int]]:
    """(lambda, choice from that lambda on), from a choice between any two crossings of a pair of models."""
    slopes = [(a.p - b.p, a.p - b.p + a.h - b.h) for a, b in combinations(cells, 2)]
    crossings = [p / slope for p, slope in slopes if slope and 0 < p / slope < 1]
    found = [(0.0, choice(cells, 0.0))]
    for left, right in pairwise([0.0, *sorted(crossings), 1.0]):
        if (m := choice(cells, (left + right) / 2)) != found[-1][1]:
            found.append((left, m))
    return found


def read(source: Path) -> tuple[list[str], dict[str, list[Query]], dict[str, float]]:
    """Models; queries by router; overhead by router."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in pq.read_table(source).to_pylist():
        rows[row["router"]][row["query_id"]].append(row)
    queries: dict[str, list[Query]] = defaultdict(list)
    overhead: dict[str, float] = {}
    for router, by_query in rows.items():
        for of_query in by_query.values():
            y = [math.nan if r["correct"] is None else r["correct"] for r in of_query]
            cells = [Cell(v, r["p"], r["est_cost_usd"], r["cost_norm"]) for v, r in zip(y, of_query, strict=True)]
            grid = [choice(cells, k / 100) for k in range(101)]
            overhead[router], lam = of_query[0]["overhead_usd"], of_query[0]["chosen_lambda"]
            means = [(r["train_accuracy"], r["train_cost_norm"]) for r in of_query]
            queries[router].append(
                Query(cells, means, grid, choice(cells, 0.0, grid[0]), choice(cells, lam), path(cells))
            )
    return [r["model"] for r in of_query], queries, overhead


def level_1(models: list[str], queries: list[Query]) -> dict[str, Any]:
    of: dict[str, dict[str, float]] = {"auc": {}, "brier": {}, "ece": {}}
    for m, name in enumerate(models):
        pairs = [(q.cells[m].p, y) for q in queries if not math.isnan(y := q.cells[m].y)]
        right, wrong = [p for p, y in pairs if y == 1], [p for p, y in pairs if y == 0]
        if right and wrong:
            of["auc"][name] = mean((a > b) + (a == b) / 2 for a in right for b in wrong)
        of["brier"][name] = mean((p - y) ** 2 for p, y in pairs)
        bins: dict[int, float] = defaultdict(float)
        for p, y in pairs:
            bins[min(int(p * 15), 14)] += p - y
        of["ece"][name] = sum(map(abs, bins.values())) / len(pairs)
    return {k: {"estimate": mean(v.values()), "per_model": v} for k, v in of.items()}


def area(points: Points) -> float:
    """Trapezoids over X, highest Y of equal X; constant from X = 0 to the first point, nothing after the last."""
    highest = {x: max(v for u, v in points if u == x) for x, _ in points}
    x = sorted(highest)
    return x[0] * highest[x[0]] + math.fsum((b - a) * (highest[a] + highest[b]) / 2 for a, b in pairwise(x))


def hull(points: Points) -> Points:
    """The non-decreasing part of the upper convex hull, from the cheapest point to the most accurate."""
    corners = [min(points, key=lambda v: (v[0], -v[1]))]
    while better := [v for v in points if v[1] > corners[-1][1]]:
        x, y = corners[-1]
        corners.append(max(better, key=lambda v: ((v[1] - y) / (v[0] - x), v[0])))
    return corners


def height(corners: Points, low: float, high: float) -> float:
    """Mean height between low and high: 0 to the left of the hull, constant to the right."""
    total = 0.0
    for (u, a), (v, b) in pairwise([*corners, (max(high, corners[-1][0] + 1), corners[-1][1])]):
        left, right = max(u, low), min(v, high)
        total += max(0.0, right - left) * (a + (b - a) * ((left + right) / 2 - u) / (v - u))
    return total / (high - low)


def figures(models: list[str], labelled: list[Query], overhead: float) -> dict[str, Any]:
    """The figures of the full test split or its disagreement part, with the curve."""
    queries = [q for q in labelled if not any(math.isnan(v.y) for v in q.cells)]
    single = [(mean(q.cells[m].c for q in queries), mean(q.cells[m].y for q in queries)) for m in range(len(models))]
    c_lo, a_lo = min(single, key=lambda v: (v[0], -v[1]))
    c_hi, a_oracle = max(c for c, _ in single), mean(max(v.y for v in q.cells) for q in queries)
    c_best, a_best = min(single, key=lambda v: (-v[1], v[0]))

    def xy(v: tuple[float, float]) -> tuple[float, float]:
        return (min(max((1 / v[0] - 1 / c_hi) / (1 / c_lo - 1 / c_hi), 0), 1), (v[1] - a_lo) / (a_oracle - a_lo))

    def routed(chosen: list[int]) -> tuple[float, float]:
        of = [q.cells[m] for q, m in zip(queries, chosen, strict=True)]
        return mean(v.c for v in of) + overhead, mean(v.y for v in of)

    sweep = [routed([q.grid[k] for q in queries]) for k in range(101)]
    passes = [b for a, b in pairwise([-1, *sorted({v for q in queries for v, _ in q.path})]) if b - a > 1e-12]
    exact = [routed([q.path[bisect_right(q.path, (at + 1e-12, 0)) - 1][1] for q in queries]) for at in passes]
    pareto = [v for v in single if not any(w != v and w[0] <= v[0] and w[1] >= v[1] for w in single)]
    corners = hull(single)
    c_top, a_top = min(sweep, key=lambda v: (-v[1], v[0]))
    c_chosen, a_chosen = routed([q.chosen for q in queries])
    hull_area = xy(corners[-1])[0] * xy(corners[-1])[1]
    for (u, a), (v, b) in pairwise(corners):  # Y = at_0 + slope C, dX = -dC / (C^2 (1 / C_lo - 1 / C_hi))
        slope = (b - a) / (a_oracle - a_lo) / (v - u)
        at_0 = xy((u, a))[1] - slope * u
        hull_area += (at_0 * (1 / u - 1 / v) + slope * math.log(v / u)) / (1 / c_lo - 1 / c_hi)
    wrong = [(q.cells[q.grid[0]], q.cells[q.second]) for q in queries if q.cells[q.grid[0]].y == 0]
    log_cost = math.log(200 / min(max(1000 * c_chosen, 0.0044), 200)) / math.log(200 / 0.0044)
    on_grid, on_path, by_single = (area([xy(v) for v in points]) for points in (sweep, exact, pareto))
    enough = [c for c, a in sweep if a >= a_best - 1e-12]
    out = level_1(models, labelled) | {
        "near_misses": {
            "second_right": mean(b.y == 1 for _, b in wrong),
            "narrow": mean(a.p - b.p < 0.05 for a, b in wrong),
            "near_miss": mean(b.y == 1 and a.p - b.p < 0.05 for a, b in wrong),
        },
        "p_auccc": on_grid,
        "mdp_auccc": on_grid - by_single,
        "p_auccc_exact": on_path,
        "mdp_auccc_exact": on_path - by_single,
        "p_auccc_exact_over_hull": on_path - hull_area,
        "efficacy": mean(math.dist(xy(v), (1, 1)) for v in sweep),
        "oracle_accuracy": a_oracle,
        "best_single_accuracy": a_best,
        "routed_to_accuracy": sweep[0][1],
        "max_router_accuracy": a_top,
        "cost_at_max_accuracy": c_top,
        "accuracy_at_chosen_lambda": a_chosen,
        "cost_at_chosen_lambda": c_chosen,
        "break_even_overhead_usd": c_best - (c_chosen - overhead),
        "literature": {
            "llmrouterbench": {"perf_gain": a_top / a_best - 1}
            | ({"cost_save": 1 - min(enough) / c_best} if enough else {}),
            "routerarena": {"arena_score": 1.1 * a_chosen * log_cost / (0.1 * a_chosen + log_cost)},
            "routerbench": {"aiq": height(hull(sweep), c_lo, c_hi)},
        },
        "path_points": len(passes),
        "curve": {
            "cost": [c for c, _ in sweep],
            "accuracy": [a for _, a in sweep],
            "X": [xy(v)[0] for v in sweep],
            "Y": [xy(v)[1] for v in sweep],
        },
    }
    for suffix, a, c in (("", a_top, c_top), ("_at_chosen_lambda", a_chosen, c_chosen)):
        out |= {
            "accuracy_gain" + suffix: a - a_best,
            "cost_saving" + suffix: 1 - c / c_hi,
            "headroom_captured" + suffix: (a - a_best) / (a_oracle - a_best),
        }
    return out


def utilities(labelled: list[Query]) -> dict[str, Any]:
    """Utility of the router's choices, and its difference from that of the best model on the training queries."""
    queries = [q for q in labelled if not any(math.isnan(v.y) for v in q.cells)]
    out: dict[str, Any] = {"utility": {}, "utility_over_best_static": {}}
    for lam in (0, 0.05, 0.1, 0.2, 0.4):
        of = {m: (1 - lam) * a - lam * h for m, (a, h) in enumerate(queries[0].means)}
        best = max(of, key=lambda m: of[m])
        own, static = (
            mean((1 - lam) * v.y - lam * v.h for v in cells)
            for cells in ([q.cells[q.grid[round(100 * lam)]] for q in queries], [q.cells[best] for q in queries])
        )
        out["utility"][f"{lam:g}"], out["utility_over_best_static"][f"{lam:g}"] = own, own - static
    return out


def recomputed(predictions: Path) -> dict[str, Any]:
    """`routers` of metrics.json from predictions.parquet alone, with numbers for estimates and lists for curves.

    Leaves out intervals, differences, `routed_to`, figures per benchmark or between routers, and undefined figures.
    Slow: about a second per router and hundred queries. Requires that `cost_norm` rises with the cost in each query.
    """
    models, queries, overhead = read(predictions)
    out: dict[str, Any] = {}
    for router, of in queries.items():
        out[router] = figures(models, of, overhead[router]) | utilities(of)
        part = figures(models, [q for q in of if {0, 1} <= {v.y for v in q.cells}], overhead[router])
        out[router]["disagreement"] = {k: v for k, v in part.items() if k not in ("curve", "path_points")}
    return {"routers": out}


def flat(figure: Any, at: str = "") -> dict[str, float]:
    """Every number by its path, without the step `estimate`; undefined figures are left out."""
    if isinstance(figure, dict | list):
        items = figure.items() if isinstance(figure, dict) else enumerate(figure)
        return {
            k: v for name, value in items for k, v in flat(value, at if name == "estimate" else f"{at}/{name}").items()
        }
    return {} if figure is None or isinstance(figure, str) else {at: figure}


def test_metrics_equal_their_definitions_in_the_documentation(tmp_path: Path) -> None:
    source = tmp_path / "predictions.parquet"
    write_predictions(made_up(80, 5, missing=0.02, group_size=2), source)
    mine, theirs = flat(recomputed(source)), flat(evaluate(read_predictions(source), n_resamples=0))
    assert len(mine) > 4 * 400
    assert mine == {k: pytest.approx(theirs[k], rel=1e-9, abs=1e-11) for k in mine}
