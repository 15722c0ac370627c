"""Fits a grid of semantic routers and compares the best ones with the prefill router on the same splits.

In: outcomes, pool, activations (an embedding is the mean-pooled final layer of an encoder), text features. Out, under
OUTPUT: `fits/`, one file per fit, so that the same command resumes an interrupted run; `grid.json` and `grid.md`
with every configuration; and `evaluation/`, the files of jobs.evaluate for the best configurations, the prefill router
and a hybrid of both, over several split seeds and with leave-one-benchmark-out. Configurations are selected by AUC on
the calibration queries of seed 0; test labels are read only for the reports. `prefill_router.semantic.grid` defines the
grid, `prefill_router.experiments.semantic_grid` does a fit.
"""

from __future__ import annotations

import shlex
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import ray
from pydantic import Field, field_validator

from prefill_router import registry
from prefill_router.cli import main
from prefill_router.cluster import connect, where
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.experiments.provenance import provenance
from prefill_router.experiments.semantic_grid import (
    HYBRID,
    SCHEME,
    Material,
    Task,
    best_configurations,
    check_split,
    hybrid,
    run_task,
    save_result,
    split_of,
)
from prefill_router.files import read_json, read_yaml, sha256_strings, write_json
from prefill_router.locations import Location
from prefill_router.locks import locked
from prefill_router.metrics.evaluate import REFERENCE
from prefill_router.outcomes.table import read_note, read_of_queries
from prefill_router.progress import tqdm
from prefill_router.registry.store import shown
from prefill_router.reports.semantic import Fitted, Routers, write_evaluation, write_grid
from prefill_router.routing.candidates import encoder_names
from prefill_router.routing.config import FitConfig
from prefill_router.semantic.families import Sources, check_family
from prefill_router.semantic.grid import Configuration, Result, default_grid
from prefill_router.semantic.text_features import read_text_features
from prefill_router.signals.join import Signals
from prefill_router.version import code_version
from prefill_router.workflows.inputs import SignalsConfig, check_adapters, load_signals, refuse_adapters
from prefill_router.workflows.train import TrainConfig


class Grid(FrozenModel):
    """A grid from a YAML file with the key `configurations`."""

    configurations: Annotated[tuple[Configuration, ...], Field(min_length=1)]

    @field_validator("configurations")
    @classmethod
    def _each_once(cls, given: tuple[Configuration, ...]) -> tuple[Configuration, ...]:
        names = [configuration.name for configuration in given]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"configurations: {twice[0]!r} is listed twice; list each once")
        return given


class SemanticConfig(SignalsConfig):
    """Inputs, the grid, and the evaluation of the best configurations."""

    features: Annotated[
        Location | None,
        Field(description="text features, an output folder of jobs.features; null: no families that need them"),
    ] = None
    prefill: Annotated[
        Location | None,
        Field(
            description="configuration of the prefill router, a YAML file of jobs.train such as a sweep's best.yaml; "
            "null: the default"
        ),
    ] = None
    grid: Annotated[
        Location | None, Field(description="grid, a YAML file with the key `configurations`; null: the built-in grid")
    ] = None
    judge: Annotated[
        str | None, Field(description="column of the outcomes with a judge's difficulty, from 0 (easy) to 1 (hard)")
    ] = None
    best: Annotated[int, Field(ge=1, description="number of best configurations to fit at every seed")] = 10
    seeds: Annotated[int, Field(ge=1, description="number of split seeds, from 0")] = 5
    unseen: Annotated[
        int, Field(ge=0, description="number of best configurations to fit without each benchmark; 0: none")
    ] = 5
    resamples: Annotated[int, Field(ge=0, description="bootstrap resamples of the test queries, by group")] = 1000
    cpus_per_fit: Annotated[int, Field(ge=1, description="logical CPUs per fit")] = 1
    gpus_per_lora: Annotated[float, Field(ge=0, description="GPUs per LoRA fit; a fraction shares a GPU")] = 0.0


