"""The layer search against scikit-learn doing the same work: seconds, AUC, peak memory, and how they grow.

The work: for every block (layer x pooling), number of components k, target and fold, standardise, PCA, logistic
regression, ROC-AUC on the fold left out; the search adds Fisher's J for every k and the geometry. scikit-learn does it
twice: a fit of everything per target and k, and with scaler and PCA shared by all targets and k. Data are made up from
a seed, column by column, or read from activations. Every figure comes from a process of its own; scikit-learn gets a
process per core, each with one thread.
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

from benchmarks.reference import measured_block, peak_mib
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import write_json
from prefill_router.outcomes.splits import make_folds
from prefill_router.routing.fit import N_FOLDS
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.search import search_layers
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals

FACTORS = 192  # that made-up states are mixed from, beside noise
Kind = Literal["search", "shared", "pipelines"]
TITLES: dict[Kind, str] = {
    "search": "layer search, with J and geometry",
    "shared": "scikit-learn, PCA shared",
    "pipelines": "scikit-learn, a pipeline per target and k",
}


class ProbeBenchmarkConfig(FrozenModel):
    """The shape of made-up data, or where real data are; and what to measure."""

    output: Annotated[Path, Field(description="folder for probe.json")] = Path("runs/benchmarks/probe")
    queries: Annotated[int, Field(ge=100, description="made-up training queries")] = 10_000
    hidden: Annotated[int, Field(ge=8, description="width of made-up states")] = 384
    layers: Annotated[int, Field(ge=1, description="made-up layers, each with two poolings")] = 7
    targets: Annotated[int, Field(ge=1, description="made-up targets")] = 9
    missing: Annotated[float, Field(ge=0, lt=1, description="share of made-up labels that are missing")] = 0.002
    outcomes: Annotated[Path | None, Field(description="real outcomes, with pool and activations")] = None
    pool: Annotated[Path | None, Field(description="pool.yaml")] = None
    activations: Annotated[Path | None, Field(description="activations dataset")] = None
    seed: Annotated[int, Field(ge=0, description="of made-up data, split and folds")] = 0
    components: Annotated[tuple[int, ...], Field(min_length=1, description="values of k, a list")] = (16, 32, 64, 128)
    shared_blocks: Annotated[
        int,
        Field(
            ge=0, description="blocks on which scikit-learn with a shared PCA is measured; its time is scaled to all"
        ),
    ] = 4
    pipeline_blocks: Annotated[int, Field(ge=0, description="the same, of a fit per target and k")] = 2
    pca: Annotated[
        Literal["auto", "covariance_eigh", "full"],
        Field(description="scikit-learn's svd_solver; above 500 columns auto may take the inexact randomised one"),
    ] = "auto"
    scaling: Annotated[bool, Field(description="also with twice the queries, targets and values of k")] = True

    @model_validator(mode="after")
    def _all_or_none(self) -> ProbeBenchmarkConfig:
        given = [self.outcomes is not None, self.pool is not None, self.activations is not None]
        if any(given) and not all(given):
            raise ValueError("outcomes, pool and activations go together")
        return self


@dataclass(frozen=True)
class Data:
    """Training queries: labels [queries, targets], folds, and the states of one block at a time."""

    blocks: tuple[LayerKey, ...]
    correct: np.ndarray
    folds: np.ndarray
    states: Callable[[LayerKey], np.ndarray]


@dataclass(frozen=True)
class Measured:
    """Seconds by the clock, of all CPUs, and of all threads in getting states; memory; AUC [blocks, ks, targets].

    scikit-learn's CPU seconds leave out getting states, the search's do not.
    """

    blocks: tuple[LayerKey, ...]
    all_blocks: int
    seconds: float
    cpu_seconds: float
    reading: float
    peak_mib: float
    auc: np.ndarray

    @property
    def scale(self) -> float:
        """What makes figures of the blocks measured those of all."""
        return self.all_blocks / len(self.blocks)


def run(config: ProbeBenchmarkConfig) -> str:
    """Measure the layer search and scikit-learn on the same work; print tables of time, AUC, memory and growth."""
    search = _measure(config, "search")
    print(f"\n{_shape(config)}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| | blocks measured | seconds, all blocks | ratio | CPU seconds | ratio | max AUC difference | same layers "
        "| peak MiB |\n" + "|---" * 9 + "|\n" + _row(search, search, "search"),
        flush=True,
    )
    found: dict[Kind, Measured] = {"search": search}
    wanted: dict[Kind, int] = {"shared": config.shared_blocks, "pipelines": config.pipeline_blocks}
    for kind, n_blocks in wanted.items():
        if n_blocks:
            found[kind] = _measure(config, kind, n_blocks)
            print(_row(found[kind], search, kind), flush=True)
    growth = _grow(config) if config.scaling else {}
    write_json(
        config.output / "probe.json",
        {
            "config": config.model_dump(mode="json"),
            "growth": growth,
            **{
                kind: {
                    "blocks": len(own.blocks),
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
        f"{len(search.blocks)} blocks in {search.seconds:.1f} s, {search.reading:.1f} s of threads in getting "
        f"states, {search.peak_mib:,.0f} MiB at most" + (f"; {ratios}" if ratios else "")
    )


def made_up(config: ProbeBenchmarkConfig) -> Data:
    """States mixed from factors of falling strength, blurred the more the further from two thirds up, and noise."""
    n, strength = config.queries, 1 / np.sqrt(np.arange(1, FACTORS + 1, dtype=np.float32))

    def factors() -> np.ndarray:
        return np.random.default_rng([config.seed, 0]).standard_normal((n, FACTORS), np.float32)

    def states(block: LayerKey) -> np.ndarray:
        rng = np.random.default_rng([config.seed, 1, block.layer, int(block.pooling == "mean")])
        blur = 0.5 + abs(block.layer / config.layers - 2 / 3) + 0.3 * (block.pooling == "last")
        mixed = (factors() + blur * rng.standard_normal((n, FACTORS), np.float32)) * strength
        x = mixed @ rng.standard_normal((FACTORS, config.hidden), np.float32)
        for row in x:  # row by row: the noise of a wide block would double its memory
            row += 0.2 * rng.standard_normal(config.hidden, np.float32)
        x += 2 * rng.standard_normal(config.hidden, np.float32)
        return x

    rng = np.random.default_rng([config.seed, 2])
    logits = factors() @ (0.5 * rng.normal(size=(FACTORS, config.targets)) * strength[:, None])
    logits += rng.normal(size=config.targets)
    correct = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    correct[rng.random(correct.shape) < config.missing] = np.nan
    blocks = tuple(
        LayerKey("made-up", pooling, layer) for pooling in ("last", "mean") for layer in range(config.layers)
    )
    return Data(blocks, correct, rng.permutation(n) % N_FOLDS, states)


def real(config: ProbeBenchmarkConfig) -> Data:
    """The training part of the 85/15 split of `seed`."""
    given = config.model_dump(include={"outcomes", "pool", "activations", "output"})
    _, signals = load_signals(SignalsConfig.model_validate(given))
    train = split_signals(signals, config.seed, "85/15").train
    folds = make_folds(signals.outcomes, train, config.seed, N_FOLDS)
    return Data(signals.layer_keys, signals.outcomes.correct[train], folds, lambda block: signals.states(block, train))


def _measure(config: ProbeBenchmarkConfig, kind: Kind, n_blocks: int | None = None) -> Measured:
    """In a new process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measured, config, kind, n_blocks).result()


