"""Projection: standardise, then PCA to k components (paper Eq. 1), from sums that can be added and subtracted.

In: states [queries, hidden] of one (encoder, layer, pooling). Out: `Projection`, an affine map to k components.
Moments are kept per fold, so that the fit without a fold is the total minus that fold and no state is read twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from prefill_router.signals.spectrum import DENSE, leading_eigenvectors

CHUNK = 4096  # rows whose second moment is summed in the states' precision; the chunks are summed in double
SLAB = 128  # rows of a covariance at work at once: they fit a cache


@dataclass(frozen=True)
class Sums:
    """Count, sum and sum of squares per column about a common `origin`."""

    origin: Float[np.ndarray, " hidden"]
    count: int
    total: Float[np.ndarray, " hidden"]
    squares: Float[np.ndarray, " hidden"]

    @classmethod
    def of_centred(cls, centred: Float[np.ndarray, "queries hidden"], origin: Float[np.ndarray, " hidden"]) -> Sums:
        """Of states from which `origin` was subtracted; their own mean is taken out, lest it drown the squares."""
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
    """Count, sum and second moment about a common `origin`; adding and subtracting them is exact bookkeeping."""

    origin: Float[np.ndarray, " hidden"]
    count: int
    total: Float[np.ndarray, " hidden"]
    second: Float[np.ndarray, "hidden hidden"]

    @classmethod
    def of(cls, states: Float[np.ndarray, "queries hidden"], origin: Float[np.ndarray, " hidden"]) -> Moments:
        origin = origin.astype(states.dtype)
        return cls.of_centred(states - origin, origin)

    @classmethod
    def of_centred(cls, centred: Float[np.ndarray, "queries hidden"], origin: Float[np.ndarray, " hidden"]) -> Moments:
        """Of states from which `origin` was subtracted."""
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
    """z = (x - mean) / scale @ components. A column without variance has scale 1 and weight 0."""

    mean: Float[np.ndarray, " hidden"]
    scale: Float[np.ndarray, " hidden"]
    components: Float[np.ndarray, "hidden components"]

    def __call__(self, states: Float[np.ndarray, "queries hidden"]) -> Float[np.ndarray, "queries components"]:
        return ((states - self.mean) / self.scale) @ self.components


@dataclass(frozen=True)
class PrincipalComponents:
    """A projection, and the variance of each of its components."""

    projection: Projection
    variances: Float[np.ndarray, " components"]


def fold_moments(states: Float[np.ndarray, "queries hidden"], folds: Int[np.ndarray, " queries"]) -> list[Moments]:
    """Moments of each fold about one common origin."""
    origin = states.mean(axis=0, dtype=np.float64)
    return [Moments.of(states[folds == fold], origin) for fold in range(int(folds.max()) + 1)]


def fit_projection(moments: Moments, k: int) -> Projection:
    """The projection to min(k, hidden) principal components of the standardised states.

    Each component's sign makes its largest weight positive, so that equal moments give equal maps. Components are
    scaled by one common factor to unit mean variance: their relative variances, which rank them, stay.
    """
    precision = np.float64 if len(moments.total) <= DENSE else np.float32
    return principal_components(moments, k, precision=precision).projection


def principal_components(moments: Moments, k: int, precision: type[np.floating] = np.float32) -> PrincipalComponents:
    """As `fit_projection`, with the components' variances."""
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
    """Both divided by the common factor that makes the components' mean variance one; zero where there is none."""
    mean = float(variances.mean(dtype=np.float64))
    if mean <= 0:
        return np.zeros_like(vectors), np.zeros(len(variances))
    return vectors / np.sqrt(mean), variances.astype(np.float64) / mean


def inverse_scale(moments: Moments | Sums) -> Float[np.ndarray, " hidden"]:
    """What a column is multiplied by to have unit variance; 0 for a constant one."""
    variance = moments.squares / moments.count - np.square(moments.total / moments.count)
    # Rounding leaves a constant column with a variance of about eps times its squared offset, not with zero.
    floor = 1e-10 * (np.square(moments.mean) + variance.max(initial=0.0)) + np.finfo(np.float64).tiny
    constant = variance <= floor
    return np.where(constant, 0.0, 1 / np.sqrt(np.where(constant, 1.0, variance)))


def standardised_covariance(
    moments: Moments, dtype: type[np.floating] = np.float64
) -> tuple[Float[np.ndarray, "hidden hidden"], Float[np.ndarray, " hidden"]]:
    """Covariance of the standardised states and the scale per column; rows of constant columns are zero."""
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
