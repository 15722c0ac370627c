"""L2 logistic regression of many targets on the same features at once, labels masked: truncated Newton on matrices.

Minimises, per target m, the sum over labelled rows of the log loss plus |w|^2 / (2 c), the intercept free: the
objective of scikit-learn's LogisticRegression(C=c), to which tests hold it.

No Hessian is formed. Newton's step is solved by conjugate gradients, whose products with the Hessian are two matrix
products for all targets together; the Gram matrix of the features, factored once and scaled by each target's mean
weight p (1 - p), preconditions them so well that a few products do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit

FREE = 1e-8  # the intercept's penalty: enough to keep a one-class target finite


def fit_logistic(z: Float[np.ndarray, "queries components"], correct: Float[np.ndarray, "queries models"],
                 c: float = 1.0, max_iterations: int = 30, tolerance: float = 1e-6
                 ) -> Float[np.ndarray, "components_and_intercept models"]:
    """Weights, the intercept last. NaN labels are left out; labels may be soft (any value in [0, 1]).

    Stops when no gradient, per labelled row, exceeds `tolerance`.
    """
    x = np.column_stack([z, np.ones(len(z))]).astype(np.float64)
    known = np.isfinite(correct)
    y = np.where(known, correct, 0.0).astype(np.float64)
    n = np.maximum(known.sum(axis=0), 1)
    penalty = np.full((x.shape[1], 1), 1.0 / c)
    penalty[-1] = FREE
    gram = cho_factor(x.T @ x + np.diag(penalty[:, 0] + 1e-9 * max(len(x), 1)))
    weights = np.zeros((x.shape[1], y.shape[1]))

    def loss(logits: np.ndarray, at: np.ndarray) -> np.ndarray:
        log_loss = np.where(known, np.logaddexp(0, logits) - y * logits, 0).sum(axis=0)
        return np.asarray(log_loss + 0.5 * (penalty * at * at).sum(axis=0))

    logits = x @ weights
    value = loss(logits, weights)
    for _ in range(max_iterations):
        p = expit(logits)
        gradient = x.T @ np.where(known, p - y, 0) + penalty * weights
        if (np.abs(gradient).max(axis=0) <= tolerance * n).all():
            break
        curvature = np.where(known, np.maximum(p * (1 - p), 1e-10), 0)
        scale = np.maximum(curvature.sum(axis=0) / len(x), 1e-10)
        step = _conjugate_gradients(lambda v, w=curvature: x.T @ (w * (x @ v)) + penalty * v,
                                    lambda r, s=scale: cho_solve(gram, r) / s, gradient)
        moved = x @ step
        size = np.ones(len(n))  # halved, per target, until the loss no longer grows
        for _ in range(20):
            new = loss(logits - size * moved, weights - size * step)
            worse = new > value + 1e-12 * np.abs(value)
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        weights, logits = weights - size * step, logits - size * moved
        value = loss(logits, weights)
    return weights


def decision(z: Float[np.ndarray, "queries components"], weights: Float[np.ndarray, "components_and_intercept models"]
             ) -> Float[np.ndarray, "queries models"]:
    """The logit of each target."""
    return z @ weights[:-1] + weights[-1]


def _conjugate_gradients(product: Callable[[np.ndarray], np.ndarray], precondition: Callable[[np.ndarray], np.ndarray],
                         right: np.ndarray, max_iterations: int = 12, relative: float = 1e-3) -> np.ndarray:
    """Solves A_m x_m = right_m for all columns m together; columns that are done get steps of zero."""
    solution = np.zeros_like(right)
    residual = right.copy()
    z = precondition(residual)
    direction, inner = z, (residual * z).sum(axis=0)
    start = inner
    for _ in range(max_iterations):
        if (inner <= relative ** 2 * start).all():
            break
        image = product(direction)
        curvature = (direction * image).sum(axis=0)
        alpha = np.where(curvature > 0, inner / np.maximum(curvature, 1e-300), 0)
        solution = solution + alpha * direction
        residual = residual - alpha * image
        z = precondition(residual)
        after = (residual * z).sum(axis=0)
        direction = z + np.where(inner > 0, after / np.maximum(inner, 1e-300), 0) * direction
        inner = after
    return solution
