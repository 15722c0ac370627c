"""Area under the ROC curve of many scores at once.

scikit-learn's roc_auc_score refuses missing labels and sorts one score at a time (measured in benchmarks.probe).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def auc_per_model(
    correct: Float[np.ndarray, "queries models"], score: Float[np.ndarray, "queries models"]
) -> Float[np.ndarray, " models"]:
    """ROC-AUC of every model over its labelled rows; ties count one half. NaN if a class is missing."""
    return area_under_curve(correct, score.T[None])[0]


def area_under_curve(
    correct: Float[np.ndarray, "queries models"], scores: Float[np.ndarray, "ks models queries"]
) -> Float[np.ndarray, "ks models"]:
    """As `auc_per_model`, for several scores per model."""
    labelled, is_right = ~np.isnan(correct).T, (correct == 1).T
    scores = scores.copy()
    scores[:, ~labelled] = np.inf  # unlabelled rows rank last and do not count
    order = np.argsort(scores, axis=-1)
    ranked = np.take_along_axis(scores, order, axis=-1)
    right = is_right[np.arange(len(is_right))[:, None], order]
    n_right, n_wrong = is_right.sum(axis=1), (labelled & ~is_right).sum(axis=1)
    above = right @ np.arange(1.0, len(correct) + 1)
    tied = (ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] < np.inf)
    for place in zip(*np.nonzero(tied.any(axis=-1)), strict=True):
        ends = np.append(np.flatnonzero(~tied[place]), len(correct) - 1) + 1
        starts = np.append(0, ends[:-1])
        above[place] = np.repeat((starts + 1 + ends) / 2, ends - starts)[right[place]].sum()
    return np.where(
        (n_right > 0) & (n_wrong > 0), (above - n_right * (n_right + 1) / 2) / np.maximum(n_right * n_wrong, 1), np.nan
    )
