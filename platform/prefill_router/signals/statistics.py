"""Sufficient statistics of a block: sums over its states from which PCA, Fisher's J and a linear discriminant follow.

In: states [queries, hidden], labels [queries, models], folds; in any number of pieces, each seen once. Out: one
`Statistics` per fold, whose memory does not grow with the number of queries, and from them, for every target and every
k at once, J (paper Eq. 13) and the discriminant. Knows nothing of probes.

Missing labels: a target's within-class scatter is that of all rows, less its unlabelled rows, less what lies between
its classes. Rows with any label missing are few and kept as they are; where more than `hidden` of them miss the same
targets, a triangular factor with the same second moment stands for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import LinAlgError, cholesky, qr, solve_triangular

from prefill_router.signals.projection import Moments, PrincipalComponents

RIDGE = 1e-9  # relative to the mean variance: keeps directions without variance from deciding


@dataclass(frozen=True)
class Statistics:
    """Sums over some queries, about the origin of `moments`.

    `right` and `right_total` are the count and the sum of the rows that a target answered right. `gaps` are rows with
    missing labels, a column of ones appended; `missing` says which targets miss them.
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
    """Of every target: J on the first k components for every k, and the discriminant's weights for chosen k.

    NaN where a class is empty. The weights, the intercept last, are where a logistic regression would be if each class
    were Gaussian with the same covariance.
    """

    fisher: Float[np.ndarray, "components models"]
    weights: Float[np.ndarray, "ks models components_and_intercept"]


def gather(
    pieces: Iterable[tuple[Float[np.ndarray, "_ hidden"], Float[np.ndarray, "_ models"], Int[np.ndarray, " _"]]],
    n_folds: int,
) -> list[Statistics]:
    """One pass over (states, labels, folds): the statistics of each fold about a common origin."""
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
    """The statistics of all folds but those: the total minus them."""
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
    """J and discriminants in the components that were fitted on the same rows.

    There the scatter of all rows is diagonal. The leading block of a Cholesky factor is the factor of the leading
    block, so that one factorisation per target serves every k and J is a cumulative sum.
    """
    moments, projection = statistics.moments, principal.projection
    k, n_models = len(principal.variances), len(statistics.right)
    # z of a row about the origin, with a one appended, is that row times `map_`.
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
    """Of the matrix plus a ridge, raised where fewer rows than components leave less than rounding takes away."""
    while True:
        try:
            raised = matrix.copy()
            raised.flat[:: len(raised) + 1] += ridge
            return np.asarray(cholesky(raised, lower=True, check_finite=False))
        except LinAlgError:
            ridge *= 100


def _compress(gaps: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As few rows with the same second moments, for every target."""
    if len(gaps) <= gaps.shape[1]:
        return gaps, missing
    rows, kinds = [], []
    patterns, which = np.unique(missing, axis=0, return_inverse=True)
    for index, pattern in enumerate(patterns):
        own = gaps[which.reshape(-1) == index]
        if len(own) > own.shape[1]:
            own = qr(own, mode="r", check_finite=False)[0][: own.shape[1]]
        rows.append(own)
        kinds.append(np.repeat(pattern[None], len(own), axis=0))
    return np.concatenate(rows), np.concatenate(kinds)
