"""Experiment tracking: runs with their configuration, metrics and files in MLflow.

In: a job's configuration, metrics and files. Out: MLflow runs of the experiment `prefill-router`. The store is
MLFLOW_TRACKING_URI, or `sqlite:///runs/mlflow.db`, which is created on first use. Artefacts of a sqlite store are in
`mlartifacts/` next to its file. MLflow is imported on first use (1.6 s).
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

NAME = "prefill-router"  # of the experiment and of the registered model
NESTED = "mlflow.parentRunId"  # the tag by which MLflow nests runs
_PARENT: ContextVar[str | None] = ContextVar("parent", default=None)  # the parent of runs that are opened now


class Run:
    """One tracked run. Every call is one round trip to the store (about 50 ms), so hand over things in bulk."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.id = run_id
        self._client = client

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Logs all of `metrics` in one batch. Undefined figures (None) are left out: MLflow has no null."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(
            self.id,
            metrics=[Metric(name, float(value), now, step) for name, value in metrics.items() if value is not None],
        )

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs parameters, nested ones by dotted names, in one batch. The same ones again change nothing."""
        from mlflow.entities import Param

        self._client.log_batch(self.id, params=[Param(name, str(value)) for name, value in _flat(params).items()])

    def log_history(self, steps: Sequence[Mapping[str, float | None]]) -> None:
        """Logs metrics step by step from 1, in as few batches as the store takes."""
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
        """Ends a run that `child` opened."""
        self._client.set_terminated(self.id, status)

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Copies a file, or a folder with all that is in it, into the run's artefacts (under `folder`)."""
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(self.id, str(path), folder)

    def tag(self, **tags: str) -> None:
        """Sets tags. The run that trained a checkpoint carries `checkpoint_id`: `register` finds it by that."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.id, tags=[RunTag(name, value) for name, value in tags.items()])


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else sqlite in `runs/` of the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').resolve()}"


@contextmanager
def track(job: str, config: BaseModel, tags: Mapping[str, str] | None = None) -> Iterator[Run]:
    """A run named `job`, with the resolved configuration as parameters and as `config.json`.

    Ends FINISHED, or FAILED with the error as tag `error` when the body raises, or KILLED when it is interrupted.
    Inside `track_many` the run of the same job, configuration and tags, if there is one, is gone on with.
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
    """As `track`, but runs opened inside stand under this one, and a run with the same `key` is gone on with.

    What ran under it when it was interrupted ends KILLED; `child` and `track` find it again, and it runs again.
    """
    client = connect()
    experiment = experiment_id(client)
    known = client.search_runs([experiment], f"tags.job = '{job}' and tags.key = '{key}'", max_results=1)
    if known:
        run = Run(client, known[0].info.run_id)
        client.update_run(run.id, status="RUNNING")
        left = client.search_runs([experiment], f"tags.`{NESTED}` = '{run.id}' and attributes.status = 'RUNNING'")
        for other in left:
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
    """The run `name` under the one that `track_many` opened: that with the same `key`, which runs again, or a new one.

    Its `end` must be called.
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
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = tracking_uri()
    file = _sqlite_file(uri)
    if file is not None and not file.exists():
        print(f"making the tracking database {file} (some seconds, once)", file=sys.stderr, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
    import mlflow

    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient()


def experiment_id(client: MlflowClient) -> str:
    """The id of our experiment, made on first use: MLflow's own would put artefacts into the working directory."""
    experiment = client.get_experiment_by_name(NAME)
    if experiment is not None:
        return str(experiment.experiment_id)
    file = _sqlite_file(tracking_uri())
    location = (file.parent / "mlartifacts").as_uri() if file is not None else None
    return str(client.create_experiment(NAME, artifact_location=location))


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat
