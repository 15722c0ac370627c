"""Speed of the layer search against scikit-learn on the same work: seconds, AUC, peak memory, and scaling.

The work: for every layer key (layer x pooling), number of components k, target and fold: standardise, PCA, logistic
regression, ROC-AUC on the held-out fold. The search also computes Fisher's J for every k and the geometry. scikit-learn
runs twice: with one pipeline per target and k, and with one scaler and PCA for all targets and k. Data are synthetic,
from a seed, or read from activations. Every method runs in its own process; scikit-learn runs in one process per core,
with one thread each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator
from threadpoolctl import threadpool_limits

from benchmarks.reference import measured_layer, peak_mib
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import write_json
from prefill_router.locations import LocalPath
from prefill_router.outcomes.splits import make_folds
from prefill_router.routing.layers import N_FOLDS
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.search import search_layers
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals

FACTORS = 192  # factors of the synthetic states; noise is added
Kind = Literal["search", "shared", "pipelines"]
TITLES: dict[Kind, str] = {
    "search": "layer search, with J and geometry",
    "shared": "scikit-learn, PCA shared",
    "pipelines": "scikit-learn, a pipeline per target and k",
}


class ProbeBenchmarkConfig(FrozenModel):
    """The shape of synthetic data, or the paths of real data, and the methods to measure."""

    output: Annotated[LocalPath, Field(description="folder for probe.json")] = Path("runs/benchmarks/probe")
    queries: Annotated[int, Field(ge=100, description="synthetic training queries")] = 10_000
    hidden: Annotated[int, Field(ge=8, description="width of synthetic states")] = 384
    layers: Annotated[int, Field(ge=1, description="synthetic layers, with two poolings each")] = 7
    targets: Annotated[int, Field(ge=1, description="synthetic targets")] = 9
    missing: Annotated[float, Field(ge=0, lt=1, description="share of missing labels in synthetic data")] = 0.002
    outcomes: Annotated[
        LocalPath | None, Field(description="outcomes.parquet of real data; needs pool and activations")
    ] = None
    pool: Annotated[LocalPath | None, Field(description="pool.yaml")] = None
    activations: Annotated[LocalPath | None, Field(description="activations dataset")] = None
    seed: Annotated[int, Field(ge=0, description="seed of synthetic data, split and folds")] = 0
    components: Annotated[tuple[int, ...], Field(min_length=1, description="values of k, a list")] = (16, 32, 64, 128)
    shared_blocks: Annotated[
        int,
        Field(
            ge=0,
            description="layer keys on which scikit-learn with a shared PCA is measured; its time is scaled to all",
        ),
    ] = 4
    pipeline_blocks: Annotated[int, Field(ge=0, description="the same for one pipeline per target and k")] = 2
    pca: Annotated[
        Literal["auto", "covariance_eigh", "full"],
        Field(description="svd_solver of scikit-learn; above 500 columns auto may be the inexact randomised solver"),
    ] = "auto"
    scaling: Annotated[bool, Field(description="also measure twice the queries, targets and values of k")] = True

    @model_validator(mode="after")
    def _all_or_none(self) -> ProbeBenchmarkConfig:
        given = [self.outcomes is not None, self.pool is not None, self.activations is not None]
        if any(given) and not all(given):
            raise ValueError(
                f"outcomes, pool, activations: got {sum(given)} of the three; give all for real data, or none"
            )
        return self


@dataclass(frozen=True)
class Data:
    """Training queries: labels [queries, targets], folds, and the states of one layer key at a time."""

    keys: tuple[LayerKey, ...]
    correct: np.ndarray
    folds: np.ndarray
    states: Callable[[LayerKey], np.ndarray]


@dataclass(frozen=True)
class Measured:
    """Wall-clock seconds, CPU seconds, seconds of all threads to get states, peak memory (MiB), AUC.

    AUC is [layer keys, ks, targets]. The CPU seconds of the search include the time to get states, those of
    scikit-learn do not.
    """

    keys: tuple[LayerKey, ...]
    all_keys: int
    seconds: float
    cpu_seconds: float
    reading: float
    peak_mib: float
    auc: np.ndarray

    @property
    def scale(self) -> float:
        """The factor from the measured layer keys to all."""
        return self.all_keys / len(self.keys)


def run(config: ProbeBenchmarkConfig) -> str:
    """Measure the layer search and scikit-learn on the same work; print tables of time, AUC, memory and growth."""
    search = _measure(config, "search")
    print(f"\n{_shape(config)}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| | layer keys measured | seconds, all layer keys | ratio | CPU seconds | ratio | max AUC difference "
        "| same layers | peak MiB |\n" + "|---" * 9 + "|\n" + _row(search, search, "search"),
        flush=True,
    )
    found: dict[Kind, Measured] = {"search": search}
    wanted: dict[Kind, int] = {"shared": config.shared_blocks, "pipelines": config.pipeline_blocks}
    for kind, n_keys in wanted.items():
        if n_keys:
            found[kind] = _measure(config, kind, n_keys)
            print(_row(found[kind], search, kind), flush=True)
    growth = _grow(config) if config.scaling else {}
    write_json(
        config.output / "probe.json",
        {
            "config": config.model_dump(mode="json"),
            "growth": growth,
            **{
                kind: {
                    "blocks": len(own.keys),
                    "seconds": own.seconds,
                    "seconds_all_blocks": own.seconds * own.scale,
                    "cpu_seconds_all_blocks": own.cpu_seconds * own.scale,
                    "seconds_reading": own.reading,
                    "peak_mib": own.peak_mib,
                    "same_layers": _agreement(own, search),
                    "max_auc_difference": _difference(own, search),
                }
                for kind, own in found.items()
            },
        },
    )
    ratios = ", ".join(
        f"{own.seconds * own.scale / search.seconds:.0f}x {TITLES[kind]}"
        for kind, own in found.items()
        if kind != "search"
    )
    return (
        f"{len(search.keys)} layer keys in {search.seconds:.1f} s, of which getting states took {search.reading:.1f} "
        f"thread seconds, peak memory {search.peak_mib:,.0f} MiB" + (f"; {ratios}" if ratios else "")
    )


def synthetic(config: ProbeBenchmarkConfig) -> Data:
    """Synthetic states from factors of decreasing strength, plus noise that is lowest at two thirds of the layers."""
    n, strength = config.queries, 1 / np.sqrt(np.arange(1, FACTORS + 1, dtype=np.float32))

    def factors() -> np.ndarray:
        return np.random.default_rng([config.seed, 0]).standard_normal((n, FACTORS), np.float32)

    def states(key: LayerKey) -> np.ndarray:
        rng = np.random.default_rng([config.seed, 1, key.layer, int(key.pooling == "mean")])
        blur = 0.5 + abs(key.layer / config.layers - 2 / 3) + 0.3 * (key.pooling == "last")
        mixed = (factors() + blur * rng.standard_normal((n, FACTORS), np.float32)) * strength
        x = mixed @ rng.standard_normal((FACTORS, config.hidden), np.float32)
        for row in x:  # row by row: noise for all rows would double the memory
            row += 0.2 * rng.standard_normal(config.hidden, np.float32)
        x += 2 * rng.standard_normal(config.hidden, np.float32)
        return x

    rng = np.random.default_rng([config.seed, 2])
    logits = factors() @ (0.5 * rng.normal(size=(FACTORS, config.targets)) * strength[:, None])
    logits += rng.normal(size=config.targets)
    correct = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    correct[rng.random(correct.shape) < config.missing] = np.nan
    keys = tuple(
        LayerKey("synthetic", pooling, layer) for pooling in ("last", "mean") for layer in range(config.layers)
    )
    return Data(keys, correct, rng.permutation(n) % N_FOLDS, states)


def real(config: ProbeBenchmarkConfig) -> Data:
    """The training queries of the 85/15 split of `seed`."""
    given = config.model_dump(include={"outcomes", "pool", "activations", "output"})
    _, signals = load_signals(SignalsConfig.model_validate(given))
    train = split_signals(signals, config.seed, "85/15").train
    folds = make_folds(signals.outcomes, train, config.seed, N_FOLDS)
    return Data(signals.layer_keys, signals.outcomes.correct[train], folds, lambda key: signals.states(key, train))


def _measure(config: ProbeBenchmarkConfig, kind: Kind, n_keys: int | None = None) -> Measured:
    """Measures in a new process, for its own peak memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measured, config, kind, n_keys).result()


