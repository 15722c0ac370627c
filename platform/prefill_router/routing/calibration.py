"""Calibration: pooled or per-target Platt scaling (Platt 1999), or isotonic regression (Zadrozny & Elkan 2002).

In: held-out probabilities (out of fold, or of a calibration split) and labels. Out: a calibrator: a monotone map of
probabilities per target. `calibrated_across` calibrates every query without its own label, for a fair evaluation of
held-out predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, logit

from prefill_router.routing.pooled import choose_strength, cross_validation_folds, fit_pooled
from prefill_router.signals.logistic import fit_logistic

EPSILON = 1e-6  # probabilities are clipped to [EPSILON, 1 - EPSILON] before the logit
CalibratorName = Literal["pooled", "platt", "isotonic"]


@dataclass(frozen=True)
class PlattScaling:
    """Calibrated p = sigmoid(slope * logit(p) + offset)."""

    slope: Float[np.ndarray, " models"]
    offset: Float[np.ndarray, " models"]

    def __call__(self, p: Float[np.ndarray, "*any models"]) -> Float[np.ndarray, "*any models"]:
        return expit(self.slope * logit(np.clip(p, EPSILON, 1 - EPSILON)) + self.offset)


@dataclass(frozen=True)
class IsotonicScaling:
    """Calibrated p is piecewise linear between the knots and constant beyond them.

    A target with fewer knots repeats its last one.
    """

    knots: Float[np.ndarray, "models knots"]
    values: Float[np.ndarray, "models knots"]

    def __call__(self, p: Float[np.ndarray, "*any models"]) -> Float[np.ndarray, "*any models"]:
        return np.stack(
            [np.interp(p[..., model], self.knots[model], self.values[model]) for model in range(len(self.knots))],
            axis=-1,
        )


Calibrator = PlattScaling | IsotonicScaling


def fit_calibrator(
    name: CalibratorName, p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]
) -> Calibrator:
    """Fits the named calibrator on the labelled rows of the targets."""
    fits: dict[CalibratorName, Callable[[np.ndarray, np.ndarray], Calibrator]] = {
        "pooled": fit_pooled_platt,
        "platt": fit_platt,
        "isotonic": fit_isotonic,
    }
    return fits[name](p, correct)


def fit_pooled_platt(
    p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]
) -> PlattScaling:
    """Fits one slope and offset for all targets, and deviations of each target with a cross-validated penalty.

    With few queries, separate offsets reorder targets that are close (docs/equations.md, Pooled calibration).
    """
    x = logit(np.clip(p.astype(np.float64), EPSILON, 1 - EPSILON))[:, :, None]
    centre = np.ones(1)
    strength = choose_strength(x, correct, cross_validation_folds(len(x)), centre)
    fitted = fit_pooled(x, correct, strength, centre)
    return PlattScaling(fitted.weights[:, 0], fitted.offsets)


def fit_platt(p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]) -> PlattScaling:
    """Fits slope and offset of every target on its labelled rows, with Platt's smoothed labels.

    Slope and offset stay finite for labels of one class and for perfect predictions.
    """
    n_right, n_wrong = (correct == 1).sum(axis=0), (correct == 0).sum(axis=0)
    soft = np.where(correct == 1, (n_right + 1) / (n_right + 2), 1 / (n_wrong + 2))
    soft = np.where(np.isnan(correct), np.nan, soft)
    logits = logit(np.clip(p.astype(np.float64), EPSILON, 1 - EPSILON))
    weights = np.column_stack(
        [fit_logistic(logits[:, [model]], soft[:, [model]], c=1e6) for model in range(correct.shape[1])]
    )
    return PlattScaling(weights[0], weights[1])


def fit_isotonic(
    p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]
) -> IsotonicScaling:
    """Fits a non-decreasing map for every target on its labelled rows; 0.5 for a target without labels.

    Values are clipped to the range of Platt's smoothed labels, so that no confidence is 0 or 1.
    """
    from sklearn.isotonic import IsotonicRegression

    fits = []
    for model in range(correct.shape[1]):
        known = ~np.isnan(correct[:, model])
        y, x = correct[known, model].astype(np.float64), p[known, model].astype(np.float64)
        fitted = IsotonicRegression(out_of_bounds="clip").fit(x, y) if len(y) else None
        knots = np.array([0.5]) if fitted is None else fitted.X_thresholds_
        values = np.array([0.5]) if fitted is None else fitted.y_thresholds_
        fits.append((knots, np.clip(values, 1 / ((y == 0).sum() + 2), ((y == 1).sum() + 1) / ((y == 1).sum() + 2))))
    longest = max(len(knots) for knots, _ in fits)
    padded = [[np.append(row, np.repeat(row[-1], longest - len(row))) for row in pair] for pair in fits]
    return IsotonicScaling(np.stack([row[0] for row in padded]), np.stack([row[1] for row in padded]))


def calibrated_across(
    fit: Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]],
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    folds: Int[np.ndarray, " queries"],
) -> Float[np.ndarray, "queries models"]:
    """The predictions of each fold, calibrated by `fit(p, correct)` on the other folds."""
    calibrated = np.empty(p.shape)
    for fold in np.unique(folds):
        rest, own = folds != fold, folds == fold
        calibrated[own] = fit(p[rest], correct[rest])(p[own])
    return calibrated
