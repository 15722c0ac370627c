"""Semantic routers, the whole grid of them, beside the prefill router on the same splits.

In: outcomes, pool, activations (their first encoder's final layer, mean pooled, is the embedding), text features. Out,
under OUTPUT: `fits/`, one file per fit, so that the same command goes on after any interruption; `grid.json` and
`grid.md`, every configuration; and `evaluation/`, what jobs.evaluate writes, of the best configurations, the prefill
router and a hybrid of both, with further split seeds and benchmarks left out. Configurations are selected by AUC on the
calibration queries of the first seed; test labels are read only to report. Configuration, resources and plumbing: the
grid is `prefill_router.semantic.grid`, a fit is `prefill_router.experiments.semantic_grid`.
"""

from __future__ import annotations

import shlex
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
from pydantic import Field, field_validator
from tqdm import tqdm

from jobs.cli import main
from jobs.cluster import connect
from jobs.inputs import SignalsConfig, load
from jobs.train import TrainConfig
from prefill_router import registry
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
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
from prefill_router.metrics.evaluate import REFERENCE
from prefill_router.outcomes.table import read_note, read_of_queries
from prefill_router.reports.semantic import Fitted, Routers, write_evaluation, write_grid
from prefill_router.routing.fit import FitConfig
from prefill_router.semantic.families import Sources, check_family
from prefill_router.semantic.grid import Configuration, Result, default_grid
from prefill_router.semantic.text_features import read_text_features
from prefill_router.version import code_version


class Grid(FrozenModel):
    """A grid of one's own: a YAML file with the key `configurations`."""

    configurations: Annotated[tuple[Configuration, ...], Field(min_length=1)]

    @field_validator("configurations")
    @classmethod
    def _each_once(cls, given: tuple[Configuration, ...]) -> tuple[Configuration, ...]:
        names = [configuration.name for configuration in given]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"configurations: {twice[0]!r} stands twice; each may stand once")
        return given


class SemanticConfig(SignalsConfig):
    """Inputs, the grid, and how the best of it is judged."""

    features: Annotated[
        Path | None,
        Field(
            description="text features, the folder that jobs.features wrote; none: families that need them are left out"
        ),
    ] = None
    prefill: Annotated[
        Path | None,
        Field(
            description="configuration of the prefill router, a YAML file of jobs.train "
            "(best.yaml of a sweep); none: the default"
        ),
    ] = None
    grid: Annotated[
        Path | None, Field(description="configurations, a YAML file; the built-in ones where none is given")
    ] = None
    judge: Annotated[
        str | None, Field(description="column of the outcomes with a judge's difficulty, 0 easy to 1 hard")
    ] = None
    best: Annotated[int, Field(ge=1, description="configurations fitted again at every seed")] = 10
    seeds: Annotated[int, Field(ge=1, description="split seeds, from 0")] = 5
    unseen: Annotated[
        int, Field(ge=0, description="best configurations fitted again without each benchmark; 0 leaves that out")
    ] = 5
    resamples: Annotated[int, Field(ge=0, description="bootstrap resamples, as in jobs.evaluate")] = 1000
    cpus_per_fit: Annotated[int, Field(ge=1)] = 1
    gpus_per_lora: Annotated[float, Field(ge=0, description="GPUs of a LoRA fit")] = 0.0


def run(config: SemanticConfig) -> str:
    """Fit the grid of semantic routers, and the best of it beside the prefill router at several seeds; write tables."""
    given = read_yaml(config.grid, Grid).configurations if config.grid else None
    material = _material(config, given)
    grid = given or default_grid(material.sources, material.fit.trunk)
    for configuration in grid:
        check_family(configuration.family, material.sources)
    for seed in range(config.seeds):  # fits would fail one by one
        check_split(material, Task(configuration=None, seed=seed))
    record = _open(config, material)
    fits = config.output / "fits"
    connect()
    shared = ray.put(material)
    with registry.track_many("semantic", config, record["id"]) as tracked:
        failed = _fit(config, shared, [Task(configuration=one, seed=0) for one in grid], "grid")
        fitted = Fitted(fits, grid, {}, config.seeds, {}, (), failed)
        done = fitted.results({one.name: one for one in grid})
        if not done:
            raise RuntimeError(f"none of {len(grid)} configurations could be fitted; the first: {failed[0]}")
        write_grid(config.output, material, fitted)  # whatever becomes of the rest
        best = best_configurations(grid, done, config.best)
        routers = _routers(best, material.fit)
        few = [REFERENCE, HYBRID, *(one.name for one in best[: config.unseen])]
        benchmarks = _benchmarks(material) if config.unseen else []
        again = [Task(configuration=one, seed=seed) for seed in range(config.seeds) for one in routers.values()]
        again += [
            Task(configuration=routers[name], seed=0, benchmark=benchmark) for benchmark in benchmarks for name in few
        ]
        failed += _fit(config, shared, again, "seeds and benchmarks")
        fitted = _whole(
            replace(
                fitted, routers=routers, few={name: routers[name] for name in few}, benchmarks=benchmarks, failed=failed
            )
        )
        print(f"bootstrap: {config.resamples:,} resamples, {len(fitted.routers)} routers", flush=True)
        provenance = {
            "notice": read_note(config.outcomes),
            "code": code_version(),
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "split": f"{SCHEME}, seed 0",
            "configuration": config.model_dump(mode="json"),
        }
        aucs, tables = write_evaluation(config.output, material, fitted, provenance, config.resamples)
        print(f"\n{tables}", flush=True)
        first = next(name for name in aucs if name not in (REFERENCE, HYBRID))
        tracked.log_metrics({"prefill_auc": aucs[REFERENCE], "hybrid_auc": aucs.get(HYBRID), "best_auc": aucs[first]})
        for name in ("grid.json", "grid.md", "evaluation/report.html"):
            tracked.log_artifact(config.output / name)
    said = ", ".join(f"{name} {aucs[name]:.4f}" for name in (REFERENCE, HYBRID, first) if name in aucs)
    return (
        f"{len(done)} configurations, {len(failed)} fits failed; mean AUC {said}; report: "
        f"{config.output / 'evaluation' / 'report.html'}"
    )


