"""What a router chooses at its chosen lambda: by benchmark, by confidence, and where it was most wrong.

In: `Predictions` and a router's name. Out: shares and lists for the report, all of which follow from
predictions.parquet. A query without a label for the chosen model counts among the choices, not among the answers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from prefill_router.metrics import curves
from prefill_router.metrics.predictions import Predictions
from prefill_router.routing.policy import choose

DECILES, WORST = 10, 12
LAMBDAS = np.linspace(0, 1, 61) ** 2  # most choices change near 0


class ByConfidence(NamedTuple):
    """Queries in tenths by the router's highest confidence, lowest first; `highest` is its mean in each.

    `confidence` is the mean confidence in the models chosen, of which `n_right` of the `n_labelled` were right.
    """

    highest: Float[np.ndarray, " bins"]
    share: Float[np.ndarray, "bins models"]
    confidence: Float[np.ndarray, " bins"]
    n_right: Int[np.ndarray, " bins"]
    n_labelled: Int[np.ndarray, " bins"]


class Mistake(NamedTuple):
    """A query whose chosen model was wrong while others, the most confident first, were right."""

    query_id: str
    benchmark: str
    chosen: str
    p: float
    right: list[tuple[str, float]]


def at_chosen_lambda(predictions: Predictions, router: str) -> Int[np.ndarray, " queries"]:
    """The router's choice for every query."""
    said = predictions.routers[router]
    return choose(said.p, predictions.cost, predictions.cost_norm, said.chosen_lambda)


def along_lambda(predictions: Predictions, router: str) -> Float[np.ndarray, "points models"]:
    """Share of the queries that each model gets at LAMBDAS."""
    choices = curves.sweep(predictions.routers[router].p, predictions.cost, predictions.cost_norm, LAMBDAS)
    return np.stack([(choices == model).mean(axis=1) for model in range(len(predictions.models))], axis=1)


def by_benchmark(predictions: Predictions, router: str) -> list[tuple[str, int, list[float]]]:
    """(benchmark, number of queries, share of each model)."""
    choices = at_chosen_lambda(predictions, router)
    return [
        (name, int(inside.sum()), _shares(choices[inside], len(predictions.models)).tolist())
        for name in sorted(set(predictions.benchmarks))
        for inside in [predictions.benchmarks == name]
    ]


def by_confidence(predictions: Predictions, router: str) -> ByConfidence:
    """Tenths of equal size; fewer where there are fewer queries."""
    choices, p = at_chosen_lambda(predictions, router), predictions.routers[router].p
    at = np.arange(len(p))
    chosen_p, right, highest = p[at, choices], predictions.correct[at, choices], p.max(axis=1)
    order = np.argsort(highest, kind="stable")
    parts = [part for part in np.array_split(order, DECILES) if len(part)]
    return ByConfidence(
        np.array([highest[part].mean() for part in parts]),
        np.stack([_shares(choices[part], p.shape[1]) for part in parts]),
        np.array([chosen_p[part].mean() for part in parts]),
        np.array([(right[part] == 1).sum() for part in parts]),
        np.array([(~np.isnan(right[part])).sum() for part in parts]),
    )


def most_wrong(predictions: Predictions, router: str, n: int = WORST) -> list[Mistake]:
    """The mistakes of highest confidence, of those that another model would have answered."""
    choices, p, correct = at_chosen_lambda(predictions, router), predictions.routers[router].p, predictions.correct
    at = np.arange(len(p))
    avoidable = np.flatnonzero((correct[at, choices] == 0) & (correct == 1).any(axis=1))
    worst = avoidable[np.argsort(-p[avoidable, choices[avoidable]], kind="stable")[:n]]
    mistakes = []
    for query in worst:
        right = np.flatnonzero(correct[query] == 1)
        right = right[np.argsort(-p[query, right], kind="stable")]
        mistakes.append(
            Mistake(
                predictions.query_ids[query],
                predictions.benchmarks[query],
                predictions.models[choices[query]],
                float(p[query, choices[query]]),
                [(predictions.models[model], float(p[query, model])) for model in right],
            )
        )
    return mistakes


def _shares(choices: Int[np.ndarray, " queries"], n_models: int) -> Float[np.ndarray, " models"]:
    return np.bincount(choices, minlength=n_models) / len(choices)
