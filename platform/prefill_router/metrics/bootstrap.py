"""Bootstrap over test queries: every figure is recomputed on every resample, groups are drawn as units.

In: a function from weights [resamples queries] to arrays [resamples]. Out: the same arrays, with the estimate (all
weights one) first and the resamples after it. All arrays share the resamples, so the difference of two arrays is the
paired difference. Leaves out the variance of training. See docs/equations.md, Intervals.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from prefill_router.errors import InputError

Json = dict[str, Any]
Figures = TypeVar("Figures")
LEVEL = 0.95
BLOCK = 64  # resamples at a time: 1 MB of weights for 2,000 queries fits the cache


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval. None means undefined, and `reason` says why.

    `undefined_resamples` counts the resamples in which the figure is undefined; the interval leaves them out.
    """

    estimate: float | None
    lower: float | None
    upper: float | None
    reason: str | None = None
    undefined_resamples: int = 0

    def to_json(self) -> Json:
        """`{estimate, lower, upper}`, plus `reason` if it is set and `undefined_resamples` if it is not 0."""
        value: Json = {"estimate": self.estimate, "lower": self.lower, "upper": self.upper}
        if self.reason is not None:
            value["reason"] = self.reason
        if self.undefined_resamples:
            value["undefined_resamples"] = self.undefined_resamples
        return value


def interval(
    draws: Float[np.ndarray, " draws"], reason: str = "undefined", level: float = LEVEL, centred: bool = False
) -> Interval:
    """Summarises one array of `resample`: draws[0] is the estimate, the others are resamples, NaN means undefined.

    `reason` is reported if the estimate is undefined. `centred` is for figures that are at least 0 and that noise
    alone raises, such as ECE: resampling adds noise, so the percentiles are shifted by estimate - mean(resamples).
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
    figures: Callable[[np.ndarray], Figures],
    groups: np.ndarray,
    n_resamples: int,
    seed: int,
    block: int = BLOCK,
) -> Figures:
    """Calls `figures` on the test split and on `n_resamples` resamples of its groups.

    `figures` returns arrays [resamples] in mappings or dataclasses, nested at will. The result has the same structure
    with arrays [1 + n_resamples]. Groups are drawn with replacement from their sorted names, so the result depends
    neither on the row order nor on `block`. Raises InputError if n_resamples is negative.
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

    def on_draw(counts: np.ndarray) -> Figures:
        return figures(np.ascontiguousarray(counts.T, dtype=np.float64)[group_of].T)

    # One thread per block and none inside it: BLAS threads would wait for each other at every small product.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(on_draw, draws()))
    return _concatenate(parts)


def _concatenate(parts: list[Any]) -> Any:
    """Concatenates corresponding arrays of structures that are alike."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {name: _concatenate([part[name] for part in parts]) for name in first}
    if is_dataclass(first):
        names = [member.name for member in fields(first)]
        group: Any = type(first)
        return group(**{name: _concatenate([getattr(part, name) for part in parts]) for name in names})
    return np.concatenate(parts)


def largest_resample(groups: np.ndarray) -> int:
    """An upper bound on the number of queries in a resample."""
    _, sizes = np.unique(np.asarray(groups, dtype=str), return_counts=True)
    return int(len(sizes) * sizes.max())
