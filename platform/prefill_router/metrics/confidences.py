"""Level 1 of the evaluation: discrimination and calibration of the confidences, and routing shares (paper 5.2.1).

In: confidences and labels [queries models], and `weights` [resamples queries]: how often each resample contains each
query. A row of ones is the test split itself, a row of counts is a bootstrap resample, a row of zeros and ones is a
part of the split. Out: arrays [resamples] or [resamples models], NaN if a figure is undefined. Missing labels (NaN)
never count.

Every figure is a matrix product or a cumulative sum over all resamples at once. This is fastest if the resamples are
contiguous in memory, as `bootstrap.resample` lays them out. Knows nothing of curves or files.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from prefill_router.metrics.groups import Draws, NearMissFigures, RoutedToFigures

ECE_BINS = 15
NARROW = 0.05  # difference of two confidences below which a decision is a close one


def roc_auc(
    p: Float[np.ndarray, " queries"],
    correct: Float[np.ndarray, " queries"],
    weights: Float[np.ndarray, "resamples queries"],
    part_of: Int[np.ndarray, " queries"],
    n_parts: int,
) -> Float[np.ndarray, "resamples parts"]:
    """Weighted ROC-AUC of one model within each part of the split.

    This is the share of (correct, incorrect) pairs that the confidence orders correctly; a tie counts one half.
    `part_of` is the number of each query's part, 0..n_parts-1. NaN if a part holds only one class.
    """
    order = np.lexsort((p, part_of))
    part, level = part_of[order], p[order]
    place = np.cumsum(
        np.append(0, (np.diff(part) > 0) | (np.diff(level) != 0))
    )  # equal places are ties within one part
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
    """ROC-AUC of every model over its labelled pairs. NaN if these hold only one class."""
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
    """Brier score per model over its labelled pairs (Brier, 1950; docs/equations.md, Eq. 6). NaN without labels."""
    labelled = ~np.isnan(correct)
    squared = np.where(labelled, (p - np.where(labelled, correct, 0)) ** 2, 0)
    return ratio(weights @ squared, weights @ labelled.astype(np.float64))


def ece_per_model(
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    weights: Float[np.ndarray, "resamples queries"],
) -> Float[np.ndarray, "resamples models"]:
    """Expected calibration error of every model over its labelled pairs, 15 bins of equal width (Guo et al., 2017).

    This is the mean over bins of |mean confidence - share correct|, weighted by the number of pairs in the bin. NaN
    without labels.
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
) -> NearMissFigures[Draws]:
    """Shares of the queries whose first choice is wrong. Labels must be complete.

    `second_right`: the second choice is right. `narrow`: its confidence is less than NARROW below that of the first
    choice. `near_miss`: both. NaN if no first choice is wrong.
    """
    at = np.arange(len(p))
    wrong, right = correct[at, first] == 0, correct[at, second] == 1
    narrow = p[at, first] - p[at, second] < NARROW
    n_wrong = weights @ wrong.astype(np.float64)
    return NearMissFigures(
        *(ratio(weights @ (wrong & part).astype(np.float64), n_wrong) for part in (right, narrow, right & narrow))
    )


def mean_over_models(values: Float[np.ndarray, "resamples models"]) -> Float[np.ndarray, " resamples"]:
    """Mean over the models (or benchmarks) whose figure is defined; NaN if none is.

    Labels alone decide which figures are defined, so the means of all routers cover the same models.
    """
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1).astype(np.float64))


def routed_to(
    choices: Int[np.ndarray, " queries"],
    correct: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    weights: Float[np.ndarray, "resamples queries"],
) -> RoutedToFigures[Draws]:
    """Each model on the queries routed to it, compared with the same model on the other queries.

    Labels must be complete. Arrays are [resamples models]. `share`: share of the queries routed to the model.
    `accuracy`: accuracy of the model on them (conditional accuracy; its mean weighted by `share` is the routed
    accuracy). `accuracy_delta`, `cost_delta` (USD per query): the model's mean on them minus its mean on the other
    queries (routing delta).
    """
    here = (choices[:, None] == np.arange(correct.shape[1])).astype(np.float64)
    n = weights.sum(axis=1)[:, None]
    n_here, correct_here, cost_here, all_correct, all_cost = np.split(
        weights @ np.hstack([here, here * correct, here * cost, correct, cost]), 5, axis=1
    )
    accuracy = ratio(correct_here, n_here)
    return RoutedToFigures(
        share=ratio(n_here, n),
        accuracy=accuracy,
        accuracy_delta=accuracy - ratio(all_correct - correct_here, n - n_here),
        cost_delta=ratio(cost_here, n_here) - ratio(all_cost - cost_here, n - n_here),
    )


def running_sums(values: Float[np.ndarray, "rows resamples"]) -> Float[np.ndarray, "rows_and_one resamples"]:
    """Row n of the result is the sum of the first n rows.

    Four times faster than np.cumsum along axis 0, which walks the columns one by one: this takes about sqrt(rows)
    additions of long slices. Sums of integers and of gridded costs are exact in any order.
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
    """Marks the last value of each run of equal values."""
    return np.append(values[1:] != values[:-1], True)[: len(values)]


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator; NaN if the denominator is 0."""
    safe = np.where(denominator == 0, np.nan, denominator)
    return numerator / safe
