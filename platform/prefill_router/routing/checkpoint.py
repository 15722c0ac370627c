"""The routing checkpoint: a folder with manifest.json, checkpoint.safetensors and pool.yaml. No pickle.

Saving writes a temporary folder and renames it, so that no reader sees a partial checkpoint. In an object store the
manifest is uploaded last. Loading checks the format version and the file digests, and needs neither Ray, MLflow nor
torch. The id is a digest of the complete content.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prefill_router.errors import InputError, UnavailableError, one_line
from prefill_router.files import read_json, remove_temporary, sha256_file, temporary_suffix, write_json
from prefill_router.locations import ObjectPath, location
from prefill_router.pool import load_pool, save_pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import with_recorded_limit
from prefill_router.routing.added import AddedHead, ChangedPool, Reads
from prefill_router.routing.calibration import IsotonicScaling, PlattScaling
from prefill_router.routing.cost import CostModel, output_prices
from prefill_router.routing.ensemble import Ensemble
from prefill_router.routing.lengths import LengthModel
from prefill_router.routing.policy import Margin, TrainingMeans
from prefill_router.routing.pooled import PooledLogistic
from prefill_router.routing.router import Router
from prefill_router.routing.stack import DomainPrior, Neighbours, Part, Stack
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.novelty import Novelty, Spread
from prefill_router.signals.projection import Projection

FORMAT_VERSION = 3  # 3 added the stack, without which confidences would be wrong
CHANGED_VERSION = 4  # of checkpoints whose pool has changed since the training: earlier releases would mix up columns
LENGTHS = "lengths."  # prefix of the length model's tensors
MANIFEST, TENSORS, POOL = "manifest.json", "checkpoint.safetensors", "pool.yaml"


def check_place(folder: Path) -> None:
    """Raises InputError if `folder` exists and is not a checkpoint: saving would delete its files.

    In an object store, raises InputError if the bucket does not exist or `folder` holds files of anything else.
    """
    if isinstance(folder, ObjectPath):
        folder.mkdir()
        if other := sorted({path.name for path in folder.iterdir()} - {MANIFEST, TENSORS, POOL}):
            raise InputError(f"{folder}: holds {other[0]}, not only a checkpoint; choose another output folder")
        return
    if folder.exists() and not ((folder / MANIFEST).exists() and (folder / TENSORS).exists()):
        raise InputError(f"{folder}: exists and is not a checkpoint; choose another output folder")


def save_checkpoint(router: Router, folder: Path | str) -> Router:
    """Writes the checkpoint and returns the router with its `id`. Replaces an existing checkpoint.

    Raises InputError if `folder` exists and is not a checkpoint, and UnavailableError if an upload fails; its message
    names a local copy.
    """
    folder = location(folder)
    check_place(folder)
    if isinstance(folder, ObjectPath):
        return _save_and_upload(router, folder)
    remove_temporary(folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"))
    building = folder.with_name(f".{folder.name}{temporary_suffix(os.getpid())}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        save_file(_tensors(router), building / TENSORS)
        save_pool(router.pool, building / POOL)
        content = {
            "format_version": FORMAT_VERSION if router.changed is None else CHANGED_VERSION,
            "encoders": {name: config.model_dump(mode="json") for name, config in router.encoders.items()},
            "layer_keys": [[key.encoder, key.pooling, key.layer] for key in router.layer_keys],
            "trunk_layers": len(router.ensemble.layers),
            "cost_range_usd": [router.costs.c_min, router.costs.c_max],
            "chosen_lambda": router.chosen_lambda,
            "files": {name: sha256_file(building / name) for name in (TENSORS, POOL)},
            "lineage": dict(router.manifest),
        }
        write_json(building / MANIFEST, {"id": _digest(content), **content})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return replace(router, id=_digest(content))


def _save_and_upload(router: Router, folder: ObjectPath) -> Router:
    """Saves to a temporary folder, uploads the manifest last, and deletes the temporary folder."""
    scratch = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    router = save_checkpoint(router, scratch / folder.name)
    try:
        for name in (TENSORS, POOL, MANIFEST):
            (folder / name).upload(scratch / folder.name / name)
    except UnavailableError as error:
        raise UnavailableError(f"{error}; the checkpoint is kept in {scratch / folder.name}") from None
    shutil.rmtree(scratch)
    return router


def checkpoint_id(folder: Path) -> str:
    """The id in the manifest. Raises InputError if the manifest is missing, altered or of an unknown format."""
    identity: str = _read_manifest(folder)["id"]
    return identity


def download_checkpoint(folder: ObjectPath, target: Path) -> Path:
    """Downloads the files of a checkpoint to the local folder `target`, which must not exist, and returns it.

    Raises InputError if the checkpoint is missing or damaged.
    """
    manifest = _read_manifest(folder)
    target.mkdir(parents=True)
    for name in (MANIFEST, TENSORS, POOL):
        if (folder / name).is_file():
            (folder / name).download(target / name)
    _check_files(target, manifest, folder)
    return target


def load_checkpoint(folder: Path | str) -> Router:
    """Reads a checkpoint of format 1 to 4. Checkpoints without tensors of novelty give no novelty.

    Raises InputError with the file name if a file is missing, truncated or altered, or the format is unknown.
    """
    folder = location(folder)
    if isinstance(folder, ObjectPath):
        with tempfile.TemporaryDirectory() as scratch:
            return load_checkpoint(download_checkpoint(folder, Path(scratch, folder.name)))
    manifest = _read_manifest(folder)
    _check_files(folder, manifest, folder)
    version = manifest["format_version"]
    try:
        tensors = load_file(folder / TENSORS)
        if version == 1:
            manifest, tensors = _from_version_1(manifest, tensors)
        return _router(manifest, tensors, folder)
    except (SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{folder / TENSORS}: not the tensors of a routing checkpoint ({error})") from None
    except ValidationError as error:
        raise InputError(f"{folder / MANIFEST}: {one_line(error)}") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest. Raises InputError if it is missing or altered, or of another format version."""
    if not folder.is_dir():
        raise InputError(f"checkpoint: {folder} is not a folder; give the folder that has the {MANIFEST}")
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version not in (1, 2, FORMAT_VERSION, CHANGED_VERSION):
        raise InputError(
            f"{folder / MANIFEST}: format_version is {version!r}, this version reads 1 to {CHANGED_VERSION}; "
            "retrain the checkpoint or install the version that wrote it"
        )
    content = {key: value for key, value in manifest.items() if key != "id"}
    if manifest.get("id") != _digest(content):
        raise InputError(
            f"{folder / MANIFEST}: the content does not match its id {manifest.get('id')!r}; the file was "
            "altered or truncated: replace it with an intact copy"
        )
    return manifest


