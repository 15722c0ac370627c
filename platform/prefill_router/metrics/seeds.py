"""Summary over several split seeds of one pool: means, and the variance of training and of the test draw.

In: the metrics.json of one evaluation per seed; each seed has its own split, training and test queries. Out: per figure
the mean over seeds with its interval, and the standard deviation of one evaluation. `sd_seeds`: over the seeds.
`sd_test`: the part from the draw of the test queries (standard error of the bootstrap, root mean square over seeds).
`sd_training`: the remainder, from the draw of the training queries and the folds and the random seed of the trunk.
Splits are stratified by benchmark and partition but the bootstrap is not, so `sd_test` is an upper bound. If it exceeds
`sd_seeds`, `sd_training` is null.

Seeds share most of their training queries, so the interval of a mean is that of the corrected resampled t-test (Nadeau
and Bengio, 2003): Student's t over the seeds, with (1 / seeds + test / training) times the variance over seeds as the
variance of the mean. Differences from the reference are paired by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, t

from prefill_router.metrics.bootstrap import LEVEL, Json
from prefill_router.metrics.evaluate import REFERENCE
from prefill_router.metrics.utility import NAMES
from prefill_router.outcomes.splits import TEST_SHARE

HEADINGS: dict[tuple[str, ...], str] = {
    ("auc",): "AUC",
    ("brier",): "Brier",
    ("ece",): "ECE",
    ("p_auccc",): "P-AUCCC",
    ("p_auccc_exact",): "exact area",
    ("p_auccc_exact_over_hull",): "exact area over hull",
    ("mdp_auccc",): "MDP-AUCCC",
    ("efficacy",): "efficacy",
    ("routed_to_accuracy",): "routed-to accuracy",
    ("accuracy_gain_at_chosen_lambda",): "gain at chosen lambda",
    ("headroom_captured",): "headroom, best point",
    ("headroom_captured_at_chosen_lambda",): "headroom, chosen lambda",
    ("cost_saving",): "saving, best point",
    ("cost_saving_at_chosen_lambda",): "saving, chosen lambda",
    **{("utility_over_best_static", name): f"utility over best static, lambda {name}" for name in NAMES},
    ("macro", "auc"): "AUC in benchmarks",
    ("disagreement", "auc"): "AUC, disagreement",
    ("near_misses", "near_miss"): "near misses",
    ("literature", "routerarena", "arena_score"): "arena score",
    ("literature", "routerarena", "optimal_selection"): "optimal selection",
    ("literature", "routellm", "apgr"): "APGR",
    ("literature", "routerbench", "aiq"): "AIQ",
}


def across_seeds(metrics: Mapping[int, Json]) -> Json:
    """Summarises two or more seeds: {"seeds", "pool", "routers"}; each router holds its `differences` too."""
    runs = list(metrics.values())
    return {
        "seeds": list(metrics),
        "pool": _summaries([run["pool"] for run in runs]),
        "routers": {name: _summaries([run["routers"][name] for run in runs]) for name in runs[0]["routers"]},
    }


def markdown(summary: Json, headings: Mapping[tuple[str, ...], str] = HEADINGS) -> str:
    """Markdown tables: one row per router, then the reference minus each other router; intervals in brackets.

    `headings` maps the path of a figure in metrics.json to its column heading.
    """
    shown = {
        path: heading
        for path, heading in headings.items()
        if all(_at(router, path) is not None for router in summary["routers"].values())
    }
    parts = []
    for paths in _batches(list(shown), 7):
        lines = ["| router | " + " | ".join(shown[path] for path in paths) + " |", "|---" * (len(paths) + 1) + "|"]
        for name, router in summary["routers"].items():
            lines.append(f"| {name} | " + " | ".join(_cell(_at(router, path), "") for path in paths) + " |")
        for name, router in summary["routers"].items():
            if "differences" in router:
                cells = (_cell(_minus(_at(router["differences"], path)), "+") for path in paths)
                lines.append(f"| {REFERENCE} less {name} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _summaries(values: Sequence[Any]) -> Json:
    """The same tree with a summary in place of each figure; figures that a seed lacks are left out."""
    tree: Json = {}
    first = values[0]
    if {"estimate", "lower", "upper"} <= first.keys():
        tree = _summary(values)
    for key, value in first.items():
        if isinstance(value, dict) and all(isinstance(other.get(key), dict) for other in values):
            below = _summaries([other[key] for other in values])
            if below:
                tree[key] = below
    return tree


def _summary(figures: Sequence[Json]) -> Json:
    estimates = [figure["estimate"] for figure in figures]
    if any(estimate is None for estimate in estimates):
        reason = next(figure.get("reason", "undefined") for figure in figures if figure["estimate"] is None)
        return {"mean": None, "lower": None, "upper": None, "reason": f"{reason}, at one seed or more"}
    n, mean, sd = len(estimates), float(np.mean(estimates)), float(np.std(estimates, ddof=1))
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * sd * (1 / n + TEST_SHARE / (1 - TEST_SHARE)) ** 0.5
    summary: Json = {"mean": mean, "lower": mean - half, "upper": mean + half, "by_seed": estimates, "sd_seeds": sd}
    widths = [figure["upper"] - figure["lower"] for figure in figures if figure["lower"] is not None]
    if len(widths) == n:
        sd_test = float(np.sqrt(np.mean(np.square(widths)))) / (2 * float(norm.ppf((1 + LEVEL) / 2)))
        summary |= {"sd_test": sd_test, "sd_training": float(np.sqrt(sd**2 - sd_test**2)) if sd > sd_test else None}
    return summary


def _at(tree: Json, path: Sequence[str]) -> Json | None:
    for step in path:
        tree = tree.get(step, {})
    return tree if "mean" in tree else None


def _minus(figure: Json | None) -> Json | None:
    if figure is None or figure["mean"] is None:
        return figure
    return {"mean": -figure["mean"], "lower": -figure["upper"], "upper": -figure["lower"]}


def _cell(figure: Json | None, sign: str) -> str:
    if figure is None or figure["mean"] is None:
        return "undefined"
    return f"{figure['mean']:{sign}.4f} [{figure['lower']:{sign}.4f}, {figure['upper']:{sign}.4f}]"


def _batches(items: list[tuple[str, ...]], size: int) -> list[list[tuple[str, ...]]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
