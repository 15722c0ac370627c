"""Projection: standardise, then PCA to k components (paper Eq. 1), from sums that can be added and subtracted.

In: states [queries, hidden] of one (encoder, layer, pooling). Out: `Projection`, an affine map to k components.
Moments are kept per fold, so that the fit without a fold is the total minus that fold and no state is read twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh


@dataclass(frozen=True)
class Moments:
    """Count, sum and second moment about a common `origin`; adding and subtracting them is exact bookkeeping."""

    origin: Float[np.ndarray, " hidden"]
    count: int
    total: Float[np.ndarray, " hidden"]
    second: Float[np.ndarray, "hidden hidden"]

    @classmethod
    def of(cls, states: Float[np.ndarray, "queries hidden"], origin: Float[np.ndarray, " hidden"]) -> Moments:
        centred = states.astype(np.float64) - origin
        return cls(origin, len(states), centred.sum(axis=0), centred.T @ centred)

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


def fit_projection(moments: Moments, k: int) -> Projection:
    """The projection to min(k, hidden) principal components of the standardised states.

    Each component's sign makes its largest weight positive, so that equal moments give equal maps. Components are
    scaled by one common factor to unit mean variance: their relative variances, which rank them, stay.
    """
    correlation, scale = standardised_covariance(moments)
    width = len(correlation)
    eigenvalues, vectors = eigh(correlation, subset_by_index=(max(width - k, 0), width - 1))
    vectors = vectors[:, ::-1]
    strongest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[strongest, np.arange(vectors.shape[1])])
    mean_variance = eigenvalues.mean()
    vectors = vectors / np.sqrt(mean_variance) if mean_variance > 0 else np.zeros_like(vectors)
    return Projection(moments.mean.astype(np.float32), scale.astype(np.float32), vectors.astype(np.float32))


def standardised_covariance(moments: Moments
                            ) -> tuple[Float[np.ndarray, "hidden hidden"], Float[np.ndarray, " hidden"]]:
    """Covariance of the standardised states and the scale per column; rows of constant columns are zero."""
    covariance = moments.covariance
    variance = np.diag(covariance).copy()
    # Rounding leaves a constant column with a variance of about eps times its squared offset, not with zero.
    floor = 1e-10 * (np.square(moments.mean) + variance.max(initial=0.0)) + np.finfo(np.float64).tiny
    constant = variance <= floor
    scale = np.where(constant, 1.0, np.sqrt(np.where(constant, 1.0, variance)))
    correlation = covariance / np.outer(scale, scale)
    correlation[constant, :] = 0
    correlation[:, constant] = 0
    return correlation, scale
