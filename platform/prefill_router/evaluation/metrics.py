"""Level 1 of the evaluation: how good each model's confidences are, and what is routed where (paper 5.2.1).

In: confidences and labels on the axes `queries models`, and `weights` [resamples queries]: how often each query
stands in each resample. A row of ones is the test split itself, a bootstrap draw is a row of counts, a
row of zeros and ones is a part of the split; each row gives one value. Out: arrays [resamples] or
[resamples models], NaN where a figure is undefined. Missing labels (NaN) never count.

Everything is a matrix product or a cumulative sum over all resamples at once. Weights laid out with the resamples
contiguous (`bootstrap.resample` makes them so) are the fast ones. Knows nothing of curves or files.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def roc_auc(p: Float[np.ndarray, " queries"], correct: Float[np.ndarray, " queries"],
            weights: Float[np.ndarray, "resamples queries"], part_of: Int[np.ndarray, " queries"], n_parts: int
            ) -> Float[np.ndarray, "resamples parts"]:
    """Weighted ROC-AUC of one model within each part: the share of (correct, incorrect) pairs in order, ties one half.

    `part_of` numbers the parts of the split 0..n_parts-1. NaN where a part holds only one class.
    """
    order = np.lexsort((p, part_of))
    part, level = part_of[order], p[order]
    place = np.cumsum(np.append(0, (np.diff(part) > 0) | (np.diff(level) != 0)))  # equal places are ties of one part
    wrong, right = correct[order] == 0, correct[order] == 1
    by_query = weights.T
    wrong_weight, right_weight = by_query[order[wrong]], by_query[order[right]]
    below = np.zeros((len(wrong_weight) + 1, len(weights)))  # [n]: weight of the first n incorrect answers
    np.cumsum(wrong_weight, axis=0, out=below[1:])
    first = np.searchsorted(place[wrong], place[right], side="left")
    last = np.searchsorted(place[wrong], place[right], side="right")
    overtaken = below[first] if np.array_equal(first, last) else (below[first] + below[last]) / 2
    parts = np.arange(n_parts + 1)
    ends_wrong, ends_right = np.searchsorted(part[wrong], parts), np.searchsorted(part[right], parts)
    auc = np.empty((len(weights), n_parts))
    for number in range(n_parts):
        here = slice(ends_right[number], ends_right[number + 1])
        before, through = below[ends_wrong[number]], below[ends_wrong[number + 1]]
        n_right = right_weight[here].sum(axis=0)
        ordered = np.einsum("qr,qr->r", right_weight[here], overtaken[here]) - before * n_right
        auc[:, number] = ratio(ordered, n_right * (through - before))
    return auc


def roc_auc_per_model(p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"],
                      weights: Float[np.ndarray, "resamples queries"]) -> Float[np.ndarray, "resamples models"]:
    """ROC-AUC of every model over its own labelled pairs. NaN where these hold only one class."""
    return roc_auc_by_part(p, correct, weights, np.zeros(len(p), dtype=np.int64), 1)[:, :, 0]


def roc_auc_by_part(p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"],
                    weights: Float[np.ndarray, "resamples queries"], part_of: Int[np.ndarray, " queries"],
                    n_parts: int) -> Float[np.ndarray, "resamples models parts"]:
    """`roc_auc` of every model within every part of the split."""
    return np.stack([roc_auc(p[:, model], correct[:, model], weights, part_of, n_parts)
                     for model in range(p.shape[1])], axis=1)


def brier_per_model(p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"],
                    weights: Float[np.ndarray, "resamples queries"]) -> Float[np.ndarray, "resamples models"]:
    """Brier score of every model over its own labelled pairs (Brier, 1950; paper Eq. 6). NaN without labels."""
    labelled = ~np.isnan(correct)
    squared = np.where(labelled, (p - np.where(labelled, correct, 0)) ** 2, 0)
    return ratio(weights @ squared, weights @ labelled.astype(np.float64))


def mean_over_models(values: Float[np.ndarray, "resamples models"]) -> Float[np.ndarray, " resamples"]:
    """Mean over the models whose figure is defined; NaN where none is.

    Whether it is defined depends on labels alone, so routers are compared over the same models.
    """
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1).astype(np.float64))


def routed_to(choices: Int[np.ndarray, " queries"], correct: Float[np.ndarray, "queries models"],
              cost: Float[np.ndarray, "queries models"], weights: Float[np.ndarray, "resamples queries"],
              ) -> dict[str, Float[np.ndarray, "resamples models"]]:
    """What each model does on the queries routed to it, and how that differs from the rest.

    Labels must be complete. `share` is the share of queries routed to the model, `accuracy` the model's accuracy on
    them (conditional accuracy; its mean weighted by `share` is the routed accuracy), `accuracy_delta` and
    `cost_delta` (USD per query) that minus the same model's figure on the other queries: the routing delta.
    """
    here = (choices[:, None] == np.arange(correct.shape[1])).astype(np.float64)
    n = weights.sum(axis=1)[:, None]
    n_here, correct_here, cost_here, all_correct, all_cost = np.split(
        weights @ np.hstack([here, here * correct, here * cost, correct, cost]), 5, axis=1)
    accuracy = ratio(correct_here, n_here)
    return {
        "share": ratio(n_here, n),
        "accuracy": accuracy,
        "accuracy_delta": accuracy - ratio(all_correct - correct_here, n - n_here),
        "cost_delta": ratio(cost_here, n_here) - ratio(all_cost - cost_here, n - n_here),
    }


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    safe = np.where(denominator == 0, np.nan, denominator)
    return numerator / safe