def plan(config: SemanticConfig) -> list[str]:
    """What a dry run says: fits done and left. Raises InputError as `run` does for its inputs and its place."""
    material, grid = _checked(config)
    _recorded(config, material)
    done = sum(1 for _ in (config.output / "fits").glob("*.safetensors"))
    best = min(config.best, len(grid)) + 2  # the prefill router and the hybrid
    benchmarks = len(_benchmarks(material)) if config.unseen else 0
    most = len(grid) + config.seeds * best + benchmarks * min(config.unseen + 2, best)
    return [
        f"tracks the runs in {shown(registry.tracking_uri())}",
        f"costs the time of {where()}: at most {most:,} fits, of which {done:,} are in fits/; {len(grid)} "
        f"configurations, then {best} routers at {config.seeds} seeds, and {config.resamples:,} resamples",
    ]


def run(config: SemanticConfig) -> str:
    """Fit a grid of semantic routers; compare the best with the prefill router over several seeds; write tables."""
    with locked(config.output):
        return _compare(config)


def _checked(config: SemanticConfig) -> tuple[Material, Sequence[Configuration]]:
    """The inputs and the grid. Raises InputError for what would make fits fail one by one."""
    given = read_yaml(config.grid, Grid).configurations if config.grid else None
    material = _material(config, given)
    grid = given or default_grid(material.sources, material.fit.trunk)
    for configuration in grid:
        check_family(configuration.family, material.sources, configuration.encoder)
    for seed in range(config.seeds):
        check_split(material, Task(configuration=None, seed=seed))
        check_adapters(material.signals, split_of(material, Task(configuration=None, seed=seed)))
    if config.unseen:
        refuse_adapters(material.signals, "unseen", "set it to 0")
    return material, grid


def _compare(config: SemanticConfig) -> str:
    """Fits the grid, the best configurations and the prefill router, and writes the comparison."""
    material, grid = _checked(config)
    record = _open(config, material)
    fits = config.output / "fits"
    connect()
    shared = ray.put(material)
    with registry.track_many("semantic", config, record["id"]) as tracked:
        failed = _fit(config, shared, [Task(configuration=one, seed=0) for one in grid], "grid")
        fitted = Fitted(fits, grid, {}, config.seeds, {}, (), failed)
        done = fitted.results({one.name: one for one in grid})
        if not done:
            raise RuntimeError(f"none of {len(grid)} configurations could be fitted; first failure: {failed[0]}")
        write_grid(config.output, material, fitted)  # kept even if a later step fails
        best = best_configurations(grid, done, config.best)
        routers = _routers(best, material.fit)
        few = [REFERENCE, HYBRID, *(one.name for one in best[: config.unseen])]
        benchmarks = _benchmarks(material) if config.unseen else []
        tasks = [Task(configuration=one, seed=seed) for seed in range(config.seeds) for one in routers.values()]
        tasks += [
            Task(configuration=routers[name], seed=0, benchmark=benchmark) for benchmark in benchmarks for name in few
        ]
        failed += _fit(config, shared, tasks, "seeds and benchmarks")
        fitted = _comparable(
            replace(
                fitted, routers=routers, few={name: routers[name] for name in few}, benchmarks=benchmarks, failed=failed
            )
        )
        print(f"bootstrap: {config.resamples:,} resamples, {len(fitted.routers)} routers", flush=True)
        about = {
            "notice": read_note(config.outcomes),
            **provenance(material.signals),
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "split": f"{SCHEME}, seed 0",
            "configuration": config.model_dump(mode="json"),
        }
        aucs, tables = write_evaluation(config.output, material, fitted, about, config.resamples)
        print(f"\n{tables}", flush=True)
        first = next(name for name in aucs if name not in (REFERENCE, HYBRID))
        tracked.log_metrics({"prefill_auc": aucs[REFERENCE], "hybrid_auc": aucs.get(HYBRID), "best_auc": aucs[first]})
        for name in ("grid.json", "grid.md", "evaluation/report.html"):
            tracked.log_artifact(config.output / name)
    means = ", ".join(f"{name} {aucs[name]:.4f}" for name in (REFERENCE, HYBRID, first) if name in aucs)
    return (
        f"{len(done)} configurations, {len(failed)} fits failed; mean AUC {means}; report: "
        f"{config.output / 'evaluation' / 'report.html'}"
    )