def _check_files(folder: Path, manifest: dict[str, Any], shown: Path) -> None:
    """Raises InputError if a file is missing or has another digest. Messages show `shown` as the folder."""
    for name, digest in manifest["files"].items():
        if not (folder / name).exists():
            raise InputError(f"{shown / name}: missing; replace the checkpoint with an intact copy")
        if sha256_file(folder / name) != digest:
            raise InputError(
                f"{shown / name}: its sha256 differs from the manifest's; the file was altered or truncated: "
                "replace it with an intact copy"
            )


def _from_version_1(
    manifest: dict[str, Any], tensors: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Manifest and tensors of format 1, renamed to format 2."""
    renamed = {"blocks": "layer_keys", "target_blocks": "target_layers"}
    manifest = {renamed.get(name, name): value for name, value in manifest.items()}
    manifest["lineage"] = {renamed.get(name, name): value for name, value in manifest["lineage"].items()}
    return manifest, {re.sub(r"^block(?=\d)", "projection", name): array for name, array in tensors.items()}


def _digest(content: dict[str, Any]) -> str:
    """16 hex digits of the manifest's sha256; the manifest has the digests of the other files."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _tensors(router: Router) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {
        "cost.per_input_token": router.costs.per_input_token,
        "cost.fixed": router.costs.fixed,
        "cost.median_output": router.costs.median_output,
        "cost.token_ratio": router.costs.token_ratio,
        "trunk.validation_loss": router.ensemble.validation_loss,
    }
    if isinstance(router.calibrator, PlattScaling):
        tensors |= {"platt.slope": router.calibrator.slope, "platt.offset": router.calibrator.offset}
    else:
        tensors |= {"isotonic.knots": router.calibrator.knots, "isotonic.values": router.calibrator.values}
    tensors |= _stack_tensors(router.stack)
    if router.margin is not None:
        tensors |= {
            "margin.accuracy": router.margin.means.accuracy,
            "margin.cost_norm": router.margin.means.cost_norm,
            "margin.bonus": np.array([router.margin.bonus]),
        }
    for index, projection in enumerate(router.projections):
        tensors |= {
            f"projection{index}.mean": projection.mean,
            f"projection{index}.scale": projection.scale,
            f"projection{index}.components": projection.components,
        }
    if router.novelty is not None:
        tensors["novelty.held_out"] = router.novelty.held_out
        tensors["novelty.residual"] = np.array([spread.residual for spread in router.novelty.spreads])
        for index, spread in enumerate(router.novelty.spreads):
            tensors[f"novelty{index}.variances"] = spread.variances
    if router.lengths is not None:
        tensors |= {f"{LENGTHS}{name}": array for name, array in vars(router.lengths).items()}
    tensors |= _changed_tensors(router.changed)
    for index, (weight, bias) in enumerate(router.ensemble.layers):
        tensors |= {f"trunk{index}.weight": weight, f"trunk{index}.bias": bias}
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _router(manifest: dict[str, Any], tensors: dict[str, np.ndarray], folder: Path) -> Router:
    layer_keys = tuple(LayerKey(*key) for key in manifest["layer_keys"])
    pool = load_pool(folder / POOL)
    c_min, c_max = manifest["cost_range_usd"]
    return Router(
        pool=pool,
        encoders=_encoders(manifest),
        layer_keys=layer_keys,
        projections=tuple(
            Projection(
                tensors[f"projection{i}.mean"], tensors[f"projection{i}.scale"], tensors[f"projection{i}.components"]
            )
            for i in range(len(layer_keys))
        ),
        ensemble=Ensemble(
            tuple((tensors[f"trunk{i}.weight"], tensors[f"trunk{i}.bias"]) for i in range(manifest["trunk_layers"])),
            tensors["trunk.validation_loss"],
        ),
        calibrator=IsotonicScaling(tensors["isotonic.knots"], tensors["isotonic.values"])
        if "isotonic.knots" in tensors
        else PlattScaling(tensors["platt.slope"], tensors["platt.offset"]),
        costs=CostModel(
            tensors["cost.per_input_token"],
            tensors["cost.fixed"],
            tensors["cost.median_output"],
            tensors["cost.token_ratio"],
            c_min,
            c_max,
            output_prices(pool),
        ),
        chosen_lambda=manifest["chosen_lambda"],
        manifest=manifest["lineage"],
        novelty=_novelty(tensors, len(layer_keys)),
        stack=_stack(tensors),
        margin=_margin(tensors),
        lengths=_lengths(tensors),
        changed=_changed(tensors),
        id=manifest["id"],
    )


