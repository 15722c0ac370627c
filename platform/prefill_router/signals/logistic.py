"""L2 logistic regression of many targets on nested feature sets at once, labels masked: L-BFGS on matrices.

In: features z [queries, components], labels [queries, models], and the numbers k of leading components to use. A
problem is a pair (k, target); all share z, the weights beyond k held at zero. Minimises, per problem, the sum over
labelled rows of the log loss plus |w|^2 / (2 c), the intercept free: the objective of scikit-learn's
LogisticRegression(C=c), to which tests hold it. Computes in the precision of z.

An iteration is two matrix products for all problems together. Principal components are uncorrelated: their second
moments, times a problem's mean weight p (1 - p), come so near its Hessian that a step of length one nearly always fits
and half a dozen iterations do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

FREE = 1e-8  # the intercept's penalty: enough to keep a one-class target finite
MEMORY = 8  # steps from which L-BFGS learns curvature
OVERSHOT = 0.9  # of the slope before a step may be met, reversed, after it; the loss has fallen for less than one


def fit_logistic(z: Float[np.ndarray, "queries components"], correct: Float[np.ndarray, "queries models"],
                 c: float = 1.0, max_iterations: int = 200, tolerance: float = 1e-6
                 ) -> Float[np.ndarray, "components_and_intercept models"]:
    """Weights on all components, the intercept last. Labels and stopping as in `fit_nested_logistic`."""
    return fit_nested_logistic(z, correct, [z.shape[1]], np.array([c]), None, max_iterations, tolerance)[0].T


def fit_nested_logistic(z: Float[np.ndarray, "queries components"], correct: Float[np.ndarray, "queries models"],
                        ks: Sequence[int], c: Float[np.ndarray, " ks"],
                        start: Float[np.ndarray, "ks models components_and_intercept"] | None = None,
                        max_iterations: int = 200, tolerance: float = 1e-6
                        ) -> Float[np.ndarray, "ks models components_and_intercept"]:
    """Weights of every (k, target), the intercept last; those beyond k are zero. `c` has one value per k.

    NaN labels are left out; labels may be soft (any value in [0, 1]). `start` may be near the solution. A problem is
    done when no gradient, per labelled row, exceeds `tolerance`.
    """
    z = z.astype(np.result_type(z, np.float32), copy=False)
    n_models, width, kind = correct.shape[1], z.shape[1] + 1, z.dtype
    target = np.tile(np.arange(n_models), len(ks))  # of each problem
    labelled = np.isfinite(correct).T
    half = (0.5 * labelled).astype(kind)[target]  # p - y = tanh(logit / 2) / 2 - (y - 1/2)
    y = np.where(labelled, correct.T - 0.5, 0).astype(kind)[target]
    used = np.repeat([[*(np.arange(width - 1) < k), True] for k in ks], n_models, axis=0)
    penalty = np.repeat([[1 / value] * (width - 1) + [FREE] for value in c], n_models, axis=0).astype(kind)
    n = np.maximum(labelled.sum(axis=1), 1)[target].astype(kind)
    weights = np.zeros(used.shape, kind) if start is None else np.where(used, start.reshape(used.shape), 0).astype(kind)
    squares = np.append(np.einsum("ij,ij->j", z, z), len(z)).astype(kind) / max(len(z), 1)
    slope = _slope(z, weights, half, y)
    off = slope + y  # p - 1/2
    mean_weight = np.maximum(0.25 - np.einsum("ij,ij->i", off, off) / n, 1e-4)
    inverse = (used / ((mean_weight * n)[:, None] * squares + penalty)).astype(kind)
    at, gradient = weights, _gradient(z, weights, slope, penalty, used)
    history: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # steps, changes of gradient, 1 / their products
    step = -inverse * gradient
    todo = np.arange(len(weights))
    for _ in range(max_iterations):
        far = np.abs(gradient).max(axis=1) > tolerance * n
        if not far.any():
            break
        if not far.all():
            todo, at, gradient, step, half, y, used, penalty, n, inverse = (
                array[far] for array in (todo, at, gradient, step, half, y, used, penalty, n, inverse))
            history = [(s[far], g[far], product[far]) for s, g, product in history]
        tried = at + step
        there = _gradient(z, tried, _slope(z, tried, half, y), penalty, used)
        before, after = (gradient * step).sum(axis=1), (there * step).sum(axis=1)
        overshot = after > -OVERSHOT * before
        change = there - gradient
        product = np.where(overshot, np.inf, np.maximum(after - before, np.finfo(kind).tiny))
        history = [*history[1 - MEMORY:], (step, change, (1 / product).astype(kind)[:, None])]
        shorter = (before / np.where(overshot, before - after, 1))[:, None].astype(kind) * step  # least on the line
        at, gradient = (np.where(overshot[:, None], old, new) for old, new in ((at, tried), (gradient, there)))
        step = np.where(overshot[:, None], shorter, _direction(gradient, inverse, history))
        weights[todo] = at
    return weights.reshape(len(ks), n_models, width)


def decision(z: Float[np.ndarray, "queries components"],
             weights: Float[np.ndarray, "ks models components_and_intercept"]
             ) -> Float[np.ndarray, "ks models queries"]:
    """The logit of each problem."""
    flat = weights.reshape(-1, weights.shape[-1])
    return (flat[:, :-1] @ z.T + flat[:, -1:]).reshape(*weights.shape[:-1], len(z))


def _slope(z: np.ndarray, weights: np.ndarray, half: np.ndarray, y: np.ndarray) -> np.ndarray:
    """p - y [problems, queries], 0 where unlabelled. The intercept stands apart: a column of ones breaks alignment."""
    slope = (0.5 * weights[:, :-1]) @ z.T
    slope += 0.5 * weights[:, -1:]
    np.tanh(slope, out=slope)
    slope *= half
    slope -= y
    return np.asarray(slope)


def _gradient(z: np.ndarray, weights: np.ndarray, slope: np.ndarray, penalty: np.ndarray, used: np.ndarray
              ) -> np.ndarray:
    return np.where(used, np.column_stack([slope @ z, slope.sum(axis=1)]) + penalty * weights, 0)


def _direction(gradient: np.ndarray, inverse: np.ndarray,
               history: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """L-BFGS's two loops (Nocedal, 1980), of every problem at once."""
    direction, shares = -gradient, []
    for step, change, inverse_product in reversed(history):
        shares.append(inverse_product * (step * direction).sum(axis=1, keepdims=True))
        direction = direction - shares[-1] * change
    direction = inverse * direction
    for (step, change, inverse_product), share in zip(history, reversed(shares), strict=True):
        direction = direction + (share - inverse_product * (change * direction).sum(axis=1, keepdims=True)) * step
    return direction
