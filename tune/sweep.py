"""Sweeps: searches the configuration of a router; trains, evaluates and registers the winner.

In: outcomes, pool, activations, a search space. Out, under OUTPUT: `sweep.json`, `space.yaml`, `trials/`, `best.yaml`
(a configuration of jobs.train), `sweep.html`, and the winner's `checkpoint/` and `evaluation/`. The test split is read
only to evaluate the winner. The search space is `tune.space`; `prefill_router.sweeps.prepare` trains a trial.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Annotated, Any

import ray
import yaml
from pydantic import Field
from ray import tune

from prefill_router import registry
from prefill_router.cli import main
from prefill_router.cluster import connect, where
from prefill_router.errors import InputError
from prefill_router.files import read_json, read_yaml, write_atomically, write_json
from prefill_router.locations import Location, ObjectPath
from prefill_router.locks import locked
from prefill_router.outcomes.splits import Scheme
from prefill_router.pool import Pool
from prefill_router.registry.store import shown
from prefill_router.routing.checkpoint import check_place
from prefill_router.routing.config import FitConfig
from prefill_router.signals.join import Signals
from prefill_router.sweeps.objective import Objective
from prefill_router.sweeps.prepare import Prepared, prepare
from prefill_router.sweeps.trials import Trial, best_trial, load_trials
from prefill_router.version import code_version
from prefill_router.workflows import evaluate, train
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals
from tune.recorder import Halving, Recorder
from tune.space import SearchSpace
from tune.summary import write_page
from tune.trial import SweepTrial

FORMAT_VERSION = 1
SCRATCH = ".tune"  # folder of Tune's own files while trials run
RETRIES = 2  # per trial, after a failure such as the loss of its node
SETTINGS = {  # switch off the files and messages of Tune that the recorder replaces
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# Settings that cannot change when a sweep resumes.
FIXED = ("seed", "scheme", "objective", "grace_epochs", "reduction")


class SweepConfig(SignalsConfig):
    """Inputs, the search, and the evaluation of the winner."""

    trials: Annotated[
        int, Field(ge=1, description="total number of trials; the first has the default configuration")
    ] = 40
    objective: Annotated[
        Objective, Field(description="held-out figure to optimise: auc, brier (lower is better) or p_auccc")
    ] = "auc"
    space: Annotated[Location | None, Field(description="search space, a YAML file; null: the built-in space")] = None
    seed: Annotated[int, Field(ge=0, description="seed of split, folds, ensembles and sampler")] = 0
    scheme: Annotated[Scheme, Field(description="85/15 calibrates out of fold, 75/10/15 on the calibration part")] = (
        "85/15"
    )
    concurrent: Annotated[
        int, Field(ge=1, description="maximum number of concurrent trials; only 1 is reproducible")
    ] = 1
    cpus_per_trial: Annotated[int, Field(ge=1, description="logical CPUs per trial")] = 1
    grace_epochs: Annotated[int, Field(ge=1, description="number of epochs before a trial may be stopped")] = 5
    reduction: Annotated[
        float, Field(gt=1, description="ASHA's reduction factor r: one of r trials continues, to r times the epochs")
    ] = 3.0
    resume: Annotated[bool, Field(description="resume the sweep in OUTPUT")] = False
    baselines: Annotated[bool, Field(description="evaluate the winner next to the baselines of jobs.evaluate")] = True
    resamples: Annotated[int, Field(ge=0, description="bootstrap resamples of the winner's evaluation")] = 1000


def plan(config: SweepConfig) -> list[str]:
    """What a dry run says: trials done and left. Raises InputError as `run` does for its inputs and its place."""
    check_place(config.output / "checkpoint")
    space, _, signals = _inputs(config)
    _recorded(config, space, signals)
    split_signals(signals, config.seed, config.scheme)
    ended = sum(trial.ended for trial in load_trials(config.output / "trials"))
    left = max(0, config.trials - ended)
    return [
        f"tracks the runs in {shown(registry.tracking_uri())}, and registers the winner there",
        f"costs the time of {where()}: {left} trials, {ended} have ended, each of at most {max(space.max_epochs)} "
        "epochs; then a fit and an evaluation of the winner",
    ]


def run(config: SweepConfig) -> str:
    """Search the configuration of a router; train, evaluate and register the winner."""
    config = config.model_copy(update={"output": config.output.resolve()})
    check_place(config.output / "checkpoint")
    with locked(config.output):
        return _sweep(config)


def _sweep(config: SweepConfig) -> str:
    """Runs the trials that are left, then trains, evaluates and registers the winner."""
    space, pool, signals = _inputs(config)
    base = FitConfig(seed=config.seed, scheme=config.scheme)
    registry.connect()  # raises before hours of trials: the winner is registered at the end
    sweep = _open(config, space, signals)
    with registry.track_many("sweep", config, sweep["id"]) as tracked:
        recorder = _recorder(config, space, base)
        if recorder.left:
            _start_ray(config)  # before the expensive projections: no cluster may be available
            split = split_signals(signals, config.seed, config.scheme)
            prepared = prepare(
                signals,
                pool,
                split,
                space.layer_choices(base),
                progress=True,
            )
            rounds = 0
            while (lost := _search(config, space, recorder, prepared)) and rounds < RETRIES:
                print(f"trials whose process ended: {lost}; they run again", flush=True)
                recorder, rounds = _recorder(config, space, base), rounds + 1
        _remove(config.output / SCRATCH)  # of a run that was killed after its last trial
        trials = [recorder.trials[number] for number in sorted(recorder.trials)]
        best = best_trial(trials, config.objective)
        if best is None:
            raise RuntimeError(
                f"no trial of {len(trials)} finished with a defined {config.objective}; see {config.output / 'trials'}"
            )
        winner = _write_best(config, best)
        sweep |= {"run": tracked.id, "best": best.number, config.objective: best.value(config.objective)}
        write_json(config.output / "sweep.json", sweep)
        write_page(config.output)
        tracked.log_metrics({"trials": float(len(trials)), f"best_{config.objective}": best.value(config.objective)})
        sweep = _finish(config, winner, best, sweep, tracked)
        page = write_page(config.output)
        for name in ("sweep.json", "space.yaml", "best.yaml", "sweep.html"):
            tracked.log_artifact(config.output / name)
    return (
        f"{len(trials)} trials, best {config.objective} {best.value(config.objective):.4f} (trial {best.number}); "
        f"checkpoint {sweep['checkpoint']} is version {sweep['version']} of {registry.NAME}; page: {page}"
    )


def _inputs(config: SweepConfig) -> tuple[SearchSpace, Pool, Signals]:
    """The search space for the encoders of the activations, the pool, and the joined inputs."""
    space = read_yaml(config.space, SearchSpace) if config.space else SearchSpace()
    pool, signals = load_signals(config)
    return space.resolve(signals.encoders), pool, signals


def _open(config: SweepConfig, space: SearchSpace, signals: Signals) -> dict[str, Any]:
    """The record of a new or resumed sweep, which is written. Raises InputError as `_recorded`."""
    path = config.output / "sweep.json"
    record, before = _recorded(config, space, signals)
    if before is None:
        write_atomically(
            config.output / "space.yaml",
            lambda place: place.write_text(yaml.safe_dump(record["space"], sort_keys=False), encoding="utf-8"),
        )
        record = {
            "id": uuid.uuid4().hex[:16],
            **record,
            "code_version": code_version(),
            "config": config.model_dump(mode="json"),
        }
        write_json(path, record)
        return record
    before["config"] = config.model_dump(mode="json")  # for the commands on the page: the number of trials may change
    write_json(path, before)
    return before


def _recorded(
    config: SweepConfig, space: SearchSpace, signals: Signals
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The settings and inputs that a sweep records, and the record in OUTPUT if there is one. Writes nothing.

    Raises InputError if OUTPUT holds a sweep and `resume` is false, or if its settings or inputs differ.
    """
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        **{name: getattr(config, name) for name in FIXED},
        "space": space.model_dump(mode="json"),
        "outcomes_digest": signals.outcomes.digest(),
        "activations_digest": signals.digest,
    }
    path = config.output / "sweep.json"
    if not path.exists():
        return record, None
    if not config.resume:
        raise InputError(f"output: {config.output} holds a sweep; continue it with --resume, or choose another folder")
    before: dict[str, Any] = read_json(path)
    for name, value in record.items():
        if before.get(name) != value:
            values = "" if name == "space" else f" (got {value}, expected {before.get(name)})"
            raise InputError(
                f"resume: {name} differs from the sweep in {config.output}{values}; use the values in its "
                "sweep.json and space.yaml, or choose another folder"
            )
    return record, before


