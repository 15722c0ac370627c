"""What calibration, stack and margin add to the same trunks, over split seeds and numbers of queries.

For every split seed the trunks are trained once, and finished as the default (`prefill`), without each part of the
stack, without the margin, and with each calibrator alone (`raw`: none). The category prior and the best single model of
the training queries are the baselines. All figures of an evaluation are computed on the test queries of the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from threadpoolctl import threadpool_limits

from prefill_router.cli import main
from prefill_router.experiments.leave_one_out import combine, without
from prefill_router.experiments.predict import BEST_SINGLE, PREFILL, predict_test
from prefill_router.files import sha256_strings, write_atomically, write_json
from prefill_router.metrics import seeds
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import Predictions, RouterPredictions, read_predictions, write_predictions
from prefill_router.outcomes.splits import Scheme, Split, make_folds
from prefill_router.pool import Pool
from prefill_router.routing.calibration import PlattScaling
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import TrainedTrunks, best_lambda, finish_router, train_trunks
from prefill_router.routing.layers import N_FOLDS
from prefill_router.routing.router import Router
from prefill_router.semantic.baselines import best_single, category_prior
from prefill_router.signals.join import Signals
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals

VARIANTS: dict[str, dict[str, Any]] = {
    PREFILL: {},
    "no margin": {"margin": False},
    "no neighbours": {"stack": ("domain",)},
    "no domain": {"stack": ("neighbours",)},
    "pooled": {"stack": (), "margin": False},
    "platt": {"stack": (), "margin": False, "calibrator": "platt"},
    "isotonic": {"stack": (), "margin": False, "calibrator": "isotonic"},
    "pooled, margin": {"stack": ()},
}
RAW = "raw"
FIGURES = [
    ("auc",),
    ("brier",),
    ("ece",),
    ("p_auccc_exact",),
    ("headroom_captured_at_chosen_lambda",),
    ("cost_saving_at_chosen_lambda",),
    *(("utility_over_best_static", name) for name in seeds.NAMES),
]


class DecisionsConfig(SignalsConfig):
    """Inputs, split seeds, and numbers of labelled training queries."""

    seeds: Annotated[int, Field(ge=2, description="split seeds, from 0")] = 5
    scheme: Annotated[Scheme, Field(description="split scheme")] = "85/15"
    labels: Annotated[
        tuple[Annotated[int, Field(ge=100)], ...],
        Field(description="numbers of training queries, drawn from the training part; empty: all of them"),
    ] = ()
    calibration: Annotated[
        tuple[Annotated[int, Field(ge=100)], ...],
        Field(
            description="numbers of queries on which stack, calibrator and margin are fitted, drawn from all of them; "
            "empty: all"
        ),
    ] = ()
    unseen: Annotated[
        bool, Field(description="leave-one-benchmark-out: the routers of a benchmark's queries never saw the benchmark")
    ] = False
    fit: FitConfig = FitConfig()


def run(config: DecisionsConfig) -> str:
    """Train trunks at several split seeds, finish them in several ways; write the test figures and differences."""
    threadpool_limits(1)
    pool, signals = load_signals(config)
    text, found = [], {}
    for n in config.labels or (None,):
        by_size: dict[int | None, dict[int, Any]] = {}
        for seed in range(config.seeds):
            for size, predictions in _cached(config, pool, signals, seed, n).items():
                by_size.setdefault(size, {})[seed] = evaluate(predictions, n_resamples=0)
        for size, by_seed in by_size.items():
            title = "all training queries" if n is None else f"{n:,} training queries"
            title += "" if size is None else f", {size:,} calibration queries"
            found[title] = seeds.across_seeds(by_seed)
            figures = seeds.markdown(found[title], {path: seeds.HEADINGS[path] for path in FIGURES})
            text.append(f"### {title}\n\n{figures}")
            print(f"\n{text[-1]}", flush=True)
    write_json(config.output / "decisions.json", {"config": config.model_dump(mode="json"), **found})
    write_atomically(config.output / "decisions.md", lambda place: place.write_text("\n".join(text), encoding="utf-8"))
    return f"{len(VARIANTS) + 3} routers x {config.seeds} seeds; tables in {config.output / 'decisions.md'}"


def _cached(
    config: DecisionsConfig, pool: Pool, signals: Signals, seed: int, n: int | None
) -> dict[int | None, Predictions]:
    """The predictions of one seed by number of calibration queries; kept for interrupted runs."""
    key = sha256_strings(
        [
            signals.outcomes.digest(),
            pool.model_dump_json(),
            repr(VARIANTS),
            *(dataset.digest for dataset in signals.activations.values()),
            config.model_dump_json(include={"scheme", "fit"}),
        ]
    )[:16]
    name = f"seed{seed}{'-unseen' if config.unseen else ''}{'' if n is None else f'-{n}'}"
    paths = {
        size: Path(config.output) / key / f"{name}{'' if size is None else f'-calibration{size}'}.parquet"
        for size in config.calibration or (None,)
    }
    missing = [size for size, path in paths.items() if not path.exists()]
    if missing:
        for size, predictions in _predict(config, pool, signals, seed, n, missing):
            paths[size].parent.mkdir(parents=True, exist_ok=True)
            write_predictions(predictions, paths[size])
        print(f"seed {seed}, {'all' if n is None else f'{n:,}'} training queries: done", flush=True)
    return {size: read_predictions(path) for size, path in paths.items()}


def _predict(
    config: DecisionsConfig, pool: Pool, signals: Signals, seed: int, n: int | None, sizes: Sequence[int | None]
) -> Iterator[tuple[int | None, Predictions]]:
    """The predictions of one seed for each number of calibration queries, all from the same trunks."""
    fit = config.fit.model_copy(update={"seed": seed, "scheme": config.scheme})
    split = split_signals(signals, seed, config.scheme)
    split = replace(split, train=_part(split.train, n, seed))
    trained = train_trunks(signals, pool, split, fit)
    for size in sizes:
        predictions = _finished(signals, pool, split, fit, _calibrated_on(trained, size, seed))
        if config.unseen:
            predictions = combine(predictions, dict(_without_each(signals, pool, split, fit, size, seed)))
        yield size, predictions


def _without_each(
    signals: Signals, pool: Pool, split: Split, fit: FitConfig, size: int | None, seed: int
) -> Iterator[tuple[str, Predictions]]:
    """The predictions for every benchmark's test queries by variants that were fitted on the other benchmarks."""
    benchmarks = signals.outcomes.benchmarks
    for benchmark in sorted(set(benchmarks[split.test])):
        part = without(split, benchmarks, benchmark)
        trained = _calibrated_on(train_trunks(signals, pool, part, fit), size, seed)
        yield benchmark, _finished(signals, pool, part, fit, trained)


