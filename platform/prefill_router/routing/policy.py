"""The policy: from confidences and costs to a model per query (paper Eq. 3-5).

In: `p` (confidence), `cost` (USD) and `cost_norm` (cost normalised to [0, 1]), each [queries, models]. Out: the
position of the chosen model per query. Another lambda needs no new training. Knows nothing of the source of
confidences and costs.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.errors import InputError

LAMBDAS = np.arange(101) / 100  # the lambda sweep: 0, 0.01, ..., 1
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


def choose(
    p: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
    lam: float,
    allowed: Bool[np.ndarray, "queries models"] | None = None,
) -> Int[np.ndarray, " queries"]:
    """Paper Eq. 5: the position of the model with the highest score.

    Scores within SAME_SCORE tie. A tie goes to the lower cost, then to the higher `p`, then to the first in pool order
    (docs/equations.md, Policy). `allowed` restricts the models of each query; None allows all. Raises InputError for a
    lambda outside [0, 1] or a query without an allowed model.
    """
    score = scores(p, cost_norm, check_lambda(lam))
    candidates = np.ones(score.shape, dtype=bool) if allowed is None else allowed
    if not candidates.any(axis=1).all():
        raise InputError("models: no model of the pool is allowed for this query; allow more models or a higher cost")
    for values, tolerance in ((score, SAME_SCORE), (-cost, 0.0), (p, 0.0)):
        best = np.where(candidates, values, -np.inf).max(axis=1, keepdims=True)
        candidates = candidates & (values >= best - tolerance)
    return candidates.argmax(axis=1)
