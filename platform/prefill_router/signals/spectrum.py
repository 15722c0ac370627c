"""Leading eigenvectors of a covariance: by LAPACK if it is small, by a block Krylov method if it is large.

In: a symmetric positive semidefinite matrix [hidden, hidden] and the number k of eigenvectors. Out: eigenvalues and
eigenvectors in descending order. The large case multiplies the matrix by blocks of vectors, with restarts and
Rayleigh-Ritz in float64. SciPy's eigsh multiplies by one vector at a time instead of a block (layer search of
12,000 x 4,096 states: 2.7 s per layer key, python -m benchmarks.probe --hidden 4096).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh, qr

DENSE = 512  # up to this width LAPACK is faster
TOLERANCE = 1e-3  # of a residual relative to its eigenvalue; the relative error of the eigenvalue is its square
ROUNDING = 1e-6  # of a residual relative to the largest eigenvalue: the limit of float32
MAX_ROUNDS = 30


def leading_eigenvectors(
    matrix: Float[np.ndarray, "hidden hidden"], k: int, block: int = 0, tolerance: float = TOLERANCE
) -> tuple[Float[np.ndarray, " basis"], Float[np.ndarray, "hidden basis"]]:
    """The k leading eigenpairs (k <= hidden), followed by less accurate ones.

    The number of pairs is max(block, k + max(k // 4, 16)), at most `hidden`. The residual |A v - e v| of each of the
    first k is at most `tolerance` e. Uses LAPACK if the Krylov method does not reach this.
    """
    width = len(matrix)
    block = min(max(block, k + max(k // 4, 16)), width)
    if width <= DENSE or width <= 4 * block:
        return _dense(matrix, block)
    start = np.random.default_rng(0).standard_normal((width, block), dtype=np.float32).astype(matrix.dtype)
    return _krylov(matrix, k, start, tolerance) or _dense(matrix, block)


def _dense(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    width = len(matrix)
    if width <= 8 * k:  # divide and conquer for all is faster than another driver for k
        values, vectors = eigh(matrix, driver="evd", check_finite=False)
    else:
        values, vectors = eigh(matrix, subset_by_index=(width - k, width - 1), check_finite=False)
    return values[::-1][:k], vectors[:, ::-1][:, :k]


def _krylov(matrix: np.ndarray, k: int, start: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Each round extends the basis by the residuals and their images, then keeps the best vectors of the new basis.

    None if the tolerance is not reached in MAX_ROUNDS rounds.
    """
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
            for _ in range(2):  # in floating point, orthogonalisation needs two passes
                more = _orthonormal(more - basis @ (basis.T @ more))
            image_of_more = matrix @ more
            basis, image = np.concatenate([basis, more], axis=1), np.concatenate([image, image_of_more], axis=1)
            more = image_of_more
    return None


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(qr(vectors, mode="economic", overwrite_a=True, check_finite=False)[0])