def _material(config: SemanticConfig, grid: Sequence[Configuration] | None = None) -> Material:
    pool, signals = load_signals(config)
    outcomes, text = signals.outcomes, {}
    if config.features is not None:
        features = read_text_features(config.features)
        wanted = features.families if grid is None else {part for one in grid for part in one.family.split("+")}
        text = {
            family: features.values(family, outcomes.query_ids, outcomes.prompt_digests)
            for family in features.families
            if family in wanted
        }
    judged = None if config.judge is None else read_of_queries(config.outcomes, config.judge, outcomes.query_ids)
    groups = np.unique(outcomes.groups.astype(str), return_inverse=True)[1]
    sources = Sources(_embeddings(signals), outcomes.prompts, text, judged, groups)
    return Material(
        pool, signals, sources, read_yaml(config.prefill, TrainConfig).fit if config.prefill else FitConfig()
    )


def _embeddings(signals: Signals) -> dict[str, np.ndarray]:
    """The embedding of every encoder by name, the first encoder's first. Prints the encoders without an embedding.

    Raises InputError if the first encoder has none.
    """
    embeddings: dict[str, np.ndarray] = {}
    for fingerprint, name in encoder_names(signals.encoders).items():
        try:
            embeddings[name] = signals.states(signals.final_layer(fingerprint))
        except InputError as error:
            if not embeddings:
                raise
            print(f"semantic routers do not read {name}: {error}", flush=True)
    return embeddings


def _benchmarks(material: Material) -> list[str]:
    """Benchmarks with test queries and enough other queries to fit on. Prints the benchmarks that are excluded."""
    names, kept = material.signals.outcomes.benchmarks, []
    if len(set(names)) < 2:
        print("leave-one-benchmark-out: skipped, the outcomes have only one benchmark", flush=True)
        return []
    for benchmark in sorted(set(names[split_of(material, Task(configuration=None, seed=0)).test])):
        try:
            check_split(material, Task(configuration=None, seed=0, benchmark=benchmark))
            kept.append(benchmark)
        except InputError as error:
            print(f"leave-one-benchmark-out: without {benchmark} no fit is possible: {error}", flush=True)
    return kept


def _comparable(fitted: Fitted) -> Fitted:
    """Keeps the routers with a fit at every seed, and the benchmarks without which all of `few` were fitted.

    Raises RuntimeError if the prefill router or every semantic router is missing.
    """
    counts = Counter(name for seed in range(fitted.n_seeds) for name in fitted.results(fitted.routers, seed))
    routers = {name: one for name, one in fitted.routers.items() if counts[name] == fitted.n_seeds}
    if REFERENCE not in routers or set(routers) <= {REFERENCE, HYBRID}:
        raise RuntimeError(
            f"{len(fitted.failed)} fits failed, too many for a comparison; the grid is in grid.md; "
            f"rerun the same command to retry; first failure: {fitted.failed[0]}"
        )
    few = {name: one for name, one in fitted.few.items() if name in routers}
    return replace(
        fitted,
        routers=routers,
        few=few,
        benchmarks=[benchmark for benchmark in fitted.benchmarks if len(fitted.results(few, 0, benchmark)) == len(few)],
    )


