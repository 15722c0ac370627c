"""The stack: the ensemble's logits, the prior of the query's domain and the labels of near queries, in one regression.

In: features [queries, features], the ensemble's probabilities, benchmarks and labels of training queries. Out: a
`Stack`, a map from features and probabilities to probabilities, NumPy only.

Each part gives a logit per target. The domain prior is the mean of each target's share of right answers by benchmark,
weighted by probabilities of the benchmarks that are predicted from the features: a request needs no benchmark. If no
benchmark is likely, the prior is the target's share over all queries. The neighbours give the share of right answers on
the nearest training queries. A part enters the regression (pooled.py) as two inputs: its mean over the targets, which
says how hard the query is, and the target's deviation from this mean (docs/equations.md, Stack).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, logit

from prefill_router.routing.pooled import PooledLogistic, choose_strength, cross_validated, fit_pooled
from prefill_router.signals.logistic import fit_logistic

StackPart = Literal["domain", "neighbours"]
EPSILON = 1e-6  # probabilities are clipped to [EPSILON, 1 - EPSILON] before the logit
DOMAIN_C = 0.1  # inverse L2 penalty of the classifier of benchmarks
DOMAIN_QUERIES = 20.0  # weight, in queries, of a target's share over all queries in its share on one benchmark
NEIGHBOURS = (10, 100)  # counts of nearest queries; one input pair each
NEIGHBOUR_QUERIES = 5.0  # weight, in queries, of a target's share over all queries in its share on near queries
DIMENSIONS = 64  # of the vectors whose angles define the neighbours
CHUNK = 256  # queries compared with all training queries at a time


@dataclass(frozen=True)
class DomainPrior:
    """Classifier of benchmarks, one against the rest, and shares of right answers by benchmark.

    `overall` are the shares over all queries.
    """

    weights: Float[np.ndarray, "features domains"]
    offsets: Float[np.ndarray, " domains"]
    shares: Float[np.ndarray, "domains models"]
    overall: Float[np.ndarray, " models"]

    def __call__(self, features: Float[np.ndarray, "queries features"]) -> list[Float[np.ndarray, "queries models"]]:
        """The logit of the prior. If the probabilities sum to less than 1, the rest goes to the overall shares."""
        domains = expit(features @ self.weights + self.offsets)
        total = domains.sum(axis=1, keepdims=True)
        known = np.minimum(total, 1.0)
        return [_logit(domains / np.maximum(total, EPSILON) * known @ self.shares + (1 - known) * self.overall)]


@dataclass(frozen=True)
class Neighbours:
    """Vectors of unit length and labels of the training queries.

    A vector is (features - `mean`) x `components`, scaled to length 1. Labels are 1 (right), 0 (wrong) and -1 (none).
    `overall` are the shares of right answers over all training queries.
    """

    mean: Float[np.ndarray, " features"]
    components: Float[np.ndarray, "features dimensions"]
    vectors: Float[np.ndarray, "known dimensions"]
    labels: Int[np.ndarray, "known models"]
    overall: Float[np.ndarray, " models"]

    def __call__(self, features: Float[np.ndarray, "queries features"]) -> list[Float[np.ndarray, "queries models"]]:
        """The logits of the shares on the nearest queries, for each count k of NEIGHBOURS.

        The weight of a neighbour falls to 0 at the k-th: it changes without steps if rounding reorders neighbours.
        """
        vectors = _unit((features - self.mean) @ self.components)
        found = [np.empty((len(vectors), self.labels.shape[1])) for _ in NEIGHBOURS]
        for start in range(0, len(vectors), CHUNK):
            part = slice(start, start + CHUNK)
            distance, rows = self._nearest(vectors[part])
            labels = self.labels[rows]
            for logits, k in zip(found, NEIGHBOURS, strict=True):
                weights = _weights(distance[:, :k])[:, :, None]
                right, known = weights * (labels[:, :k] == 1), weights * (labels[:, :k] >= 0)
                logits[part] = _logit(_shares(right, known, NEIGHBOUR_QUERIES, self.overall))
        return found

    def _nearest(
        self, vectors: Float[np.ndarray, "queries dimensions"]
    ) -> tuple[Float[np.ndarray, "queries nearest"], Int[np.ndarray, "queries nearest"]]:
        """Distances (1 - cosine) and rows of the nearest training queries, nearest first."""
        k = min(max(NEIGHBOURS), len(self.vectors))
        distance = 1 - vectors.astype(np.float32) @ self.vectors.T
        rows = np.argpartition(distance, k - 1, axis=1)[:, :k]
        nearest = np.take_along_axis(distance, rows, axis=1)
        order = np.argsort(nearest, axis=1, kind="stable")
        return np.take_along_axis(nearest, order, axis=1), np.take_along_axis(rows, order, axis=1)


Part = DomainPrior | Neighbours


@dataclass(frozen=True)
class Stack:
    """The parts in use and the regression over them."""

    parts: tuple[Part, ...]
    regression: PooledLogistic

    def __call__(
        self,
        p: Float[np.ndarray, "*any queries models"],
        context: Sequence[Float[np.ndarray, "queries models"]],
    ) -> Float[np.ndarray, "*any queries models"]:
        """Probabilities of a right answer, from those of the ensemble or of each member, and `context_of` the parts."""
        return np.asarray(expit(self.regression(_inputs(p, context))))


def context_of(
    parts: Sequence[Part], features: Float[np.ndarray, "queries features"]
) -> list[Float[np.ndarray, "queries models"]]:
    """The logits of all parts."""
    return [logits for part in parts for logits in part(features)]


def fit_parts(
    names: Sequence[StackPart],
    features: Float[np.ndarray, "queries features"],
    correct: Float[np.ndarray, "queries models"],
    benchmarks: np.ndarray,
) -> tuple[Part, ...]:
    """The named parts, from training queries."""
    parts: list[Part] = []
    if "domain" in names:
        parts.append(_fit_domain(features, correct, benchmarks))
    if "neighbours" in names:
        parts.append(_fit_neighbours(features, correct))
    return tuple(parts)


def fit_regression(
    p: Float[np.ndarray, "queries models"],
    context: Sequence[Float[np.ndarray, "queries models"]],
    correct: Float[np.ndarray, "queries models"],
    folds: Int[np.ndarray, " queries"],
) -> tuple[PooledLogistic, Float[np.ndarray, "queries models"]]:
    """The regression on held-out probabilities and context, and the probabilities of each fold without its labels.

    The strength of the penalty is chosen once, by cross-validation over `folds`.
    """
    x = _inputs(p, context)
    centre = np.zeros(x.shape[2])
    centre[:2] = 1  # without labels, the ensemble's probabilities
    strength = choose_strength(x, correct, folds, centre)
    return (
        fit_pooled(x, correct, strength, centre),
        np.asarray(expit(cross_validated(x, correct, folds, strength, centre))),
    )


def _fit_domain(features: np.ndarray, correct: np.ndarray, benchmarks: np.ndarray) -> DomainPrior:
    names, of_query = np.unique(benchmarks, return_inverse=True)
    is_domain = (of_query[:, None] == np.arange(len(names))).astype(np.float64)
    scale = np.maximum(features.std(axis=0), EPSILON).astype(np.float64)
    weights = fit_logistic(features / scale, is_domain, c=DOMAIN_C, tolerance=1e-4)
    known = ~np.isnan(correct)
    right = np.where(known, correct, 0.0)
    overall = _shares(right, known, 1.0, 0.5)
    count = is_domain.T @ known
    shares = (is_domain.T @ right + DOMAIN_QUERIES * overall) / (count + DOMAIN_QUERIES)
    return DomainPrior(weights[:-1] / scale[:, None], weights[-1], shares, overall)


def _fit_neighbours(features: np.ndarray, correct: np.ndarray) -> Neighbours:
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    components = directions[:, ::-1][:, :DIMENSIONS]
    vectors = _unit(centred @ components).astype(np.float16).astype(np.float32)  # as the checkpoint stores them
    labels = np.where(np.isnan(correct), -1, correct >= 0.5).astype(np.int8)
    return Neighbours(mean, components, vectors, labels, _shares(labels == 1, labels >= 0, 1.0, 0.5))


def _inputs(p: np.ndarray, context: Sequence[np.ndarray]) -> Float[np.ndarray, "*any queries models inputs"]:
    parts = [_logit(p), *context]
    inputs = np.empty((*p.shape, 2 * len(parts)))
    for index, logits in enumerate(parts):
        mean = logits.mean(axis=-1, keepdims=True)
        inputs[..., 2 * index], inputs[..., 2 * index + 1] = mean, logits - mean
    return inputs


def _shares(right: np.ndarray, known: np.ndarray, weight: float, overall: np.ndarray | float) -> np.ndarray:
    """Shares of right answers over the axis before the models, with `weight` queries of the share `overall`."""
    return np.asarray((right.sum(axis=-2) + weight * overall) / (known.sum(axis=-2) + weight))


def _weights(distance: Float[np.ndarray, "queries k"]) -> Float[np.ndarray, "queries k"]:
    """Weights that sum to k and fall linearly with the distance, to 0 at the k-th; 1 if all distances are equal."""
    k = distance.shape[1]
    below = np.maximum(distance[:, -1:].astype(np.float64) - distance, 0)
    total = below.sum(axis=1, keepdims=True)
    return np.where(total > EPSILON, below * k / np.maximum(total, EPSILON), 1.0)


def _logit(p: np.ndarray) -> np.ndarray:
    return np.asarray(logit(np.clip(p.astype(np.float64), EPSILON, 1 - EPSILON)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
