"""Experiment tracking: MLflow runs with configuration, metrics and files.

In: a job's configuration, metrics and files. Out: MLflow runs of the experiment `prefill-router`. The store is
MLFLOW_TRACKING_URI or, if it is not set, `sqlite:///runs/mlflow.db`, which is created on first use. A sqlite store has
its artefacts in `mlartifacts/` next to its file. MLflow is imported on first use (1.6 s).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from prefill_router.files import sha256_strings

if TYPE_CHECKING:
    from mlflow import MlflowClient
else:  # MLflow's types cost its import; tests check annotations when functions are called
    MlflowClient = Any

NAME = "prefill-router"  # name of the experiment and of the registered model
NESTED = "mlflow.parentRunId"  # the tag by which MLflow nests runs
_PARENT: ContextVar[str | None] = ContextVar("parent", default=None)  # the run of `track_many`, parent of new runs


class Run:
    """A tracked run. Every call is a round trip to the store (about 50 ms), so log in batches."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.id = run_id
        self._client = client

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Logs the metrics in one batch. None is left out, since MLflow has no null."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(
            self.id,
            metrics=[Metric(name, float(value), now, step) for name, value in metrics.items() if value is not None],
        )

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs parameters in one batch; nested ones get dotted names. Logging equal values twice changes nothing."""
        from mlflow.entities import Param

        self._client.log_batch(self.id, params=[Param(name, str(value)) for name, value in _flat(params).items()])

    def log_history(self, steps: Sequence[Mapping[str, float | None]]) -> None:
        """Logs the metrics of steps 1, 2, ..., in as few batches as the store allows."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = [
            Metric(name, float(value), now, step)
            for step, figures in enumerate(steps, 1)
            for name, value in figures.items()
            if value is not None
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.id, metrics=metrics[start : start + 1000])

    def end(self, status: str = "FINISHED") -> None:
        """Ends a run that `child` returned, with an MLflow status: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.id, status)

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Copies a file, or a folder with its contents, to the run's artefacts, under `folder` if given."""
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(self.id, str(path), folder)

    def tag(self, **tags: str) -> None:
        """Sets tags. `register` finds the run that trained a checkpoint by the tag `checkpoint_id`."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.id, tags=[RunTag(name, value) for name, value in tags.items()])


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI or, if it is not set, a sqlite URI in `runs/` of the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').resolve()}"


@contextmanager
def track(job: str, config: BaseModel, tags: Mapping[str, str] | None = None) -> Iterator[Run]:
    """Context of a run named `job`, with the resolved configuration as parameters and as `config.json`.

    The run ends as FINISHED, as FAILED with the tag `error` if the body raises an exception, or as KILLED if it is
    interrupted. Inside `track_many` an existing run with the same job, configuration and tags is resumed.
    """
    client, tags = connect(), {"job": job, **(tags or {})}
    if _PARENT.get() is None:
        run = _open(client, experiment_id(client), job, tags)
    else:
        same = sha256_strings([json.dumps([config.model_dump(mode="json"), tags], sort_keys=True)])[:16]
        run = child(job, f"{job} {same}", tags)
    with _until_done(client, run):
        _log_config(client, run, config)
        yield run


@contextmanager
def track_many(job: str, config: BaseModel, key: str) -> Iterator[Run]:
    """As `track`, for a run with nested runs. An existing run with the same job and `key` is resumed.

    Nested runs that an interruption left running end as KILLED; `child` and `track` resume them.
    """
    client = connect()
    experiment = experiment_id(client)
    known = client.search_runs([experiment], f"tags.job = '{job}' and tags.key = '{key}'", max_results=1)
    if known:
        run = Run(client, known[0].info.run_id)
        client.update_run(run.id, status="RUNNING")
        interrupted = client.search_runs(
            [experiment], f"tags.`{NESTED}` = '{run.id}' and attributes.status = 'RUNNING'"
        )
        for other in interrupted:
            client.set_terminated(other.info.run_id, "KILLED")
    else:
        run = _open(client, experiment, job, {"job": job, "key": key})
        _log_config(client, run, config)
    token = _PARENT.set(run.id)
    try:
        with _until_done(client, run):
            yield run
    finally:
        _PARENT.reset(token)


def child(name: str, key: str, tags: Mapping[str, str]) -> Run:
    """Resumes the nested run with this `key`, or opens a new one named `name`, inside `track_many`.

    The caller must call its `end`.
    """
    client, parent = connect(), _PARENT.get()
    experiment = experiment_id(client)
    known = client.search_runs([experiment], f"tags.`{NESTED}` = '{parent}' and tags.key = '{key}'", max_results=1)
    if known:
        client.update_run(known[0].info.run_id, status="RUNNING")
        return Run(client, known[0].info.run_id)
    return _open(client, experiment, name, {**tags, "key": key})


def _open(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str]) -> Run:
    parent = _PARENT.get()
    nested = {NESTED: parent} if parent else {}
    return Run(client, client.create_run(experiment, run_name=name, tags={**tags, **nested}).info.run_id)


def _log_config(client: MlflowClient, run: Run, config: BaseModel) -> None:
    resolved = config.model_dump(mode="json")
    run.log_params(resolved)
    client.log_dict(run.id, resolved, "config.json")


@contextmanager
def _until_done(client: MlflowClient, run: Run) -> Iterator[None]:
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    except Exception as error:
        status = "FAILED"
        run.tag(error=f"{type(error).__name__}: {error}"[:5000])
        raise
    finally:
        client.set_terminated(run.id, status)


def connect() -> MlflowClient:
    """An MLflow client of `tracking_uri`. Imports MLflow, and creates the folder of a sqlite store."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = tracking_uri()
    file = _sqlite_file(uri)
    if file is not None and not file.exists():
        print(f"creating the tracking database {file} (once, takes seconds)", file=sys.stderr, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
    import mlflow

    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient()


def experiment_id(client: MlflowClient) -> str:
    """The id of the experiment `prefill-router`, created on first use.

    Sets its artefact folder, since MLflow's default is the working directory.
    """
    experiment = client.get_experiment_by_name(NAME)
    if experiment is not None:
        return str(experiment.experiment_id)
    file = _sqlite_file(tracking_uri())
    location = (file.parent / "mlartifacts").as_uri() if file is not None else None
    return str(client.create_experiment(NAME, artifact_location=location))


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat
