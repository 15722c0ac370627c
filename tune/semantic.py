"""Semantic routers, the whole grid of them, beside the prefill router on the same splits.

In: outcomes, pool, activations (their first encoder's final layer, mean pooled, is the embedding), text features. Out,
under OUTPUT: `fits/`, one file per fit, so that the same command goes on after any interruption; `grid.json` and
`grid.md`, every configuration; and `evaluation/`, what jobs.evaluate writes, of the best configurations, the prefill
router and a hybrid of both, with further split seeds and benchmarks left out. Configurations are selected by AUC on the
calibration queries of the first seed; test labels are read only to report. Configuration, resources and plumbing: the
grid is `prefill_router.semantic.grid`, a fit is `prefill_router.evaluation.semantic`.
"""

from __future__ import annotations

import shlex
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from tqdm import tqdm

from jobs.cli import main
from jobs.cluster import connect
from jobs.inputs import SignalsConfig, load
from jobs.train import TrainConfig
from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.evaluation import leave_one_out, seeds
from prefill_router.evaluation.evaluate import REFERENCE, evaluate
from prefill_router.evaluation.predictions import Predictions, write_predictions
from prefill_router.evaluation.report import write_report
from prefill_router.evaluation.semantic import (
    HYBRID,
    SCHEME,
    Material,
    Task,
    best_configurations,
    hybrid,
    load_result,
    predictions,
    run_task,
    save_result,
)
from prefill_router.evaluation.semantic_tables import (
    FIGURES,
    best_of,
    ends,
    grid_markdown,
    grid_rows,
    shown_rows,
    unseen_markdown,
)
from prefill_router.files import read_json, read_yaml, write_atomically, write_json
from prefill_router.outcomes.table import read_note, read_of_queries
from prefill_router.routing.fit import FitConfig
from prefill_router.semantic.families import Sources, check_family
from prefill_router.semantic.grid import Configuration, Result, default_grid
from prefill_router.semantic.text_features import read_text_features
from prefill_router.version import code_version

CAVEAT = ("Encoder and embedder are the same small sentence encoder here wherever only one encoder's activations are "
          "given: layers and heads are compared, not LLMs with embedding models.")


Routers = Mapping[str, Configuration | None]  # by name; None is the prefill router


