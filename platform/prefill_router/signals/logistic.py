"""L2 logistic regression of many targets on nested feature sets at once, labels masked: truncated Newton on matrices.

In: features z [queries, components], labels [queries, models], and the numbers k of leading components to use. A
problem is a pair (k, target); all share z, the weights beyond k held at zero. Minimises, per problem, the sum over
labelled rows of the log loss plus |w|^2 / (2 c), the intercept free: the objective of scikit-learn's
LogisticRegression(C=c), to which tests hold it. Computes in the precision of z.

No Hessian is formed. Newton's step is solved by conjugate gradients, whose products with the Hessians are two matrix
products for all problems together. Principal components are uncorrelated, so their second moments, scaled by each
problem's mean weight p (1 - p), precondition them so well that a few products do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

FREE = 1e-8  # the intercept's penalty: enough to keep a one-class target finite


def fit_logistic(z: Float[np.ndarray, "queries components"], correct: Float[np.ndarray, "queries models"],
                 c: float = 1.0, max_iterations: int = 30, tolerance: float = 1e-6
                 ) -> Float[np.ndarray, "components_and_intercept models"]:
    """Weights on all components, the intercept last. Labels and stopping as in `fit_nested_logistic`."""
    return fit_nested_logistic(z, correct, [z.shape[1]], np.array([c]), None, max_iterations, tolerance)[0].T


def fit_nested_logistic(z: Float[np.ndarray, "queries components"], correct: Float[np.ndarray, "queries models"],
                        ks: Sequence[int], c: Float[np.ndarray, " ks"],
                        start: Float[np.ndarray, "ks models components_and_intercept"] | None = None,
                        max_iterations: int = 30, tolerance: float = 1e-6
                        ) -> Float[np.ndarray, "ks models components_and_intercept"]:
    """Weights of every (k, target), the intercept last; those beyond k are zero. `c` has one value per k.

    NaN labels are left out; labels may be soft (any value in [0, 1]). `start` may be near the solution. Stops when no
    gradient, per labelled row, exceeds `tolerance`, or rounding hides it.
    """
    z = z.astype(np.result_type(z, np.float32), copy=False)
    n_models, width, kind = correct.shape[1], z.shape[1] + 1, z.dtype
    target = np.tile(np.arange(n_models), len(ks))  # of each problem
    labelled = np.isfinite(correct).T
    known = labelled.astype(kind)[target]
    y = np.where(labelled, correct.T, 0).astype(kind)[target]
    used = np.repeat([[*(np.arange(width - 1) < k), True] for k in ks], n_models, axis=0).astype(kind)
    penalty = np.repeat([[1 / value] * (width - 1) + [FREE] for value in c], n_models, axis=0).astype(kind)
    squares = np.append(np.einsum("ij,ij->j", z, z), len(z)).astype(kind)
    slack = 1e-12 if kind == np.float64 else 1e-6
    n = np.maximum(known.sum(axis=1, dtype=np.float64), 1)
    weights = np.zeros_like(used) if start is None else start.reshape(used.shape).astype(kind) * used
    logits = _logits(z, weights)
    p, value = _link(logits, y, known, weights, penalty)
    at, todo = weights, np.arange(len(weights))  # the weights of the problems still to do
    for _ in range(max_iterations):
        slope = p - y
        slope *= known
        gradient = (_pull(z, slope) + penalty * at) * used
        steepest = np.abs(gradient).max(axis=1) / n
        far = steepest > tolerance
        if not far.any():
            break
        if not far.all():
            todo, at, logits, p, value, y, known, used, penalty, n, gradient, steepest = (
                array[far] for array in (todo, at, logits, p, value, y, known, used, penalty, n, gradient, steepest))
        # Newton's own error is of the order of the gradient: nothing is gained by solving for the step more exactly.
        relative = np.minimum(np.maximum(steepest, 0.3 * tolerance / steepest), 0.1)
        curvature = np.maximum(p * (1 - p), 1e-10)
        curvature *= known
        step, moved = _newton_step(z, curvature, penalty, used, squares, gradient, relative)
        size = np.ones((len(todo), 1), kind)
        for _ in range(20):  # halved, per problem, until the loss no longer grows
            tried, there = at - size * step, logits - size * moved
            p, after = _link(there, y, known, tried, penalty)
            worse = after > value * (1 + slack)
            if not worse.any():
                break
            size[worse] /= 2
        weights[todo], at, logits, value = tried, tried, there, after
    return weights.reshape(len(ks), n_models, width)


def decision(z: Float[np.ndarray, "queries components"],
             weights: Float[np.ndarray, "ks models components_and_intercept"]
             ) -> Float[np.ndarray, "ks models queries"]:
    """The logit of each problem."""
    return _logits(z, weights.reshape(-1, weights.shape[-1])).reshape(*weights.shape[:-1], len(z))


def _logits(z: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[problems, queries]; the intercept stands apart, for a column of ones beside z would cost alignment."""
    product = weights[:, :-1] @ z.T
    product += weights[:, -1:]
    return np.asarray(product)


def _pull(z: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """What slopes [problems, queries] of the logits mean for the weights: the transpose of `_logits`."""
    return np.column_stack([slope @ z, slope.sum(axis=1)])


def _link(logits: np.ndarray, y: np.ndarray, known: np.ndarray, weights: np.ndarray, penalty: np.ndarray
          ) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [problems, queries] and the loss [problems], from one exponential."""
    small = np.exp(-np.abs(logits))
    p = np.where(logits >= 0, 1, small) / (1 + small)
    loss = np.log1p(small, out=small)
    loss += np.maximum(logits, 0)
    loss -= y * logits
    loss *= known
    return p, loss.sum(axis=1, dtype=np.float64) + 0.5 * (penalty * np.square(weights)).sum(axis=1, dtype=np.float64)


def _newton_step(z: np.ndarray, curvature: np.ndarray, penalty: np.ndarray, used: np.ndarray, squares: np.ndarray,
                 gradient: np.ndarray, relative: np.ndarray, max_iterations: int = 12
                 ) -> tuple[np.ndarray, np.ndarray]:
    """Solves Hessian step = gradient for all problems by conjugate gradients, to a relative tolerance.

    Also returns what the step adds to the logits. Problems that are done wait for the others.
    """
    inverse = used / (np.maximum(curvature.mean(axis=1, keepdims=True), 1e-10) * squares + penalty)
    step, residual, moved = np.zeros_like(gradient), gradient, np.zeros_like(curvature)
    direction = ahead = inverse * residual
    inner = (residual * ahead).sum(axis=1)
    enough = np.square(relative) * inner
    for _ in range(max_iterations):
        if (inner <= enough).all():
            break
        shift = _logits(z, direction)
        image = (_pull(z, curvature * shift) + penalty * direction) * used
        bend = (direction * image).sum(axis=1)
        length = np.where((bend > 0) & (inner > enough), inner / np.maximum(bend, 1e-30), 0).astype(z.dtype)[:, None]
        shift *= length
        moved += shift
        step, residual = step + length * direction, residual - length * image
        ahead = inverse * residual
        after = (residual * ahead).sum(axis=1)
        direction = ahead + (after / np.maximum(inner, 1e-30)).astype(z.dtype)[:, None] * direction
        inner = after
    return step, moved
