"""The leading subspace of a block: scaler and PCA without any folds, from states in a few hundred coordinates.

In: states, the rows of a fold together. Out: `Subspace`, which gives the states' coordinates in it, and what scaler and
PCA are where folds are left out. Knows nothing of labels. Where the subspace is not all there is, the states of a fold
left out have had a part in choosing it, and in nothing else.

The leading components of all rows, and some more, span nearly all that the components of any four of five folds do.
There PCA of the others is one small eigenproblem (Rayleigh-Ritz): with columns scaled by d where all rows together
have s, its directions are orthonormal in the metric B' (d / s)^2 B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh

from prefill_router.signals.projection import (
    Moments,
    PrincipalComponents,
    Projection,
    Sums,
    inverse_scale,
    standardised_covariance,
    unit_mean_variance,
)
from prefill_router.signals.spectrum import leading_eigenvectors

LOST = 0.01  # of a component's square that may lie outside
MOST = 256  # dimensions, or twice the components, where the states are too wide for all eigenvectors


@dataclass(frozen=True)
class Subspace:
    """Orthonormal `basis` of standardised states, and the sums over each fold from which scalers follow."""

    basis: Float[np.ndarray, "hidden basis"]
    factor: Float[np.ndarray, " hidden"]
    total: Moments
    folds: tuple[Sums, ...]

    @classmethod
    def of(
        cls,
        centred: Float[np.ndarray, "queries hidden"],
        total: Moments,
        rows: Sequence[slice],
        k: int,
        most_out: int = 1,
    ) -> Subspace:
        """One that holds k components of all folds but `most_out`; `centred` is about the origin of `total`."""
        correlation, _ = standardised_covariance(total, np.float32)
        factor, k = inverse_scale(total), min(k, len(correlation))
        values, basis = leading_eigenvectors(correlation, k, max(MOST, 2 * k))
        needed = _dimensions(values, k, float(np.count_nonzero(factor)), total.count * (len(rows) / most_out - 1))
        return cls(
            basis[:, :needed], factor, total, tuple(Sums.of_centred(centred[fold], total.origin) for fold in rows)
        )

    def __call__(self, centred: Float[np.ndarray, "queries hidden"]) -> Float[np.ndarray, "queries basis"]:
        """The states' coordinates, their mean at zero."""
        map_ = (self.basis * self.factor[:, None]).astype(centred.dtype)
        z = centred @ map_
        z -= (self.total.total / self.total.count).astype(centred.dtype) @ map_
        return np.asarray(z)

    def principal_without(self, left_out: Sequence[int], moments: Moments, k: int) -> PrincipalComponents:
        """Of coordinates: what scaler and PCA fitted without those folds make of them. `moments` are of the others.

        A column that is constant without them keeps its scale: it has no variance to weigh.
        """
        kept = [fold for index, fold in enumerate(self.folds) if index not in left_out]
        factor = inverse_scale(sum(kept[1:], kept[0]))
        varies = (factor > 0) & (self.factor > 0)
        stretch = np.where(varies, self.factor / np.where(varies, factor, 1), 1).astype(self.basis.dtype)
        stretched = self.basis * stretch[:, None]
        values, vectors = eigh(moments.covariance, stretched.T @ stretched, check_finite=False)
        vectors, variances = unit_mean_variance(vectors[:, ::-1][:, :k], values[::-1][:k])
        return PrincipalComponents(Projection(moments.mean, np.ones(len(vectors)), vectors), variances)


def _dimensions(values: np.ndarray, k: int, trace: float, n: float) -> int:
    """How many leading eigenvectors hold all but LOST of the k-th one after leaving rows out, by perturbation theory.

    Leaving a share s of N rows out changes a covariance by about sqrt(e_i e_j / n), n = N (1 / s - 1), between two of
    its eigenvectors; that turns i by that much, divided by e_i - e_j, towards j.
    """
    beyond = np.maximum(trace - np.cumsum(values, dtype=np.float64), 0)
    enough = values[k - 1] * beyond / n <= LOST * np.square(values[k - 1] - values)
    enough[: k - 1] = False
    return int(enough.argmax()) + 1 if enough.any() else len(values)
