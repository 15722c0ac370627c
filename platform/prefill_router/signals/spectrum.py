"""Leading eigenvectors of a covariance: all of them by LAPACK when it is small, only those asked for when it is large.

In: a symmetric positive semidefinite matrix [hidden, hidden], and how many are wanted. Out: eigenvalues and
eigenvectors in descending order. Knows nothing of what the matrix is of.

A large matrix is only multiplied by blocks of vectors (block Krylov with restarts, Rayleigh-Ritz in double precision).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh, qr

DENSE = 512  # up to this width all eigenvectors at once are cheaper
TOLERANCE = 1e-3  # of residuals, relative to the eigenvalue: eigenvalues are then exact to its square
ROUNDING = 1e-6  # of residuals, relative to the largest eigenvalue: single precision has no more
MAX_ROUNDS = 30


def leading_eigenvectors(
    matrix: Float[np.ndarray, "hidden hidden"], k: int, block: int = 0, tolerance: float = TOLERANCE
) -> tuple[Float[np.ndarray, " basis"], Float[np.ndarray, "hidden basis"]]:
    """The k leading eigenpairs, k <= hidden, and more that may be less exact: a quarter, or up to `block` in all.

    Every residual |A v - e v| of the first k is below `tolerance` e. Falls back to LAPACK where that is not reached.
    """
    width = len(matrix)
    block = min(max(block, k + max(k // 4, 16)), width)
    if width <= DENSE or width <= 4 * block:
        return _dense(matrix, block)
    start = np.random.default_rng(0).standard_normal((width, block), dtype=np.float32).astype(matrix.dtype)
    return _krylov(matrix, k, start, tolerance) or _dense(matrix, block)


def _dense(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    width = len(matrix)
    if width <= 8 * k:  # divide and conquer finds all of them sooner than the other drivers find a part
        values, vectors = eigh(matrix, driver="evd", check_finite=False)
    else:
        values, vectors = eigh(matrix, subset_by_index=(width - k, width - 1), check_finite=False)
    return values[::-1][:k], vectors[:, ::-1][:, :k]


def _krylov(matrix: np.ndarray, k: int, start: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray] | None:
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
