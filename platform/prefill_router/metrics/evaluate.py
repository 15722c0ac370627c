"""One evaluation: metrics.json from predictions (docs/data-formats.md).

In: `Predictions` on the test split. Out: `{"pool": {...}, "routers": {NAME: {...}}}`, scalars as
{estimate, lower, upper}; an undefined one is null with a reason, never 0 and never NaN. Recomputing it from
predictions.parquet with the same seed gives the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from prefill_router.metrics import curves
from prefill_router.metrics.bootstrap import LEVEL, interval, resample
from prefill_router.metrics.figures import (
    DISAGREEMENT,
    Figures,
    SingleModels,
    TestSplit,
    all_figures,
    prepare,
    single_models,
)
from prefill_router.metrics.predictions import Predictions
from prefill_router.outcomes.table import partitions

REFERENCE = "prefill"
PARTITIONS = ("all-correct", "all-incorrect", "disagreement", "undecided")
DETAILS = frozenset({"per_model", "benchmarks", "routed_to"})
HULL_POINTS = 201

Json = dict[str, Any]


def evaluate(predictions: Predictions, *, n_resamples: int = 1000, seed: int = 0, reference: str = REFERENCE) -> Json:
    """Computes metrics.json. Under `differences` stands each router's figure minus that of `reference`, paired.

    Costs are in USD per query. Deterministic under `seed`. Raises InputError for a negative n_resamples.
    """
    test = prepare(predictions)
    draws = resample(partial(all_figures, test), predictions.groups, n_resamples, seed)
    models = single_models(test, np.ones((1, len(test.cost))))
    report = _Report(draws, models.anchors, _anchors_of(test.disagreement))
    return {
        "pool": _pool(test, models, report)
        | {
            "bootstrap": {
                "n_resamples": n_resamples,
                "seed": seed,
                "level": LEVEL,
                "n_groups": len(set(predictions.groups)),
            }
        },
        "routers": {name: _router(test, name, models, report, reference) for name in predictions.routers},
    }


def _anchors_of(part: TestSplit | None) -> curves.Anchors | None:
    return None if part is None else single_models(part, np.ones((1, len(part.cost)))).anchors


class _Report:
    """Looks a figure up by its path and says it as JSON, with the reason where it is undefined."""

    def __init__(self, draws: Figures, whole: curves.Anchors, part: curves.Anchors | None) -> None:
        self.draws = draws
        self.of_whole = _reasons(whole)
        self.of_part = _reasons(part) if part is not None else {}

    def say(self, *path: str) -> Json:
        return interval(self.draws[path], self.reason(path), centred=_own_steps(path)[:1] == ("ece",)).to_json()

    def say_difference(self, path: tuple[str, ...], other: tuple[str, ...]) -> Json:
        return interval(self.draws[path] - self.draws[other], self.reason(path)).to_json()

    def reason(self, path: tuple[str, ...]) -> str:
        reasons = self.of_part if path[2:3] == (DISAGREEMENT,) else self.of_whole
        steps = [step.removesuffix("_at_chosen_lambda") for step in reversed(_own_steps(path))]
        return next((reasons[step] for step in steps if step in reasons), reasons["otherwise"])

    def nested(self, *prefix: str) -> Json:
        """Every figure below a path, at its place; a figure may have others below it."""
        return _tree(
            {
                path[len(prefix) :]: self.say(*path)
                for path in self.draws
                if path[: len(prefix)] == prefix and len(path) > len(prefix)
            }
        )

    def nested_differences(self, one: tuple[str, str], other: tuple[str, str]) -> Json:
        """Of the figures that are taken over all models and benchmarks."""
        return _tree(
            {
                path[2:]: self.say_difference(path, (*other, *path[2:]))
                for path in self.draws
                if path[:2] == one and not DETAILS.intersection(path[2:])
            }
        )


def _reasons(anchors: curves.Anchors) -> dict[str, str]:
    """Why a figure is undefined, by its name, on the split or part of it that the anchors were taken on."""
    nothing = "no query has a label for every model" if np.isnan(anchors.cost_lo[0]) else ""
    reasons = {
        "auc": "the labels do not hold both classes",
        **dict.fromkeys(("brier", "ece"), "there are no labels"),
        **dict.fromkeys(
            (
                "p_auccc",
                "mdp_auccc",
                "p_auccc_exact",
                "mdp_auccc_exact",
                "p_auccc_exact_over_hull",
                "efficacy",
                "pareto_dist",
            ),
            anchors.why_undefined(),
        ),
        "near_misses": "no first choice was wrong",
        "cost_save": "no point of the sweep is as accurate as the best single model, or it is free",
        "aiq": "all models cost the same on average",
        "routellm": "the strongest model is no more accurate than the cheapest, or recovers too little",
        "routerarena": "no model answers any query, or the router costs nothing",
        "llmrouterbench": "in no benchmark is the model compared with ever right",
        "headroom_captured": "the oracle is no better than the best single model",
        **dict.fromkeys(("cost_saving", "cost_saving_over_best_single"), "every model is free"),
        "routed_to": "no query is routed to the model, or every query is",
        "otherwise": "no query of this part has a label for every model",
    }
    return {
        name: (nothing if name not in ("auc", "brier", "ece") else "") or reason or "it is undefined here"
        for name, reason in reasons.items()
    }


def _own_steps(path: tuple[str, ...]) -> tuple[str, ...]:
    """A path's steps that name figures, without the router, the part, and names of models and benchmarks."""
    own = [step for before, step in pairwise(path[1:]) if before not in DETAILS | {"models"}]
    return tuple(own[1:] if own[:1] == [DISAGREEMENT] else own)


