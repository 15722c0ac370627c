"""Headline figures of one router from plain arrays, without intervals: for benchmarks and experiments.

In: confidences, labels and costs [queries models] of the test queries, and means of the training queries. Out: numbers
by name. They equal the estimates of `evaluate` for the same arrays.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from prefill_router.metrics.figures import all_figures
from prefill_router.metrics.predictions import Predictions, RouterPredictions
from prefill_router.metrics.split import prepare
from prefill_router.routing.policy import TrainingMeans


def headline(
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
    chosen_lambda: float,
    training: TrainingMeans | None = None,
    margin_bonus: float = 0.0,
) -> dict[str, float]:
    """AUC, Brier score, ECE, exact areas, the operating point at `chosen_lambda`, and utilities; NaN if undefined.

    `correct` is 0, 1 or NaN (unlabelled), `cost` is in USD per query. Utilities at lambda are named `utility LAMBDA`,
    and with `training` also `utility_over_best_static LAMBDA`. `margin_bonus` is the router's bonus for the best static
    choice and needs `training`. Raises InputError for a value out of range, or arrays of different shapes.
    """
    numbers, models = np.arange(len(p)).astype(str), tuple(f"model {index}" for index in range(p.shape[1]))
    routers = {"router": RouterPredictions(p, chosen_lambda, margin_bonus=margin_bonus)}
    predictions = Predictions(
        numbers, np.full(len(p), "all"), numbers, models, correct, cost, cost_norm, routers, training
    )
    figures = all_figures(prepare(predictions, parts=False), np.ones((1, len(p))))
    router, pool = figures.routers["router"], figures.pool
    curve = router.split.curve
    values = {
        "auc": router.split.confidence.auc.mean,
        "brier": router.split.confidence.brier.mean,
        "ece": router.split.confidence.ece.mean,
        "p_auccc_exact": curve.p_auccc_exact,
        "p_auccc_exact_over_hull": curve.p_auccc_exact_over_hull,
        "mixture_hull_p_auccc": pool.mixture_hull_p_auccc,
        "best_single_accuracy": curve.best_single_accuracy,
        "oracle_accuracy": curve.oracle_accuracy,
        "routed_to_accuracy": curve.routed_to_accuracy,
        "accuracy_at_chosen_lambda": curve.accuracy_at_chosen_lambda,
        "cost_at_chosen_lambda": curve.cost_at_chosen_lambda,
        "headroom_captured_at_chosen_lambda": curve.headroom_captured_at_chosen_lambda,
        "cost_saving_at_chosen_lambda": curve.cost_saving_at_chosen_lambda,
        "cost_saving_over_best_single_at_chosen_lambda": curve.cost_saving_over_best_single_at_chosen_lambda,
    }
    for name, by_lambda in vars(router.utility).items():
        values |= {f"{name} {lam}": value for lam, value in by_lambda.items()}
    return {name: float(value[0]) for name, value in values.items()}
