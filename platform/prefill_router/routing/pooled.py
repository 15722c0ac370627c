"""Pooled logistic regression: one regression for all targets, with deviations of each target that are penalised.

In: inputs [queries, models, inputs] and labels (NaN: unlabelled). Out: weights and offsets of each target. The logit
of target m is the sum over inputs j of (a[j] + da[m, j]) x[m, j], plus b + db[m]. The fit minimises the masked log loss
plus `strength` / 2 times the squares of all deviations da and db, and PRIOR / 2 times the squared distance of the
shared weights a from `centre` (docs/equations.md, Pooled calibration). Strength 0 fits each target alone; a large
strength gives all targets the same weights and offset. With few labels the weights stay near the centre.

The strength is chosen by cross-validation on the log loss of differences: of each query and each pair of targets of
which one is right, the probability that it is this one. That loss depends on the order of the targets within a query,
which routing needs, and not on the difficulty of the query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit

STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10_000.0)
FOLDS = 5
PRIOR = 10.0  # penalty on shared weights, as about 50 labels: decisive for perfect predictions and few labels only
FREE = 0.01  # penalty on the shared offset, so that it stays finite
SMALLEST = 1e-6  # strength, so that deviations stay finite
ITERATIONS, TOLERANCE, LARGEST_STEP = 100, 1e-8, 5.0


@dataclass(frozen=True)
class PooledLogistic:
    """Weights and offset of each target."""

    weights: Float[np.ndarray, "models inputs"]
    offsets: Float[np.ndarray, " models"]

    def __call__(self, x: Float[np.ndarray, "*any models inputs"]) -> Float[np.ndarray, "*any models"]:
        """The logits of the targets."""
        return np.einsum("...mj,mj->...m", x, self.weights) + self.offsets


def fit_pooled(
    x: Float[np.ndarray, "queries models inputs"],
    correct: Float[np.ndarray, "queries models"],
    strength: float,
    centre: Float[np.ndarray, " inputs"],
) -> PooledLogistic:
    """Fits by Newton's method. A target without labels has the shared weights and offset.

    `centre` are the shared weights without labels.
    """
    # [models, queries, inputs], so that one batched matrix product serves all targets
    x = np.ascontiguousarray(np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=2).swapaxes(0, 1))
    known = ~np.isnan(correct.T)
    y = np.where(known, correct.T, 0.0)
    n_models, _, n_inputs = x.shape
    strength, penalty = max(strength, SMALLEST), np.append(np.full(n_inputs - 1, PRIOR), FREE)
    start = np.append(centre, 0.0)
    shared, deviations = np.zeros(n_inputs), np.zeros((n_models, n_inputs))  # where the loss is bounded
    for _ in range(ITERATIONS):
        p = expit((x @ (shared + deviations)[:, :, None])[:, :, 0])
        slope = (np.where(known, p - y, 0.0)[:, None] @ x)[:, 0]
        curvature = (x * np.where(known, p * (1 - p), 0.0)[:, :, None]).swapaxes(1, 2) @ x
        # The deviations of each target are eliminated, so that one small system for the shared weights is left.
        inverse = np.linalg.inv(curvature + strength * np.eye(n_inputs))
        of_deviations = np.einsum("mjk,mk->mj", inverse, slope + strength * deviations)
        crossed = np.einsum("mjk,mkl->mjl", inverse, curvature)
        left = curvature.sum(axis=0) - np.einsum("mjk,mkl->jl", curvature, crossed) + np.diag(penalty)
        right = (slope - np.einsum("mjk,mk->mj", curvature, of_deviations)).sum(axis=0) + penalty * (shared - start)
        step = np.linalg.solve(left, right)
        steps = of_deviations - np.einsum("mjl,l->mj", crossed, step)
        largest = max(np.abs(step).max(), np.abs(steps).max())
        scale = min(1.0, LARGEST_STEP / max(largest, TOLERANCE))
        shared, deviations = shared - scale * step, deviations - scale * steps
        if largest < TOLERANCE:
            break
    weights = shared + deviations
    return PooledLogistic(weights[:, :-1], weights[:, -1])


def choose_strength(
    x: Float[np.ndarray, "queries models inputs"],
    correct: Float[np.ndarray, "queries models"],
    folds: Int[np.ndarray, " queries"],
    centre: Float[np.ndarray, " inputs"],
) -> float:
    """The strength of STRENGTHS with the lowest cross-validated loss of differences; ties: the largest.

    The largest strength if no query has both a right and a wrong target.
    """
    losses = [
        differences_loss(cross_validated(x, correct, folds, strength, centre), correct)
        for strength in reversed(STRENGTHS)
    ]
    return STRENGTHS[-1 - int(np.argmin(losses))]


def differences_loss(
    logits: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]
) -> float:
    """Mean log loss over the pairs of a right and a wrong target of a query; 0 without such a pair.

    If one of two independent targets is right, it is m rather than n with probability sigmoid(logit m - logit n).
    """
    total, pairs = 0.0, 0
    for model in range(correct.shape[1]):
        wrong = (correct == 0) & (correct[:, [model]] == 1)
        total += float(np.logaddexp(0, logits - logits[:, [model]])[wrong].sum())
        pairs += int(wrong.sum())
    return total / max(pairs, 1)


def cross_validation_folds(n_queries: int) -> Int[np.ndarray, " queries"]:
    """Random folds of equal size, the same for every call with this number of queries."""
    return np.asarray(np.random.default_rng(0).permutation(n_queries) % FOLDS)


def cross_validated(
    x: Float[np.ndarray, "queries models inputs"],
    correct: Float[np.ndarray, "queries models"],
    folds: Int[np.ndarray, " queries"],
    strength: float,
    centre: Float[np.ndarray, " inputs"],
) -> Float[np.ndarray, "queries models"]:
    """The logits of each fold from a fit on the other folds."""
    logits = np.empty(correct.shape)
    for fold in np.unique(folds):
        rest, own = folds != fold, folds == fold
        logits[own] = fit_pooled(x[rest], correct[rest], strength, centre)(x[own])
    return logits
