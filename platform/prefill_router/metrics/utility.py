"""Utility of routers and of the best static choice, at the lambdas of UTILITY_LAMBDAS (docs/equations.md, Utility).

A static choice is one model for all queries. In: labels, normalised costs and choices of the queries with a label for
every model; means of the training queries. Out: utilities per query, and figures on every resample.

Utility is linear in lambda. The mean accuracy and the mean normalised cost of each model on the training queries
therefore determine the best static choice at every lambda.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from prefill_router.metrics.curves import weighted_mean
from prefill_router.metrics.groups import BestStaticFigures, Draws, UtilityFigures
from prefill_router.routing.policy import LAMBDAS, TrainingMeans, scores, utility

UTILITY_LAMBDAS = (0.0, 0.05, 0.1, 0.2, 0.4)  # points of the sweep
POINTS = np.searchsorted(LAMBDAS, UTILITY_LAMBDAS)
NAMES = tuple(f"{lam:g}" for lam in UTILITY_LAMBDAS)


@dataclass(frozen=True)
class StaticChoices:
    """The best static choice at each of UTILITY_LAMBDAS, as the model's position, and its utility on each query."""

    models: Int[np.ndarray, " lambdas"]
    utility: Float[np.ndarray, "queries lambdas"]

    @classmethod
    def of(
        cls,
        training: TrainingMeans,
        correct: Float[np.ndarray, "queries models"],
        cost_norm: Float[np.ndarray, "queries models"],
    ) -> StaticChoices:
        """The choices by `training`, and their utility on queries with these labels and costs."""
        models = np.array([training.best_static(lam) for lam in UTILITY_LAMBDAS])
        columns = zip(models, UTILITY_LAMBDAS, strict=True)
        return cls(models, np.stack([scores(correct, cost_norm, lam)[:, model] for model, lam in columns], axis=1))


def router_utility(
    choices: Int[np.ndarray, "points queries"],
    correct: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
) -> Float[np.ndarray, "queries lambdas"]:
    """Utility per query and lambda of a router; the first rows of `choices` are its choices along LAMBDAS."""
    return np.stack(
        [utility(correct, cost_norm, choices[point], lam) for point, lam in zip(POINTS, UTILITY_LAMBDAS, strict=True)],
        axis=1,
    )


def utility_figures(
    own: Float[np.ndarray, "queries lambdas"],
    static: StaticChoices | None,
    on_curve: Float[np.ndarray, "resamples queries"],
) -> UtilityFigures[Draws]:
    """Mean utility of a router, and its paired difference from that of the best static choice (None: left out)."""
    over = {} if static is None else _by_lambda(weighted_mean(own - static.utility, on_curve))
    return UtilityFigures(_by_lambda(weighted_mean(own, on_curve)), over)


def static_figures(
    static: StaticChoices | None,
    accuracy: Float[np.ndarray, "resamples models"],
    cost: Float[np.ndarray, "resamples models"],
    on_curve: Float[np.ndarray, "resamples queries"],
) -> dict[str, BestStaticFigures[Draws]]:
    """By lambda: utility, accuracy and mean cost (USD per query) of the best static choice; empty without `static`."""
    if static is None:
        return {}
    mean = weighted_mean(static.utility, on_curve)
    return {
        name: BestStaticFigures(mean[:, index], accuracy[:, model], cost[:, model])
        for index, (name, model) in enumerate(zip(NAMES, static.models, strict=True))
    }


def _by_lambda(values: Float[np.ndarray, "resamples lambdas"]) -> Mapping[str, Draws]:
    return {name: values[:, index] for index, name in enumerate(NAMES)}
