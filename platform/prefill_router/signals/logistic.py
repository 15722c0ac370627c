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
    x = np.ones((len(z), z.shape[1] + 1), np.result_type(z, np.float32))
    x[:, :-1] = z
    n_models, width, kind = correct.shape[1], x.shape[1], x.dtype
    target = np.tile(np.arange(n_models), len(ks))  # of each problem
    labelled = np.isfinite(correct).T
    known = labelled.astype(kind)[target]
    y = np.where(labelled, correct.T, 0).astype(kind)[target]
    used = np.repeat([[*(np.arange(width - 1) < k), True] for k in ks], n_models, axis=0).astype(kind)
    penalty = np.repeat([[1 / value] * (width - 1) + [FREE] for value in c], n_models, axis=0).astype(kind)
    squares = np.square(x).sum(axis=0, dtype=np.float64).astype(kind)
    n = np.maximum(known.sum(axis=1, dtype=np.float64), 1)
    weights = np.zeros_like(used) if start is None else start.reshape(used.shape).astype(kind) * used
    logits = weights @ x.T
    p, value = _link(logits, y, known, weights, penalty)
    todo = np.arange(len(weights))
    for _ in range(max_iterations):
        residual = p
        residual -= y[todo]
        residual *= known[todo]
        gradient = (residual @ x + penalty[todo] * weights[todo]) * used[todo]
        far = np.abs(gradient).max(axis=1, initial=0) > tolerance * n[todo]
        if not far.any():
            break
        if not far.all():
            todo, gradient, residual, logits, value = (a[far] for a in (todo, gradient, residual, logits, value))
        yt, kt, wt, pt = y[todo], known[todo], weights[todo], penalty[todo]
        residual += yt * kt  # p again, on labelled rows
        curvature = np.maximum(residual * (kt - residual), 1e-10) * kt
        relative = np.clip(0.3 * tolerance * n[todo] / np.abs(gradient).max(axis=1), 1e-3, 0.03)
        step, moved = _newton_step(x, curvature, pt, used[todo], squares, gradient, relative)
        size = np.ones((len(todo), 1), kind)
        slack = 1e-12 if kind == np.float64 else 1e-6
        for _ in range(20):  # halved, per problem, until the loss no longer grows
            tried = wt - size * step
            p, after = _link(logits - size * moved, yt, kt, tried, pt)
            worse = after > value * (1 + slack)
            if not worse.any():
                break
            size[worse] /= 2
        weights[todo], logits, value = tried, logits - size * moved, after
    return weights.reshape(len(ks), n_models, width)


def decision(z: Float[np.ndarray, "queries components"],
             weights: Float[np.ndarray, "ks models components_and_intercept"]
             ) -> Float[np.ndarray, "ks models queries"]:
    """The logit of each problem."""
    flat = weights.reshape(-1, weights.shape[-1])
    return (flat[:, :-1] @ z.T + flat[:, -1:]).reshape(*weights.shape[:-1], len(z))


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


def _newton_step(x: np.ndarray, curvature: np.ndarray, penalty: np.ndarray, used: np.ndarray, squares: np.ndarray,
                 gradient: np.ndarray, relative: np.ndarray, max_iterations: int = 12
                 ) -> tuple[np.ndarray, np.ndarray]:
    """Solves Hessian step = gradient for all problems by conjugate gradients, to a relative tolerance; and x step.

    Problems that are done get steps of zero.
    """
    inverse = used / (np.maximum(curvature.mean(axis=1, keepdims=True), 1e-10) * squares + penalty)
    step, residual = np.zeros_like(gradient), gradient
    moved = np.zeros_like(curvature)
    z = inverse * residual
    direction, inner = z, (residual * z).sum(axis=1)
    enough = np.square(relative) * inner
    for _ in range(max_iterations):
        if (inner <= enough).all():
            break
        shift = direction @ x.T
        image = ((curvature * shift) @ x + penalty * direction) * used
        bend = (direction * image).sum(axis=1)
        alpha = np.where((bend > 0) & (inner > enough), inner / np.maximum(bend, 1e-30), 0)[:, None].astype(x.dtype)
        step = step + alpha * direction
        shift *= alpha
        moved += shift
        residual = residual - alpha * image
        z = inverse * residual
        after = (residual * z).sum(axis=1)
        direction = z + (after / np.maximum(inner, 1e-30))[:, None].astype(x.dtype) * direction
        inner = after
    return step, moved
