"""The policy: from confidences and costs to a model per query (paper Eq. 3-5), with a margin for static choices.

In: `p` (confidence), `cost` (USD) and `cost_norm` (cost normalised to [0, 1]), each [queries, models]. Out: the
position of the chosen model per query. Another lambda needs no new training. Knows nothing of the source of
confidences and costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.errors import InputError

LAMBDAS = np.arange(101) / 100  # the lambda sweep: 0, 0.01, ..., 1
MARGIN_LAMBDAS = LAMBDAS[::5]
# At lambda 0 a bonus of 1 always takes the best static choice.
BONUSES = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
MARGIN_QUERIES = 30  # with fewer, equal utilities are accidents
SAME_SCORE = 1e-12  # scores closer than this differ only by rounding and count as ties


def check_lambda(lam: float) -> float:
    """Returns `lam`. Raises InputError if it is outside [0, 1]."""
    if not 0 <= lam <= 1:  # NaN fails this too
        raise InputError(f"lambda: got {lam}, allowed is 0 (most confident) to 1 (cheapest)")
    return float(lam)


def scores(
    p: Float[np.ndarray, "queries models"], cost_norm: Float[np.ndarray, "queries models"], lam: float
) -> Float[np.ndarray, "queries models"]:
    """Paper Eq. 3: s = (1 - lambda) p - lambda cost_norm."""
    return (1 - lam) * p - lam * cost_norm


def utility(
    correct: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
    choices: Int[np.ndarray, " queries"],
    lam: float,
) -> Float[np.ndarray, " queries"]:
    """Utility of each query's chosen model: (1 - lambda) correct - lambda cost_norm (docs/equations.md, Utility).

    NaN if the chosen model has no label for the query. Raises InputError for a lambda outside [0, 1].
    """
    return np.take_along_axis(scores(correct, cost_norm, check_lambda(lam)), choices[:, None], axis=1)[:, 0]


def choose(
    p: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
    lam: float,
    allowed: Bool[np.ndarray, "queries models"] | None = None,
    margin: Margin | None = None,
) -> Int[np.ndarray, " queries"]:
    """Paper Eq. 5: the position of the model with the highest score, `margin` included.

    Scores within SAME_SCORE tie. A tie goes to the lower cost, then to the higher `p`, then to the first in pool order
    (docs/equations.md, Policy). `allowed` restricts the models of each query; None allows all. Raises InputError for a
    lambda outside [0, 1] or a query without an allowed model.
    """
    check_lambda(lam)
    candidates = np.ones(p.shape, dtype=bool) if allowed is None else allowed
    if not candidates.any(axis=1).all():
        raise InputError("models: no model of the pool is allowed for this query; allow more models or a higher cost")
    if margin is not None and margin.bonus:
        p = margin(p, lam, candidates)
    score = scores(p, cost_norm, lam)
    for values, tolerance in ((score, SAME_SCORE), (-cost, 0.0), (p, 0.0)):
        best = np.where(candidates, values, -np.inf).max(axis=1, keepdims=True)
        candidates = candidates & (values >= best - tolerance)
    return candidates.argmax(axis=1)


@dataclass(frozen=True)
class TrainingMeans:
    """Mean accuracy and mean normalised cost of each model over the training queries; they define static choices.

    A static choice is one model for all queries (docs/equations.md, Utility).
    """

    accuracy: Float[np.ndarray, " models"]
    cost_norm: Float[np.ndarray, " models"]

    def best_static(self, lam: float) -> int:
        """Position of the model with the highest mean utility; ties as in `choose`."""
        cost_norm = self.cost_norm[None]
        return int(choose(self.accuracy[None], cost_norm, cost_norm, lam)[0])


def training_means(
    correct: Float[np.ndarray, "queries models"], cost_norm: Float[np.ndarray, "queries models"]
) -> TrainingMeans:
    """Means over the queries with a label for every model; without such a query, over each model's labelled queries.

    A model without a label has accuracy 0.
    """
    known = ~np.isnan(correct)
    if known.all(axis=1).any():
        known = np.repeat(known.all(axis=1, keepdims=True), correct.shape[1], axis=1)
    n = np.maximum(known.sum(axis=0), 1)
    return TrainingMeans(np.where(known, correct, 0).sum(axis=0) / n, np.where(known, cost_norm, 0).sum(axis=0) / n)


@dataclass(frozen=True)
class Margin:
    """A bonus on the confidence of the best static choice (docs/equations.md, Margin).

    Another model is chosen only if its score is higher in spite of the bonus. `bonus` is a probability.
    """

    means: TrainingMeans
    bonus: float

    def __call__(
        self, p: Float[np.ndarray, "queries models"], lam: float, allowed: Bool[np.ndarray, "queries models"]
    ) -> Float[np.ndarray, "queries models"]:
        """`p` with the bonus on the best static choice among the allowed models of each query."""
        accuracy, cost_norm = (np.broadcast_to(mean, p.shape) for mean in (self.means.accuracy, self.means.cost_norm))
        static = choose(accuracy, cost_norm, cost_norm, lam, allowed)
        return p + self.bonus * (np.arange(p.shape[1]) == static[:, None])


def fit_margin(
    p: Float[np.ndarray, "queries models"],
    correct: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
    means: TrainingMeans,
) -> Margin:
    """The margin of BONUSES with the highest utility on held-out predictions `p`, ties: the largest.

    The utility is the mean over lambdas 0, 0.05, ..., 1 and over the queries with a label for every model. With fewer
    than MARGIN_QUERIES such queries, and with one model, the bonus is 0.
    """
    rows = np.flatnonzero(~np.isnan(correct).any(axis=1))
    if len(rows) < MARGIN_QUERIES or p.shape[1] == 1:
        return Margin(means, 0.0)
    p, correct, cost, cost_norm = p[rows], correct[rows], cost[rows], cost_norm[rows]
    found = []
    for bonus in BONUSES:
        margin = Margin(means, bonus)
        choices = [choose(p, cost, cost_norm, lam, margin=margin) for lam in MARGIN_LAMBDAS]
        values = [
            utility(correct, cost_norm, own, lam).mean() for own, lam in zip(choices, MARGIN_LAMBDAS, strict=True)
        ]
        found.append((round(float(np.mean(values)), 12), bonus))
    return Margin(means, max(found)[1])
