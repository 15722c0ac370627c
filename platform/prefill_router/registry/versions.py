"""The model registry: versions of the model `prefill-router` with their lineage.

In: a checkpoint folder. Out: a version, or the checkpoint folder of a version. aliases.py names versions. A version is
downloaded once per machine. Functions raise UnavailableError within seconds if the store does not answer.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefill_router.errors import InputError, UnavailableError
from prefill_router.files import read_json
from prefill_router.locations import ObjectPath, location
from prefill_router.registry.cache import cached_checkpoint, cached_version, remember_version, store_checkpoint
from prefill_router.registry.store import (
    NAME,
    connect,
    experiment_id,
    failures,
    probe,
    registry_uri,
    shown,
    sqlite_file,
)
from prefill_router.routing.checkpoint import checkpoint_id, download_checkpoint, load_checkpoint
from prefill_router.routing.router import Router

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
else:  # MLflow's types cost its import; tests check annotations when functions are called
    MlflowClient = ModelVersion = Any

URI = re.compile(rf"models:/{NAME}(?:@(?P<alias>[A-Za-z][\w-]*)|/(?P<version>[1-9]\d*))")
HEADLINE = ("auc", "brier", "p_auccc", "mdp_auccc", "efficacy", "headroom_captured", "cost_saving")
DATA = "checkpoint"  # the folder's name in the artefacts; MLflow cannot fetch names with `#`, `?` or `%`
LINEAGE = ("outcomes_digest", "activations_digest", "code_version")  # fields of the checkpoint's manifest


@dataclass(frozen=True)
class Version:
    """A version of the registered model: its number and checkpoint id. `created`: whether this call registered it."""

    number: int
    checkpoint: str
    created: bool = False


def register(
    checkpoint: Path | str, evaluation: Path | str | None = None, tags: Mapping[str, str] | None = None
) -> Version:
    """Registers the checkpoint folder as a version of `prefill-router`, tagged with its lineage.

    The version belongs to the `train` run with its `checkpoint_id`, or to a new run if no such run exists. Tags:
    checkpoint_id, encoders (fingerprints), digests of outcomes and activations, code_version, the headline figures of
    `evaluation` (a folder with metrics.json), and `tags`. A registered checkpoint keeps its version; its tags are
    updated.

    Raises InputError if the checkpoint is missing or corrupt, or if the evaluation has no `prefill` router.
    """
    folder = resolve(str(checkpoint))
    router = load_checkpoint(folder)  # refuses a corrupt checkpoint
    tags = _lineage(router) | _headline(evaluation) | dict(tags or {})
    client = connect()
    with failures():
        known = client.search_model_versions(f"name='{NAME}' and tag.checkpoint_id='{router.id}'")
        for version in sorted(known, key=lambda version: int(version.version)):
            if _is_fetchable(client, version):
                for name, value in tags.items():
                    client.set_model_version_tag(NAME, version.version, name, value)
                return Version(int(version.version), router.id)
        number = _log_version(client, router.id, folder, tags)
    return Version(number, router.id, created=True)


def _log_version(client: MlflowClient, checkpoint: str, folder: Path, tags: Mapping[str, str]) -> int:
    """Uploads the folder as a model of its training run, registers it with the tags, and returns its number."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    experiment = experiment_id(client)
    trained = f"tags.checkpoint_id = '{checkpoint}' and tags.job = 'train'"  # evaluation runs have the id too
    runs = client.search_runs([experiment], trained, max_results=1)
    with (
        tempfile.TemporaryDirectory() as scratch,
        mlflow.start_run(
            run_id=runs[0].info.run_id if runs else None,
            experiment_id=experiment,
            run_name=None if runs else "register",
        ),
        warnings.catch_warnings(action="ignore", category=UserWarning),
    ):  # MLflow recommends an input example
        data = shutil.copytree(folder, Path(scratch) / DATA)
        # A loader module with data instead of a pickled model. Signature and requirements are given, because MLflow
        # takes 10 s to infer them.
        logged = mlflow.pyfunc.log_model(
            name="router",
            loader_module="prefill_router.registry.flavour",
            data_path=str(data),
            signature=ModelSignature(Schema([ColSpec("string", "prompt")]), Schema([ColSpec("string", "model")])),
            pip_requirements=[f"prefill-router=={_package_version()}"],
        )
        # Tags are set with the version: without its checkpoint_id the next call would register a second version.
        version = mlflow.register_model(logged.model_uri, NAME, tags=dict(tags))
    return int(version.version)


def pin_version(where: str) -> str:
    """Resolves an alias to its present version and a relative path to an absolute one.

    All processes then load the same checkpoint, also after a promotion. Raises InputError as `resolve` does.
    """
    if not where.startswith("models:"):
        return str(_folder(where))
    match = _parse(where)
    if _cached(match) is not None:
        return where
    return f"models:/{NAME}/{_ask(match)[1].version}"


def resolve(where: str) -> Path:
    """The local checkpoint folder of a path, `models:/prefill-router@ALIAS` or `models:/prefill-router/N`.

    A version, or a checkpoint in an object store, is downloaded once per machine, to
    `$XDG_CACHE_HOME/prefill-router/CHECKPOINT_ID` (default `~/.cache`); a damaged copy is replaced. A version by number
    whose copy is intact needs no tracking server.

    Raises InputError for a missing folder, another URI, an unknown version or alias, and files that are damaged or
    cannot be fetched; UnavailableError if the store is needed and does not answer.
    """
    if not where.startswith("models:"):
        given = _folder(where)
        return _fetch(given) if isinstance(given, ObjectPath) else given
    match = _parse(where)
    if (folder := _cached(match)) is not None:
        return folder
    client, version = _ask(match)
    checkpoint = _checkpoint_id(version)
    folder = cached_checkpoint(checkpoint)
    if folder is None:
        with failures():
            folder = store_checkpoint(checkpoint, lambda scratch: _download(client, version, scratch))
    remember_version(registry_uri(), str(version.version), checkpoint)
    return folder


