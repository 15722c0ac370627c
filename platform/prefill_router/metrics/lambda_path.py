"""The exact lambda path: every choice of a router as lambda goes from 0 to 1, not only at the points of a grid.

In: p, cost and cost_norm [queries models]. Out: `LambdaPath`, the steps at which a query moves from one model to
another, in ascending order of lambda. The score of a model is linear in lambda (docs/equations.md, Eq. 3:
p - lambda (p + cost_norm)). The choices of a query are therefore the upper envelope of its models' lines, and a step is
a crossing of two lines. At a crossing the tie rules choose the cheaper model, so the choices at a breakpoint are those
just after it.

Breakpoints are rounded to 12 decimals, consistent with policy.SAME_SCORE: queries that move at the same lambda form one
point. Without a margin the mean cost never rises along the path, so its points are sorted by X. With a margin it can
rise at the lambdas at which the best static choice changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.metrics.confidences import ends_of_runs, ratio, running_sums
from prefill_router.routing.policy import Margin, choose

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

    def choices(self, lam: float, closed: bool = True) -> Int[np.ndarray, " queries"]:
        """The choice per query at `lam`; without `closed` just before it."""
        last = np.searchsorted(self.lambdas, lam, side="right" if closed else "left")
        chosen = self.start.copy()
        chosen[self.query[:last]] = self.after[:last]  # steps of a query are in order: the last one counts
        return chosen


def lambda_path(
    p: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
    margin: Margin | None = None,
) -> LambdaPath:
    """Computes the path.

    With a margin, the path is made of pieces between the lambdas at which the best static choice changes.
    """
    if margin is None:
        return _path(p, cost, cost_norm)
    means = margin.means
    static = _path(means.accuracy[None], means.cost_norm[None], means.cost_norm[None])
    bounds = [*static.breakpoints, np.inf]
    everything = np.ones(p.shape, dtype=bool)
    pieces = [_path(margin(p, lam, everything), cost, cost_norm) for lam in bounds[:-1]]
    steps = []
    for (start, end), piece, after in zip(pairwise(bounds), pieces, [*pieces[1:], None], strict=True):
        inside = (piece.lambdas > start) & (piece.lambdas < end)
        steps.append((piece.lambdas[inside], piece.query[inside], piece.before[inside], piece.after[inside]))
        if after is not None:
            old, new = piece.choices(end, closed=False), after.choices(end)
            moved = np.flatnonzero(old != new)
            steps.append((np.full(len(moved), end), moved, old[moved], new[moved]))
    return _ordered(pieces[0].start, steps, cost)


def _path(
    p: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
    cost_norm: Float[np.ndarray, "queries models"],
) -> LambdaPath:
    """The path without a margin.

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
    return _ordered(start, steps, cost)


def _ordered(
    start: Int[np.ndarray, " queries"],
    steps: Sequence[tuple[np.ndarray, ...]],
    cost: Float[np.ndarray, "queries models"],
) -> LambdaPath:
    """The path from its steps in any order of lambda."""
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
