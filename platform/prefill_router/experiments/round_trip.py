"""The trial of a checkpoint: it loads, routes, and is the same after it is saved and loaded again.

In: a checkpoint folder. Out: `Trial`: the problem in words, or the milliseconds of single decisions. Routes synthetic
states, drawn around the mean of each projection, so that no activations are needed: the trial finds checkpoints that
cannot route, not those that route badly. Context windows do not count, since the synthetic queries are no requests.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from prefill_router.controller import LocalRouter
from prefill_router.metrics.bootstrap import Interval
from prefill_router.outcomes.sample import load_sample
from prefill_router.pool import Pool
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.router import Router
from prefill_router.signals.layer_key import LayerKey

QUERIES = 64  # synthetic queries
TIMED = 300  # timed decisions, after WARM_UP others
WARM_UP = 20
PROMPTS = 60  # timed prompts of the built-in sample, from text to decision
RESAMPLES = 1000


@dataclass(frozen=True)
class Trial:
    """`problem` is None for a checkpoint that routes; `router` is then the loaded router."""

    problem: str | None
    router: Router | None = None


def try_checkpoint(folder: Path) -> Trial:
    """Loads the checkpoint, routes synthetic states, saves it and loads it again.

    Problems: files that are missing, damaged or of an unknown format; confidences, uncertainties or costs that are not
    finite or out of range, or not one per model of the pool; results that differ in any bit after the round trip.
    """
    try:
        router = load_checkpoint(folder)
        rows = synthetic_rows(router)
        first = _results(router, rows)
        if (problem := _problem(router, first)) is not None:
            return Trial(problem)
        _without_windows(router).decide(rows)
        with tempfile.TemporaryDirectory() as scratch:
            saved = save_checkpoint(router, Path(scratch, "checkpoint"))
            again = load_checkpoint(Path(scratch, "checkpoint"))
    except (ValueError, IndexError, KeyError) as error:  # arrays of different shapes raise the last three
        return Trial(f"the checkpoint cannot route: {' '.join(str(error).split())}")
    second = _results(again, rows)
    if again.id != saved.id or again.pool != router.pool or dict(again.manifest) != dict(router.manifest):
        return Trial("its identity, pool or lineage changes when it is saved and loaded again")
    for name, values in first.items():
        if values.tobytes() != second[name].tobytes():
            return Trial(f"{name}: changes when the checkpoint is saved and loaded again")
    return Trial(None, router)


def synthetic_rows(router: Router, n: int = QUERIES, seed: int = 0) -> dict[str, pa.Table]:
    """Activations rows of `n` synthetic queries by encoder: states around the mean of each projection, float32."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 2_000, n)
    rows: dict[str, pa.Table] = {}
    for key, projection in zip(router.layer_keys, router.projections, strict=True):
        states = (projection.mean + projection.scale * rng.standard_normal((n, len(projection.mean)))).astype(
            np.float32
        )
        column = pa.FixedSizeListArray.from_arrays(pa.array(states.ravel()), states.shape[1])
        table = rows.get(key.encoder)
        if table is None:
            table = pa.table({"n_tokens": pa.array(counts), "error": pa.nulls(n, pa.string())})
        rows[key.encoder] = table.append_column(key.column, column)
    return rows


def decision_ms(router: Router) -> Interval:
    """The median milliseconds of one decision from states, with a 95 % bootstrap interval."""
    rows, router = synthetic_rows(router), _without_windows(router)
    single = [{name: table.slice(at, 1) for name, table in rows.items()} for at in range(QUERIES)]
    return _median(_timed(lambda at: router.decide(single[at % QUERIES]), TIMED))


def request_ms(router: Router) -> Interval:
    """As `decision_ms`, from prompts of the built-in sample: tokenization, encoder and decision, one at a time.

    Loads the encoders. Raises InputError if an encoder cannot be loaded.
    """
    outcomes, _ = load_sample(n_queries=500)
    with LocalRouter(router) as local:
        local.load_encoders()
        return _median(_timed(lambda at: local.route(outcomes.prompts[at % len(outcomes)]), PROMPTS))


def _without_windows(router: Router) -> Router:
    """The router with a pool in which no model declares a context window."""
    models = tuple(model.model_copy(update={"context_tokens": None}) for model in router.pool.models)
    return replace(router, pool=Pool(models=models))


def _results(router: Router, rows: Mapping[str, pa.Table]) -> dict[str, np.ndarray]:
    """Everything that a decision depends on, for every query."""

    def states(key: LayerKey) -> np.ndarray:
        column = rows[key.encoder].column(key.column).combine_chunks()
        return np.asarray(column.flatten().to_numpy().reshape(len(column), -1))

    features = router.features(states)
    p, uncertainty = router.confidences(features)
    counts = rows[router.counting_encoder].column("n_tokens").to_numpy()
    results = {
        "confidences": p,
        "uncertainties": uncertainty,
        "costs": router.costs.estimate(counts, output_tokens=router.output_tokens(features)),
    }
    if router.novelty is not None:
        results["novelty"] = router.novelty([states(key) for key in router.layer_keys], router.projections)
    return results


def _problem(router: Router, results: Mapping[str, np.ndarray]) -> str | None:
    """The first result that is not one finite number in its range per query and model."""
    shape = (QUERIES, len(router.pool.models))
    for name, most in (("confidences", 1.0), ("uncertainties", 1.0), ("costs", np.inf)):
        values = results[name]
        if values.shape != shape:
            return f"{name}: one for each of {values.shape[-1]} models, but the pool has {shape[1]}"
        bad = ~(np.isfinite(values) & (values >= 0) & (values <= most))
        if bad.any():
            query, model = np.argwhere(bad)[0]
            return (
                f"{name}: {bad.sum():,} of {values.size:,} are not finite or out of range, such as "
                f"{values[query, model]} for {router.pool.names[model]}"
            )
    if "novelty" in results and not np.isfinite(results["novelty"]).all():
        return "novelty: not finite"
    return None


def _timed(act: Callable[[int], object], n: int) -> Float[np.ndarray, " times"]:
    """Milliseconds of `n` calls."""
    times = []
    for at in range(WARM_UP + n):
        started = time.perf_counter()
        act(at)
        times.append(1000 * (time.perf_counter() - started))
    return np.array(times[WARM_UP:])


def _median(times: Float[np.ndarray, " times"]) -> Interval:
    drawn = np.random.default_rng(0).choice(times, (RESAMPLES, len(times)))
    lower, upper = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Interval(float(np.median(times)), float(lower), float(upper))
