"""Every figure of an evaluation as a function of the queries' weights: what the bootstrap calls.

In: `Predictions`, once, and then weights [resamples queries]. Out: arrays [resamples] by path, such as
("prefill", "auc", "model-a"). Confidence figures (AUC, Brier) use every labelled pair, everything on the curve the
queries whose labels are complete over the pool (EQUATIONS.md, Missing labels). Knows nothing of intervals or JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.evaluation import curves, metrics
from prefill_router.evaluation.bootstrap import largest_resample
from prefill_router.evaluation.predictions import Predictions

Path = tuple[str, ...]
Figures = dict[Path, np.ndarray]


@dataclass(frozen=True)
class Curve:
    """What one router picks: at each lambda of the sweep and, as the last point, at its chosen lambda."""

    choices: Int[np.ndarray, "points complete"]
    correct: Float[np.ndarray, "complete points"]
    cost: Float[np.ndarray, "complete points"]


@dataclass(frozen=True)
class TestSplit:
    """What no resample changes. `complete` are the queries on the curve; costs there are on an exact grid."""

    predictions: Predictions
    correct: Float[np.ndarray, "complete models"]
    cost: Float[np.ndarray, "complete models"]
    oracle_correct: Float[np.ndarray, "complete 1"]
    oracle_cost: Float[np.ndarray, "complete 1"]
    curves: dict[str, Curve]
    benchmarks: tuple[str, ...]
    of_benchmark: Bool[np.ndarray, "queries benchmarks"]

    @property
    def complete(self) -> Bool[np.ndarray, " queries"]:
        return self.predictions.complete


@dataclass(frozen=True)
class SingleModels:
    """The pool's models as operating points on the curve's queries, and the anchors that they give."""

    cost: Float[np.ndarray, "resamples models"]
    accuracy: Float[np.ndarray, "resamples models"]
    anchors: curves.Anchors


def prepare(predictions: Predictions) -> TestSplit:
    """Makes every choice of every router, once."""
    complete = predictions.complete
    correct, raw_cost, chat = predictions.correct[complete], predictions.cost[complete], predictions.chat[complete]
    cost = curves.on_exact_grid(raw_cost, largest_resample(predictions.groups))
    picks = {}
    for name, router in predictions.routers.items():
        choices = curves.sweep(router.p[complete], raw_cost, chat, np.append(curves.LAMBDAS, router.chosen_lambda))
        picks[name] = Curve(choices, curves.picked(correct, choices), curves.picked(cost, choices))
    right = (correct == 1).any(axis=1, keepdims=True)
    cheapest_right = np.where(correct == 1, cost, np.inf).min(axis=1, keepdims=True)
    benchmarks = tuple(sorted(set(predictions.benchmarks)))
    return TestSplit(predictions, correct, cost, right.astype(np.float64),
                     np.where(right, cheapest_right, cost.min(axis=1, keepdims=True)), picks, benchmarks,
                     np.stack([predictions.benchmarks == name for name in benchmarks], axis=1).astype(bool))


def single_models(test: TestSplit, on_curve: Float[np.ndarray, "resamples complete"]) -> SingleModels:
    """Mean costs and accuracies of the models; the oracle's accuracy goes into the anchors."""
    cost, accuracy = curves.weighted_mean(test.cost, on_curve), curves.weighted_mean(test.correct, on_curve)
    oracle = curves.weighted_mean(test.oracle_correct, on_curve)[:, 0]
    return SingleModels(cost, accuracy, curves.anchors(cost, accuracy, oracle))


def all_figures(test: TestSplit, weights: Float[np.ndarray, "resamples queries"]) -> Figures:
    """Every figure on every resample; pool figures stand under "pool", a router's under its name."""
    on_curve = _columns(weights, test.complete)
    models = single_models(test, on_curve)
    models_area, figures = _pool_figures(test, models, on_curve)
    for name in test.predictions.routers:
        parts = (_confidence_figures(test, name, weights), _curve_figures(test, name, models, models_area, on_curve))
        figures |= {("router", name, *path): values for part in parts for path, values in part.items()}
    return figures


