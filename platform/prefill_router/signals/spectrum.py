"""Leading eigenvectors of a covariance: all of them by LAPACK when it is small, only those asked for when it is large.

In: a symmetric positive semidefinite matrix [hidden, hidden], how many are wanted, and possibly a basis near them. Out:
eigenvalues and eigenvectors in descending order. Knows nothing of what the matrix is of.

A large matrix is only multiplied by blocks of vectors (block Krylov with restarts, Rayleigh-Ritz in double precision).
The covariance without a fold differs little from the whole one, whose basis is then a start that saves half the
products.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh, qr

DENSE = 512  # up to this width all eigenvectors at once are cheaper
TOLERANCE = 1e-3  # of residuals, relative to the eigenvalue: eigenvalues are then exact to its square
ROUNDING = 1e-6  # of residuals, relative to the largest eigenvalue: single precision has no more
MAX_ROUNDS = 30


def leading_eigenvectors(matrix: Float[np.ndarray, "hidden hidden"], k: int,
                         start: Float[np.ndarray, "hidden start"] | None = None, tolerance: float = TOLERANCE
                         ) -> tuple[Float[np.ndarray, " basis"], Float[np.ndarray, "hidden basis"]]:
    """At least the k leading eigenpairs, k <= hidden; the rest of the basis, less exact, serves as another's `start`.

    Every residual |A v - e v| of the first k is below `tolerance` e. Falls back to LAPACK where that is not reached.
    """
    width = len(matrix)
    if width <= DENSE or width < 4 * k:
        return _dense(matrix, k)
    block = k + max(k // 4, 16)
    if start is None or start.shape[1] < block:
        start = np.random.default_rng(0).standard_normal((width, block), dtype=np.float32)
    return _krylov(matrix, k, start[:, :block].astype(matrix.dtype), tolerance) or _dense(matrix, k)


def _dense(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    width = len(matrix)
    if width <= 8 * k:  # divide and conquer finds all of them sooner than the other drivers find a part
        values, vectors = eigh(matrix, driver="evd", check_finite=False)
    else:
        values, vectors = eigh(matrix, subset_by_index=(width - k, width - 1), check_finite=False)
    return values[::-1][:k], vectors[:, ::-1][:, :k]


def _krylov(matrix: np.ndarray, k: int, start: np.ndarray, tolerance: float
            ) -> tuple[np.ndarray, np.ndarray] | None:
    """Each round extends the basis by the residuals and by their image, then keeps the best of the whole."""
    block = start.shape[1]
    basis = _orthonormal(start)
    image = matrix @ basis
    for _ in range(MAX_ROUNDS):
        values, mix = np.linalg.eigh((basis.T @ image).astype(np.float64))
        values, mix = values[::-1][:block], mix[:, ::-1][:, :block].astype(matrix.dtype)
        basis, image = basis @ mix, image @ mix
        residual = image - basis * values.astype(matrix.dtype)
        far = np.linalg.norm(residual, axis=0) > np.maximum(tolerance * values, ROUNDING * values[0])
        if not far[:k].any():
            return values, basis
        more = residual[:, far]
        for _ in range(2):
            for _ in range(2):  # once is not enough in floating point, twice is
                more = _orthonormal(more - basis @ (basis.T @ more))
            image_of_more = matrix @ more
            basis, image = np.concatenate([basis, more], axis=1), np.concatenate([image, image_of_more], axis=1)
            more = image_of_more
    return None


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(qr(vectors, mode="economic", overwrite_a=True, check_finite=False)[0])