class Grid(BaseModel):
    """A grid of one's own: a YAML file with the key `configurations`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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

    features: Annotated[Path | None, Field(description="text features, the folder that jobs.features wrote; none: "
                                                       "families that need them are left out")] = None
    prefill: Annotated[Path | None, Field(description="configuration of the prefill router, a YAML file of jobs.train "
                                                      "(best.yaml of a sweep); none: the default")] = None
    grid: Annotated[Path | None, Field(description="configurations, a YAML file; the built-in ones where none is given"
                                       )] = None
    judge: Annotated[str | None, Field(description="column of the outcomes with a judge's difficulty, 0 easy to 1 hard"
                                       )] = None
    best: Annotated[int, Field(ge=1, description="configurations fitted again at every seed")] = 10
    seeds: Annotated[int, Field(ge=1, description="split seeds, from 0")] = 5
    unseen: Annotated[int, Field(ge=0, description="best configurations fitted again without each benchmark; 0 leaves "
                                                   "that out")] = 5
    resamples: Annotated[int, Field(ge=0, description="bootstrap resamples, as in jobs.evaluate")] = 1000
    cpus_per_fit: Annotated[int, Field(ge=1)] = 1


def run(config: SemanticConfig) -> str:
    """Fit the grid of semantic routers, and the best of it beside the prefill router at several seeds; write tables."""
    material = _material(config)
    grid = read_yaml(config.grid, Grid).configurations if config.grid else \
        default_grid(material.sources, material.fit.trunk)
    for configuration in grid:
        check_family(configuration.family, material.sources)
    if config.unseen:
        leave_one_out.check(material.signals.outcomes.benchmarks)
    record = _open(config, material)
    fits = config.output / "fits"
    connect()
    shared = ray.put(material)
    with registry.track_many("semantic", config, record["id"]) as tracked:
        first = [Task(configuration=configuration, seed=0) for configuration in grid]
        failed = _fit(shared, first, fits, config.cpus_per_fit, "grid")
        done = {configuration.name: result for configuration, task in zip(grid, first, strict=True)
                if (result := load_result(fits, task)) is not None}
        if not done:
            raise RuntimeError(f"none of {len(first)} configurations could be fitted; the first: {failed[0]}")
        best = best_configurations(grid, done, config.best)
        routers = _routers(best, material.fit)
        again = [Task(configuration=configuration, seed=seed) for seed in range(config.seeds)
                 for configuration in routers.values()]
        benchmarks = sorted(set(material.signals.outcomes.benchmarks)) if config.unseen else []
        few = {name: routers[name] for name in [REFERENCE, HYBRID, *(one.name for one in best[:config.unseen])]}
        again += [Task(configuration=configuration, seed=0, benchmark=benchmark) for benchmark in benchmarks
                  for configuration in few.values()]
        if lost := _fit(shared, again, fits, config.cpus_per_fit, "seeds and benchmarks"):
            raise RuntimeError(f"{len(lost)} fits failed, run the same command again; the first: {lost[0]}")
        summary = _report(config, material, grid, done, routers, few, benchmarks, failed)
        tracked.log_metrics({f"{name}_auc": figure for name, figure in summary.items()})
        for name in ("grid.json", "grid.md", "evaluation/report.html"):
            tracked.log_artifact(config.output / name)
    return (f"{len(done)} configurations, best {best[0].name}: AUC {summary['best']:.4f}, prefill "
            f"{summary['prefill']:.4f}, hybrid {summary['hybrid']:.4f}; report: "
            f"{config.output / 'evaluation' / 'report.html'}")


def _material(config: SemanticConfig) -> Material:
    pool, signals = load(config)
    outcomes = signals.outcomes
    text = {}
    if config.features is not None:
        features = read_text_features(config.features)
        text = {family: features.values(family, outcomes.query_ids, outcomes.prompt_digests)
                for family in features.families}
    judged = None if config.judge is None else read_of_queries(config.outcomes, config.judge, outcomes.query_ids)
    groups = np.unique(outcomes.groups.astype(str), return_inverse=True)[1]
    sources = Sources(signals.states(signals.final_block()), outcomes.prompts, text, judged, groups)
    return Material(pool, signals, sources, read_yaml(config.prefill, TrainConfig).fit if config.prefill
                    else FitConfig())


def _open(config: SemanticConfig, material: Material) -> dict[str, Any]:
    """The record of what fits were made from. Raises InputError where the folder's were made from something else."""
    record = {"outcomes_digest": material.signals.outcomes.digest(),
              "activations_digest": "+".join(dataset.digest for dataset in material.signals.activations.values()),
              "features_digest": read_text_features(config.features).digest if config.features else None,
              "judge": config.judge, "prefill": material.fit.model_dump(mode="json")}
    path = config.output / "semantic.json"
    if path.exists():
        before: dict[str, Any] = read_json(path)
        if differs := [name for name, value in record.items() if before.get(name) != value]:
            raise InputError(f"output: {config.output} holds fits made with another {differs[0].replace('_', ' ')}; "
                             "choose another folder")
        return before
    record |= {"id": uuid.uuid4().hex[:16], "code_version": code_version()}
    write_json(path, record)
    return record


def _routers(best: Sequence[Configuration], fit: FitConfig) -> Routers:
    """The prefill router, the hybrid with the best configuration's features, and the best configurations, by name."""
    family = next((one.family for one in best if one.family != "text"), "embedding")
    mixed = hybrid(Configuration(family=family, router="network"), fit.trunk)
    return {REFERENCE: None, HYBRID: mixed, **{one.name: one for one in best}}


def _fit(shared: Any, tasks: Sequence[Task], folder: Path, cpus: int, label: str) -> list[str]:
    """Makes the fits that are not there yet, each kept as soon as it is made; returns what went wrong."""
    todo = [task for task in tasks if not task.path(folder).exists()]
    remote = ray.remote(num_cpus=cpus)(run_task)
    running = {remote.remote(shared, task): task for task in todo}
    failed = []
    with tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc=label, unit="fit") as bar:
        for reference, task in _as_they_end(running):
            name = task.configuration.name if task.configuration else REFERENCE
            run = registry.child(name, task.path(folder).stem, {
                "stage": label, "router": name, "seed": str(task.seed), "left_out": task.benchmark or ""})
            try:
                result: Result = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
                failed.append(f"{name}: {reason}")
                run.end("FAILED")
                tqdm.write(f"{name}: failed: {reason}", file=sys.stderr)
            else:
                run.log_params(task.model_dump(mode="json") | {"calibrator": result.calibrator})
                run.log_metrics({"calibration_auc": result.auc, "cpu_seconds": result.seconds,
                                 "calibration_brier": result.figures[result.calibrator]["brier"]})
                save_result(folder, task, result)
                run.end()
                bar.set_postfix_str(f"{name} {result.auc:.4f}"[:60])
            bar.update()
    return failed


