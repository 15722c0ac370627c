"""Projection: standardise, then PCA to k components (paper Eq. 1), from moments that can be added and subtracted.

In: states [queries, hidden] of one layer key. Out: `Projection`, an affine map to k components. The moments are kept
per fold: the fit without a fold uses the total minus that fold, and every state is read once. No library subtracts
moments: StandardScaler and PCA of scikit-learn need all rows for every fold (measured in benchmarks.probe).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from prefill_router.signals.spectrum import DENSE, leading_eigenvectors

CHUNK = 4096  # rows whose second moment is summed in the precision of the states; chunks are summed in float64
BLOCK = 65_536  # rows projected at a time
SLAB = 128  # rows of a covariance processed at a time, small enough for the CPU cache


@dataclass(frozen=True)
class Sums:
    """Count, sum and sum of squares per column, about `origin`. Only objects with the same origin can be added."""

    origin: Float[np.ndarray, " hidden"]
    count: int
    total: Float[np.ndarray, " hidden"]
    squares: Float[np.ndarray, " hidden"]

    @classmethod
    def of_centred(cls, centred: Float[np.ndarray, "queries hidden"], origin: Float[np.ndarray, " hidden"]) -> Sums:
        """The sums of states minus `origin`. Squares are taken about the mean of the rows, to limit cancellation."""
        ones = np.ones(len(centred), centred.dtype)
        mean = ones @ centred / len(centred)
        rest = centred - mean
        mean, left = mean.astype(np.float64), ones @ rest
        return cls(
            origin,
            len(centred),
            len(centred) * mean + left,
            np.einsum("ij,ij->j", rest, rest) + mean * (len(centred) * mean + 2 * left),
        )

    def __add__(self, other: Sums) -> Sums:
        return type(self)(self.origin, self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Float[np.ndarray, " hidden"]:
        return self.origin + self.total / self.count


@dataclass(frozen=True)
class Moments:
    """Count, sum and second moment about `origin`.

    Objects with the same origin can be added and subtracted: the moments of all rows minus those of a fold are the
    moments of the other folds.
    """

    origin: Float[np.ndarray, " hidden"]
    count: int
    total: Float[np.ndarray, " hidden"]
    second: Float[np.ndarray, "hidden hidden"]

    @classmethod
    def of(cls, states: Float[np.ndarray, "queries hidden"], origin: Float[np.ndarray, " hidden"]) -> Moments:
        """The moments of states about `origin`."""
        origin = origin.astype(states.dtype)
        return cls.of_centred(states - origin, origin)

    @classmethod
    def of_centred(cls, centred: Float[np.ndarray, "queries hidden"], origin: Float[np.ndarray, " hidden"]) -> Moments:
        """The moments of states minus `origin`."""
        total, second = np.zeros(len(origin)), np.zeros((len(origin), len(origin)))
        for start in range(0, len(centred), CHUNK):
            chunk = centred[start : start + CHUNK]
            total += np.ones(len(chunk), chunk.dtype) @ chunk
            second += chunk.T @ chunk
        return cls(origin, len(centred), total, second)

    def __add__(self, other: Moments) -> Moments:
        return type(self)(self.origin, self.count + other.count, self.total + other.total, self.second + other.second)

    def __sub__(self, other: Moments) -> Moments:
        return type(self)(self.origin, self.count - other.count, self.total - other.total, self.second - other.second)

    @property
    def mean(self) -> Float[np.ndarray, " hidden"]:
        return self.origin + self.total / self.count

    @property
    def squares(self) -> Float[np.ndarray, " hidden"]:
        return np.diag(self.second)

    @property
    def covariance(self) -> Float[np.ndarray, "hidden hidden"]:
        mean = self.total / self.count
        return self.second / self.count - np.outer(mean, mean)


@dataclass(frozen=True)
class Projection:
    """z = (x - mean) / scale @ components. A column without variance has scale 1 and weight 0 in all components."""

    mean: Float[np.ndarray, " hidden"]
    scale: Float[np.ndarray, " hidden"]
    components: Float[np.ndarray, "hidden components"]

    def __call__(self, states: Float[np.ndarray, "queries hidden"]) -> Float[np.ndarray, "queries components"]:
        parts = [((states[rows] - self.mean) / self.scale) @ self.components for rows in blocks(len(states))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class PrincipalComponents:
    """A projection and the variance of each of its components."""

    projection: Projection
    variances: Float[np.ndarray, " components"]


def blocks(rows: int) -> Iterator[slice]:
    """At most BLOCK rows at a time, so that temporary arrays stay small."""
    yield from (slice(start, start + BLOCK) for start in range(0, max(rows, 1), BLOCK))


def concatenate_features(projected: Sequence[Float[np.ndarray, "queries _"]]) -> Float[np.ndarray, "queries features"]:
    """Paper Eq. 1: the projected states of all layer keys, concatenated, float32."""
    return np.concatenate(projected, axis=1, dtype=np.float32)


def fold_moments(states: Float[np.ndarray, "queries hidden"], folds: Int[np.ndarray, " queries"]) -> list[Moments]:
    """`Moments` (count, sum, second moment) of the states of every fold, centred on the mean over all folds."""
    origin = states.mean(axis=0, dtype=np.float64)
    return [Moments.of(states[folds == fold], origin) for fold in range(int(folds.max()) + 1)]


def project_layer(
    x: Float[np.ndarray, "queries hidden"], train: np.ndarray, folds: np.ndarray, wanted: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, Projection, np.ndarray]]:
    """Yields (fit, k, projection, projected states of all queries) for every wanted (fit, k).

    Fit 0 uses all training rows, fit 1 + f leaves out fold f.
    """
    moments = fold_moments(x[train], folds)
    total = sum(moments[1:], moments[0])
    for index, k in wanted:
        projection = fit_projection(total - moments[index - 1] if index else total, k)
        yield index, k, projection, projection(x)


def fit_projection(moments: Moments, k: int) -> Projection:
    """The projection to the min(k, hidden) leading principal components of the standardised states.

    The sign of each component makes its largest weight positive, so that equal moments give equal projections. All
    components share one factor that makes their mean variance 1 (docs/equations.md, Eq. 1).
    """
    precision = np.float64 if len(moments.total) <= DENSE else np.float32
    return principal_components(moments, k, precision=precision).projection


def principal_components(moments: Moments, k: int, precision: type[np.floating] = np.float32) -> PrincipalComponents:
    """As `fit_projection`, with the variances of the components; `precision` is that of the eigenvectors."""
    k = min(k, len(moments.total))
    correlation, scale = standardised_covariance(moments, precision)
    values, vectors = leading_eigenvectors(correlation, k)
    vectors = vectors[:, :k]
    strongest = np.abs(vectors).argmax(axis=0)
    vectors, variances = unit_mean_variance(vectors * np.sign(vectors[strongest, np.arange(k)]), values[:k])
    projection = Projection(moments.mean.astype(np.float32), scale.astype(np.float32), vectors.astype(np.float32))
    return PrincipalComponents(projection, variances)


def unit_mean_variance(
    vectors: Float[np.ndarray, "hidden components"], variances: Float[np.ndarray, " components"]
) -> tuple[Float[np.ndarray, "hidden components"], Float[np.ndarray, " components"]]:
    """Eigenvectors and variances, rescaled to a mean variance of 1; all zero if no component has variance."""
    mean = float(variances.mean(dtype=np.float64))
    if mean <= 0:
        return np.zeros_like(vectors), np.zeros(len(variances))
    return vectors / np.sqrt(mean), variances.astype(np.float64) / mean


def inverse_scale(moments: Moments | Sums) -> Float[np.ndarray, " hidden"]:
    """The factor per column that gives it unit variance; 0 for a constant column."""
    variance = moments.squares / moments.count - np.square(moments.total / moments.count)
    # By rounding, a constant column has a variance of about eps times its squared offset instead of zero.
    floor = 1e-10 * (np.square(moments.mean) + variance.max(initial=0.0)) + np.finfo(np.float64).tiny
    constant = variance <= floor
    return np.where(constant, 0.0, 1 / np.sqrt(np.where(constant, 1.0, variance)))


def standardised_covariance(
    moments: Moments, dtype: type[np.floating] = np.float64
) -> tuple[Float[np.ndarray, "hidden hidden"], Float[np.ndarray, " hidden"]]:
    """Covariance of the standardised states, and the scale per column.

    Rows and columns of constant columns are zero, and their scale is 1.
    """
    mean, factor = moments.total / moments.count, inverse_scale(moments)
    correlation = np.empty(moments.second.shape, dtype)
    for start in range(0, len(mean), SLAB):
        rows = slice(start, start + SLAB)
        slab = moments.second[rows] / moments.count
        slab -= np.outer(mean[rows], mean)
        slab *= factor[rows, None]
        slab *= factor
        correlation[rows] = slab
    return correlation, 1 / np.where(factor > 0, factor, 1)
