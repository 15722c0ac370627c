"""L2 logistic regression of many targets on the same features at once, labels masked: truncated Newton on matrices.

Minimises, per target m, the sum over labelled rows of the log loss plus |w|^2 / (2 c), the intercept free: the
objective of scikit-learn's LogisticRegression(C=c), to which tests hold it.

No Hessian is formed. Newton's step is solved by conjugate gradients, whose products with the Hessian are two matrix
products for all targets together; the Gram matrix of the features, factored once and scaled by each target's mean
weight p (1 - p), preconditions them so well that a few products do.
"""

from __future__ import annotations

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
    logits = x @ weights
    value = _loss(logits, weights, y, known, penalty)
    for _ in range(max_iterations):
        p = expit(logits)
        gradient = x.T @ np.where(known, p - y, 0) + penalty * weights
        if (np.abs(gradient).max(axis=0) <= tolerance * n).all():
            break
        curvature = np.where(known, np.maximum(p * (1 - p), 1e-10), 0)
        step = _newton_step(x, curvature, penalty, gram, gradient)
        moved = x @ step
        size = np.ones(len(n))
        for _ in range(20):  # halved, per target, until the loss no longer grows
            worse = _loss(logits - size * moved, weights - size * step, y, known, penalty) > value * (1 + 1e-12)
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        weights, logits = weights - size * step, logits - size * moved
        value = _loss(logits, weights, y, known, penalty)
    return weights


def decision(z: Float[np.ndarray, "queries components"], weights: Float[np.ndarray, "components_and_intercept models"]
             ) -> Float[np.ndarray, "queries models"]:
    """The logit of each target."""
    return z @ weights[:-1] + weights[-1]


def _loss(logits: np.ndarray, weights: np.ndarray, y: np.ndarray, known: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    log_loss = np.where(known, np.logaddexp(0, logits) - y * logits, 0).sum(axis=0)
    return np.asarray(log_loss + 0.5 * (penalty * np.square(weights)).sum(axis=0))


def _newton_step(x: np.ndarray, curvature: np.ndarray, penalty: np.ndarray, gram: tuple[np.ndarray, bool],
                 gradient: np.ndarray, max_iterations: int = 12, relative: float = 1e-3) -> np.ndarray:
    """Solves Hessian_m step_m = gradient_m for all targets m by conjugate gradients, to a relative tolerance.

    Columns that are done get steps of zero.
    """
    scale = np.maximum(curvature.mean(axis=0), 1e-10)
    step, residual = np.zeros_like(gradient), gradient
    z = cho_solve(gram, residual) / scale
    direction, inner = z, (residual * z).sum(axis=0)
    enough = relative**2 * inner
    for _ in range(max_iterations):
        if (inner <= enough).all():
            break
        image = x.T @ (curvature * (x @ direction)) + penalty * direction
        bend = (direction * image).sum(axis=0)
        alpha = np.where(bend > 0, inner / np.maximum(bend, 1e-300), 0)
        step, residual = step + alpha * direction, residual - alpha * image
        z = cho_solve(gram, residual) / scale
        after = (residual * z).sum(axis=0)
        direction = z + np.where(inner > 0, after / np.maximum(inner, 1e-300), 0) * direction
        inner = after
    return step