def _as_they_end(running: dict[Any, Task]) -> Iterator[tuple[Any, Task]]:
    left = list(running)
    while left:
        ended, left = ray.wait(left, num_returns=1)
        yield ended[0], running[ended[0]]


def _report(config: SemanticConfig, material: Material, grid: Sequence[Configuration], done: Mapping[str, Result],
            routers: Routers, few: Routers, benchmarks: Sequence[str], failed: Sequence[str]) -> dict[str, float]:
    """Writes grid.json, grid.md and evaluation/; the AUCs of prefill, hybrid and the best configuration, means over
    the seeds."""
    folder, fits = config.output / "evaluation", config.output / "fits"
    print(f"test figures of {len(done)} configurations", flush=True)
    beside = _of(fits, {name: routers[name] for name in (REFERENCE, HYBRID)}, 0)
    whole = evaluate(predictions(material, {**done, **beside}, 0), n_resamples=0)
    rows = grid_rows(grid, done, whole)
    print(f"bootstrap: {config.resamples:,} resamples, {len(routers)} routers", flush=True)
    by_seed = {seed: predictions(material, _of(fits, routers, seed), seed) for seed in range(config.seeds)}
    evaluated = {seed: evaluate(one, n_resamples=config.resamples, seed=seed) for seed, one in by_seed.items()}
    metrics, tables = evaluated[0], []
    if config.seeds > 1:
        metrics = metrics | {"seeds": seeds.across_seeds(evaluated)}
        table = seeds.markdown(metrics["seeds"], {(name,): heading for name, heading in FIGURES.items()})
        write_atomically(folder / "seeds.md", lambda place: place.write_text(table, encoding="utf-8"))
        tables.append(f"Means over {config.seeds} split seeds:\n\n{table}")
    tables.append(grid_markdown(rows, {name: whole["routers"][name] for name in (REFERENCE, HYBRID)}))
    if benchmarks:
        unseen = _unseen(material, fits, by_seed[0], few, benchmarks)
        write_predictions(unseen, folder / "leave_one_out.parquet")
        metrics["leave_one_benchmark_out"] = evaluate(unseen, n_resamples=config.resamples, seed=0)
        tables.append("Benchmarks never seen beside the same benchmarks seen, seed 0:\n\n"
                      + unseen_markdown(metrics, metrics["leave_one_benchmark_out"]))
    write_json(config.output / "grid.json", {"configurations": rows, "failed": list(failed), "caveat": CAVEAT})
    text = f"{CAVEAT}\n\n" + "\n".join(tables)
    write_atomically(config.output / "grid.md", lambda place: place.write_text(text, encoding="utf-8"))
    print(f"\n{text}", flush=True)
    write_predictions(by_seed[0], folder / "predictions.parquet")
    write_json(folder / "metrics.json", metrics)
    provenance = {"notice": read_note(config.outcomes), "code": code_version(),
                  "command": shlex.join(["python", *sys.orig_argv[1:]]), "split": f"{SCHEME}, seed 0",
                  "configuration": config.model_dump(mode="json"), "caveat": CAVEAT}
    write_json(folder / "provenance.json", provenance)
    top, bottom = ends(rows)
    write_report(folder, by_seed[0], metrics, provenance, {
        "The grid": f"{len(rows)} configurations were selected among by AUC on the calibration queries. {CAVEAT}",
        "Best of each architecture": shown_rows(best_of(rows, "architecture")),
        "Best of each family": shown_rows(best_of(rows, "family")),
        "Highest and lowest P-AUCCC": shown_rows([*top, *bottom])})
    names = {"prefill": REFERENCE, "hybrid": HYBRID, "best": list(routers)[2]}
    return {key: sum(one["routers"][name]["auc"]["estimate"] for one in evaluated.values()) / len(evaluated)
            for key, name in names.items()}


def _of(fits: Path, routers: Routers, seed: int, benchmark: str | None = None) -> dict[str, Result]:
    found = {}
    for name, configuration in routers.items():
        result = load_result(fits, Task(configuration=configuration, seed=seed, benchmark=benchmark))
        assert result is not None, f"{name}, seed {seed}, without {benchmark}: no result"
        found[name] = result
    return found


def _unseen(material: Material, fits: Path, seen: Predictions, few: Routers,
            benchmarks: Sequence[str]) -> Predictions:
    """The test split of seed 0 with every benchmark judged by routers that learned without it."""
    some = replace(seen, routers={name: seen.routers[name] for name in few})
    return leave_one_out.combine(some, {benchmark: predictions(material, _of(fits, few, 0, benchmark), 0, benchmark)
                                        for benchmark in benchmarks if benchmark in set(seen.benchmarks)})


if __name__ == "__main__":
    main(SemanticConfig, run)
