"""The folder of an adapter with probe tokens: its manifest, digest and base encoder (prefill/probe_tokens.py).

Reads `adapter.json` and the digest of `adapter.safetensors`, not the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, one_line
from prefill_router.files import read_json, sha256_file, sha256_strings, write_json
from prefill_router.prefill.encoder import EncoderInfo

WEIGHTS, MANIFEST = "adapter.safetensors", "adapter.json"
Positions = Literal["suffix", "all"]


class AdapterManifest(FrozenModel):
    """Content of `adapter.json`: the base encoder, the adapter's shape, and the training."""

    format_version: Literal[1] = 1
    base: Annotated[EncoderInfo, Field(description="the encoder without adapter")]
    tokens: Annotated[int, Field(ge=1, description="k, the number of probe tokens")]
    rank: Annotated[int, Field(ge=0, description="rank of the low-rank matrices; 0: none")]
    positions: Annotated[Positions, Field(description="positions at which the low-rank matrices apply")]
    layer: Annotated[int, Field(ge=1, description="hidden-state index that the training reads")]
    targets: Annotated[tuple[str, ...], Field(description="models whose correctness the training predicts")]
    prompts: Annotated[tuple[str, ...], Field(description="digests of the prompts that the training read, sorted")]
    weights_digest: Annotated[str, Field(description="sha256 of adapter.safetensors")]
    training: Annotated[dict[str, Any], Field(description="configuration and figures of the training")]

    @property
    def digest(self) -> str:
        """sha256 of all properties that the states depend on: the weights, the base encoder, and the positions."""
        return sha256_strings([self.weights_digest, self.base.fingerprint, self.positions])


def read_manifest(folder: Path | str) -> AdapterManifest:
    """The manifest of an adapter folder. Raises InputError if it is missing or invalid."""
    path = Path(folder).expanduser() / MANIFEST
    if not path.is_file():
        raise InputError(
            f"adapter: {folder} has no {MANIFEST}; give a folder that jobs.adapt has written; a server takes "
            "it from `adapter` in the override of the encoder"
        )
    return _read(path)


def _read(path: Path) -> AdapterManifest:
    try:
        return AdapterManifest.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(f"adapter: {path}: {one_line(error)}") from None


def require_adapter(folder: Path | str, base: EncoderInfo) -> AdapterManifest:
    """The manifest of an adapter of the encoder `base`.

    Raises InputError for a folder without an adapter, damaged weights, or an adapter of another encoder.
    """
    manifest, weights = read_manifest(folder), Path(folder).expanduser() / WEIGHTS
    if manifest.base.fingerprint != base.fingerprint:
        was, now = dict(manifest.base), dict(base)
        excluded = ("model", "revision", "backend", "states_dtype")
        field = next((name for name in was if was[name] != now[name] and name not in excluded), "fingerprint")
        raise InputError(
            f"adapter: {folder} was trained on another encoder: {field} was {_shorten(was.get(field))}, is now "
            f"{_shorten(now.get(field))}; use the encoder settings of its {MANIFEST}, or train another adapter"
        )
    if not weights.is_file() or sha256_file(weights) != manifest.weights_digest:
        raise InputError(f"adapter: {weights} is missing or damaged; copy the folder or train the adapter again")
    return manifest


def recorded_adapter(dataset: Path, folder: Path | str, digest: str) -> AdapterManifest | None:
    """The manifest of the adapter with this digest: the copy in an activations dataset, or that of the adapter folder.

    None if neither is that adapter.
    """
    for path in (dataset / MANIFEST, Path(folder).expanduser() / MANIFEST):
        if path.is_file() and (found := _read(path)).digest == digest:
            return found
    return None


def keep_manifest(dataset: Path, folder: Path | str | None, digest: str) -> None:
    """Copies the manifest of the adapter to an activations dataset: it lists the prompts that the training read.

    Does nothing if `folder` does not hold the adapter with this digest.
    """
    if folder is not None and (found := recorded_adapter(dataset, folder, digest)):
        write_json(dataset / MANIFEST, found.model_dump(mode="json"))


def seen_prompts(manifest: AdapterManifest, digests: Sequence[str]) -> int:
    """How many of these prompts (digests as in `prompt_digest`) the training of the adapter read."""
    read = set(manifest.prompts)
    return sum(digest in read for digest in digests)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
