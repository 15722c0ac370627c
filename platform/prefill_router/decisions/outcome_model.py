"""The outcome model of off-policy evaluation: confidences and costs of a checkpoint, corrected by a log.

In: predictions for every candidate, and outcomes of the chosen models. Out: predictions in which no decision's outcome
corrects its own prediction: decisions are predicted by the fit without their fold, and a cluster is in one fold
(cross-fitting, Chernozhukov et al. 2018). Models without outcomes follow the others. NaN stays NaN.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, logit

from prefill_router.decisions.off_policy import Logged
from prefill_router.routing.calibration import EPSILON
from prefill_router.routing.pooled import fit_pooled

FOLDS = 5
STRENGTH = 10.0  # penalty on a model's deviation from the shared slope and offset: as strong as about 50 scores
SHARE = 20.0  # decisions of a model at which its cost ratio is half its own, half that of all models


def recalibrated(
    logged: Logged, confidence: Float[np.ndarray, "decisions models"], score: Float[np.ndarray, " decisions"]
) -> Float[np.ndarray, "decisions models"]:
    """Confidences, calibrated on the scores of the other folds by a pooled logistic regression with one input."""
    x = logit(np.clip(confidence, EPSILON, 1 - EPSILON))[:, :, None]
    labels = np.full(confidence.shape, np.nan)
    labels[np.arange(len(score)), logged.chosen] = score
    found, folds, known = np.empty(confidence.shape), _folds(logged.clusters), ~np.isnan(score)
    for fold in range(FOLDS):
        rest, own = known & (folds != fold), folds == fold
        fitted = fit_pooled(np.nan_to_num(x[rest]), labels[rest], STRENGTH, np.ones(1))
        found[own] = expit(fitted(x[own]))
    return found


def rescaled(
    logged: Logged, estimated: Float[np.ndarray, "decisions models"], cost: Float[np.ndarray, " decisions"]
) -> Float[np.ndarray, "decisions models"]:
    """Estimated costs (USD) times each model's ratio of actual to estimated cost in the other folds."""
    n_models, own_estimate, folds = estimated.shape[1], logged.of_chosen(estimated), _folds(logged.clusters)
    known, found = ~np.isnan(cost), np.empty(estimated.shape)
    for fold in range(FOLDS):
        rest, own = known & (folds != fold), folds == fold
        chosen = logged.chosen[rest]
        actual, expected, n = (
            np.bincount(chosen, values, minlength=n_models)
            for values in (cost[rest], own_estimate[rest], np.ones(len(chosen)))
        )
        shared = actual.sum() / expected.sum() if expected.sum() else 1.0
        ratio = np.where(expected > 0, actual / np.where(expected > 0, expected, 1.0), shared)
        found[own] = estimated[own] * ((n * ratio + SHARE * shared) / (n + SHARE))
    return found


def _folds(clusters: Int[np.ndarray, " decisions"]) -> Int[np.ndarray, " decisions"]:
    """Folds of whole clusters, the same for every call with these clusters."""
    names, of = np.unique(clusters, return_inverse=True)
    return np.asarray((np.random.default_rng(0).permutation(len(names)) % FOLDS)[of])
