"""Leave-one-benchmark-out: predictions for each benchmark by routers that were fitted without its queries.

In: joined signals, and the split and settings of a router. Out: the `Predictions` of that router's test split with
every p replaced. Layers, projections, trunk, calibration and baselines are refitted without the benchmark's training
queries. Costs, training means and each router's lambda and margin are not refitted, because the experiment measures
the generalisation of the confidences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from prefill_router.errors import InputError
from prefill_router.experiments.predict import predict_test
from prefill_router.metrics.predictions import Predictions
from prefill_router.outcomes.splits import Split
from prefill_router.pool import Pool
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_router
from prefill_router.semantic.baselines import FittedBaseline
from prefill_router.signals.join import Signals


def check(benchmarks: np.ndarray) -> None:
    """Raises InputError if there is only one benchmark."""
    if len(names := sorted(set(benchmarks))) < 2:
        raise InputError(
            f"leave_one_benchmark_out: all queries are of the benchmark {names[0]!r}, none would be left for "
            "training; turn the option off, or add outcomes of other benchmarks"
        )


def without(split: Split, benchmarks: np.ndarray, benchmark: str) -> Split:
    """The split with the benchmark's queries removed from training and calibration, and as the only test queries."""

    def kept(queries: Int[np.ndarray, " part"], inside: bool) -> Int[np.ndarray, " kept"]:
        return queries[(benchmarks[queries] == benchmark) == inside]

    return Split(kept(split.train, False), kept(split.calibration, False), kept(split.test, True))


def predict_unseen(
    pool: Pool,
    signals: Signals,
    split: Split,
    config: FitConfig,
    benchmark: str,
    *,
    baselines: bool = True,
    tuned: Mapping[str, FittedBaseline] | None = None,
) -> Predictions:
    """Predictions for the benchmark's test queries by routers that were fitted on the other benchmarks.

    `baselines` and `tuned` as in `predict_test`. Raises InputError as `fit_router`.
    """
    part = without(split, signals.outcomes.benchmarks, benchmark)
    fitted = fit_router(signals, pool, part, config, {}, progress=True)
    return predict_test(fitted.router, signals, part, baselines=baselines, progress=True, tuned=tuned)[0]


def combine(predictions: Predictions, unseen: Mapping[str, Predictions]) -> Predictions:
    """`predictions` with the confidences of `unseen`, which maps each of its benchmarks to their predictions."""
    place = {query_id: row for row, query_id in enumerate(predictions.query_ids)}
    routers = {}
    for name, router in predictions.routers.items():
        p = np.full(router.p.shape, np.nan)
        for part in unseen.values():
            p[[place[query_id] for query_id in part.query_ids]] = part.routers[name].p
        routers[name] = replace(router, p=p)
    return replace(predictions, routers=routers)
