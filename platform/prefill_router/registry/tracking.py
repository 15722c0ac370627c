"""Experiment tracking: MLflow runs with configuration, metrics and files.

In: a job's configuration, metrics and files. Out: MLflow runs of the experiment `prefill-router` in the store of
`registry.store`. Tracking never ends a job: if the store does not answer, a warning is printed once and the job
continues without it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from prefill_router.errors import UnavailableError
from prefill_router.files import sha256_strings
from prefill_router.locations import local_copy, location
from prefill_router.registry.store import connect, experiment_id, failures, probe, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
else:  # MLflow's types cost its import; tests check annotations when functions are called
    MlflowClient = Any

Value = TypeVar("Value")
NESTED = "mlflow.parentRunId"  # the tag by which MLflow nests runs
RETRY_S = 60.0  # after a failure of the store, time until it is tried again


class _Store:
    """The store of a run and its nested runs. After a failure, calls do nothing until a retry succeeds."""

    def __init__(self) -> None:
        self._client: MlflowClient | None = None
        self._retry_at = 0.0

    @property
    def failed(self) -> bool:
        return self._retry_at > 0

    def call(self, operation: Callable[[MlflowClient], Value]) -> Value | None:
        """The result of the operation, or None if the store fails. Prints a warning at the first failure."""
        if time.monotonic() < self._retry_at:
            return None
        try:
            if self.failed and self._client is not None:
                probe(tracking_uri())  # MLflow's own retries are slow
            self._client = self._client or connect()
            with failures(passing=()):
                value = operation(self._client)
        except UnavailableError as error:
            if not self.failed:
                print(f"warning: {error}. The job continues without tracking", file=sys.stderr, flush=True)
            self._retry_at = time.monotonic() + RETRY_S
            return None
        if self.failed:
            print("tracking: the store answers", file=sys.stderr, flush=True)
            self._retry_at = 0.0
        return value


class Run:
    """A tracked run. Every call is a round trip to the store (about 50 ms), so log in batches.

    `id` is empty if the store did not answer when the run was opened. Calls then do nothing. `complete`: whether the
    store has everything that was logged.
    """

    def __init__(self, store: _Store, run_id: str | None) -> None:
        self.id = run_id or ""
        self.complete = bool(run_id)
        self._store = store

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Logs the metrics in one batch. None is left out, since MLflow has no null."""
        self._log([(name, value, step) for name, value in metrics.items()])

    def log_history(self, steps: Sequence[Mapping[str, float | None]]) -> None:
        """Logs the metrics of steps 1, 2, ..., in as few batches as the store allows."""
        self._log([(name, value, step) for step, figures in enumerate(steps, 1) for name, value in figures.items()])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs parameters in one batch; nested ones get dotted names. Logging equal values twice changes nothing."""
        from mlflow.entities import Param

        values = [Param(name, str(value)) for name, value in _flat(params).items()]
        self._call(lambda client: client.log_batch(self.id, params=values))

    def log_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes the artefact `name` with `value` as JSON."""
        self._call(lambda client: client.log_dict(self.id, dict(value), name))

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Copies a file, or a folder with its contents, to the run's artefacts, under `folder` if given."""

        def log(client: MlflowClient) -> None:
            with local_copy(location(path)) as copy:
                (client.log_artifacts if copy.is_dir() else client.log_artifact)(self.id, str(copy), folder)

        self._call(log)

    def tag(self, **tags: str) -> None:
        """Sets tags. `register` finds the run that trained a checkpoint by the tag `checkpoint_id`."""
        from mlflow.entities import RunTag

        values = [RunTag(name, value) for name, value in tags.items()]
        self._call(lambda client: client.log_batch(self.id, tags=values))

    def end(self, status: str = "FINISHED") -> None:
        """Ends a run that `child` returned, with an MLflow status: FINISHED, FAILED or KILLED."""
        self._call(lambda client: client.set_terminated(self.id, status))

    def _log(self, metrics: Sequence[tuple[str, float | None, int]]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        values = [Metric(name, float(value), now, step) for name, value, step in metrics if value is not None]
        for start in range(0, len(values), 1000):
            self._call(partial(_log_metrics, run_id=self.id, metrics=values[start : start + 1000]))

    def _call(self, operation: Callable[[MlflowClient], object]) -> None:
        if self.id:
            self.complete &= bool(self._store.call(lambda client: (operation(client),)))


_PARENT: ContextVar[Run | None] = ContextVar("parent", default=None)  # the run of `track_many`, parent of new runs


@contextmanager
def track(job: str, config: BaseModel, tags: Mapping[str, str] | None = None) -> Iterator[Run]:
    """Context of a run named `job`, with the resolved configuration as parameters and as `config.json`.

    The run ends as FINISHED, as FAILED with the tag `error` if the body raises an exception, or as KILLED if it is
    interrupted. Inside `track_many` an existing run with the same job, configuration and tags is resumed.

    Raises InputError for a URI that MLflow does not support. If the store does not answer, at the start or later, a
    warning is printed and the body runs to its end.
    """
    tags = {"job": job, **(tags or {})}
    if _PARENT.get() is None:
        store = _Store()
        run = Run(store, store.call(lambda client: _open(client, experiment_id(client), job, tags)))
    else:
        same = sha256_strings([json.dumps([config.model_dump(mode="json"), tags], sort_keys=True)])[:16]
        run = child(job, f"{job} {same}", tags)
    with _until_done(run):
        _log_config(run, config)
        yield run


@contextmanager
def track_many(job: str, config: BaseModel, key: str) -> Iterator[Run]:
    """As `track`, for a run with nested runs. An existing run with the same job and `key` is resumed.

    Nested runs that an interruption left running end as KILLED; `child` and `track` resume them.
    """
    store = _Store()
    found = store.call(lambda client: _open_parent(client, job, key))
    run = Run(store, found[0] if found else None)
    if found and found[1]:
        _log_config(run, config)
    token = _PARENT.set(run)
    try:
        with _until_done(run):
            yield run
    finally:
        _PARENT.reset(token)


def child(name: str, key: str, tags: Mapping[str, str]) -> Run:
    """Resumes the nested run with this `key`, or opens a new one named `name`, inside `track_many`.

    The caller must call its `end`.
    """
    parent = _PARENT.get()
    if parent is None:
        raise RuntimeError("`child` needs a surrounding `track_many`")

    def open_child(client: MlflowClient) -> str:
        experiment = experiment_id(client)
        known = client.search_runs(
            [experiment], f"tags.`{NESTED}` = '{parent.id}' and tags.key = '{key}'", max_results=1
        )
        if known:
            client.update_run(known[0].info.run_id, status="RUNNING")
            return str(known[0].info.run_id)
        return _open(client, experiment, name, {**tags, "key": key, NESTED: parent.id})

    return Run(parent._store, parent._store.call(open_child) if parent.id else None)


def _open_parent(client: MlflowClient, job: str, key: str) -> tuple[str, bool]:
    """The id of the run with this job and key, and whether it is new."""
    experiment = experiment_id(client)
    known = client.search_runs([experiment], f"tags.job = '{job}' and tags.key = '{key}'", max_results=1)
    if not known:
        return _open(client, experiment, job, {"job": job, "key": key}), True
    run_id = str(known[0].info.run_id)
    client.update_run(run_id, status="RUNNING")
    interrupted = client.search_runs([experiment], f"tags.`{NESTED}` = '{run_id}' and attributes.status = 'RUNNING'")
    for other in interrupted:
        client.set_terminated(other.info.run_id, "KILLED")
    return run_id, False


def _open(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str]) -> str:
    return str(client.create_run(experiment, run_name=name, tags=dict(tags)).info.run_id)


def _log_metrics(client: MlflowClient, run_id: str, metrics: list[Any]) -> None:
    client.log_batch(run_id, metrics=metrics)


def _log_config(run: Run, config: BaseModel) -> None:
    resolved = config.model_dump(mode="json")
    run.log_params(resolved)
    run.log_json("config.json", resolved)


@contextmanager
def _until_done(run: Run) -> Iterator[None]:
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    except Exception as error:
        status = "FAILED"
        run.tag(error=f"{type(error).__name__}: {error}"[:5000])
        raise
    finally:
        run.end(status)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat
