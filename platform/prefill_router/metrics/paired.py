"""Paired differences of two routers on one test split: candidate minus champion, overall and within each benchmark.

In: `Predictions` with the two routers. Out: `PairedFigures`, from one bootstrap by group: both routers are computed on
the same resamples. Benchmarks with few queries are pooled, and the intervals of the benchmarks hold together (max-t;
Westfall and Young, 1993). Knows nothing of bounds, versions or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float

from prefill_router.errors import InputError
from prefill_router.metrics.bootstrap import Interval, Json, interval, resample
from prefill_router.metrics.figures import all_figures
from prefill_router.metrics.groups import Draws, RouterFigures
from prefill_router.metrics.predictions import Predictions
from prefill_router.metrics.split import prepare

CHAMPION, CANDIDATE = "champion", "candidate"
SMALL = "small benchmarks"
LOWER_IS_BETTER = ("brier",)


@dataclass(frozen=True)
class PairedFigure:
    """One figure of both routers, and the difference candidate minus champion."""

    champion: Interval
    candidate: Interval
    difference: Interval


@dataclass(frozen=True)
class PairedBenchmark:
    """Accuracy at the routers' chosen lambdas within one benchmark.

    `lower` and `upper` bound the difference candidate minus champion, for all benchmarks together. `queries` have a
    label for every model; `pooled` are the small benchmarks that this row replaces.
    """

    name: str
    queries: int
    champion: float
    candidate: float
    difference: float
    lower: float
    upper: float
    pooled: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairedFigures:
    """The comparison of two routers on `queries` test queries, of which `complete` have a label for every model.

    `level` is that of every interval. `too_small`: queries of benchmarks that are too small even when pooled.
    """

    queries: int
    complete: int
    groups: int
    level: float
    figures: Mapping[str, PairedFigure]
    benchmarks: tuple[PairedBenchmark, ...]
    too_small: Mapping[str, int]

    def to_json(self) -> Json:
        """As a mapping; intervals as in metrics.json."""
        pairs = {
            name: {part: getattr(figure, part).to_json() for part in (CHAMPION, CANDIDATE, "difference")}
            for name, figure in self.figures.items()
        }
        return {
            "queries": self.queries,
            "complete": self.complete,
            "groups": self.groups,
            "level": self.level,
            "figures": pairs,
            "benchmarks": [asdict(benchmark) for benchmark in self.benchmarks],
            "too_small": dict(self.too_small),
        }


def paired_figures(
    predictions: Predictions, *, level: float, n_resamples: int, seed: int, min_benchmark: int
) -> PairedFigures:
    """Compares the routers named CANDIDATE and CHAMPION; other routers are left out.

    `level` is the two-sided level of the intervals, so that each end is a bound of level (1 + level) / 2. Benchmarks
    with fewer than `min_benchmark` complete queries are pooled. Raises InputError if a router is missing or if
    `n_resamples` is less than 1.
    """
    if n_resamples < 1:
        raise InputError(f"resamples: got {n_resamples}, a paired comparison needs at least 1")
    if missing := [name for name in (CHAMPION, CANDIDATE) if name not in predictions.routers]:
        raise InputError(f"routers: {missing[0]!r} is missing, got {', '.join(predictions.routers)}")
    pooled, small = _pool_small(predictions, min_benchmark)
    pooled = replace(pooled, routers={name: pooled.routers[name] for name in (CHAMPION, CANDIDATE)})
    test = prepare(pooled, parts=False)
    draws = resample(partial(all_figures, test), predictions.groups, n_resamples, seed)
    champion, candidate = (_of(draws.routers[name]) for name in (CHAMPION, CANDIDATE))
    reason = "undefined on this test split"
    figures = {
        name: PairedFigure(
            interval(champion[name], reason, level),
            interval(candidate[name], reason, level),
            interval(candidate[name] - champion[name], reason, level),
        )
        for name in champion
    }
    counts = Counter(pooled.benchmarks[test.complete].tolist())
    tested = [name for name in test.benchmarks if counts[name] >= min_benchmark]
    pairs = [
        tuple(draws.routers[router].benchmarks[name].accuracy_at_chosen_lambda for router in (CHAMPION, CANDIDATE))
        for name in tested
    ]
    bands = simultaneous([theirs - ours for ours, theirs in pairs], level)
    return PairedFigures(
        len(predictions),
        int(test.complete.sum()),
        len(set(predictions.groups)),
        level,
        figures,
        tuple(
            PairedBenchmark(
                name,
                counts[name],
                float(ours[0]),
                float(theirs[0]),
                float(theirs[0] - ours[0]),
                lower,
                upper,
                small if name == SMALL else (),
            )
            for name, (ours, theirs), (lower, upper) in zip(tested, pairs, bands, strict=True)
        ),
        {name: counts[name] for name in test.benchmarks if name not in tested},
    )


def simultaneous(differences: list[Float[np.ndarray, " draws"]], level: float) -> list[tuple[float, float]]:
    """Intervals that hold for all differences together; in each array the estimate is first, then the resamples.

    An end of every interval lies the same number c of bootstrap standard errors from its estimate. c is the quantile
    (1 + level) / 2 of the largest standardised deviation of a resample, of each end on its own. A difference that no
    resample changes has an interval of width 0. Undefined resamples (NaN) deviate by 0.
    """
    if not differences:
        return []
    estimates = np.array([draws[0] for draws in differences])
    deviations = np.stack([np.nan_to_num(draws[1:] - draws[0]) for draws in differences])
    errors = deviations.std(axis=1)
    z = np.divide(deviations, errors[:, None], out=np.zeros_like(deviations), where=errors[:, None] > 0)
    below, above = (float(np.quantile(side.max(axis=0), (1 + level) / 2)) for side in (z, -z))
    return [
        (float(estimate - below * error), float(estimate + above * error))
        for estimate, error in zip(estimates, errors, strict=True)
    ]


def _pool_small(predictions: Predictions, min_benchmark: int) -> tuple[Predictions, tuple[str, ...]]:
    """The predictions with the small benchmarks as one benchmark, and the names of these."""
    counts = Counter(predictions.benchmarks[predictions.complete].tolist())
    small = tuple(sorted(name for name in set(predictions.benchmarks) if counts[name] < min_benchmark))
    if not small:
        return predictions, ()
    names = np.array([SMALL if name in small else name for name in predictions.benchmarks], dtype=object)
    return replace(predictions, benchmarks=names), small


def _of(router: RouterFigures[Draws]) -> dict[str, Draws]:
    """The figures that gates bound, by their names in metrics.json."""
    curve = router.split.curve
    return {
        "auc": router.split.confidence.auc.mean,
        "brier": router.split.confidence.brier.mean,
        "p_auccc_exact": curve.p_auccc_exact,
        "headroom_captured": curve.headroom_captured,
        "headroom_captured_at_chosen_lambda": curve.headroom_captured_at_chosen_lambda,
        "accuracy_at_chosen_lambda": curve.accuracy_at_chosen_lambda,
    }
