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
        second = np.zeros((len(origin), len(origin)))
        for start in range(0, len(centred), CHUNK):
            chunk = centred[start:start + CHUNK]
            second += chunk.T @ chunk
        return cls(origin, len(centred), centred.sum(axis=0, dtype=np.float64), second)

    def __add__(self, other: Moments) -> Moments:
        return type(self)(self.origin, self.count + other.count, self.total + other.total, self.second + other.second)

    def __sub__(self, other: Moments) -> Moments:
        return type(self)(self.origin, self.count - other.count, self.total - other.total, self.second - other.second)

    @property
    def mean(self) -> Float[np.ndarray, " hidden"]:
        return self.origin + self.total / self.count

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
    """A projection, the variance of each of its components, and a basis from which a similar one is found sooner."""

    projection: Projection
    variances: Float[np.ndarray, " components"]
    basis: Float[np.ndarray, "hidden basis"]


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


def principal_components(moments: Moments, k: int, start: Float[np.ndarray, "hidden start"] | None = None,
                         precision: type[np.floating] = np.float32) -> PrincipalComponents:
    """As `fit_projection`; `start` is the basis of similar moments."""
    k = min(k, len(moments.total))
    correlation, scale = standardised_covariance(moments, precision)
    values, basis = leading_eigenvectors(correlation, k, start)
    variances, vectors = values[:k].astype(np.float64), basis[:, :k]
    strongest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[strongest, np.arange(k)])
    mean_variance = float(variances.mean())
    if mean_variance > 0:
        vectors, variances = vectors / np.sqrt(mean_variance), variances / mean_variance
    else:
        vectors, variances = np.zeros_like(vectors), np.zeros_like(variances)
    projection = Projection(moments.mean.astype(np.float32), scale.astype(np.float32), vectors.astype(np.float32))
    return PrincipalComponents(projection, variances, basis)


def standardised_covariance(moments: Moments, dtype: type[np.floating] = np.float64
                            ) -> tuple[Float[np.ndarray, "hidden hidden"], Float[np.ndarray, " hidden"]]:
    """Covariance of the standardised states and the scale per column; rows of constant columns are zero."""
    mean = moments.total / moments.count
    variance = np.diag(moments.second) / moments.count - np.square(mean)
    # Rounding leaves a constant column with a variance of about eps times its squared offset, not with zero.
    floor = 1e-10 * (np.square(moments.mean) + variance.max(initial=0.0)) + np.finfo(np.float64).tiny
    constant = variance <= floor
    scale = np.where(constant, 1.0, np.sqrt(np.where(constant, 1.0, variance)))
    factor = np.where(constant, 0.0, 1 / scale)
    correlation = np.empty(moments.second.shape, dtype)
    for start in range(0, len(mean), SLAB):
        rows = slice(start, start + SLAB)
        slab = moments.second[rows] / moments.count
        slab -= np.outer(mean[rows], mean)
        slab *= factor[rows, None]
        slab *= factor
        correlation[rows] = slab
    return correlation, scale