def _measured(config: ProbeBenchmarkConfig, kind: Kind, n_blocks: int | None) -> Measured:
    threadpool_limits(1)  # for good: this process ends with the measurement
    data = real(config) if config.activations else made_up(config)
    n_all = len(data.blocks)
    at = (
        range(n_all)
        if n_blocks is None or n_blocks >= n_all
        else np.linspace(0, n_all - 1, n_blocks + 2)[1:-1].round().astype(int)
    )
    blocks = tuple(data.blocks[index] for index in at)
    reading = [0.0]

    def states(block: LayerKey) -> np.ndarray:
        started = time.perf_counter()
        x = data.states(block)
        reading[0] += time.perf_counter() - started
        return x

    if kind == "search":
        started, used = time.perf_counter(), time.process_time()
        found = search_layers(
            blocks,
            states,
            data.correct,
            data.folds,
            config.components,
            nested=False,
            with_geometry=True,
            progress="search",
        )
        seconds, used = time.perf_counter() - started, time.process_time() - used
        return Measured(blocks, n_all, seconds, used, reading[0], peak_mib(), np.stack([found[b].auc for b in blocks]))
    workers = min(os.cpu_count() or 1, len(blocks))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(time.sleep, [1] * workers))  # started, every one, before the clock
        started = time.perf_counter()
        tasks = [
            pool.submit(
                measured_block, states(block), data.correct, data.folds, config.components, kind == "shared", config.pca
            )
            for block in blocks
        ]
        answers = [task.result() for task in tasks]
        seconds = time.perf_counter() - started
    peaks: dict[int, float] = {}
    for _, _, process, peak in answers:
        peaks[process] = max(peak, peaks.get(process, 0))
    return Measured(
        blocks,
        n_all,
        seconds,
        sum(cpu for _, cpu, _, _ in answers),
        reading[0],
        sum(peaks.values()),
        np.stack([auc for auc, *_ in answers]),
    )