def _material(config: SemanticConfig, grid: Sequence[Configuration] | None = None) -> Material:
    pool, signals = load(config)
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
    sources = Sources(signals.states(signals.final_layer()), outcomes.prompts, text, judged, groups)
    return Material(
        pool, signals, sources, read_yaml(config.prefill, TrainConfig).fit if config.prefill else FitConfig()
    )


def _benchmarks(material: Material) -> list[str]:
    """Those that can be left out: with test queries, and enough left to learn from. Says which cannot."""
    names, kept = material.signals.outcomes.benchmarks, []
    if len(set(names)) < 2:
        print("benchmarks left out: none, for there is only one", flush=True)
        return []
    for benchmark in sorted(set(names[split_of(material, Task(configuration=None, seed=0)).test])):
        try:
            check_split(material, Task(configuration=None, seed=0, benchmark=benchmark))
            kept.append(benchmark)
        except InputError as error:
            print(f"benchmarks left out: not {benchmark}: {error}", flush=True)
    return kept


def _whole(fitted: Fitted) -> Fitted:
    """What can be compared: routers with a fit at every seed, benchmarks without which all of the few were fitted."""
    counts = Counter(name for seed in range(fitted.n_seeds) for name in fitted.results(fitted.routers, seed))
    routers = {name: one for name, one in fitted.routers.items() if counts[name] == fitted.n_seeds}
    if REFERENCE not in routers or set(routers) <= {REFERENCE, HYBRID}:
        raise RuntimeError(
            f"{len(fitted.failed)} fits failed, too many to compare anything; the grid stands in "
            f"grid.md; run the same command again; the first: {fitted.failed[0]}"
        )
    few = {name: one for name, one in fitted.few.items() if name in routers}
    return replace(
        fitted,
        routers=routers,
        few=few,
        benchmarks=[benchmark for benchmark in fitted.benchmarks if len(fitted.results(few, 0, benchmark)) == len(few)],
    )


def _open(config: SemanticConfig, material: Material) -> dict[str, Any]:
    """The record of what fits were made from. Raises InputError where the folder's were made from something else."""
    judged = material.sources.judged
    record = {
        "outcomes_digest": material.signals.outcomes.digest(),
        "activations_digest": "+".join(dataset.digest for dataset in material.signals.activations.values()),
        "features_digest": read_text_features(config.features).digest if config.features else None,
        "judge": None if judged is None else sha256_strings([str(config.judge), *map(repr, judged)]),
        "prefill": material.fit.model_dump(mode="json"),
    }
    path = config.output / "semantic.json"
    if path.exists():
        before: dict[str, Any] = read_json(path)
        if differs := [name for name, value in record.items() if before.get(name) != value]:
            raise InputError(
                f"output: {config.output} holds fits made with another {differs[0].replace('_', ' ')}; "
                "choose another folder"
            )
        return before
    record |= {"id": uuid.uuid4().hex[:16], "code_version": code_version()}
    write_json(path, record)
    return record


def _routers(best: Sequence[Configuration], fit: FitConfig) -> Routers:
    """The prefill router, the hybrid with the best configuration's features, and the best configurations, by name."""
    family = next((one.family for one in best if one.family != "text"), "embedding")
    mixed = hybrid(Configuration(family=family, router="network"), fit.trunk)
    return {REFERENCE: None, HYBRID: mixed, **{one.name: one for one in best}}


def _fit(config: SemanticConfig, shared: Any, tasks: Sequence[Task], label: str) -> list[str]:
    """Makes the fits that are not there yet, each kept as soon as it is made; returns what went wrong."""
    folder, failed = config.output / "fits", []
    todo = [task for task in tasks if not task.path(folder).exists()]
    running = {
        ray.remote(num_cpus=config.cpus_per_fit, num_gpus=config.gpus_per_lora if _is_lora(task) else 0)(
            run_task
        ).remote(shared, task): task
        for task in todo
    }
    with tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc=label, unit="fit") as bar:
        for reference, task in _as_they_end(running):
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
                what = [name, f"seed {task.seed}", *([f"without {task.benchmark}"] if task.benchmark else [])]
                failed.append(f"{', '.join(what)}: {type(cause).__name__} {' '.join(str(cause).split())[-300:]}")
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


def _as_they_end(running: dict[Any, Task]) -> Iterator[tuple[Any, Task]]:
    left = list(running)
    while left:
        ended, left = ray.wait(left, num_returns=1)
        yield ended[0], running[ended[0]]


if __name__ == "__main__":
    main(SemanticConfig, run)
