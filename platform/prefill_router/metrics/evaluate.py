"""One evaluation: metrics.json from predictions (docs/data-formats.md, docs/metrics.md).

In: `Predictions` on the test split. Out: `Evaluation`, or the mapping of metrics.json:
`{"pool": {...}, "routers": {NAME: {...}}}` with each figure as {estimate, lower, upper}. An undefined figure is null
with a reason, never 0 and never NaN. Predictions from predictions.parquet and the same seed give the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from prefill_router.metrics import curves
from prefill_router.metrics.bootstrap import LEVEL, Interval, Json, resample
from prefill_router.metrics.figures import SingleModels, all_figures, single_models
from prefill_router.metrics.groups import (
    PoolFigures,
    RouterFigures,
    difference,
    pool_intervals,
    router_intervals,
    to_json,
)
from prefill_router.metrics.predictions import Predictions
from prefill_router.metrics.split import TestSplit, prepare
from prefill_router.metrics.utility import NAMES
from prefill_router.outcomes.table import partitions
from prefill_router.routing.policy import LAMBDAS

REFERENCE = "prefill"
PARTITIONS = ("all-correct", "all-incorrect", "disagreement", "undecided")
HULL_POINTS = 201


@dataclass(frozen=True)
class Evaluation:
    """Every figure of the pool and of the routers, with intervals.

    `differences` holds each router's figures minus those of the reference, paired; it is empty if the reference is not
    among the routers.
    """

    test: TestSplit
    n_resamples: int
    seed: int
    pool: PoolFigures[Interval]
    routers: Mapping[str, RouterFigures[Interval]]
    differences: Mapping[str, RouterFigures[Interval]]

    def to_json(self) -> Json:
        """The mapping of metrics.json."""
        models = _on_all_queries(self.test)
        return {
            "pool": _pool(self, models),
            "routers": {name: _router(self, name, models) for name in self.routers},
        }


def evaluate(predictions: Predictions, *, n_resamples: int = 1000, seed: int = 0, reference: str = REFERENCE) -> Json:
    """`evaluate_figures` as the mapping of metrics.json."""
    return evaluate_figures(predictions, n_resamples=n_resamples, seed=seed, reference=reference).to_json()


def evaluate_figures(
    predictions: Predictions, *, n_resamples: int = 1000, seed: int = 0, reference: str = REFERENCE
) -> Evaluation:
    """Computes every figure with its 95 % interval, and the paired differences from the router `reference`.

    Costs are in USD per query. The result depends on `seed` and not on the machine's number of cores. Raises InputError
    if n_resamples is negative.
    """
    test = prepare(predictions)
    draws = resample(partial(all_figures, test), predictions.groups, n_resamples, seed)
    no_plane = _on_all_queries(test).anchors.why_undefined()
    part = test.disagreement
    no_plane_in_part = "" if part is None else _on_all_queries(part).anchors.why_undefined()
    of_reference = draws.routers.get(reference)
    return Evaluation(
        test,
        n_resamples,
        seed,
        pool_intervals(draws.pool, no_plane),
        {name: router_intervals(figures, no_plane, no_plane_in_part) for name, figures in draws.routers.items()},
        {
            name: router_intervals(difference(figures, of_reference), no_plane, no_plane_in_part, centre=False)
            for name, figures in draws.routers.items()
            if of_reference is not None and name != reference
        },
    )


def _on_all_queries(test: TestSplit) -> SingleModels:
    return single_models(test, np.ones((1, len(test.cost))))


def _pool(evaluation: Evaluation, models: SingleModels) -> Json:
    test, pool = evaluation.test, evaluation.pool
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
                **to_json(pool.models[name]),
                "X": _number(x[0, i]),
                "Y": _number(y[0, i]),
                "pareto": bool(optimal[i] and test.complete.any()),
                "n_labelled": int(labelled[:, i].sum()),
            }
            for i, name in enumerate(predictions.models)
        ],
        "oracle_accuracy": pool.oracle_accuracy.to_json(),
        "oracle_cost": pool.oracle_cost.to_json(),
        "best_single_accuracy": pool.best_single_accuracy.to_json(),
        "best_single_cost": pool.best_single_cost.to_json(),
        "strong_weak": {"strong": predictions.models[test.strong], "weak": predictions.models[test.weak]},
        **_best_static(evaluation),
        "model_only": to_json(pool.model_only),
        "mixture_hull": {"p_auccc": pool.mixture_hull_p_auccc.to_json(), "curve": _hull(models)},
        "random_choice": to_json(pool.random_choice),
        "macro": to_json(pool.macro),
        "benchmarks": {
            name: {
                "n_queries": int(inside.sum()),
                "n_complete": int((inside & test.complete).sum()),
                **to_json(pool.benchmarks[name]),
            }
            for name, inside in zip(test.benchmarks, test.of_benchmark.T, strict=True)
        },
        "bootstrap": {
            "n_resamples": evaluation.n_resamples,
            "seed": evaluation.seed,
            "level": LEVEL,
            "n_groups": len(set(predictions.groups)),
        },
    }


def _best_static(evaluation: Evaluation) -> Json:
    """The best static choices by lambda; empty if the predictions have no means of the training queries."""
    static, figures = evaluation.test.static, evaluation.pool.best_static
    if static is None:
        return {}
    models = evaluation.test.predictions.models
    return {
        "best_static": {
            name: {"model": models[model], **to_json(figures[name])}
            for name, model in zip(NAMES, static.models, strict=True)
        }
    }


def _router(evaluation: Evaluation, name: str, models: SingleModels) -> Json:
    router, curve = evaluation.test.predictions.routers[name], evaluation.test.curves[name]
    value = to_json(evaluation.routers[name]) | {
        "chosen_lambda": router.chosen_lambda,
        "overhead_usd": router.overhead_usd,
        "curve": _curve(evaluation.test, name, models),
        "path_points": len(curve.path.breakpoints),
    }
    if name in evaluation.differences:
        value["differences"] = to_json(evaluation.differences[name])
    return value


def _curve(test: TestSplit, name: str, models: SingleModels) -> Json:
    ones = np.ones((1, len(test.cost)))
    cost = curves.weighted_mean(test.curves[name].cost[:, :-1], ones)
    accuracy = curves.weighted_mean(test.curves[name].correct[:, :-1], ones)
    return {"lambda": LAMBDAS.tolist()} | _points(cost, accuracy, models.anchors)


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
