"""Computes every figure of an evaluation on every resample; this is the function that the bootstrap calls.

In: a `TestSplit`, once, and then weights [resamples queries]. Out: `EvaluationFigures` of arrays [resamples]. AUC,
Brier score and ECE use all labelled pairs; every other figure uses the queries with a label for every model
(docs/equations.md, Missing labels). Knows nothing of intervals or JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from prefill_router.metrics import confidences, curves, literature
from prefill_router.metrics.groups import (
    BenchmarkFigures,
    ConfidenceFigures,
    CurveFigures,
    Draws,
    EvaluationFigures,
    LiteratureFigures,
    LLMRouterBenchFigures,
    MeanFigure,
    ModelOnlyFigures,
    OperatingPoint,
    PoolBenchmarkFigures,
    PoolFigures,
    RouterArenaFigures,
    RouterBenchFigures,
    RouterFigures,
    SplitFigures,
    split_columns,
)
from prefill_router.metrics.lambda_path import along
from prefill_router.metrics.split import Curve, TestSplit
from prefill_router.metrics.utility import static_figures, utility_figures
from prefill_router.routing.policy import LAMBDAS


@dataclass(frozen=True)
class SingleModels:
    """Mean costs and accuracies of the pool's models, and the reference values that every router shares.

    `best_cost` is the cost of the most accurate model, `area` the P-AUCCC of the Pareto-optimal models and `hull_area`
    that of the mixture hull. Costs are in USD per query.
    """

    cost: Float[np.ndarray, "resamples models"]
    accuracy: Float[np.ndarray, "resamples models"]
    anchors: curves.Anchors
    best_cost: Float[np.ndarray, " resamples"]
    area: Float[np.ndarray, " resamples"]
    hull_area: Float[np.ndarray, " resamples"]


class _Points(NamedTuple):
    """Operating points of a router: the sweep, and its chosen lambda as the last point."""

    cost: Float[np.ndarray, "resamples points"]
    accuracy: Float[np.ndarray, "resamples points"]


class _ByBenchmark(NamedTuple):
    """Accuracies within each benchmark, [resamples benchmarks]."""

    random: np.ndarray
    best_single: np.ndarray
    oracle: np.ndarray


def single_models(test: TestSplit, on_curve: Float[np.ndarray, "resamples complete"]) -> SingleModels:
    """Figures of the single models; `on_curve` are weights of the queries with a label for every model."""
    cost, accuracy = curves.weighted_mean(test.cost, on_curve), curves.weighted_mean(test.correct, on_curve)
    oracle = curves.weighted_mean(test.oracle_correct, on_curve)[:, 0]
    anchors = curves.anchors(cost, accuracy, oracle)
    area = curves.area_of_models(*curves.normalise(cost, accuracy, anchors), curves.pareto(cost, accuracy))
    return SingleModels(
        cost,
        accuracy,
        anchors,
        curves.most_accurate(cost, accuracy)[0],
        area,
        curves.area_of_hull(*curves.mixture_hull(cost, accuracy), anchors),
    )


def all_figures(test: TestSplit, weights: Float[np.ndarray, "resamples queries"]) -> EvaluationFigures[Draws]:
    """Every figure on every resample."""
    on_curve = _columns(weights, test.complete)
    models = single_models(test, on_curve)
    inside = _by_benchmark(test, models, on_curve)
    points = {name: _operating_points(curve, on_curve) for name, curve in test.curves.items()}
    distances = _pareto_distances(models, points)
    disagreement = {}
    if (part := test.disagreement) is not None:
        in_part = _columns(weights, test.in_disagreement)
        part_on_curve = _columns(in_part, part.complete)
        part_models = single_models(part, part_on_curve)
        disagreement = {
            name: _split_figures(
                part, name, part_models, in_part, part_on_curve, _operating_points(curve, part_on_curve)
            )
            for name, curve in part.curves.items()
        }
    routers = {}
    for name in test.curves:
        split = _split_figures(test, name, models, weights, on_curve, points[name])
        by_benchmark = _benchmark_figures(test, name, weights, on_curve)
        literature_figures = _full_literature(
            split.literature, test, name, on_curve, by_benchmark.accuracy_at_chosen_lambda, inside, distances[name]
        )
        routers[name] = RouterFigures(
            replace(split, literature=literature_figures),
            utility_figures(test.curves[name].utility, test.static, on_curve),
            split_columns(
                confidences.routed_to(test.curves[name].choices[0], test.correct, test.cost, on_curve),
                test.predictions.models,
            ),
            BenchmarkFigures(
                confidences.mean_over_models(by_benchmark.auc),
                confidences.mean_over_models(by_benchmark.accuracy_at_chosen_lambda),
                confidences.mean_over_models(by_benchmark.routed_to_accuracy),
            ),
            split_columns(by_benchmark, test.benchmarks),
            disagreement.get(name),
        )
    return EvaluationFigures(_pool_figures(test, models, on_curve, inside), routers)


def _pool_figures(
    test: TestSplit, models: SingleModels, on_curve: np.ndarray, inside: _ByBenchmark
) -> PoolFigures[Draws]:
    x, y = curves.normalise(models.cost, models.accuracy, models.anchors)
    return PoolFigures(
        models=split_columns(OperatingPoint(models.accuracy, models.cost), test.predictions.models),
        oracle_accuracy=models.anchors.accuracy_oracle,
        oracle_cost=curves.weighted_mean(test.oracle_cost, on_curve)[:, 0],
        best_single_accuracy=models.anchors.accuracy_best,
        best_single_cost=models.best_cost,
        best_static=static_figures(test.static, models.accuracy, models.cost, on_curve),
        model_only=ModelOnlyFigures(models.area, curves.efficacy(x, y, curves.pareto(models.cost, models.accuracy))),
        mixture_hull_p_auccc=models.hull_area,
        random_choice=OperatingPoint(models.accuracy.mean(axis=1), models.cost.mean(axis=1)),
        macro=PoolBenchmarkFigures(
            confidences.mean_over_models(inside.best_single), confidences.mean_over_models(inside.oracle)
        ),
        benchmarks=split_columns(PoolBenchmarkFigures(inside.best_single, inside.oracle), test.benchmarks),
    )


def _operating_points(curve: Curve, on_curve: np.ndarray) -> _Points:
    both = curves.weighted_mean(np.hstack([curve.cost, curve.correct]), on_curve)
    cost, accuracy = np.split(both, 2, axis=1)
    return _Points(cost, accuracy)


def _split_figures(
    test: TestSplit, name: str, models: SingleModels, weights: np.ndarray, on_curve: np.ndarray, points: _Points
) -> SplitFigures[Draws]:
    """Figures that exist for the full split and for its disagreement part."""
    p, correct = test.predictions.routers[name].p, test.predictions.correct

    def mean_figure(values: np.ndarray) -> MeanFigure[Draws]:
        per_model = {model: values[:, i] for i, model in enumerate(test.predictions.models)}
        return MeanFigure(confidences.mean_over_models(values), per_model)

    curve = test.curves[name]
    return SplitFigures(
        ConfidenceFigures(
            mean_figure(confidences.roc_auc_per_model(p, correct, weights)),
            mean_figure(confidences.brier_per_model(p, correct, weights)),
            mean_figure(confidences.ece_per_model(p, correct, weights)),
        ),
        confidences.near_misses(curve.choices[0], curve.second, p[test.complete], test.correct, on_curve),
        _curve_figures(curve, test.correct, models, on_curve, points),
        _split_literature(models, points),
    )


def _curve_figures(
    curve: Curve, correct: np.ndarray, models: SingleModels, on_curve: np.ndarray, points: _Points
) -> CurveFigures[Draws]:
    anchors = models.anchors
    swept_cost, swept = points.cost[:, :-1], points.accuracy[:, :-1]
    chosen_cost, chosen = points.cost[:, -1], points.accuracy[:, -1]
    top_cost, top = curves.most_accurate(swept_cost, swept)
    x, y = curves.normalise(swept_cost, swept, anchors)
    area = curves.area_along(x, y)
    exact = curves.area_along(
        *curves.normalise(along(curve.path, curve.charged, on_curve), along(curve.path, correct, on_curve), anchors)
    )
    return CurveFigures(
        p_auccc=area,
        mdp_auccc=area - models.area,
        p_auccc_exact=exact,
        mdp_auccc_exact=exact - models.area,
        p_auccc_exact_over_hull=exact - models.hull_area,
        efficacy=curves.efficacy(x, y),
        oracle_accuracy=anchors.accuracy_oracle,
        best_single_accuracy=anchors.accuracy_best,
        routed_to_accuracy=swept[:, 0],
        cost_saving_over_best_single_at_chosen_lambda=1 - confidences.ratio(chosen_cost, models.best_cost),
        break_even_overhead_usd=models.best_cost - (chosen_cost - curve.overhead),
        max_router_accuracy=top,
        cost_at_max_accuracy=top_cost,
        accuracy_gain=top - anchors.accuracy_best,
        headroom_captured=curves.headroom_captured(top, anchors),
        cost_saving=curves.cost_saving(top_cost, anchors),
        accuracy_at_chosen_lambda=chosen,
        cost_at_chosen_lambda=chosen_cost,
        accuracy_gain_at_chosen_lambda=chosen - anchors.accuracy_best,
        headroom_captured_at_chosen_lambda=curves.headroom_captured(chosen, anchors),
        cost_saving_at_chosen_lambda=curves.cost_saving(chosen_cost, anchors),
    )


def _split_literature(models: SingleModels, points: _Points) -> LiteratureFigures[Draws]:
    cost, accuracy = points.cost[:, :-1], points.accuracy[:, :-1]
    tradeoff = literature.cost_tradeoff(cost, accuracy, models.best_cost, models.anchors.accuracy_best)
    return LiteratureFigures(
        LLMRouterBenchFigures(tradeoff, gains=None, pareto_dist=None),
        RouterArenaFigures(literature.arena(points.accuracy[:, -1], points.cost[:, -1]), optimality=None),
        RouterBenchFigures(literature.aiq(cost, accuracy, models.anchors)),
        routellm=None,
    )


def _full_literature(
    figures: LiteratureFigures[Draws],
    test: TestSplit,
    name: str,
    on_curve: np.ndarray,
    at_chosen: np.ndarray,
    inside: _ByBenchmark,
    pareto_dist: np.ndarray,
) -> LiteratureFigures[Draws]:
    """Adds the figures that exist for the full split only; `at_chosen` is the accuracy [resamples benchmarks]."""
    p, strong, weak = test.predictions.routers[name].p[test.complete], test.strong, test.weak
    gains = literature.macro_gains(at_chosen, inside.random, inside.best_single, inside.oracle)
    optimality = literature.optimality(test.curves[name].choices[-1], test.correct, test.cost, on_curve)
    return replace(
        figures,
        llmrouterbench=replace(figures.llmrouterbench, gains=gains, pareto_dist=pareto_dist),
        routerarena=replace(figures.routerarena, optimality=optimality),
        routellm=literature.recovered_gap(
            p[:, strong] - p[:, weak], test.correct[:, strong], test.correct[:, weak], on_curve
        ),
    )


def _benchmark_figures(
    test: TestSplit, name: str, weights: np.ndarray, on_curve: np.ndarray
) -> BenchmarkFigures[Draws]:
    """One router within each benchmark; arrays [resamples benchmarks]."""
    aucs = confidences.roc_auc_by_part(
        test.predictions.routers[name].p,
        test.predictions.correct,
        weights,
        test.of_benchmark.argmax(axis=1),
        len(test.benchmarks),
    )
    at_chosen, confident = (
        _in_benchmarks(test, test.curves[name].correct[:, [point]], on_curve)[:, :, 0] for point in (-1, 0)
    )
    auc = np.stack([confidences.mean_over_models(aucs[:, :, b]) for b in range(len(test.benchmarks))], axis=1)
    return BenchmarkFigures(auc, at_chosen, confident)


def _pareto_distances(models: SingleModels, points: dict[str, _Points]) -> dict[str, np.ndarray]:
    costs, accuracies, own, n = [models.cost], [models.accuracy], {}, models.cost.shape[1]
    for name, (cost, accuracy) in points.items():
        costs.append(cost[:, :-1])
        accuracies.append(accuracy[:, :-1])
        own[name], n = slice(n, n + len(LAMBDAS)), n + len(LAMBDAS)
    return literature.pareto_distance(np.hstack(costs), np.hstack(accuracies), own, models.anchors)


def _by_benchmark(test: TestSplit, models: SingleModels, on_curve: np.ndarray) -> _ByBenchmark:
    """A model chosen at random, the model that is best over all queries, and the oracle."""
    accuracy = _in_benchmarks(test, test.correct, on_curve)
    best = np.where(models.accuracy == models.anchors.accuracy_best[:, None], models.cost, np.inf).argmin(axis=1)
    return _ByBenchmark(
        accuracy.mean(axis=2),
        accuracy[np.arange(len(best)), :, best],
        _in_benchmarks(test, test.oracle_correct, on_curve)[:, :, 0],
    )


def _in_benchmarks(
    test: TestSplit, values: Float[np.ndarray, "complete columns"], on_curve: np.ndarray
) -> Float[np.ndarray, "resamples benchmarks columns"]:
    """Weighted means within each benchmark."""
    return np.stack(
        [
            curves.weighted_mean(values[inside], _columns(on_curve, inside))
            for inside in test.of_benchmark[test.complete].T
        ],
        axis=1,
    )


def _columns(weights: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """weights[:, queries], with the resamples contiguous in memory."""
    return weights.T[queries].T
