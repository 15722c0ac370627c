"""Every figure of an evaluation as a function of the queries' weights: what the bootstrap calls.

In: `Predictions`, once, and then weights [resamples queries]. Out: arrays [resamples] by path, such as
("router", "prefill", "auc", "per_model", "model-a"), which is where the figure stands in metrics.json. Confidence
figures (AUC, Brier, ECE) use every labelled pair, everything on the curve the queries whose labels are complete over
the pool (EQUATIONS.md, Missing labels). Knows nothing of intervals or JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.metrics import confidences, curves, literature
from prefill_router.metrics.bootstrap import largest_resample
from prefill_router.metrics.lambda_path import LambdaPath, along, lambda_path
from prefill_router.metrics.predictions import Predictions
from prefill_router.outcomes.table import partitions
from prefill_router.routing.policy import choose

Figures = dict[tuple[str, ...], np.ndarray]
Points = tuple[np.ndarray, np.ndarray]
DISAGREEMENT = "disagreement"


@dataclass(frozen=True)
class Curve:
    """What one router picks: at each lambda of the sweep and, as the last point, at its chosen lambda; its exact path.

    `second` is its second choice at lambda 0. Costs hold the router's own overhead, `charged` for every model.
    """

    choices: Int[np.ndarray, "points complete"]
    correct: Float[np.ndarray, "complete points"]
    cost: Float[np.ndarray, "complete points"]
    second: Int[np.ndarray, " complete"]
    path: LambdaPath
    charged: Float[np.ndarray, "complete models"]
    overhead: float


@dataclass(frozen=True)
class TestSplit:
    """What no resample changes. `complete` are the queries on the curve; costs there are on an exact grid.

    `strong` and `weak` are the most accurate and the cheapest model (RouteLLM's pair), `disagreement` the part of the
    split on which models disagree, which has no such part of its own; None where it is empty.
    """

    predictions: Predictions
    correct: Float[np.ndarray, "complete models"]
    cost: Float[np.ndarray, "complete models"]
    oracle_correct: Float[np.ndarray, "complete 1"]
    oracle_cost: Float[np.ndarray, "complete 1"]
    curves: dict[str, Curve]
    benchmarks: tuple[str, ...]
    of_benchmark: Bool[np.ndarray, "queries benchmarks"]
    strong: int
    weak: int
    in_disagreement: Bool[np.ndarray, " queries"]
    disagreement: TestSplit | None

    @property
    def complete(self) -> Bool[np.ndarray, " queries"]:
        return self.predictions.complete


@dataclass(frozen=True)
class SingleModels:
    """The pool's models as operating points on the curve's queries, and what follows from them for every router."""

    cost: Float[np.ndarray, "resamples models"]
    accuracy: Float[np.ndarray, "resamples models"]
    anchors: curves.Anchors
    best_cost: Float[np.ndarray, " resamples"]
    area: Float[np.ndarray, " resamples"]
    hull_area: Float[np.ndarray, " resamples"]


def prepare(predictions: Predictions, parts: bool = True) -> TestSplit:
    """Makes every choice of every router, once."""
    complete = predictions.complete
    correct, raw_cost, cost_norm = (
        predictions.correct[complete],
        predictions.cost[complete],
        predictions.cost_norm[complete],
    )
    overheads = np.array([[router.overhead_usd for router in predictions.routers.values()]])
    gridded = curves.on_exact_grid(
        np.column_stack([raw_cost, np.repeat(overheads, len(raw_cost), axis=0)]), largest_resample(predictions.groups)
    )
    cost = gridded[:, : len(predictions.models)]
    picks = {}
    for index, (name, router) in enumerate(predictions.routers.items()):
        p, charged = router.p[complete], cost + gridded[:, [len(predictions.models) + index]]
        choices = curves.sweep(p, raw_cost, cost_norm, np.append(curves.LAMBDAS, router.chosen_lambda))
        others = choices[0][:, None] != np.arange(p.shape[1])
        second = choose(p, raw_cost, cost_norm, 0.0, others) if p.shape[1] > 1 else choices[0]
        picks[name] = Curve(
            choices,
            curves.picked(correct, choices),
            curves.picked(charged, choices),
            second,
            lambda_path(p, raw_cost, cost_norm),
            charged,
            router.overhead_usd,
        )
    right = (correct == 1).any(axis=1, keepdims=True)
    cheapest_right = np.where(correct == 1, cost, np.inf).min(axis=1, keepdims=True)
    benchmarks = tuple(sorted(set(predictions.benchmarks)))
    disagree = partitions(predictions.correct) == DISAGREEMENT
    part = prepare(predictions.take(disagree), parts=False) if parts and disagree.any() else None
    mean_cost, accuracy = (values.sum(axis=0) for values in (cost, correct))
    strong, weak = np.lexsort((mean_cost, -accuracy))[0], np.lexsort((-accuracy, mean_cost))[0]
    return TestSplit(
        predictions,
        correct,
        cost,
        right.astype(np.float64),
        np.where(right, cheapest_right, cost.min(axis=1, keepdims=True)),
        picks,
        benchmarks,
        np.stack([predictions.benchmarks == name for name in benchmarks], axis=1).astype(bool),
        int(strong),
        int(weak),
        disagree,
        part,
    )


def single_models(test: TestSplit, on_curve: Float[np.ndarray, "resamples complete"]) -> SingleModels:
    """Mean costs and accuracies of the models; the oracle's accuracy goes into the anchors."""
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


def all_figures(test: TestSplit, weights: Float[np.ndarray, "resamples queries"]) -> Figures:
    """Every figure on every resample; pool figures stand under "pool", a router's under "router" and its name."""
    on_curve = _columns(weights, test.complete)
    models = single_models(test, on_curve)
    inside = _by_benchmark(test, models, on_curve)
    points = {name: _operating_points(curve, on_curve) for name, curve in test.curves.items()}
    figures = {("pool", *path): values for path, values in _pool_figures(test, models, on_curve, inside).items()}
    for name in test.predictions.routers:
        parts = (
            _part_figures(test, name, models, weights, on_curve, points[name]),
            _detail(test, name, weights, on_curve, inside),
        )
        figures |= {("router", name, *path): values for part in parts for path, values in part.items()}
    figures |= _pareto_distances(models, points)
    if test.disagreement is not None:
        part, weights = test.disagreement, _columns(weights, test.in_disagreement)
        on_curve = _columns(weights, part.complete)
        models = single_models(part, on_curve)
        for name in test.predictions.routers:
            figures |= {
                ("router", name, DISAGREEMENT, *path): values
                for path, values in _part_figures(
                    part, name, models, weights, on_curve, _operating_points(part.curves[name], on_curve)
                ).items()
            }
    return figures


def _pool_figures(
    test: TestSplit, models: SingleModels, on_curve: np.ndarray, inside: dict[str, np.ndarray]
) -> Figures:
    x, y = curves.normalise(models.cost, models.accuracy, models.anchors)
    figures: Figures = {
        ("oracle_accuracy",): models.anchors.accuracy_oracle,
        ("oracle_cost",): curves.weighted_mean(test.oracle_cost, on_curve)[:, 0],
        ("best_single_accuracy",): models.anchors.accuracy_best,
        ("best_single_cost",): models.best_cost,
        ("model_only", "p_auccc"): models.area,
        ("model_only", "efficacy"): curves.efficacy(x, y, curves.pareto(models.cost, models.accuracy)),
        ("mixture_hull", "p_auccc"): models.hull_area,
        ("random_choice", "accuracy"): models.accuracy.mean(axis=1),
        ("random_choice", "cost"): models.cost.mean(axis=1),
    }
    for index, name in enumerate(test.predictions.models):
        figures["models", name, "accuracy"] = models.accuracy[:, index]
        figures["models", name, "cost"] = models.cost[:, index]
    for figure, name in (("best_single_accuracy", "best_single"), ("oracle_accuracy", "oracle")):
        figures["macro", figure] = confidences.mean_over_models(inside[name])
        figures |= {
            ("benchmarks", benchmark, figure): inside[name][:, b] for b, benchmark in enumerate(test.benchmarks)
        }
    return figures


def _operating_points(curve: Curve, on_curve: np.ndarray) -> Points:
    """(cost, accuracy), [resamples points] each: the sweep, and last the chosen lambda."""
    both = curves.weighted_mean(np.hstack([curve.cost, curve.correct]), on_curve)
    cost, accuracy = np.split(both, 2, axis=1)
    return cost, accuracy


def _part_figures(
    test: TestSplit, name: str, models: SingleModels, weights: np.ndarray, on_curve: np.ndarray, points: Points
) -> Figures:
    """Figures that are taken on the whole split and on a part of it alike."""
    p, correct = test.predictions.routers[name].p, test.predictions.correct
    figures: Figures = {}
    for figure, per_model in (
        ("auc", confidences.roc_auc_per_model),
        ("brier", confidences.brier_per_model),
        ("ece", confidences.ece_per_model),
    ):
        values = per_model(p, correct, weights)
        figures[figure,] = confidences.mean_over_models(values)
        figures |= {(figure, "per_model", model): values[:, i] for i, model in enumerate(test.predictions.models)}
    curve = test.curves[name]
    missed = confidences.near_misses(curve.choices[0], curve.second, p[test.complete], test.correct, on_curve)
    figures |= {("near_misses", figure): values for figure, values in missed.items()}
    return figures | _curve_figures(curve, test.correct, models, on_curve, points)


def _curve_figures(
    curve: Curve, correct: np.ndarray, models: SingleModels, on_curve: np.ndarray, points: Points
) -> Figures:
    anchors = models.anchors
    (swept_cost, chosen_cost), (swept, chosen) = (np.split(values, [-1], axis=1) for values in points)
    x, y = curves.normalise(swept_cost, swept, anchors)
    area = curves.area_along(x, y)
    exact = curves.area_along(
        *curves.normalise(along(curve.path, curve.charged, on_curve), along(curve.path, correct, on_curve), anchors)
    )
    figures: Figures = {
        ("p_auccc",): area,
        ("mdp_auccc",): area - models.area,
        ("p_auccc_exact",): exact,
        ("mdp_auccc_exact",): exact - models.area,
        ("p_auccc_exact_over_hull",): exact - models.hull_area,
        ("efficacy",): curves.efficacy(x, y),
        ("oracle_accuracy",): anchors.accuracy_oracle,
        ("best_single_accuracy",): anchors.accuracy_best,
        ("routed_to_accuracy",): swept[:, 0],
        ("cost_saving_over_best_single_at_chosen_lambda",): 1 - confidences.ratio(chosen_cost[:, 0], models.best_cost),
        ("break_even_overhead_usd",): models.best_cost - (chosen_cost[:, 0] - curve.overhead),
    }
    best_cost, best = curves.most_accurate(swept_cost, swept)
    for suffix, at_cost, at in (("", best_cost, best), ("_at_chosen_lambda", chosen_cost[:, 0], chosen[:, 0])):
        figures[f"accuracy{suffix}" if suffix else "max_router_accuracy",] = at
        figures[f"cost{suffix}" if suffix else "cost_at_max_accuracy",] = at_cost
        figures[f"accuracy_gain{suffix}",] = at - anchors.accuracy_best
        figures[f"headroom_captured{suffix}",] = curves.headroom_captured(at, anchors)
        figures[f"cost_saving{suffix}",] = curves.cost_saving(at_cost, anchors)
    lines = {
        "llmrouterbench": literature.cost_tradeoff(swept_cost, swept, models.best_cost, anchors.accuracy_best),
        "routerarena": {"arena_score": literature.arena(chosen[:, 0], chosen_cost[:, 0])},
        "routerbench": {"aiq": literature.aiq(swept_cost, swept, anchors)},
    }
    return figures | {
        ("literature", source, figure): values for source, part in lines.items() for figure, values in part.items()
    }


def _detail(
    test: TestSplit, name: str, weights: np.ndarray, on_curve: np.ndarray, inside: dict[str, np.ndarray]
) -> Figures:
    """Figures of the whole split only: by model routed to, by benchmark, macro, and what needs these."""
    curve, router = test.curves[name], test.predictions.routers[name]
    figures: Figures = {}
    for figure, values in confidences.routed_to(curve.choices[0], test.correct, test.cost, on_curve).items():
        figures |= {("routed_to", model, figure): values[:, i] for i, model in enumerate(test.predictions.models)}
    aucs = confidences.roc_auc_by_part(
        router.p, test.predictions.correct, weights, test.of_benchmark.argmax(axis=1), len(test.benchmarks)
    )
    at_chosen, confident = (_in_benchmarks(test, curve.correct[:, [point]], on_curve)[:, :, 0] for point in (-1, 0))
    by_benchmark = {
        "auc": np.stack([confidences.mean_over_models(aucs[:, :, b]) for b in range(len(test.benchmarks))], 1),
        "accuracy_at_chosen_lambda": at_chosen,
        "routed_to_accuracy": confident,
    }
    for figure, values in by_benchmark.items():
        figures["macro", figure] = confidences.mean_over_models(values)
        figures |= {("benchmarks", benchmark, figure): values[:, b] for b, benchmark in enumerate(test.benchmarks)}
    gains = literature.macro_gains(at_chosen, inside["random"], inside["best_single"], inside["oracle"])
    figures |= {("literature", "llmrouterbench", figure): values for figure, values in gains.items()}
    found = literature.optimality(curve.choices[-1], test.correct, test.cost, on_curve)
    figures |= {("literature", "routerarena", figure): values for figure, values in found.items()}
    p, strong, weak = router.p[test.complete], test.strong, test.weak
    pair = literature.recovered_gap(p[:, strong] - p[:, weak], test.correct[:, strong], test.correct[:, weak], on_curve)
    return figures | {("literature", "routellm", figure): values for figure, values in pair.items()}


def _pareto_distances(models: SingleModels, points: dict[str, Points]) -> Figures:
    costs, accuracies, own, n = [models.cost], [models.accuracy], {}, models.cost.shape[1]
    for name, (cost, accuracy) in points.items():
        costs.append(cost[:, :-1])
        accuracies.append(accuracy[:, :-1])
        own[name], n = slice(n, n + len(curves.LAMBDAS)), n + len(curves.LAMBDAS)
    distances = literature.pareto_distance(np.hstack(costs), np.hstack(accuracies), own, models.anchors)
    return {
        ("router", name, "literature", "llmrouterbench", "pareto_dist"): values for name, values in distances.items()
    }


def _by_benchmark(test: TestSplit, models: SingleModels, on_curve: np.ndarray) -> dict[str, np.ndarray]:
    """[resamples benchmarks] each: accuracies of a random model, the model best over all, and the oracle."""
    accuracy = _in_benchmarks(test, test.correct, on_curve)
    best = np.where(models.accuracy == models.anchors.accuracy_best[:, None], models.cost, np.inf).argmin(axis=1)
    return {
        "random": accuracy.mean(axis=2),
        "best_single": accuracy[np.arange(len(best)), :, best],
        "oracle": _in_benchmarks(test, test.oracle_correct, on_curve)[:, :, 0],
    }


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
    """weights[:, queries], resamples contiguous."""
    return weights.T[queries].T
