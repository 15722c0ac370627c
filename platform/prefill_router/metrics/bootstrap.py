"""Bootstrap over test queries: every figure recomputed on every resample, groups kept whole (EQUATIONS.md, Intervals).

In: a function from weights [resamples queries] to named arrays [resamples]. Out: the same names, with the estimate
(all weights one) first and the resamples after it. Whatever the function computes together is paired: the
difference of two of its arrays is the paired difference. Leaves out the variance of training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from prefill_router.errors import InputError

Key = TypeVar("Key", bound=Hashable)
LEVEL = 0.95
BLOCK = 64  # resamples at a time: 1 MB of weights for 2,000 queries stays in the cache


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval; None is undefined, and `reason` says why.

    `undefined_resamples` counts the resamples in which the figure was undefined: the interval is over the others.
    """

    estimate: float | None
    lower: float | None
    upper: float | None
    reason: str | None = None
    undefined_resamples: int = 0

    def to_json(self) -> dict[str, Any]:
        """`{estimate, lower, upper}`, with `reason` and `undefined_resamples` only where there is something to say."""
        value: dict[str, Any] = {"estimate": self.estimate, "lower": self.lower, "upper": self.upper}
        if self.reason is not None:
            value["reason"] = self.reason
        if self.undefined_resamples:
            value["undefined_resamples"] = self.undefined_resamples
        return value


def interval(
    draws: Float[np.ndarray, " draws"], reason: str = "undefined", level: float = LEVEL, centred: bool = False
) -> Interval:
    """Summarises what `resample` returned: draws[0] is the estimate, the rest are resamples, NaN is undefined.

    `reason` is what is said when the estimate is undefined. `centred` is for figures of at least 0 that noise alone
    raises, such as ECE: resampling adds noise, so the percentiles are moved by mean(resamples) - estimate.
    """
    estimate, resamples = draws[0], draws[1:]
    if np.isnan(estimate):
        return Interval(None, None, None, reason)
    defined = resamples[~np.isnan(resamples)]
    if not len(defined):
        return Interval(float(estimate), None, None, "no resample in which the figure is defined", len(resamples))
    lower, upper = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    if centred:
        lower, upper = np.maximum(np.array([lower, upper]) - (defined.mean() - estimate), 0)
    return Interval(float(estimate), float(lower), float(upper), None, len(resamples) - len(defined))


def resample(
    figures: Callable[[np.ndarray], dict[Key, np.ndarray]],
    groups: np.ndarray,
    n_resamples: int,
    seed: int,
    block: int = BLOCK,
) -> dict[Key, np.ndarray]:
    """Calls `figures` on the test split and on `n_resamples` draws of its groups; arrays are [1 + n_resamples].

    Groups are drawn with replacement from their sorted names, so the result depends neither on row order nor on
    `block`. Raises InputError when n_resamples is negative.
    """
    if n_resamples < 0:
        raise InputError(f"n_resamples: got {n_resamples}, allowed is 0 (no intervals) or more")
    names, group_of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rng = np.random.default_rng(seed)

    def draws() -> Iterator[np.ndarray]:
        yield np.ones((1, len(names)), dtype=np.uint16)
        for start in range(0, n_resamples, block):
            n = min(block, n_resamples - start)
            drawn = rng.integers(len(names), size=(n, len(names))) + np.arange(n)[:, None] * len(names)
            yield np.bincount(drawn.ravel(), minlength=n * len(names)).reshape(n, len(names)).astype(np.uint16)

    def on_draw(counts: np.ndarray) -> dict[Key, np.ndarray]:
        return figures(np.ascontiguousarray(counts.T, dtype=np.float64)[group_of].T)

    # A thread per block and none inside it: BLAS threads would wait for each other at every small product.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(on_draw, draws()))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def largest_resample(groups: np.ndarray) -> int:
    """An upper bound on how many queries a resample can hold."""
    _, sizes = np.unique(np.asarray(groups, dtype=str), return_counts=True)
    return int(len(sizes) * sizes.max())