def _stack_tensors(stack: Stack | None) -> dict[str, np.ndarray]:
    if stack is None:
        return {}
    tensors = {"stack.weights": stack.regression.weights, "stack.offsets": stack.regression.offsets}
    for part in stack.parts:
        prefix = "domain" if isinstance(part, DomainPrior) else "neighbours"
        tensors |= {f"{prefix}.{name}": array for name, array in vars(part).items()}
    if "neighbours.vectors" in tensors:
        tensors["neighbours.vectors"] = tensors["neighbours.vectors"].astype(np.float16)  # their values fit it
    return tensors


def _stack(tensors: dict[str, np.ndarray]) -> Stack | None:
    if "stack.weights" not in tensors:
        return None

    def part(name: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(f"{name}."): array for key, array in tensors.items() if key.startswith(f"{name}.")}

    domain, neighbours = part("domain"), part("neighbours")
    if neighbours:
        neighbours["vectors"] = neighbours["vectors"].astype(np.float32)
    parts: list[Part] = []
    if domain:
        parts.append(DomainPrior(**domain))
    if neighbours:
        parts.append(Neighbours(**neighbours))
    return Stack(tuple(parts), PooledLogistic(tensors["stack.weights"], tensors["stack.offsets"]))


def _changed_tensors(changed: ChangedPool | None) -> dict[str, np.ndarray]:
    if changed is None:
        return {}
    tensors = {"pool.columns": changed.columns}
    for index, head in enumerate(changed.heads):
        tensors |= {f"added{index}.{head.reads}.mean": head.mean, f"added{index}.{head.reads}.factor": head.factor}
    return tensors


def _changed(tensors: dict[str, np.ndarray]) -> ChangedPool | None:
    if "pool.columns" not in tensors:
        return None
    heads: list[AddedHead] = []
    kinds: tuple[Reads, ...] = get_args(Reads)
    while found := [reads for reads in kinds if f"added{len(heads)}.{reads}.mean" in tensors]:
        prefix = f"added{len(heads)}.{found[0]}"
        heads.append(AddedHead(found[0], tensors[f"{prefix}.mean"], tensors[f"{prefix}.factor"]))
    return ChangedPool(tuple(heads), tensors["pool.columns"])


def _margin(tensors: dict[str, np.ndarray]) -> Margin | None:
    if "margin.bonus" not in tensors:
        return None
    means = TrainingMeans(tensors["margin.accuracy"], tensors["margin.cost_norm"])
    return Margin(means, float(tensors["margin.bonus"][0]))


def _encoders(manifest: dict[str, Any]) -> dict[str, EncoderConfig]:
    """Configurations by fingerprint, with the former default of max_length if the encoder was loaded with it."""
    infos = manifest["lineage"].get("encoders", {})
    return {
        name: with_recorded_limit(EncoderConfig.model_validate(config), infos.get(name, {}).get("max_length"))
        for name, config in manifest["encoders"].items()
    }


def _lengths(tensors: dict[str, np.ndarray]) -> LengthModel | None:
    own = {name.removeprefix(LENGTHS): array for name, array in tensors.items() if name.startswith(LENGTHS)}
    return LengthModel(**own) if own else None


def _novelty(tensors: dict[str, np.ndarray], layer_keys: int) -> Novelty | None:
    if "novelty.held_out" not in tensors:
        return None
    residuals = tensors["novelty.residual"].tolist()
    spreads = (Spread(tensors[f"novelty{i}.variances"], residuals[i]) for i in range(layer_keys))
    return Novelty(tuple(spreads), tensors["novelty.held_out"])
