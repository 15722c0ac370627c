"""Objectives of a sweep: figures of held-out confidences.

In: calibrated confidences of held-out queries, their labels and costs, [queries, models]. Out: `auc`, `brier` (means
over models) and `p_auccc` (docs/equations.md, Eq. 6-9), NaN if undefined. They have no intervals, because they rank
configurations on the same queries. Knows nothing of samplers.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float

from prefill_router.metrics import curves
from prefill_router.routing.fit import held_out_figures

Objective = Literal["auc", "brier", "p_auccc"]
LOWER_IS_BETTER = ("brier",)
SHOWN = {"auc": "AUC", "brier": "Brier score", "p_auccc": "P-AUCCC"}


def is_better(objective: Objective, value: float, than: float) -> bool:
    """Whether `value` is better than `than`: lower for `brier`, higher for the others."""
    return value < than if objective in LOWER_IS_BETTER else value > than


def objectives(
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
) -> dict[str, float]:
    """All objectives by name."""
    own = held_out_figures(p, correct)
    return {"auc": own["held_out_auc"], "brier": own["held_out_brier"], "p_auccc": p_auccc(p, correct, cost, cost_norm)}


def p_auccc(
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
) -> float:
    """P-AUCCC over the queries with complete labels; NaN if the normalised plane is undefined."""
    complete = ~np.isnan(correct).any(axis=1)
    p, correct, cost, cost_norm = p[complete], correct[complete], cost[complete], cost_norm[complete]
    if not len(p):
        return float("nan")
    gridded, every = curves.on_exact_grid(cost, len(cost)), np.ones((1, len(p)))
    oracle = (correct == 1).any(axis=1, keepdims=True).astype(np.float64)
    anchors = curves.anchors(
        curves.weighted_mean(gridded, every),
        curves.weighted_mean(correct, every),
        curves.weighted_mean(oracle, every)[:, 0],
    )
    choices = curves.sweep(p, cost, cost_norm)
    x, y = curves.normalise(
        curves.weighted_mean(curves.picked(gridded, choices), every),
        curves.weighted_mean(curves.picked(correct, choices), every),
        anchors,
    )
    return float(curves.area_along(x, y)[0])