def _measured(config: ProbeBenchmarkConfig, kind: Kind, n_keys: int | None) -> Measured:
    threadpool_limits(1)  # for the process, which ends after the measurement
    data = real(config) if config.activations else synthetic(config)
    n_all = len(data.keys)
    at = (
        range(n_all)
        if n_keys is None or n_keys >= n_all
        else np.linspace(0, n_all - 1, n_keys + 2)[1:-1].round().astype(int)
    )
    keys = tuple(data.keys[index] for index in at)
    reading = [0.0]

    def states(key: LayerKey) -> np.ndarray:
        started = time.perf_counter()
        x = data.states(key)
        reading[0] += time.perf_counter() - started
        return x

    if kind == "search":
        started, used = time.perf_counter(), time.process_time()
        found = search_layers(
            keys,
            states,
            data.correct,
            data.folds,
            config.components,
            nested=False,
            with_geometry=True,
            progress="search",
        )
        seconds, used = time.perf_counter() - started, time.process_time() - used
        return Measured(keys, n_all, seconds, used, reading[0], peak_mib(), np.stack([found[key].auc for key in keys]))
    workers = min(os.cpu_count() or 1, len(keys))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(time.sleep, [1] * workers))  # all workers start before the measurement
        started = time.perf_counter()
        tasks = [
            pool.submit(
                measured_layer, states(key), data.correct, data.folds, config.components, kind == "shared", config.pca
            )
            for key in keys
        ]
        answers = [task.result() for task in tasks]
        seconds = time.perf_counter() - started
    peaks: dict[int, float] = {}
    for _, _, process, peak in answers:
        peaks[process] = max(peak, peaks.get(process, 0))
    return Measured(
        keys,
        n_all,
        seconds,
        sum(cpu for _, cpu, _, _ in answers),
        reading[0],
        sum(peaks.values()),
        np.stack([auc for auc, *_ in answers]),
    )


