"""A router's choices: per benchmark, per confidence decile and along lambda, and its most confident mistakes.

In: `Predictions` and a router's name. Out: shares and lists for the report. All of them follow from
predictions.parquet. A query without a label for the chosen model counts as a choice, but neither as right nor as wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from prefill_router.metrics import curves
from prefill_router.metrics.predictions import Predictions
from prefill_router.routing.policy import choose

DECILES, WORST = 10, 12
DISPLAY_LAMBDAS = np.linspace(0, 1, 61) ** 2  # finer near 0, where most choices change


class ByConfidence(NamedTuple):
    """Deciles of the queries by the router's highest confidence, in ascending order.

    Per decile: `highest` is the mean of the highest confidence, `share` the share of queries per chosen model and
    `confidence` the mean confidence in the chosen models. `n_labelled` choices have a label, of which `n_right` are
    right.
    """

    highest: Float[np.ndarray, " bins"]
    share: Float[np.ndarray, "bins models"]
    confidence: Float[np.ndarray, " bins"]
    n_right: Int[np.ndarray, " bins"]
    n_labelled: Int[np.ndarray, " bins"]


class Mistake(NamedTuple):
    """A query whose chosen model is wrong. `right` lists the right models with their p, highest p first."""

    query_id: str
    benchmark: str
    chosen: str
    p: float
    right: list[tuple[str, float]]


def at_chosen_lambda(predictions: Predictions, router: str) -> Int[np.ndarray, " queries"]:
    """The router's choice for every query, at its chosen lambda."""
    chosen = predictions.routers[router]
    return choose(
        chosen.p,
        predictions.cost,
        predictions.cost_norm,
        chosen.chosen_lambda,
        margin=predictions.margin(router),
    )


def along_lambda(predictions: Predictions, router: str) -> Float[np.ndarray, "points models"]:
    """Share of the queries that the router sends to each model, one row per lambda of DISPLAY_LAMBDAS."""
    choices = curves.sweep(
        predictions.routers[router].p,
        predictions.cost,
        predictions.cost_norm,
        DISPLAY_LAMBDAS,
        predictions.margin(router),
    )
    return np.stack([(choices == model).mean(axis=1) for model in range(len(predictions.models))], axis=1)


def by_benchmark(predictions: Predictions, router: str) -> list[tuple[str, int, list[float]]]:
    """Per benchmark: (name, number of queries, share of the queries routed to each model)."""
    choices = at_chosen_lambda(predictions, router)
    return [
        (name, int(inside.sum()), _shares(choices[inside], len(predictions.models)).tolist())
        for name in sorted(set(predictions.benchmarks))
        for inside in [predictions.benchmarks == name]
    ]


def by_confidence(predictions: Predictions, router: str) -> ByConfidence:
    """Choices at the chosen lambda per decile; fewer bins if there are fewer than ten queries."""
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
    """The `n` most confident mistakes at the chosen lambda, among queries that another model answers correctly."""
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
