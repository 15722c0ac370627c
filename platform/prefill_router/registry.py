"""Tracking and the model registry: the one module of the library that knows MLflow.

In: a job's configuration, metrics and files; a checkpoint folder. Out: MLflow runs, versions of the registered model
`prefill-router` with their lineage, and the aliases `champion` (live) and `previous` (what `undo` goes back to).

The store is MLFLOW_TRACKING_URI, else `sqlite:///runs/mlflow.db`, made on first use. Artefacts of a sqlite store
lie beside its file in `mlartifacts/`. MLflow is imported on first use (1.6 s), so that importing this module is free.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import BaseModel

from prefill_router.errors import InputError
from prefill_router.files import read_json, sha256_strings
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.router import Router

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
else:  # MLflow's types cost its import; tests check annotations when functions are called
    MlflowClient = ModelVersion = Any

NAME = "prefill-router"  # of the registered model and of the experiment
CHAMPION = "champion"
PREVIOUS = "previous"
URI = re.compile(rf"models:/{NAME}(?:@(?P<alias>[A-Za-z][\w-]*)|/(?P<version>[1-9]\d*))")
HEADLINE = ("auc", "brier", "p_auccc", "mdp_auccc", "efficacy", "headroom_captured", "cost_saving")
LINEAGE = ("outcomes_digest", "activations_digest", "code_version")  # of the checkpoint's manifest
NESTED = "mlflow.parentRunId"  # the tag by which MLflow nests runs
_PARENT: ContextVar[str | None] = ContextVar("parent", default=None)  # the run that runs opened now stand under


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


@dataclass(frozen=True)
class Version:
    """A version of the registered model. `created` is false where the checkpoint was registered before."""

    number: int
    checkpoint: str
    created: bool = False


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else sqlite in `runs/` of the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').resolve()}"


@contextmanager
def track(job: str, config: BaseModel, tags: Mapping[str, str] | None = None) -> Iterator[Run]:
    """A run named `job`, with the resolved configuration as parameters and as `config.json`.

    Ends FINISHED, or FAILED with the error as tag `error` when the body raises, or KILLED when it is interrupted.
    Inside `track_many` the run of the same job, configuration and tags, if there is one, is gone on with.
    """
    client, tags = _client(), {"job": job, **(tags or {})}
    if _PARENT.get() is None:
        run = _open(client, _experiment(client), job, tags)
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
    client = _client()
    experiment = _experiment(client)
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
    client, parent = _client(), _PARENT.get()
    experiment = _experiment(client)
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


def register(
    checkpoint: Path | str, evaluation: Path | str | None = None, tags: Mapping[str, str] | None = None
) -> Version:
    """Makes the checkpoint folder a version of `prefill-router`, tagged with its lineage.

    The version hangs on the `train` run with its `checkpoint_id`, or on a run of its own where there is none. Its
    tags: checkpoint_id, encoders (fingerprints), the digests of outcomes and activations, code_version, the
    headline figures of `evaluation` (a folder with metrics.json), and `tags`. A checkpoint that is registered already
    keeps its version, and takes the figures of a newer evaluation.

    Raises InputError for a folder that is no sound checkpoint, or an evaluation without the `prefill` router.
    """
    folder = resolve(str(checkpoint))
    router = load_checkpoint(folder)  # what cannot be loaded is never registered
    tags = _lineage(router) | _headline(evaluation) | dict(tags or {})
    client = _client()
    known = client.search_model_versions(f"name='{NAME}' and tag.checkpoint_id='{router.id}'")
    if known:
        number = min(int(version.version) for version in known)
        for name, value in tags.items():
            client.set_model_version_tag(NAME, str(number), name, value)
        return Version(number, router.id)

    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    experiment = _experiment(client)
    trained = f"tags.checkpoint_id = '{router.id}' and tags.job = 'train'"  # evaluations carry the id as well
    runs = client.search_runs([experiment], trained, max_results=1)
    with (
        mlflow.start_run(
            run_id=runs[0].info.run_id if runs else None,
            experiment_id=experiment,
            run_name=None if runs else "register",
        ),
        warnings.catch_warnings(action="ignore", category=UserWarning),
    ):  # it asks for an example of the input
        # A loader module with data, rather than a pickled Python model. With signature and requirements given
        # MLflow infers neither, which takes it 10 s.
        logged = mlflow.pyfunc.log_model(
            name="router",
            loader_module=__name__,
            data_path=str(folder),
            signature=ModelSignature(Schema([ColSpec("string", "prompt")]), Schema([ColSpec("string", "model")])),
            pip_requirements=[f"prefill-router=={_package_version()}"],
        )
        # The tags come with the version: one without its checkpoint_id would not be found again, and stand twice.
        version = mlflow.register_model(logged.model_uri, NAME, tags=tags)
    return Version(int(version.version), router.id, created=True)


def promote(number: int) -> Version | None:
    """Makes version `number` the champion; the champion so far becomes `previous` and is returned.

    A version that is the champion already stays it, and `previous` stays as it is. Raises InputError for an unknown
    version.
    """
    client = _client()
    _version(client, str(number))
    champion = _by_alias(client, CHAMPION)
    if champion is not None and champion.number == number:
        return _by_alias(client, PREVIOUS)
    # `previous` first: whoever dies between the two calls leaves the old champion live and nothing forgotten. The
    # other way round the old champion's number would be lost with the process.
    if champion is not None:
        client.set_registered_model_alias(NAME, PREVIOUS, str(champion.number))
    client.set_registered_model_alias(NAME, CHAMPION, str(number))
    return champion


def undo() -> tuple[Version, Version | None]:
    """Makes `previous` the champion again and the champion `previous`; returns (champion, previous).

    Raises InputError when there is no version to go back to.
    """
    client = _client()
    champion, previous = _by_alias(client, CHAMPION), _by_alias(client, PREVIOUS)
    if previous is None or (champion is not None and champion.number == previous.number):
        raise InputError(
            f"undo: nothing to undo, `{PREVIOUS}` "
            f"{'is not set' if previous is None else 'is the champion itself'}; "
            "name the version to go to with --version"
        )
    # Champion first: going back is what is urgent.
    client.set_registered_model_alias(NAME, CHAMPION, str(previous.number))
    if champion is not None:
        client.set_registered_model_alias(NAME, PREVIOUS, str(champion.number))
    return previous, champion


def pin(where: str) -> str:
    """`where` such that it means the same checkpoint for every process, now and later.

    An alias becomes its present version, a relative path an absolute one. Raises InputError as `resolve` does.
    """
    if not where.startswith("models:"):
        return str(_local(where))
    match = _parse(where)
    return f"models:/{NAME}/{_find(_client(), match).version}"


def resolve(where: str) -> Path:
    """The checkpoint folder meant by a local path, `models:/prefill-router@ALIAS` or `models:/prefill-router/N`.

    Versions are downloaded once per machine, to `$XDG_CACHE_HOME/prefill-router/CHECKPOINT_ID`. Raises InputError for
    a folder that is not there, another URI, an unknown version or alias.
    """
    if not where.startswith("models:"):
        return _local(where)
    match = _parse(where)
    client = _client()
    version = _find(client, match)
    checkpoint = version.tags.get("checkpoint_id")
    if checkpoint is None:
        raise InputError(f"checkpoint: {where} carries no checkpoint_id; use a version that jobs.register made")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / NAME
    folder = cache / checkpoint
    if not folder.exists():
        _download(client, version, folder)
    return folder


def _download(client: MlflowClient, version: ModelVersion, folder: Path) -> None:
    """Fetches into a scratch folder beside `folder` and renames: two processes may do it at once."""
    from mlflow.artifacts import download_artifacts

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
        uri = client.get_model_version_download_uri(NAME, version.version)
        model = Path(download_artifacts(artifact_uri=uri, dst_path=scratch))
        (manifest,) = model.glob("data/**/manifest.json")
        try:
            os.replace(manifest.parent, folder)
        except OSError:
            if not folder.exists():  # else another process was faster: same id, same bytes
                raise


def _local(where: str) -> Path:
    folder = Path(where)
    if not folder.is_dir():
        raise InputError(
            f"checkpoint: got {where!r}, expected a checkpoint folder that is there, "
            f"models:/{NAME}@ALIAS or models:/{NAME}/VERSION"
        )
    return folder.resolve()


def _parse(where: str) -> re.Match[str]:
    match = URI.fullmatch(where)
    if match is None:
        raise InputError(f"checkpoint: got {where!r}, expected models:/{NAME}@ALIAS or models:/{NAME}/VERSION")
    return match


def _find(client: MlflowClient, match: re.Match[str]) -> ModelVersion:
    return _version(client, match["version"]) if match["version"] else _aliased(client, match["alias"])


def _version(client: MlflowClient, number: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(NAME, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = sorted(int(version.version) for version in client.search_model_versions(f"name='{NAME}'"))
        raise InputError(
            f"version: {NAME} has no version {number}; it has "
            f"{', '.join(map(str, known)) or 'none yet (register one with jobs.register)'}"
        ) from None


def _aliased(client: MlflowClient, alias: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(NAME, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise InputError(
            f"checkpoint: {NAME} has no version with the alias {alias!r}; set `champion` with jobs.promote"
        ) from None


def _by_alias(client: MlflowClient, alias: str) -> Version | None:
    try:
        version = _aliased(client, alias)
    except InputError:
        return None
    return Version(int(version.version), version.tags.get("checkpoint_id", ""))


def _lineage(router: Router) -> dict[str, str]:
    """What this checkpoint came from, as tags."""
    values = {name: router.manifest[name] for name in LINEAGE if router.manifest.get(name) is not None}
    return {
        "checkpoint_id": router.id,
        "encoders": ",".join(sorted(router.encoders)),
        **{
            name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            for name, value in values.items()
        },
    }


def _headline(evaluation: Path | str | None) -> dict[str, str]:
    """The headline figures of an evaluation's `prefill` router, as tags; undefined ones are left out."""
    if evaluation is None:
        return {}
    path = Path(evaluation) / "metrics.json"
    metrics = read_json(path)
    try:
        router = metrics["routers"]["prefill"]
    except (KeyError, TypeError):
        raise InputError(
            f"{path}: has no figures of the router `prefill`; expected the file that jobs.evaluate writes"
        ) from None
    figures = {name: router.get(name) for name in HEADLINE}
    estimates = {
        name: figure.get("estimate") if isinstance(figure, dict) else figure for name, figure in figures.items()
    }
    return {name: f"{value:.6g}" for name, value in estimates.items() if value is not None}


def _client() -> MlflowClient:
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


def _experiment(client: MlflowClient) -> str:
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


def _package_version() -> str:
    from importlib.metadata import version

    return version(NAME)


class _PyfuncRouter:
    """What `mlflow.pyfunc.load_model` hands out: column `prompt` in, column `model` out, at the chosen lambda."""

    def __init__(self, folder: Path) -> None:
        from prefill_router.prefill.backends import load_encoder

        self.router = load_checkpoint(folder)
        self.encoders = {name: load_encoder(config) for name, config in self.router.encoders.items()}

    def predict(self, prompts: pd.DataFrame) -> pd.DataFrame:
        import pyarrow as pa

        texts = prompts["prompt"].tolist()
        table = pa.table({"query_id": [str(row) for row in range(len(texts))], "prompt": texts})
        rows = {name: encoder(table) for name, encoder in self.encoders.items()}
        return pd.DataFrame({"model": [decision.model for decision in self.router.decide(rows, lam=None)]})


def _load_pyfunc(data_path: str) -> _PyfuncRouter:
    """MLflow's entry point for a model that is a loader module and a folder of data."""
    (manifest,) = Path(data_path).glob("**/manifest.json")
    return _PyfuncRouter(manifest.parent)
