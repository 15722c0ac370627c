"""`run.json`: the commands that wrote an output folder, so that it explains itself.

In: the end of a job (`prefill_router.cli.main`). Out: OUTPUT/run.json, an object with the last run of each job that
wrote the folder, and the last one that failed since: command, resolved configuration, code and package versions, time,
inputs, files with their meaning, summary, and the next command. A folder with its own manifest (activations, features,
checkpoints) gets none: the manifest has the configuration, and its readers expect no other file. Knows nothing of the
jobs.
"""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefill_router.dry_run import MANIFEST, PARTIAL, places
from prefill_router.files import sha256_file, write_json
from prefill_router.version import code_version

NAME = "run.json"
FORMAT_VERSION = 1
PACKAGES = ("numpy", "pyarrow", "torch", "transformers", "scikit-learn", "ray", "mlflow")
DIGEST_LIMIT = 64 * 2**20  # bytes of an input file whose digest is computed; a larger one has size and time only
# What the files of output folders are, by name; docs/data-formats.md has their fields.
FILES = {
    "activations": "activations dataset: hidden states of every prompt",
    "adapter": "trained probe tokens for an encoder",
    "alerts.json": "alerts for other programs, and whether to train again",
    "best.yaml": "configuration of the best trial, for jobs.train",
    "cache": "results of protocols, so that an interrupted evaluation resumes; may be deleted",
    "checkpoint": "the router: load it with prefill_router.load, register it with jobs.register",
    "comparison.html": "page of the comparison",
    "comparison.json": "figures of the comparison",
    "controls.parquet": "test predictions of the control trunks",
    "drift.html": "page of the tests of drift",
    "drift.json": "every figure of the tests of drift",
    "engines.yaml": "measured constants of self-hosted models, for pool.yaml",
    "evaluation": "evaluation of the winner",
    "fits": "one file per fit, so that an interrupted run resumes",
    "geometry.html": "page of the layer search",
    "geometry.json": "figures of the layer search",
    "grid.json": "every configuration of the grid with its figures",
    "grid.md": "the same as a table",
    "labels.html": "page of suspicious labels",
    "layers.parquet": "a row per layer, pooling and target",
    "leave_one_out.parquet": "test predictions for every benchmark by routers trained without it",
    "ledger.jsonl": "every request with its cost; the budget counts these",
    "logs": "logs of inspect_ai, one per benchmark and model",
    "metrics.json": "figures with intervals (docs/metrics.md)",
    "mlartifacts": "files of MLflow runs and registered versions",
    "mlflow.db": "MLflow runs and the model registry; a promoted router lives here",
    "outcomes.parquet": "outcomes table: which model answered which query correctly",
    "perturbed.parquet": "confidences on perturbed prompts",
    "predictions.parquet": "confidences and costs of every test query",
    "provenance.json": "inputs, digests and versions of the evaluation",
    "replay.json": "figures of the replayed decisions",
    "replay.parquet": "every decision, as made and as replayed",
    "report.html": "report page of the evaluation",
    "semantic.json": "inputs of the fits, which a resumed run must have",
    "space.yaml": "the search space",
    "summary.json": "agreement of geometry and AUC, and the configuration",
    "sweep.html": "page of the sweep",
    "sweep.json": "record of the sweep, which a resumed run must have",
    "trials": "one file per trial, so that an interrupted sweep resumes",
    "truncation.parquet": "which prompts an encoder cut",
}


def write_record(
    output: Path,
    job: str,
    program: str,
    arguments: Sequence[str],
    config: BaseModel,
    summary: str,
    started: float,
    then: str | None = None,
    failed: bool = False,
) -> None:
    """Writes or updates OUTPUT/run.json. Does nothing if `output` is not a folder or has a manifest of its own.

    `started` is in seconds since 1970. `failed`: the run ended with an error, which is the summary. The record of the
    job's last successful run then stays, and an empty folder stays empty, because some jobs refuse a folder with files.
    Raises OSError or UnavailableError if it cannot be written.
    """
    if not output.is_dir() or any((output / name).is_file() for name in (MANIFEST, PARTIAL)):
        return
    names = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
    if failed and not names:
        return
    began, ended = (datetime.fromtimestamp(at, UTC) for at in (started, datetime.now(UTC).timestamp()))
    run: dict[str, Any] = {
        "command": f"{program} {shlex.join(arguments)}".strip(),
        "summary": summary,
        "started": began.isoformat(timespec="seconds"),
        "seconds": round((ended - began).total_seconds(), 1),
        "code_version": code_version(),
        "versions": {"python": platform.python_version(), **_versions()},
        "config": config.model_dump(mode="json", serialize_as_any=True),
        "inputs": {str(place.path): _identity(place.path) for place in places(config) if not place.written},
    }
    if then is not None:
        run["next"] = then.replace("{output}", shlex.quote(str(output)))
    files = {name: FILES[name] for name in names if name in FILES}
    runs = _earlier(output / NAME)
    runs["failed"].pop(job, None)
    runs["failed" if failed else "runs"][job] = run
    write_json(output / NAME, {"format_version": FORMAT_VERSION, "files": files, **runs})


def _earlier(path: Path) -> dict[str, dict[str, Any]]:
    """`runs` and `failed` of an existing record; empty if they are missing or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    parts = record if isinstance(record, dict) else {}
    return {name: part if isinstance(part := parts.get(name), dict) else {} for name in ("runs", "failed")}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _identity(path: Path) -> dict[str, Any]:
    """Bytes, time and digest of an input file; of a folder with a manifest the digest of the manifest."""
    try:
        if path.is_dir():
            manifest = path / MANIFEST
            return {"manifest_sha256": sha256_file(manifest)} if manifest.is_file() else {}
        stat = path.stat()
        modified = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(timespec="seconds")
        digest = {"sha256": sha256_file(path)} if stat.st_size <= DIGEST_LIMIT else {}
        return {"bytes": stat.st_size, "modified": modified, **digest}
    except OSError:
        return {}
