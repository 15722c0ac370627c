"""The exact lambda path: every choice of a router as lambda goes from 0 to 1, not only at the points of a grid.

In: p, cost and cost_norm [queries models]. Out: `LambdaPath`, the steps at which a query moves from one model to
another, in ascending order of lambda. The score of a model is linear in lambda (docs/equations.md, Eq. 3:
p - lambda (p + cost_norm)). The choices of a query are therefore the upper envelope of its models' lines, and a step is
a crossing of two lines. At a crossing the tie rules choose the cheaper model, so the choices at a breakpoint are those
just after it.

Breakpoints are rounded to 12 decimals, consistent with policy.SAME_SCORE: queries that move at the same lambda form one
point. The mean cost never rises along the path, so its points are sorted by X.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.metrics.confidences import ends_of_runs, ratio, running_sums
from prefill_router.routing.policy import choose

DECIMALS = 12


@dataclass(frozen=True)
class LambdaPath:
    """The choices at lambda 0 and all later steps.

    `start` is the choice per query at lambda 0. Step i moves `query[i]` from model `before[i]` to model `after[i]` at
    `lambdas[i]`. `ends` marks the last step at each lambda. The points of the path are the start and these ends.
    """

    start: Int[np.ndarray, " queries"]
    lambdas: Float[np.ndarray, " steps"]
    query: Int[np.ndarray, " steps"]
    before: Int[np.ndarray, " steps"]
    after: Int[np.ndarray, " steps"]
    ends: Bool[np.ndarray, " steps"]

    @property
    def breakpoints(self) -> Float[np.ndarray, " points"]:
        """The lambda at which each point of the path begins; the first is 0."""
        return np.append(0.0, self.lambdas[self.ends])


def lambda_path(
    p: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
) -> LambdaPath:
    """Computes the path.

    One round moves every query past its next crossing, so there are at most as many rounds as models.
    """
    queries = np.arange(len(p))
    start = choose(p, cost, cost_norm, 0.0)
    fall = p + cost_norm  # minus the slope of a model's line
    here, at = start, np.zeros(len(p))
    steps: list[tuple[np.ndarray, ...]] = []

    def step(to: np.ndarray, lambdas: np.ndarray) -> None:
        moved = np.flatnonzero(to != here)
        steps.append((lambdas[moved], queries[moved], here[moved], to[moved]))

    while True:
        gap = fall[queries, here][:, None] - fall
        flatter = gap > 0
        crossing = ratio(p[queries, here][:, None] - p, np.where(flatter, gap, 0.0))
        crossing = np.maximum(np.round(crossing, DECIMALS), at[:, None])
        flatter &= crossing < 1
        if not flatter.any():
            break
        first = np.where(flatter, crossing, np.inf).min(axis=1)
        cheapest = choose(
            p, cost, cost_norm, 1.0, (flatter & (crossing == first[:, None])) | ~flatter.any(axis=1)[:, None]
        )
        to = np.where(flatter.any(axis=1), cheapest, here)
        step(to, first)
        here, at = to, np.where(to != here, first, at)
    step(choose(p, cost, cost_norm, 1.0), np.ones(len(p)))
    lambdas, query, before, after = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    order = np.lexsort((cost[query, before] * -1, query, lambdas))
    lambdas = lambdas[order]
    return LambdaPath(start, lambdas, query[order], before[order], after[order], ends_of_runs(lambdas))


def along(
    path: LambdaPath, values: Float[np.ndarray, "queries models"], weights: Float[np.ndarray, "resamples queries"]
) -> Float[np.ndarray, "resamples points"]:
    """Weighted mean of the chosen models' `values` at every point of the path; NaN for a resample without queries."""
    by_query = weights.T
    change = values[path.query, path.after] - values[path.query, path.before]
    total = running_sums(by_query.take(path.query, axis=0) * change[:, None])[np.append(True, path.ends)]
    total += values[np.arange(len(values)), path.start] @ by_query
    n = by_query.sum(axis=0)
    total /= np.where(n > 0, n, np.nan)
    return total.T
