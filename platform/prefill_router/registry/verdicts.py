"""Verdicts of gates and evaluations of registered versions.

In: the number of a version, tags and files. Out: tags of the version, and artefacts of its run; or the files of the
evaluation that jobs.evaluate tracked for a checkpoint. Knows nothing of what the tags say. Functions raise
UnavailableError within seconds if the store does not answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefill_router.errors import InputError
from prefill_router.registry.store import NAME, connect, experiment_id, failures
from prefill_router.registry.versions import find_version

FOLDER = "evaluation"  # of the artefacts of an evaluation run
TAG_LENGTH = 500  # characters of a tag's value; the store allows more, pages do not


def version_tags(number: int) -> dict[str, str]:
    """The tags of a version. Raises InputError for an unknown version."""
    client = connect()
    with failures():
        return dict(find_version(client, str(number)).tags)


def record_verdict(number: int, tags: Mapping[str, str], prefix: str, files: Sequence[Path], folder: str) -> bool:
    """Replaces the tags of a version that begin with `prefix` by `tags`, and uploads `files` to its run.

    The files go to the artefacts of the run that the version belongs to, under `folder`. Returns whether they were
    uploaded: a version of another tool may have no run. Raises InputError for an unknown version.
    """
    client = connect()
    with failures():
        version = find_version(client, str(number))
        if version.run_id:
            for file in files:
                client.log_artifact(version.run_id, str(file), folder)
        for name in version.tags:
            if name.startswith(prefix) and name not in tags:
                client.delete_model_version_tag(NAME, version.version, name)
        for name, value in tags.items():
            client.set_model_version_tag(NAME, version.version, name, value[:TAG_LENGTH])
        return bool(version.run_id)


def fetch_evaluation(checkpoint: str, names: Sequence[str], target: Path) -> Path | None:
    """Downloads the files `names` of the latest tracked evaluation of a checkpoint to `target`, and returns it.

    None if no finished evaluation of this checkpoint was tracked. Raises InputError with the reason if its files cannot
    be fetched.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    client = connect()
    with failures():
        done = f"tags.checkpoint_id = '{checkpoint}' and tags.job = 'evaluate' and attributes.status = 'FINISHED'"
        runs = client.search_runs([experiment_id(client)], done, order_by=["attributes.end_time DESC"], max_results=1)
    if not runs:
        return None
    target.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            download_artifacts(run_id=runs[0].info.run_id, artifact_path=f"{FOLDER}/{name}", dst_path=str(target))
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"evaluation: run {runs[0].info.run_id} has the evaluation of checkpoint {checkpoint}, but its files "
            f"cannot be fetched from the artefact store ({reason}); run the command again later, or give "
            "--evaluation or --champion-evaluation"
        ) from error
    return target / FOLDER if (target / FOLDER).is_dir() else target


def checkpoint_of(number: int) -> str:
    """The checkpoint id of a version. Raises InputError for an unknown version, or one without the id."""
    checkpoint = version_tags(number).get("checkpoint_id")
    if checkpoint is None:
        raise InputError(f"version: {NAME} {number} has no tag checkpoint_id; use a version that jobs.register created")
    return checkpoint
