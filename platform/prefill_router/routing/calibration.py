"""Platt scaling per target (Platt 1999): calibrated p = sigmoid(slope * logit(p) + offset).

In: predictions that were made without the queries they are for (out of fold, or on a calibration split), and labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit, logit

from prefill_router.signals.logistic import fit_logistic

EPSILON = 1e-6  # probabilities are kept this far from 0 and 1 before their logit is taken


@dataclass(frozen=True)
class PlattScaling:
    slope: Float[np.ndarray, " models"]
    offset: Float[np.ndarray, " models"]

    def __call__(self, p: Float[np.ndarray, "*any models"]) -> Float[np.ndarray, "*any models"]:
        return expit(self.slope * logit(np.clip(p, EPSILON, 1 - EPSILON)) + self.offset)


def fit_platt(p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]) -> PlattScaling:
    """Fits slope and offset per target on labelled rows, with Platt's smoothed labels, so that they stay finite."""
    n_right, n_wrong = (correct == 1).sum(axis=0), (correct == 0).sum(axis=0)
    soft = np.where(correct == 1, (n_right + 1) / (n_right + 2), 1 / (n_wrong + 2))
    soft = np.where(np.isnan(correct), np.nan, soft)
    logits = logit(np.clip(p.astype(np.float64), EPSILON, 1 - EPSILON))
    weights = np.column_stack([fit_logistic(logits[:, [model]], soft[:, [model]], c=1e6)
                               for model in range(correct.shape[1])])
    return PlattScaling(weights[0], weights[1])