def at_hand(where: str) -> Path | None:
    """The folder of `resolve` if it is on this machine. None for a version that a registry has to be asked for.

    Asks no registry and downloads nothing. Raises InputError for a missing folder and another URI.
    """
    if where.startswith("models:"):
        return _cached(_parse(where))
    given = _folder(where)
    return cached_checkpoint(checkpoint_id(given)) if isinstance(given, ObjectPath) else given


def _cached(match: re.Match[str]) -> Path | None:
    """The copy of a version by number. A sqlite registry is a file, which answers at once and may be recreated."""
    uri = registry_uri()
    return cached_version(uri, match["version"]) if match["version"] and sqlite_file(uri) is None else None


def _ask(match: re.Match[str]) -> tuple[MlflowClient, ModelVersion]:
    """A client, and the version that the store has for a number or an alias."""
    try:
        client = connect()
        with failures():
            return client, _find(client, match)
    except UnavailableError as error:
        raise UnavailableError(
            f"{error}; without it, give a folder, or models:/{NAME}/N with a version that this machine has cached"
        ) from None


def _checkpoint_id(version: ModelVersion) -> str:
    checkpoint = version.tags.get("checkpoint_id")
    if checkpoint is None:
        raise InputError(
            f"version: {NAME} {version.version} has no tag checkpoint_id; use a version that jobs.register created"
        )
    return str(checkpoint)


def _download(client: MlflowClient, version: ModelVersion, scratch: Path) -> Path:
    """Downloads the model of a version and returns the checkpoint folder in it."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    uri = client.get_model_version_download_uri(NAME, version.version)
    reason = "its checkpoint is not among them"
    try:
        found = list(Path(download_artifacts(artifact_uri=uri, dst_path=str(scratch))).glob("data/**/manifest.json"))
    except (MlflowException, OSError) as error:
        probe(registry_uri())  # raises UnavailableError if the server, not the version, is at fault
        found, reason = [], " ".join(str(error).split())[:300]
    if len(found) != 1:
        raise InputError(
            f"version: the files of {NAME} {version.version} cannot be fetched from {shown(uri)} ({reason}); make this "
            "store reachable from here (`mlflow server --serve-artifacts`), or register the checkpoint again"
        )
    return found[0].parent


def _is_fetchable(client: MlflowClient, version: ModelVersion) -> bool:
    """Whether the store still has the version's checkpoint, under a name that MLflow can fetch."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return load_checkpoint(_download(client, version, Path(scratch))).id == version.tags["checkpoint_id"]
        except InputError:
            return False


def _fetch(folder: ObjectPath) -> Path:
    """The copy of a checkpoint in an object store."""
    checkpoint = checkpoint_id(folder)
    return cached_checkpoint(checkpoint) or store_checkpoint(
        checkpoint, lambda scratch: download_checkpoint(folder, scratch / "checkpoint")
    )


def _folder(where: str) -> Path:
    folder = location(where)
    if not folder.is_dir():
        raise InputError(
            f"checkpoint: got {where!r}, expected a checkpoint folder that exists, "
            f"models:/{NAME}@ALIAS or models:/{NAME}/VERSION"
            f"{'' if folder.is_absolute() else f'; relative paths count from {Path.cwd()}'}"
        )
    return folder.resolve()


def _parse(where: str) -> re.Match[str]:
    match = URI.fullmatch(where)
    if match is None:
        raise InputError(f"checkpoint: got {where!r}, expected models:/{NAME}@ALIAS or models:/{NAME}/VERSION")
    return match


def _find(client: MlflowClient, match: re.Match[str]) -> ModelVersion:
    return find_version(client, match["version"]) if match["version"] else _aliased(client, match["alias"])


def find_version(client: MlflowClient, number: str) -> ModelVersion:
    """The version `number`. Raises InputError with the known versions if there is none."""
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


def by_alias(client: MlflowClient, alias: str) -> Version | None:
    """The version with this alias; None if no version has it."""
    try:
        version = _aliased(client, alias)
    except InputError:
        return None
    return Version(int(version.version), version.tags.get("checkpoint_id", ""))


def _lineage(router: Router) -> dict[str, str]:
    """Tags with the inputs and the code of the checkpoint."""
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
    """Tags with the headline figures of an evaluation's `prefill` router, without undefined ones."""
    if evaluation is None:
        return {}
    path = location(evaluation) / "metrics.json"
    metrics = read_json(path)
    try:
        router = metrics["routers"]["prefill"]
    except (KeyError, TypeError):
        raise InputError(
            f"{path}: has no figures of the router `prefill`; give an output folder of jobs.evaluate"
        ) from None
    figures = {name: router.get(name) for name in HEADLINE}
    estimates = {
        name: figure.get("estimate") if isinstance(figure, dict) else figure for name, figure in figures.items()
    }
    return {name: f"{value:.6g}" for name, value in estimates.items() if value is not None}


def _package_version() -> str:
    from importlib.metadata import version

    return version(NAME)