def _tree(figures: Mapping[tuple[str, ...], Json]) -> Json:
    tree: Json = {}
    for path, figure in figures.items():
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        node |= figure
    return tree


def _pool(test: TestSplit, models: SingleModels, report: _Report) -> Json:
    predictions = test.predictions
    x, y = curves.normalise(models.cost, models.accuracy, models.anchors)
    optimal = curves.pareto(models.cost, models.accuracy)[0]
    counts = Counter(partitions(predictions.correct).tolist())
    labelled = ~np.isnan(predictions.correct)
    return {
        "n_queries": len(predictions),
        "n_complete": int(test.complete.sum()),
        "n_labelled_pairs": int(labelled.sum()),
        "partitions": {name: {"n": counts[name], "share": counts[name] / len(predictions)} for name in PARTITIONS},
        "models": [
            {
                "name": name,
                "accuracy": report.say("pool", "models", name, "accuracy"),
                "cost": report.say("pool", "models", name, "cost"),
                "X": _number(x[0, i]),
                "Y": _number(y[0, i]),
                "pareto": bool(optimal[i] and test.complete.any()),
                "n_labelled": int(labelled[:, i].sum()),
            }
            for i, name in enumerate(predictions.models)
        ],
        **{
            name: report.say("pool", name)
            for name in ("oracle_accuracy", "oracle_cost", "best_single_accuracy", "best_single_cost")
        },
        "strong_weak": {"strong": predictions.models[test.strong], "weak": predictions.models[test.weak]},
        "model_only": report.nested("pool", "model_only"),
        "mixture_hull": {"p_auccc": report.say("pool", "mixture_hull", "p_auccc"), "curve": _hull(models)},
        "random_choice": report.nested("pool", "random_choice"),
        "macro": report.nested("pool", "macro"),
        "benchmarks": {
            name: {
                "n_queries": int(inside.sum()),
                "n_complete": int((inside & test.complete).sum()),
                **report.nested("pool", "benchmarks", name),
            }
            for name, inside in zip(test.benchmarks, test.of_benchmark.T, strict=True)
        },
    }


def _router(test: TestSplit, name: str, models: SingleModels, report: _Report, reference: str) -> Json:
    router = test.predictions.routers
    value = report.nested("router", name)
    value["chosen_lambda"] = router[name].chosen_lambda
    value["overhead_usd"] = router[name].overhead_usd
    value["curve"] = _curve(test, name, models)
    value["path_points"] = len(test.curves[name].path.breakpoints)
    if reference in router and name != reference:
        value["differences"] = report.nested_differences(("router", name), ("router", reference))
    return value


def _curve(test: TestSplit, name: str, models: SingleModels) -> Json:
    ones = np.ones((1, len(test.cost)))
    cost = curves.weighted_mean(test.curves[name].cost[:, :-1], ones)
    accuracy = curves.weighted_mean(test.curves[name].correct[:, :-1], ones)
    return {"lambda": curves.LAMBDAS.tolist()} | _points(cost, accuracy, models.anchors)


def _hull(models: SingleModels) -> Json:
    vertices = curves.mixture_hull(models.cost, models.accuracy)
    edges = np.linspace(0, vertices[0].shape[1] - 1, HULL_POINTS)
    cost, accuracy = (np.interp(edges, np.arange(part.shape[1]), part[0])[None] for part in vertices)
    return _points(cost, accuracy, models.anchors)


def _points(cost: np.ndarray, accuracy: np.ndarray, anchors: curves.Anchors) -> Json:
    x, y = curves.normalise(cost, accuracy, anchors)
    return {
        name: [_number(number) for number in values[0]]
        for name, values in (("cost", cost), ("accuracy", accuracy), ("X", x), ("Y", y))
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