def _start_ray(config: SweepConfig) -> None:
    """Connects to Ray. Raises InputError if no node has the CPUs of a trial: Tune would wait forever."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    connect()
    most = int(max(_resource_of_nodes("CPU"), default=0))
    if config.cpus_per_trial > most:
        raise InputError(
            f"cpus_per_trial: got {config.cpus_per_trial}, no node has more than {most}; give at most "
            f"{most}, or add a larger node"
        )


def _resource_of_nodes(resource: str) -> list[float]:
    """Amounts of a resource on the nodes that have it."""
    return [node["Resources"][resource] for node in ray.nodes() if node["Alive"] and resource in node["Resources"]]


def _recorder(config: SweepConfig, space: SearchSpace, base: FitConfig) -> Recorder:
    return Recorder(config.output / "trials", space, base, config.objective, config.trials, config.concurrent)


def _search(config: SweepConfig, space: SearchSpace, recorder: Recorder, prepared: Prepared) -> int:
    """Runs the remaining trials and returns how many failed because their process ended.

    Tune tries such a trial again, unless the process ended between two trials. Raises InputError if the projections do
    not fit into the object store.
    """
    capacity = min(_resource_of_nodes("object_store_memory"), default=0.0)  # every node holds a copy
    print(f"projections for all trials: {prepared.nbytes / 1e6:,.0f} MB in shared memory", flush=True)
    if prepared.nbytes > 0.9 * capacity:
        raise InputError(
            f"space: its projections take {prepared.nbytes / 1e9:.1f} GB, Ray's object store has "
            f"{capacity / 1e9:.1f} GB; give fewer components, poolings, encoders or layers_per_target"
        )
    objective = config.objective
    longest = max(space.max_epochs)
    scheduler = Halving(
        metric=objective,
        mode=recorder.mode,
        max_t=longest + 1,
        grace_period=min(config.grace_epochs, longest),
        reduction_factor=config.reduction,
    )
    scheduler.remember([recorder.trials[number] for number in sorted(recorder.trials)], objective)
    scratch = config.output / SCRATCH
    _remove(scratch)
    shared = tune.with_parameters(SweepTrial, prepared=prepared)  # one copy, in the object store
    try:
        results = tune.Tuner(
            tune.with_resources(shared, {"cpu": config.cpus_per_trial}),
            tune_config=tune.TuneConfig(
                search_alg=recorder,
                scheduler=scheduler,
                num_samples=recorder.left,
                max_concurrent_trials=config.concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch.key if isinstance(scratch, ObjectPath) else str(scratch),
                storage_filesystem=scratch.filesystem if isinstance(scratch, ObjectPath) else None,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    finally:
        _remove(scratch)
        recorder.close()
    if recorder.fault is not None:
        raise recorder.fault
    if results.errors:
        print(f"{len(results.errors)} trials failed, the first: {results.errors[0]}", file=sys.stderr, flush=True)
    return sum(isinstance(error, ray.exceptions.RayActorError) for error in results.errors)


def _remove(folder: Path) -> None:
    if isinstance(folder, ObjectPath):
        folder.remove_below()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _write_best(config: SweepConfig, best: Trial) -> train.TrainConfig:
    """Writes best.yaml, with which jobs.train reproduces the winner's checkpoint."""
    inputs = {name: getattr(config, name) for name in ("outcomes", "pool", "activations")}
    inputs = {
        name: tuple(path.resolve() for path in value) if isinstance(value, tuple) else value.resolve()
        for name, value in inputs.items()
    }
    winner = train.TrainConfig(**inputs, output=config.output, fit=best.fit)
    write_atomically(
        config.output / "best.yaml",
        lambda place: place.write_text(
            yaml.safe_dump(winner.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
        ),
    )
    return winner


def _finish(
    config: SweepConfig, winner: train.TrainConfig, best: Trial, sweep: dict[str, Any], tracked: registry.Run
) -> dict[str, Any]:
    """Trains, evaluates and registers the winner. Steps that an interrupted run completed are skipped."""
    path, checkpoint, evaluation = (config.output / name for name in ("sweep.json", "checkpoint", "evaluation"))
    if sweep.get("trained") != best.number:
        print(f"training the winner, trial {best.number}, in full", flush=True)
        train.run(winner)
        sweep |= {
            "trained": best.number,
            "checkpoint": read_json(checkpoint / "manifest.json")["id"],
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
        write_json(path, sweep)
    if sweep.get("evaluated") != sweep["checkpoint"]:
        evaluate.run(
            evaluate.EvaluateConfig(
                outcomes=config.outcomes,
                pool=config.pool,
                activations=config.activations,
                checkpoint=checkpoint,
                output=evaluation,
                baselines=config.baselines,
                resamples=config.resamples,
            )
        )
        sweep |= {"evaluated": sweep["checkpoint"]}
        write_json(path, sweep)
    version = registry.register(
        checkpoint,
        evaluation,
        {
            "sweep_run": tracked.id,
            "sweep_trial": str(best.number),
            "sweep_objective": config.objective,
            f"held_out_{config.objective}": f"{best.value(config.objective):.6g}",
        },
    )
    tracked.tag(checkpoint_id=version.checkpoint, version=str(version.number), best_trial=str(best.number))
    sweep |= {"version": version.number}
    write_json(path, sweep)
    return sweep


if __name__ == "__main__":
    main(SweepConfig, run, plan=plan, then="open {output}/sweep.html, then python -m jobs.promote")
