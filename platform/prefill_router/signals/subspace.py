"""The leading subspace of a layer key: scaler and PCA without any fold, from states in a few hundred coordinates.

In: states, sorted by fold. Out: `Subspace`: the coordinates of the states, and the scaler and PCA fitted without given
folds. Knows nothing of labels. If the subspace is smaller than the space, the states of a left-out fold take part in
the choice of the subspace, and in nothing else. No library does this: scikit-learn repeats StandardScaler and PCA for
every fold on all columns (measured in benchmarks.probe).

The leading components of all rows, plus some more, span nearly the same space as the components of the rows without one
or two of five folds. There, PCA of these rows is one small generalised eigenproblem (Rayleigh-Ritz): if the columns are
scaled by d instead of s, its directions are orthonormal in the metric B' (d / s)^2 B.
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

LOST = 0.01  # share of the squared norm of a component that may lie outside the subspace
MOST = 256  # largest dimension (or twice the components) if the states are too wide for all eigenvectors


@dataclass(frozen=True)
class Subspace:
    """Orthonormal `basis` of standardised states.

    `factor` is the inverse scale per column over all rows, `total` the moments of all rows, `folds` the sums of each
    fold, which give the scalers without folds.
    """

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
        """A subspace for k components without up to `most_out` folds.

        `centred` are states minus the origin of `total`; `rows` are the rows of each fold.
        """
        correlation, _ = standardised_covariance(total, np.float32)
        factor, k = inverse_scale(total), min(k, len(correlation))
        values, basis = leading_eigenvectors(correlation, k, max(MOST, 2 * k))
        needed = _dimensions(values, k, float(np.count_nonzero(factor)), total.count * (len(rows) / most_out - 1))
        return cls(
            basis[:, :needed], factor, total, tuple(Sums.of_centred(centred[fold], total.origin) for fold in rows)
        )

    def __call__(self, centred: Float[np.ndarray, "queries hidden"]) -> Float[np.ndarray, "queries basis"]:
        """The coordinates of states minus the origin of `total`; their mean over all rows is zero."""
        map_ = (self.basis * self.factor[:, None]).astype(centred.dtype)
        z = centred @ map_
        z -= (self.total.total / self.total.count).astype(centred.dtype) @ map_
        return np.asarray(z)

    def principal_without(self, left_out: Sequence[int], moments: Moments, k: int) -> PrincipalComponents:
        """Scaler and PCA fitted without the folds `left_out`, as a map from coordinates to k components.

        `moments` are the moments of the coordinates of the other folds. A column that is constant in them keeps its
        scale over all rows.
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
    """The number of leading eigenvectors that span all but LOST of the k-th eigenvector without some rows.

    By first-order perturbation theory: without a share s of N rows, the covariance of eigenvectors i and j changes by
    about sqrt(e_i e_j / n), n = N (1 / s - 1), which rotates i towards j by this change divided by e_i - e_j.
    """
    beyond = np.maximum(trace - np.cumsum(values, dtype=np.float64), 0)
    enough = values[k - 1] * beyond / n <= LOST * np.square(values[k - 1] - values)
    enough[: k - 1] = False
    return int(enough.argmax()) + 1 if enough.any() else len(values)
