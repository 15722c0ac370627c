"""Policies: from confidences and costs to a choice. A policy is a function; nothing is retrained for another one.

In: `p` (confidence), `cost` (USD), `cost_norm` (cost normalised to [0, 1]), each [queries, models]. Out: the position
of the chosen model per query. Knows nothing of where confidences and costs come from.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.errors import InputError

SAME_SCORE = 1e-12  # scores this close differ by rounding only, and are ties


def check_lambda(lam: float) -> float:
    """`lam` itself. Raises InputError outside [0, 1]."""
    if not 0 <= lam <= 1:  # NaN fails this too
        raise InputError(f"lambda: got {lam}, allowed is 0 (most confident) to 1 (cheapest)")
    return float(lam)


def scores(
    p: Float[np.ndarray, "queries models"], cost_norm: Float[np.ndarray, "queries models"], lam: float
) -> Float[np.ndarray, "queries models"]:
    """Paper Eq. 3: s = (1 - lambda) p - lambda chat."""
    return (1 - lam) * p - lam * cost_norm


def choose(
    p: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
    lam: float,
    allowed: Bool[np.ndarray, "queries models"] | None = None,
) -> Int[np.ndarray, " queries"]:
    """Paper Eq. 5: the model of the highest score; of equals the cheaper, then the more confident, then pool order.

    Scores within SAME_SCORE are equal. `allowed` leaves models out per query; a query with none allowed raises
    InputError.
    """
    return _best(scores(p, cost_norm, check_lambda(lam)), cost, p, allowed, SAME_SCORE)


def choose_within_budget(
    p: Float[np.ndarray, "queries models"], cost: Float[np.ndarray, "queries models"], budget_usd: float
) -> Int[np.ndarray, " queries"]:
    """Budget-constrained argmax: the most confident model of those costing at most `budget_usd` a query.

    Where nothing is that cheap, the cheapest model.
    """
    affordable = cost <= budget_usd
    affordable |= ~affordable.any(axis=1, keepdims=True) & (cost == cost.min(axis=1, keepdims=True))
    return _best(p, cost, p, affordable)


def choose_by_inverse_cost(
    p: Float[np.ndarray, "queries models"], cost: Float[np.ndarray, "queries models"], exponent: float = 1.0
) -> Int[np.ndarray, " queries"]:
    """Inverse-cost weighting: the highest p / cost^exponent; 0 is the most confident, larger is thriftier.

    A free model has infinite weight, and among free models confidence decides.
    """
    weight = np.full_like(p, np.inf, dtype=np.float64)
    np.divide(p, cost**exponent, out=weight, where=(cost > 0) | (exponent == 0))
    return _best(weight, cost, p, None)


def _best(
    score: np.ndarray, cost: np.ndarray, p: np.ndarray, allowed: np.ndarray | None, same: float = 0.0
) -> np.ndarray:
    """Positions of the best score under the tie rules (EQUATIONS.md, Eq. 3-5); `same` is how near a tie may be."""
    candidates = np.ones(score.shape, dtype=bool) if allowed is None else allowed
    if not candidates.any(axis=1).all():
        raise InputError("models: no model of the pool is allowed for this query; allow more models or a higher cost")
    for values, tolerance in ((score, same), (-cost, 0.0), (p, 0.0)):
        best = np.where(candidates, values, -np.inf).max(axis=1, keepdims=True)
        candidates = candidates & (values >= best - tolerance)
    return candidates.argmax(axis=1)
