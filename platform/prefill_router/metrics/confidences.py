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
from jaxtyping import Bool, Float, Int
from scipy import sparse

ECE_BINS = 15
NARROW = 0.05  # a gap of confidence below which a decision was a close one


def roc_auc(
    p: Float[np.ndarray, " queries"],
    correct: Float[np.ndarray, " queries"],
    weights: Float[np.ndarray, "resamples queries"],
    part_of: Int[np.ndarray, " queries"],
    n_parts: int,
) -> Float[np.ndarray, "resamples parts"]:
    """Weighted ROC-AUC of one model within each part: the share of (correct, incorrect) pairs in order, ties one half.

    `part_of` numbers the parts of the split 0..n_parts-1. NaN where a part holds only one class.
    """
    order = np.lexsort((p, part_of))
    part, level = part_of[order], p[order]
    place = np.cumsum(np.append(0, (np.diff(part) > 0) | (np.diff(level) != 0)))  # equal places are ties of one part
    wrong, right = correct[order] == 0, correct[order] == 1
    by_query = weights.T
    right_weight = by_query.take(order[right], axis=0)
    below = running_sums(by_query.take(order[wrong], axis=0))  # [n]: weight of the first n incorrect answers
    first = np.searchsorted(place[wrong], place[right], side="left")
    last = np.searchsorted(place[wrong], place[right], side="right")
    overtaken = below.take(first, axis=0)
    if not np.array_equal(first, last):
        overtaken = (overtaken + below.take(last, axis=0)) / 2
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


def roc_auc_per_model(
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    weights: Float[np.ndarray, "resamples queries"],
) -> Float[np.ndarray, "resamples models"]:
    """ROC-AUC of every model over its own labelled pairs. NaN where these hold only one class."""
    return roc_auc_by_part(p, correct, weights, np.zeros(len(p), dtype=np.int64), 1)[:, :, 0]


def roc_auc_by_part(
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    weights: Float[np.ndarray, "resamples queries"],
    part_of: Int[np.ndarray, " queries"],
    n_parts: int,
) -> Float[np.ndarray, "resamples models parts"]:
    """`roc_auc` of every model within every part of the split."""
    return np.stack(
        [roc_auc(p[:, model], correct[:, model], weights, part_of, n_parts) for model in range(p.shape[1])], axis=1
    )


def brier_per_model(
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    weights: Float[np.ndarray, "resamples queries"],
) -> Float[np.ndarray, "resamples models"]:
    """Brier score of every model over its own labelled pairs (Brier, 1950; paper Eq. 6). NaN without labels."""
    labelled = ~np.isnan(correct)
    squared = np.where(labelled, (p - np.where(labelled, correct, 0)) ** 2, 0)
    return ratio(weights @ squared, weights @ labelled.astype(np.float64))


def ece_per_model(
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    weights: Float[np.ndarray, "resamples queries"],
) -> Float[np.ndarray, "resamples models"]:
    """Expected calibration error of every model over its labelled pairs, 15 bins of equal width (Guo et al., 2017).

    The mean over bins, weighted by what lies in them, of |mean confidence - share correct|. NaN without labels.
    """
    n_models, labelled = p.shape[1], ~np.isnan(correct)
    query, model = np.nonzero(labelled)
    pairs = p[query, model]
    bins = np.minimum((pairs * ECE_BINS).astype(np.int64), ECE_BINS - 1) + model * ECE_BINS
    excess = sparse.csr_array((pairs - correct[query, model], (bins, query)), shape=(n_models * ECE_BINS, len(p)))
    by_bin = np.abs(excess @ weights.T).reshape(n_models, ECE_BINS, -1).sum(axis=1)
    return ratio(by_bin.T, weights @ labelled.astype(np.float64))


def near_misses(
    first: Int[np.ndarray, " queries"],
    second: Int[np.ndarray, " queries"],
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    weights: Float[np.ndarray, "resamples queries"],
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """Of the queries whose first choice was wrong, the share in which ... Labels must be complete.

    `second_right`: the second choice was right; `narrow`: its confidence was less than NARROW below the first's;
    `near_miss`: both. NaN where no first choice was wrong.
    """
    at = np.arange(len(p))
    wrong, right = correct[at, first] == 0, correct[at, second] == 1
    narrow = p[at, first] - p[at, second] < NARROW
    n_wrong = weights @ wrong.astype(np.float64)
    return {
        name: ratio(weights @ (wrong & part).astype(np.float64), n_wrong)
        for name, part in (("second_right", right), ("narrow", narrow), ("near_miss", right & narrow))
    }


def mean_over_models(values: Float[np.ndarray, "resamples models"]) -> Float[np.ndarray, " resamples"]:
    """Mean over the models whose figure is defined; NaN where none is.

    Whether it is defined depends on labels alone, so routers are compared over the same models.
    """
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1).astype(np.float64))


def routed_to(
    choices: Int[np.ndarray, " queries"],
    correct: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    weights: Float[np.ndarray, "resamples queries"],
) -> dict[str, Float[np.ndarray, "resamples models"]]:
    """What each model does on the queries routed to it, and how that differs from the rest.

    Labels must be complete. `share` is the share of queries routed to the model, `accuracy` the model's accuracy on
    them (conditional accuracy; its mean weighted by `share` is the routed accuracy), `accuracy_delta` and
    `cost_delta` (USD per query) that minus the same model's figure on the other queries: the routing delta.
    """
    here = (choices[:, None] == np.arange(correct.shape[1])).astype(np.float64)
    n = weights.sum(axis=1)[:, None]
    n_here, correct_here, cost_here, all_correct, all_cost = np.split(
        weights @ np.hstack([here, here * correct, here * cost, correct, cost]), 5, axis=1
    )
    accuracy = ratio(correct_here, n_here)
    return {
        "share": ratio(n_here, n),
        "accuracy": accuracy,
        "accuracy_delta": accuracy - ratio(all_correct - correct_here, n - n_here),
        "cost_delta": ratio(cost_here, n_here) - ratio(all_cost - cost_here, n - n_here),
    }


def running_sums(values: Float[np.ndarray, "rows resamples"]) -> Float[np.ndarray, "rows_and_one resamples"]:
    """[n] is the sum of the first n rows: np.cumsum down the rows, in about sqrt(rows) long additions.

    NumPy's own runs down one column after another, four times slower. Sums of integers and of gridded costs are exact
    in any order.
    """
    rows, columns = values.shape
    length = int(rows**0.5) + 1
    sums = np.zeros((1 + -(-rows // length) * length, columns))
    sums[1 : rows + 1] = values
    stretches = sums[1:].reshape(-1, length, columns)
    for place in range(1, length):
        stretches[:, place] += stretches[:, place - 1]
    stretches[1:] += np.cumsum(stretches[:-1, -1], axis=0)[:, None]
    return sums[: rows + 1]


def ends_of_runs(values: Float[np.ndarray, " sorted"]) -> Bool[np.ndarray, " sorted"]:
    """The last of each run of equal values."""
    return np.append(values[1:] != values[:-1], True)[: len(values)]


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    safe = np.where(denominator == 0, np.nan, denominator)
    return numerator / safe