def _open(config: SemanticConfig, material: Material) -> dict[str, Any]:
    """The record of the inputs of the fits, which is written if it is new. Raises InputError as `_recorded`."""
    record, before = _recorded(config, material)
    if before is not None:
        return before
    record |= {"id": uuid.uuid4().hex[:16], "code_version": code_version()}
    write_json(config.output / "semantic.json", record)
    return record


def _recorded(config: SemanticConfig, material: Material) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The inputs of the fits, and the record in OUTPUT if there is one. Writes nothing.

    Raises InputError if the fits in OUTPUT have other inputs.
    """
    judged = material.sources.judged
    record = {
        "outcomes_digest": material.signals.outcomes.digest(),
        "activations_digest": material.signals.digest,
        "features_digest": read_text_features(config.features).digest if config.features else None,
        "judge": None if judged is None else sha256_strings([str(config.judge), *map(repr, judged)]),
        "prefill": material.fit.model_dump(mode="json"),
    }
    path = config.output / "semantic.json"
    if not path.exists():
        return record, None
    before: dict[str, Any] = read_json(path)
    if differs := [name for name, value in record.items() if before.get(name) != value]:
        raise InputError(
            f"output: {config.output} holds fits made with another {differs[0].replace('_', ' ')}; "
            "choose another folder"
        )
    return record, before


def _routers(best: Sequence[Configuration], fit: FitConfig) -> Routers:
    """The prefill router, the hybrid with the best configuration's features, and the best configurations, by name."""
    first = next((one for one in best if one.family != "text"), None)
    family, encoder = ("embedding", None) if first is None else (first.family, first.encoder)
    mixed = hybrid(Configuration(family=family, router="network", encoder=encoder), fit.trunk)
    return {REFERENCE: None, HYBRID: mixed, **{one.name: one for one in best}}


def _fit(config: SemanticConfig, shared: Any, tasks: Sequence[Task], label: str) -> list[str]:
    """Runs the fits that have no file yet and saves each as it ends. Returns the messages of failed fits."""
    folder, failed = config.output / "fits", []
    todo = [task for task in tasks if not task.path(folder).exists()]
    running = {
        ray.remote(num_cpus=config.cpus_per_fit, num_gpus=config.gpus_per_lora if _is_lora(task) else 0)(
            run_task
        ).remote(shared, task): task
        for task in todo
    }
    with tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc=label, unit=" fits") as bar:
        for reference, task in _as_completed(running):
            name = task.configuration.name if task.configuration else REFERENCE
            run = registry.child(
                name,
                task.path(folder).stem,
                {"stage": label, "router": name, "seed": str(task.seed), "left_out": task.benchmark or ""},
            )
            try:
                result: Result = ray.get(reference)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                fit = [name, f"seed {task.seed}", *([f"without {task.benchmark}"] if task.benchmark else [])]
                failed.append(f"{', '.join(fit)}: {type(cause).__name__} {' '.join(str(cause).split())[-300:]}")
                run.end("FAILED")
                tqdm.write(f"failed: {failed[-1]}", file=sys.stderr)
            else:
                run.log_params(task.model_dump(mode="json") | {"calibrator": result.calibrator})
                run.log_metrics(
                    {
                        "calibration_auc": result.auc,
                        "cpu_seconds": result.seconds,
                        "calibration_brier": result.figures[result.calibrator]["brier"],
                    }
                )
                save_result(folder, task, result)
                run.end()
                bar.set_postfix_str(f"{name} {result.auc:.4f}"[:60])
            bar.update()
    return failed


def _is_lora(task: Task) -> bool:
    return task.configuration is not None and task.configuration.router == "lora"


def _as_completed(running: dict[Any, Task]) -> Iterator[tuple[Any, Task]]:
    """Finished references with their tasks, in the order in which they finish."""
    left = list(running)
    while left:
        ended, left = ray.wait(left, num_returns=1)
        yield ended[0], running[ended[0]]


if __name__ == "__main__":
    main(SemanticConfig, run, plan=plan)