def _finished(signals: Signals, pool: Pool, split: Split, fit: FitConfig, trained: TrainedTrunks) -> Predictions:
    """The predictions of all variants of the same trunks, and of the baselines."""
    outcomes = signals.outcomes
    finished = {
        name: finish_router(trained, fit.model_copy(update=changes), {}).router for name, changes in VARIANTS.items()
    }
    identity = PlattScaling(np.ones(len(pool.models)), np.zeros(len(pool.models)))
    finished[RAW] = replace(finished["pooled"], calibrator=identity)  # with the lambda of the calibrated one
    reference = finished[PREFILL]
    predictions, _ = predict_test(reference, signals, split, baselines=False)
    features = reference.features(signals.states)
    routers = {name: _of(router, features[split.test]) for name, router in finished.items()}
    folds, n_tokens = make_folds(outcomes, split.train, fit.seed, N_FOLDS), signals.n_tokens[reference.counting_encoder]
    prior, single = (fit_baseline(outcomes, split.train, folds) for fit_baseline in (category_prior, best_single))
    lam = best_lambda(
        prior.held_out_p, outcomes, split.train, reference.costs, n_tokens, None, reference.output_tokens(features)
    )
    routers |= {
        "category_prior": RouterPredictions(prior.p[split.test], lam),
        BEST_SINGLE: RouterPredictions(single.p[split.test], 0.0),
    }
    return replace(predictions, routers=routers)


def _of(router: Router, features: np.ndarray) -> RouterPredictions:
    bonus = 0.0 if router.margin is None else router.margin.bonus
    return RouterPredictions(router.confidences(features)[0], router.chosen_lambda, margin_bonus=bonus)


def _calibrated_on(trained: TrainedTrunks, size: int | None, seed: int) -> TrainedTrunks:
    """The trunks with a random part of the queries on which stack, calibrator and margin are fitted."""
    kept = _part(np.arange(len(trained.rows)), size, seed)
    return replace(trained, rows=trained.rows[kept], row_folds=trained.row_folds[kept], raw=trained.raw[kept])


def _part(rows: np.ndarray, size: int | None, seed: int) -> np.ndarray:
    """A random part of the rows, the same for every call with the same arguments."""
    return rows if size is None else np.sort(np.random.default_rng((seed, 1)).permutation(rows)[:size])


if __name__ == "__main__":
    main(DecisionsConfig, run)
