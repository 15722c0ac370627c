"""Sufficient statistics of a layer key: sums over its states that give PCA, Fisher's J and linear discriminants (LDA).

In: states [queries, hidden], labels [queries, models] and folds, in any number of pieces, each read once. Out: one
`Statistics` per fold, of a size that does not depend on the number of queries; and from them J (paper Eq. 13) and
Fisher's linear discriminant for every target and every k. Knows nothing of probes. No library does this:
LinearDiscriminantAnalysis of scikit-learn fits one target and one k per call, from all rows (see benchmarks.probe).

Missing labels: the within-class scatter of a target is the scatter of all rows, minus that of its unlabelled rows,
minus the scatter between its classes. Rows with missing labels are stored. If more than `hidden` rows miss the same
targets, a triangular factor with the same second moment replaces them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import LinAlgError, cholesky, qr, solve_triangular

from prefill_router.signals.projection import Moments, PrincipalComponents

RIDGE = 1e-9  # relative to the mean variance; limits the weight of directions without variance


@dataclass(frozen=True)
class Statistics:
    """Sums over queries, about the origin of `moments`.

    `right` and `right_total` are the count and the sum of the rows with a correct answer of each target. `gaps` are the
    rows with missing labels, with a column of ones appended; `missing` marks the targets without the label.
    """

    moments: Moments
    right: Int[np.ndarray, " models"]
    right_total: Float[np.ndarray, "models hidden"]
    gaps: Float[np.ndarray, "gaps hidden_and_one"]
    missing: Bool[np.ndarray, "gaps models"]

    @classmethod
    def of(
        cls,
        states: Float[np.ndarray, "queries hidden"],
        correct: Float[np.ndarray, "queries models"],
        origin: Float[np.ndarray, " hidden"],
    ) -> Statistics:
        """The statistics of rows about `origin`; NaN labels are missing."""
        origin = origin.astype(states.dtype)
        centred = states - origin
        is_right, missing = correct == 1, np.isnan(correct)
        some = missing.any(axis=1)
        gaps = np.column_stack([centred[some], np.ones(some.sum(), states.dtype)])
        return cls(
            Moments.of_centred(centred, origin),
            is_right.sum(axis=0),
            (is_right.T.astype(states.dtype) @ centred).astype(np.float64),
            *_compress(gaps, missing[some]),
        )

    def __add__(self, other: Statistics) -> Statistics:
        gaps = np.concatenate([self.gaps, other.gaps]), np.concatenate([self.missing, other.missing])
        return type(self)(
            self.moments + other.moments,
            self.right + other.right,
            self.right_total + other.right_total,
            *_compress(*gaps),
        )


@dataclass(frozen=True)
class Separability:
    """Fisher's J of every target on the first k components for every k, and discriminant weights for chosen k.

    J is NaN and the weights are 0 for a target with an empty class. The weights, the intercept last, are those of a
    logistic regression if both classes are Gaussian with equal covariance.
    """

    fisher: Float[np.ndarray, "components models"]
    weights: Float[np.ndarray, "ks models components_and_intercept"]


def gather(
    pieces: Iterable[tuple[Float[np.ndarray, "_ hidden"], Float[np.ndarray, "_ models"], Int[np.ndarray, " _"]]],
    n_folds: int,
) -> list[Statistics]:
    """The statistics of each fold in one pass over pieces (states, labels, folds), about a common origin."""
    found: list[Statistics | None] = [None] * n_folds
    origin = None
    for states, correct, folds in pieces:
        origin = states.mean(axis=0, dtype=np.float64) if origin is None else origin
        for fold in range(n_folds):
            own = folds == fold
            new = Statistics.of(states[own], correct[own], origin)
            before = found[fold]
            found[fold] = new if before is None else before + new
    return [statistics for statistics in found if statistics is not None]


def without(total: Statistics, folds: Sequence[Statistics], left_out: Sequence[int]) -> Statistics:
    """The statistics of all folds except `left_out`: the total minus them."""
    kept = [fold for index, fold in enumerate(folds) if index not in left_out]
    gone = [folds[index] for index in left_out]
    moments, right, right_total = total.moments, total.right, total.right_total
    for fold in gone:
        moments, right, right_total = moments - fold.moments, right - fold.right, right_total - fold.right_total
    return Statistics(
        moments,
        right,
        right_total,
        np.concatenate([fold.gaps for fold in kept]),
        np.concatenate([fold.missing for fold in kept]),
    )


def separability(statistics: Statistics, principal: PrincipalComponents, ks: Sequence[int] = ()) -> Separability:
    """J for every k and discriminants for `ks`, in components that were fitted on the same rows.

    The scatter of all rows is diagonal in these components. The leading k x k part of a Cholesky factor is the factor
    of the leading k x k part of the matrix, so one factorisation per target is enough for every k, and J is a
    cumulative sum.
    """
    moments, projection = statistics.moments, principal.projection
    k, n_models = len(principal.variances), len(statistics.right)
    # A row about the origin, with a one appended, times `map_` gives its components z.
    map_ = projection.components.astype(np.float64) / projection.scale[:, None]
    map_ = np.vstack([map_, -(moments.total / moments.count) @ map_])
    of_right = np.column_stack([statistics.right_total, statistics.right]) @ map_  # sums [models, components]
    gaps = statistics.gaps @ map_
    fisher = np.full((k, n_models), np.nan)
    weights = np.zeros((len(ks), n_models, k + 1))
    for model in range(n_models):
        own, ones = gaps[statistics.missing[:, model]], statistics.gaps[statistics.missing[:, model], -1]
        n = moments.count - round(float(ones @ ones))
        n_right = int(statistics.right[model])
        n_wrong = n - n_right
        if not n_right or not n_wrong:
            continue
        right, wrong = of_right[model] / n_right, -(ones @ own + of_right[model]) / n_wrong
        less = np.vstack([own, np.sqrt(n_right) * right, np.sqrt(n_wrong) * wrong])
        within = (less.T @ less) / -n
        within.flat[:: k + 1] += (moments.count / n) * principal.variances
        mean_variance = float(np.trace(within)) / k
        if mean_variance <= 0:
            fisher[:, model] = 0
            continue
        factor = _cholesky(within, RIDGE * mean_variance)
        white = solve_triangular(factor, right - wrong, lower=True, check_finite=False)
        fisher[:, model] = np.cumsum(np.square(white))
        if len(ks):
            leading = np.where(np.arange(k)[:, None] < np.asarray(ks), white[:, None], 0)
            directions = solve_triangular(factor, leading, lower=True, trans="T", check_finite=False).T
            weights[:, model, :-1] = directions
            weights[:, model, -1] = np.log(n_right / n_wrong) - directions @ (right + wrong) / 2
    return Separability(fisher, weights)


def _cholesky(matrix: np.ndarray, ridge: float) -> np.ndarray:
    """Cholesky factor of the matrix plus a ridge. The ridge is raised until rounding errors leave it definite."""
    while True:
        try:
            raised = matrix.copy()
            raised.flat[:: len(raised) + 1] += ridge
            return np.asarray(cholesky(raised, lower=True, check_finite=False))
        except LinAlgError:
            ridge *= 100


def _compress(gaps: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fewer rows with the same second moments for every target, if there are more rows than columns."""
    if len(gaps) <= gaps.shape[1]:
        return gaps, missing
    rows, masks = [], []
    patterns, which = np.unique(missing, axis=0, return_inverse=True)
    for index, pattern in enumerate(patterns):
        own = gaps[which.reshape(-1) == index]
        if len(own) > own.shape[1]:
            own = qr(own, mode="r", check_finite=False)[0][: own.shape[1]]
        rows.append(own)
        masks.append(np.repeat(pattern[None], len(own), axis=0))
    return np.concatenate(rows), np.concatenate(masks)