def _grow(config: ProbeBenchmarkConfig) -> dict[str, float]:
    """Seconds on synthetic data of this shape, and with twice the queries, targets or values of k."""
    config = config.model_copy(update={"outcomes": None, "pool": None, "activations": None})
    between = {3 * k // 4 for k in config.components}
    variants: dict[str, dict[str, object]] = {
        "as above": {},
        "queries x2": {"queries": 2 * config.queries},
        "targets x2": {"targets": 2 * config.targets},
        "values of k x2": {"components": tuple(sorted({*config.components, *between}))},
    }
    seconds = {}
    print("\n| synthetic data | seconds without getting states | ratio |\n|---|---|---|")
    for name, update in variants.items():
        own = _measure(config.model_copy(update=update), "search")
        seconds[name] = own.seconds - own.reading / min(os.cpu_count() or 1, len(own.keys))
        print(f"| {name} | {seconds[name]:.1f} | {seconds[name] / seconds['as above']:.2f} |", flush=True)
    return seconds


def _shape(config: ProbeBenchmarkConfig) -> str:
    data = (
        "real data"
        if config.activations
        else (
            f"synthetic data: {config.queries:,} queries x {config.hidden} columns, "
            f"{2 * config.layers} layer keys, {config.targets} targets"
        )
    )
    return f"{data}; k {', '.join(map(str, config.components))}; {N_FOLDS} folds"


def _row(own: Measured, search: Measured, kind: Kind) -> str:
    same = "" if own is search else f" {_agreement(own, search):.0%} "
    difference = "" if own is search else f" {_difference(own, search):.5f} "
    scaled = "" if len(own.keys) == own.all_keys else " (scaled)"
    seconds, cpu = own.seconds * own.scale, own.cpu_seconds * own.scale
    return (
        f"| {TITLES[kind]} | {len(own.keys)} of {own.all_keys} | {seconds:.1f}{scaled} | "
        f"{seconds / search.seconds:.1f} | {cpu:.1f} | {cpu / search.cpu_seconds:.1f} |{difference}|{same}| "
        f"{own.peak_mib:,.0f} |"
    )


def _pair(own: Measured, search: Measured) -> tuple[np.ndarray, np.ndarray]:
    return own.auc, search.auc[[search.keys.index(key) for key in own.keys]]


def _difference(own: Measured, search: Measured) -> float:
    reference, ours = _pair(own, search)
    return float(np.nanmax(np.abs(reference - ours)))


def _agreement(own: Measured, search: Measured) -> float:
    """Share of (k, target) with the same choice among the measured layer keys, or an AUC within 0.001 of the best."""
    reference, ours = _pair(own, search)
    chosen = np.take_along_axis(reference, ours.argmax(axis=0)[None], axis=0)[0]
    return float((reference.max(axis=0) - chosen < 1e-3).mean())


if __name__ == "__main__":
    main(ProbeBenchmarkConfig, run)
