"""The activations dataset: what it is on disk, and how one column of it is read.

A folder: `manifest.json`, and Parquet shards of `activations_schema` with every query_id once. Rows stand in no
particular order: everything joins on `query_id` and checks `prompt_digest`. The states of one (pooling, layer) are one
column, so that a probe reads only the bytes it needs. Plain pyarrow opens it, passing over the manifest:

    pyarrow.dataset.dataset(folder, format="parquet", exclude_invalid_files=True)

Knows nothing of how it is written (shards.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from jaxtyping import Float, Int
from pydantic import BaseModel, ValidationError

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, one_line
from prefill_router.files import read_json, sha256_strings
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import EncoderInfo

MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"
LAYER_INDEX = (
    "0 is the embedding output, l the output of block l (1..L) before the final norm; "
    "`mean` is over all tokens kept, special tokens included"
)
AnyManifest = TypeVar("AnyManifest", bound=BaseModel)
CHUNK = 512  # rows converted at once: they fit a cache
SIGN_AND_HALF = np.int32(-0x80000000 | 0x0FFFE000)
INDEX = ["query_id", "prompt_digest", "n_tokens", "n_dropped", "tokens_digest", "error"]


@dataclass(frozen=True)
class DatasetType:
    """What a dataset of one row per query is called where something is wrong with it. Text features are another
    (semantic/text_features.py)."""

    name: str
    rows: str
    values: str
    job: str
    work: str


ACTIVATIONS = DatasetType("activations dataset", "activations", "states", "prefill", "prefill")


class Counts(FrozenModel):
    """What is in the dataset."""

    rows: int
    errors: int
    tokens: int
    truncated_rows: int
    dropped_tokens: int
    duplicates_after_truncation: int
    bytes: int


class Manifest(FrozenModel):
    """Provenance of an activations dataset (docs/data-formats.md)."""

    format_version: Literal[1] = 1
    encoder: EncoderInfo
    fingerprint: str
    columns: tuple[str, ...]
    hidden_size: int
    layer_index: str = LAYER_INDEX
    versions: dict[str, str]
    input_digest: str
    counts: Counts
    shards: tuple[str, ...]
    config: dict[str, Any]


@dataclass(frozen=True)
class Activations:
    """An activations dataset, read lazily: the small columns on first use, states one column at a time."""

    folder: Path
    manifest: Manifest

    @property
    def encoder(self) -> EncoderInfo:
        return self.manifest.encoder

    @property
    def encoder_config(self) -> EncoderConfig:
        """How the encoder was loaded."""
        return EncoderConfig.model_validate(self.manifest.config["encoder"])

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def columns(self) -> tuple[str, ...]:
        return self.manifest.columns

    @property
    def digest(self) -> str:
        """See `activations_digest`."""
        return activations_digest(self.manifest)

    def states(
        self, column: str, query_ids: Sequence[str] | np.ndarray, prompt_digests: Sequence[str]
    ) -> Float[np.ndarray, "queries hidden"]:
        """One column's states as float32, in the order of `query_ids`.

        Raises InputError for a column that is not there, and naming the first query that is missing, that was
        encoded from another prompt than `prompt_digests` says, or that has an error instead of states.
        """
        if column not in self.columns:
            raise InputError(f"{self.folder}: no column {column!r}; there are {', '.join(self.columns)}")
        rows = self._positions(query_ids)
        check_rows(self._index, rows, query_ids, prompt_digests, self.folder, ACTIVATIONS)
        return as_float32(list_values(self._table([column]).column(column), self.manifest.hidden_size)[rows])

    def check(self, query_ids: Sequence[str] | np.ndarray, prompt_digests: Sequence[str]) -> None:
        """Raises InputError as `states` does, before any state is read."""
        check_rows(self._index, self._positions(query_ids), query_ids, prompt_digests, self.folder, ACTIVATIONS)

    def n_tokens(self, query_ids: Sequence[str] | np.ndarray) -> Int[np.ndarray, " queries"]:
        """Tokens of the whole prompt, before truncation. Raises InputError naming the first missing query."""
        counts = self._index.column("n_tokens").to_numpy()
        return counts[self._positions(query_ids)].astype(np.int64)

    def tokens_digests(self, query_ids: Sequence[str] | np.ndarray) -> list[str | None]:
        """Equal for prompts that the encoder reads as the same tokens. Raises InputError naming a missing query."""
        digests: list[str | None] = (
            self._index.column("tokens_digest").take(pa.array(self._positions(query_ids))).to_pylist()
        )
        return digests

    def rows(self, query_ids: Sequence[str] | np.ndarray) -> pa.Table:
        """All columns, in the order of `query_ids`, as an encoder returned them; errored rows included."""
        table = self._table(None)
        return table.take(pa.array(self._positions(query_ids))).combine_chunks()

    def errors(self) -> pa.Table:
        """`query_id` and `error` of the rows without states."""
        index = self._index
        return index.filter(pc.is_valid(index.column("error"))).select(["query_id", "error"])

    @cached_property
    def _index(self) -> pa.Table:
        return self._table(INDEX).combine_chunks()

    def _table(self, columns: list[str] | None) -> pa.Table:
        return read_shards(self.folder, self.manifest.shards, columns)

    def _positions(self, query_ids: Sequence[str] | np.ndarray) -> Int[np.ndarray, " queries"]:
        return find_rows(self._index, query_ids, self.folder, ACTIVATIONS)


def read_activations(folder: Path | str) -> Activations:
    """Opens a finished dataset. Raises InputError when it is missing, unfinished, damaged or of another version."""
    return Activations(Path(folder), read_manifest(Path(folder), Manifest, ACTIVATIONS))


def read_manifest(folder: Path, model: type[AnyManifest], kind: DatasetType) -> AnyManifest:
    """A finished dataset's manifest, which has a field `shards`. Raises InputError when it is missing, unfinished,
    damaged or of another version, or a shard is missing."""
    if not (folder / MANIFEST).is_file():
        if (folder / PARTIAL).is_file():
            raise InputError(f"{folder}: this {kind.work} is unfinished; run the same command again to complete it")
        raise InputError(f"{folder}: no {kind.name} here (no {MANIFEST}); make one with python -m jobs.{kind.job}")
    try:
        manifest = model.model_validate(read_json(folder / MANIFEST))
    except ValidationError as error:
        raise InputError(f"{folder / MANIFEST}: {one_line(error)}") from None
    missing = [name for name in manifest.model_dump()["shards"] if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: shard {missing[0]} is missing; run {kind.job} again into an empty folder")
    return manifest


def find_rows(
    index: pa.Table, query_ids: Sequence[str] | np.ndarray, folder: Path, kind: DatasetType
) -> Int[np.ndarray, " queries"]:
    """Where the queries stand in `index`. Raises InputError naming the first that is missing."""
    found = pc.index_in(pa.array(query_ids, pa.string()), value_set=index.column("query_id"))
    if found.null_count:
        first = pc.index(pc.is_null(found), True).as_py()
        raise InputError(
            f"{folder}: query_id {query_ids[first]!r} has no {kind.rows} ({found.null_count} "
            f"of {len(query_ids)} have none); run {kind.job} on this input first"
        )
    return found.to_numpy().astype(np.int64)


def check_rows(
    index: pa.Table,
    rows: Int[np.ndarray, " queries"],
    query_ids: Sequence[str] | np.ndarray,
    prompt_digests: Sequence[str],
    folder: Path,
    kind: DatasetType,
) -> None:
    """Raises InputError naming the first query that was encoded from another prompt, or has an error."""
    there = index.take(pa.array(rows))
    same = pc.equal(there.column("prompt_digest"), pa.array(prompt_digests, pa.string()))
    differs = pc.index(pc.fill_null(same, False), False).as_py()
    errored = pc.index(pc.is_valid(there.column("error")), True).as_py()
    # A null prompt has no digest: what it has is an error, and that is the better message.
    if differs >= 0 and there.column("error")[differs].as_py() is None:
        raise InputError(
            f"{folder}: query_id {query_ids[differs]!r} was encoded from another prompt; "
            f"run {kind.job} on this input into a folder of its own"
        )
    if errored >= 0:
        raise InputError(
            f"{folder}: query_id {query_ids[errored]!r} has no {kind.values}: "
            f"{there.column('error')[errored].as_py()}; mend the prompt or leave the query out"
        )


def list_values(column: pa.ChunkedArray, width: int) -> Float[np.ndarray, "queries width"]:
    """A column of fixed-size lists as one array, NaN where components are null."""
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]).reshape(
        -1, width
    )


def read_shards(folder: Path, shards: Sequence[str], columns: list[str] | None) -> pa.Table:
    """The named shards' rows, in the shards' order. Raises InputError for one that is damaged."""
    try:
        return ds.dataset([folder / name for name in shards], format="parquet").to_table(columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{folder}: a shard cannot be read ({' '.join(str(error).split())[:200]}); "
            "run its job again into an empty folder"
        ) from None


def as_float32(states: np.ndarray) -> Float[np.ndarray, "queries hidden"]:
    """Finite states as float32, halves by their bits: numpy's own conversion takes three times as long."""
    if states.dtype != np.float16:
        return states.astype(np.float32)
    out = np.empty(states.shape, np.float32)
    for start in range(0, len(states), CHUNK):
        bits = states[start : start + CHUNK].view(np.int16).astype(np.int32)  # the sign fills the upper half
        bits <<= 13  # exponent and mantissa to where single precision has them
        bits &= SIGN_AND_HALF
        np.multiply(bits.view(np.float32), np.float32(2.0 ** (127 - 15)), out=out[start : start + CHUNK])
    return out


def activations_digest(manifest: Manifest) -> str:
    """sha256 identity for lineage: encoder fingerprint, kept dtype, columns, and all (query_id, prompt) pairs.

    It covers what the states are a function of, not their bytes: two runs over the same input agree, whatever the
    order of rows, the number of shards or the last bits of the arithmetic.
    """
    return sha256_strings(
        [manifest.fingerprint, manifest.encoder.states_dtype, *sorted(manifest.columns), manifest.input_digest]
    )
