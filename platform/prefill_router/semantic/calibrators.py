"""Calibrators (none, pooled, Platt, isotonic, percentile, z-score) and the choice among them on calibration queries.

In: raw p [queries, models] of queries that the router has not learned from, and their labels. Out: a map from raw to
calibrated p. Percentile and z-score put all models on one scale without labels: they map a model's p to its rank among
the calibration queries, or to the normal distribution function of the z-score of its logit. They keep the order of
queries within a model, and therefore its AUC, but they change the Brier score and the chosen model.
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
    fit_pooled_platt,
)
from prefill_router.routing.fit import held_out_figures

Suite = Literal["none", "pooled", "platt", "isotonic", "percentile", "zscore"]
SUITE: tuple[Suite, ...] = get_args(Suite)
Map = Callable[[Float[np.ndarray, "*any models"]], Float[np.ndarray, "*any models"]]


@dataclass(frozen=True)
class ZScore:
    """Calibrated p = Phi((logit p - mean) / sd), Phi the standard normal distribution function."""

    mean: Float[np.ndarray, " models"]
    sd: Float[np.ndarray, " models"]

    def __call__(self, p: Float[np.ndarray, "*any models"]) -> Float[np.ndarray, "*any models"]:
        return ndtr((_logit(p) - self.mean) / self.sd)


def fit_map(name: Suite, p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]) -> Map:
    """Fits the calibrator `name`: pooled, Platt and isotonic on labelled rows, percentile and z-score on all rows."""
    if name == "pooled":
        return fit_pooled_platt(p, correct)
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
    """The calibrator with the lowest Brier score, and `auc` and `brier` of each calibrator, averaged over models.

    Every fold is scored by calibrators that were fitted on the other folds, so that a flexible calibrator has no
    advantage from overfitting.
    """
    found: dict[Suite, dict[str, float]] = {}
    for name in SUITE:
        figures = held_out_figures(calibrated_across(partial(fit_map, name), p, correct, folds), correct)
        found[name] = {"auc": figures["held_out_auc"], "brier": figures["held_out_brier"]}
    return min(SUITE, key=lambda name: found[name]["brier"]), found


def _percentiles(p: Float[np.ndarray, "queries models"]) -> IsotonicScaling:
    """Mid-ranks divided by n + 1, with linear interpolation."""
    knots = np.sort(p, axis=0).T.astype(np.float64)
    ranks = [[(np.searchsorted(row, row, "left") + np.searchsorted(row, row, "right") + 1) / 2] for row in knots]
    return IsotonicScaling(knots, np.concatenate(ranks) / (len(p) + 1))


def _logit(p: np.ndarray) -> np.ndarray:
    return logit(np.clip(p.astype(np.float64), EPSILON, 1 - EPSILON))