def _grow(config: ProbeBenchmarkConfig) -> dict[str, float]:
    """Seconds on made-up data of this shape, and with twice as much of one thing."""
    config = config.model_copy(update={"outcomes": None, "pool": None, "activations": None})
    between = {3 * k // 4 for k in config.components}
    variants: dict[str, dict[str, object]] = {
        "as above": {},
        "queries x2": {"queries": 2 * config.queries},
        "targets x2": {"targets": 2 * config.targets},
        "values of k x2": {"components": tuple(sorted({*config.components, *between}))},
    }
    seconds = {}
    print("\n| made-up data | seconds, less getting states | ratio |\n|---|---|---|")
    for name, update in variants.items():
        own = _measure(config.model_copy(update=update), "search")
        seconds[name] = own.seconds - own.reading / min(os.cpu_count() or 1, len(own.blocks))
        print(f"| {name} | {seconds[name]:.1f} | {seconds[name] / seconds['as above']:.2f} |", flush=True)
    return seconds


def _shape(config: ProbeBenchmarkConfig) -> str:
    data = (
        "real data"
        if config.activations
        else (
            f"made-up data: {config.queries:,} queries x {config.hidden} wide, "
            f"{2 * config.layers} blocks, {config.targets} targets"
        )
    )
    return f"{data}; k {', '.join(map(str, config.components))}; {N_FOLDS} folds"


def _row(own: Measured, search: Measured, kind: Kind) -> str:
    same = "" if own is search else f" {_agreement(own, search):.0%} "
    difference = "" if own is search else f" {_difference(own, search):.5f} "
    scaled = "" if len(own.blocks) == own.all_blocks else " (scaled)"
    seconds, cpu = own.seconds * own.scale, own.cpu_seconds * own.scale
    return (
        f"| {TITLES[kind]} | {len(own.blocks)} of {own.all_blocks} | {seconds:.1f}{scaled} | "
        f"{seconds / search.seconds:.1f} | {cpu:.1f} | {cpu / search.cpu_seconds:.1f} |{difference}|{same}| "
        f"{own.peak_mib:,.0f} |"
    )


def _pair(own: Measured, search: Measured) -> tuple[np.ndarray, np.ndarray]:
    return own.auc, search.auc[[search.blocks.index(block) for block in own.blocks]]


def _difference(own: Measured, search: Measured) -> float:
    theirs, ours = _pair(own, search)
    return float(np.nanmax(np.abs(theirs - ours)))


def _agreement(own: Measured, search: Measured) -> float:
    """Share of (k, target) for which both choose the same of the blocks measured, or one within 0.001 of the best."""
    theirs, ours = _pair(own, search)
    chosen = np.take_along_axis(theirs, ours.argmax(axis=0)[None], axis=0)[0]
    return float((theirs.max(axis=0) - chosen < 1e-3).mean())


if __name__ == "__main__":
    main(ProbeBenchmarkConfig, run)