def _pool_figures(test: TestSplit, models: SingleModels, on_curve: np.ndarray) -> tuple[np.ndarray, Figures]:
    x, y = curves.normalise(models.cost, models.accuracy, models.anchors)
    optimal = curves.pareto(models.cost, models.accuracy)
    models_area = curves.area_of_models(x, y, optimal)
    hull = curves.mixture_hull(models.cost, models.accuracy)
    figures: Figures = {
        ("oracle_accuracy",): models.anchors.accuracy_oracle,
        ("oracle_cost",): curves.weighted_mean(test.oracle_cost, on_curve)[:, 0],
        ("best_single_accuracy",): models.anchors.accuracy_best,
        ("model_only", "p_auccc"): models_area,
        ("model_only", "efficacy"): curves.efficacy(x, y, optimal),
        ("mixture_hull", "p_auccc"): curves.area_of_hull(*hull, models.anchors),
        ("random_choice", "accuracy"): models.accuracy.mean(axis=1),
        ("random_choice", "cost"): models.cost.mean(axis=1),
    }
    for index, name in enumerate(test.predictions.models):
        figures["models", name, "accuracy"] = models.accuracy[:, index]
        figures["models", name, "cost"] = models.cost[:, index]
    best = np.nan_to_num(models.accuracy).argmax(axis=1)[:, None]
    for benchmark, inside in _benchmarks(test, on_curve):
        accuracy = curves.weighted_mean(test.correct[inside], _columns(on_curve, inside))
        oracle = curves.weighted_mean(test.oracle_correct[inside], _columns(on_curve, inside))
        figures["benchmarks", benchmark, "best_single_accuracy"] = np.take_along_axis(accuracy, best, axis=1)[:, 0]
        figures["benchmarks", benchmark, "oracle_accuracy"] = oracle[:, 0]
    return models_area, {("pool", *path): values for path, values in figures.items()}


def _confidence_figures(test: TestSplit, name: str, weights: np.ndarray) -> Figures:
    p, correct = test.predictions.routers[name].p, test.predictions.correct
    figures: Figures = {}
    for figure, values in (("auc", metrics.roc_auc_per_model(p, correct, weights)),
                           ("brier", metrics.brier_per_model(p, correct, weights))):
        figures[figure,] = metrics.mean_over_models(values)
        figures |= {(figure, model): values[:, i] for i, model in enumerate(test.predictions.models)}
    by_benchmark = metrics.roc_auc_by_part(p, correct, weights, test.of_benchmark.argmax(axis=1),
                                           len(test.benchmarks))
    for index, benchmark in enumerate(test.benchmarks):
        figures["benchmarks", benchmark, "auc"] = metrics.mean_over_models(by_benchmark[:, :, index])
    return figures


def _curve_figures(test: TestSplit, name: str, models: SingleModels, models_area: np.ndarray, on_curve: np.ndarray
                   ) -> Figures:
    curve, anchors = test.curves[name], models.anchors
    cost, accuracy = curves.weighted_mean(curve.cost, on_curve), curves.weighted_mean(curve.correct, on_curve)
    (swept_cost, chosen_cost), (swept, chosen) = (np.split(values, [-1], axis=1) for values in (cost, accuracy))
    x, y = curves.normalise(swept_cost, swept, anchors)
    area = curves.area(x, y)
    figures: Figures = {
        ("p_auccc",): area,
        ("mdp_auccc",): area - models_area,
        ("efficacy",): curves.efficacy(x, y),
        ("oracle_accuracy",): anchors.accuracy_oracle,
        ("best_single_accuracy",): anchors.accuracy_best,
        ("routed_to_accuracy",): swept[:, 0],
    }
    best_cost, best = curves.most_accurate(swept_cost, swept)
    for suffix, at_cost, at in (("", best_cost, best), ("_at_chosen_lambda", chosen_cost[:, 0], chosen[:, 0])):
        figures[f"accuracy{suffix}" if suffix else "max_router_accuracy",] = at
        figures[f"cost{suffix}" if suffix else "cost_at_max_accuracy",] = at_cost
        figures[f"accuracy_gain{suffix}",] = at - anchors.accuracy_best
        figures[f"headroom_captured{suffix}",] = curves.headroom_captured(at, anchors)
        figures[f"cost_saving{suffix}",] = curves.cost_saving(at_cost, anchors)
    for figure, values in metrics.routed_to(curve.choices[0], test.correct, test.cost, on_curve).items():
        figures |= {("routed_to", model, figure): values[:, i] for i, model in enumerate(test.predictions.models)}
    for benchmark, inside in _benchmarks(test, on_curve):
        by_benchmark = curves.weighted_mean(curve.correct[inside, -1:], _columns(on_curve, inside))
        figures["benchmarks", benchmark, "accuracy_at_chosen_lambda"] = by_benchmark[:, 0]
    return figures


def _benchmarks(test: TestSplit, on_curve: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(name, which of the complete queries) of each benchmark."""
    return list(zip(test.benchmarks, test.of_benchmark[test.complete].T, strict=True))


def _columns(weights: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """weights[:, queries], resamples contiguous."""
    return weights.T[queries].T
