"""L2 logistic regression of many problems at once (targets x feature counts x row subsets), by L-BFGS.

In: features z [queries, features] and labels [queries, models], in pieces of rows; views: a subset of the pieces and a
linear map from z to components; the numbers k of leading components. A problem is a (view, k, target); its weights
beyond component k are zero. Out: the weights of all problems. Each problem minimises the sum over its labelled rows of
the log loss plus |w|^2 / (2 c), without a penalty on the intercept: the objective of scikit-learn's
LogisticRegression(C=c). Computes in the precision of z. scikit-learn fits one problem per call: the layer search with
this solver is 47 times as fast as scikit-learn pipelines (python -m benchmarks.probe).

An iteration multiplies z by the weights of all problems twice. The weights are mapped instead of the rows, because they
are fewer. Principal components are uncorrelated: their variances times the mean of p (1 - p) approximate the Hessian so
well that a step of length 1 nearly always fits, and about six iterations are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

FREE = 1e-8  # penalty on the intercept, to keep targets of one class finite
MEMORY = 8  # steps in the curvature estimate of L-BFGS
OVERSHOT = 0.9  # a step is shortened if it reverses more than this share of the slope; below 1 the loss decreases
CHUNK = 4096  # rows processed at a time


@dataclass(frozen=True)
class View:
    """A subset of the rows and its components.

    `pieces` selects pieces of rows. `map_` maps (z, 1) to (components, 1). `variances` are those of the components, `c`
    is the inverse penalty of each k. The solver is fastest if the components of these rows are uncorrelated with mean
    zero.
    """

    pieces: Bool[np.ndarray, " pieces"]
    map_: Float[np.ndarray, "features_and_one components_and_one"]
    variances: Float[np.ndarray, " components"]
    c: Float[np.ndarray, " ks"]


def fit_logistic(
    z: Float[np.ndarray, "queries components"],
    correct: Float[np.ndarray, "queries models"],
    c: float = 1.0,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
) -> Float[np.ndarray, "components_and_intercept models"]:
    """Weights of every target on all components, the intercept last. Labels and stopping: see `fit_nested_logistic`."""
    z = z.astype(np.result_type(z, np.float32), copy=False)
    squares = np.einsum("ij,ij->j", z, z) / max(len(z), 1)
    view = View(np.array([True]), np.eye(z.shape[1] + 1), squares, np.array([c]))
    start = np.zeros((1, 1, correct.shape[1], z.shape[1] + 1))
    return fit_nested_logistic([(z, correct)], [view], [z.shape[1]], start, max_iterations, tolerance)[0, 0].T


def fit_nested_logistic(
    pieces: Sequence[tuple[Float[np.ndarray, "_ features"], Float[np.ndarray, "_ models"]]],
    views: Sequence[View],
    ks: Sequence[int],
    start: Float[np.ndarray, "views ks models components_and_intercept"],
    max_iterations: int = 200,
    tolerance: float = 1e-6,
) -> Float[np.ndarray, "views ks models features_and_intercept"]:
    """Weights of every (view, k, target) on the features, the intercept last.

    Labels are in [0, 1] (soft labels are allowed); NaN labels are left out. `start` are initial weights on the
    components. A problem stops when every component of its gradient, divided by its number of labelled rows, is at most
    `tolerance`, or after `max_iterations`.
    """
    kind = pieces[0][0].dtype
    n_views, n_ks, n_models, width = start.shape
    view, k, target = (index.reshape(-1) for index in np.indices(start.shape[:3]))  # per problem
    used = np.array([[*(np.arange(width - 1) < most), True] for most in ks])[k]
    penalty = np.stack(
        [np.append(np.repeat(1 / own.c[:, None], width - 1, axis=1), np.full((n_ks, 1), FREE), axis=1) for own in views]
    ).astype(kind)[view, k]
    variances = np.stack([np.append(own.variances, 1) for own in views]).astype(kind)[view]
    maps = np.stack([own.map_ for own in views]).astype(kind)
    chunks = [
        (z[at : at + CHUNK], *_coded(correct[at : at + CHUNK], kind), np.array([own.pieces[piece] for own in views]))
        for piece, (z, correct) in enumerate(pieces)
        for at in range(0, len(z), CHUNK)
    ]
    labelled = sum(np.outer(has, 2 * half.sum(axis=1)) for _, half, _, has in chunks)  # [views, models]
    n = np.maximum(labelled, 1).astype(kind)[view, target]

    def evaluate(weights: np.ndarray, todo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradients of the problems `todo`, and their sums of (p - 1/2)^2."""
        on_features = _per_view(weights, view[todo], maps.transpose(0, 2, 1))
        gradient, off = np.zeros_like(on_features), np.zeros(len(todo), kind)
        for z, half, y, has in chunks:
            own = np.flatnonzero(has[view[todo]])
            at = target[todo[own]]
            slope = (0.5 * on_features[own, :-1]) @ z.T
            slope += (
                0.5 * on_features[own, -1:]
            )  # added separately: a column of ones would break the memory alignment of z
            np.tanh(slope, out=slope)
            slope *= half[at]
            off[own] += np.einsum("ij,ij->i", slope, slope)
            slope -= y[at]
            gradient[own, :-1] += slope @ z
            gradient[own, -1] += slope.sum(axis=1)
        gradient = _per_view(gradient, view[todo], maps) + penalty[todo] * weights
        return np.where(used[todo], gradient, 0), off

    weights = np.where(used, start.reshape(used.shape), 0).astype(kind)
    gradient, off = evaluate(weights, np.arange(len(weights)))
    mean_weight = np.maximum(0.25 - off / n, 1e-4)
    inverse = (used / ((mean_weight * n)[:, None] * variances + penalty)).astype(kind)
    weights = _minimise(
        lambda at, todo: evaluate(at, todo)[0], weights, gradient, inverse, tolerance * n, max_iterations
    )
    return _per_view(weights, view, maps.transpose(0, 2, 1)).reshape(n_views, n_ks, n_models, -1)


