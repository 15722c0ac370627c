"""The calibration suite: none, Platt, isotonic, percentile, z-score; the best of them on calibration queries.

In: raw p [queries, models] of queries that the router has not learned from, and their labels. Out: a map from raw to
calibrated p. Percentile and z-score put every model on one scale and know no labels: a model's p becomes its rank among
the calibration queries, or the normal distribution function of its logit's z-score there. They move no query within a
model, and so no AUC, but they change which model is chosen, and the Brier score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logit, ndtr

from prefill_router.routing.calibration import (
    EPSILON,
    IsotonicScaling,
    calibrated_across,
    fit_isotonic,
    fit_platt,
)
from prefill_router.routing.fit import held_out_figures

Suite = Literal["none", "platt", "isotonic", "percentile", "zscore"]
SUITE: tuple[Suite, ...] = get_args(Suite)
Map = Callable[[Float[np.ndarray, "*any models"]], Float[np.ndarray, "*any models"]]


@dataclass(frozen=True)
class ZScore:
    """p becomes Phi((logit p - mean) / sd)."""

    mean: Float[np.ndarray, " models"]
    sd: Float[np.ndarray, " models"]

    def __call__(self, p: Float[np.ndarray, "*any models"]) -> Float[np.ndarray, "*any models"]:
        return ndtr((_logit(p) - self.mean) / self.sd)


def fit_map(name: Suite, p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]) -> Map:
    """Fits the calibrator of that name per model, on its labelled rows; those without labels use all rows."""
    if name == "platt":
        return fit_platt(p, correct)
    if name == "isotonic":
        return fit_isotonic(p, correct)
    if name == "percentile":
        return _percentiles(p)
    if name == "zscore":
        logits = _logit(p)
        return ZScore(logits.mean(axis=0), np.maximum(logits.std(axis=0), 1e-6))
    return lambda p: p


def choose(
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    folds: Int[np.ndarray, " queries"],
) -> tuple[Suite, dict[Suite, dict[str, float]]]:
    """The calibrator of the least Brier score, and every one's `auc` and `brier`, means over models.

    They are judged on calibration queries whose fold they were not fitted on, so that a flexible one gains nothing by
    having seen the labels.
    """
    found: dict[Suite, dict[str, float]] = {}
    for name in SUITE:
        figures = held_out_figures(calibrated_across(partial(fit_map, name), p, correct, folds), correct)
        found[name] = {"auc": figures["held_out_auc"], "brier": figures["held_out_brier"]}
    return min(SUITE, key=lambda name: found[name]["brier"]), found


def _percentiles(p: Float[np.ndarray, "queries models"]) -> IsotonicScaling:
    """Ranks over n + 1, ties at their mean, linear in between."""
    knots = np.sort(p, axis=0).T.astype(np.float64)
    ranks = [[(np.searchsorted(row, row, "left") + np.searchsorted(row, row, "right") + 1) / 2] for row in knots]
    return IsotonicScaling(knots, np.concatenate(ranks) / (len(p) + 1))


def _logit(p: np.ndarray) -> np.ndarray:
    return logit(np.clip(p.astype(np.float64), EPSILON, 1 - EPSILON))