def _coded(correct: np.ndarray, kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """[models, queries]: 1/2 and y - 1/2 for labelled pairs, 0 for others; p - y = tanh(logit / 2) / 2 - (y - 1/2)."""
    labelled = np.isfinite(correct).T
    return (0.5 * labelled).astype(kind), np.where(labelled, correct.T - 0.5, 0).astype(kind)


def _per_view(rows: np.ndarray, view: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Each row times the matrix of its view. `view` is ascending."""
    cuts = np.searchsorted(view, np.arange(len(maps) + 1))
    return np.concatenate([rows[start:end] @ map_ for map_, start, end in zip(maps, cuts[:-1], cuts[1:], strict=True)])


def _minimise(
    evaluate: Callable[[np.ndarray, np.ndarray], np.ndarray],
    weights: np.ndarray,
    gradient: np.ndarray,
    inverse: np.ndarray,
    tolerance: np.ndarray,
    max_iterations: int,
) -> np.ndarray:
    """L-BFGS on every problem until its largest gradient is at most its `tolerance`."""
    at, step, todo, kind = weights, -inverse * gradient, np.arange(len(weights)), weights.dtype
    history: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # (step, gradient change, 1 / their product)
    for _ in range(max_iterations):
        far = np.abs(gradient).max(axis=1) > tolerance
        if not far.any():
            break
        if not far.all():
            todo, at, gradient, step, inverse, tolerance = (
                array[far] for array in (todo, at, gradient, step, inverse, tolerance)
            )
            history = [(s[far], g[far], product[far]) for s, g, product in history]
        tried = at + step
        there = evaluate(tried, todo)
        before, after = (gradient * step).sum(axis=1), (there * step).sum(axis=1)
        overshot = after > -OVERSHOT * before
        change = there - gradient
        product = np.where(overshot, np.inf, np.maximum(after - before, np.finfo(kind).tiny))
        history = [*history[1 - MEMORY :], (step, change, (1 / product).astype(kind)[:, None])]
        shorter = (before / np.where(overshot, before - after, 1))[:, None].astype(
            kind
        ) * step  # to the minimum of the quadratic
        at, gradient = (np.where(overshot[:, None], old, new) for old, new in ((at, tried), (gradient, there)))
        step = np.where(overshot[:, None], shorter, _direction(gradient, inverse, history))
        weights[todo] = at
    return weights


def decision(
    z: Float[np.ndarray, "queries components"], weights: Float[np.ndarray, "*problems components_and_intercept"]
) -> Float[np.ndarray, "*problems queries"]:
    """The logits of every problem."""
    flat = weights.reshape(-1, weights.shape[-1])
    return (flat[:, :-1] @ z.T + flat[:, -1:]).reshape(*weights.shape[:-1], len(z))


def _direction(
    gradient: np.ndarray, inverse: np.ndarray, history: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> np.ndarray:
    """The two-loop recursion of L-BFGS (Nocedal, 1980) for all problems."""
    direction, shares = -gradient, []
    for step, change, inverse_product in reversed(history):
        shares.append(inverse_product * (step * direction).sum(axis=1, keepdims=True))
        direction = direction - shares[-1] * change
    direction = inverse * direction
    for (step, change, inverse_product), share in zip(history, reversed(shares), strict=True):
        direction = direction + (share - inverse_product * (change * direction).sum(axis=1, keepdims=True)) * step
    return direction
