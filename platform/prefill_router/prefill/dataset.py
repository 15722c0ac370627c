"""Reading the activations dataset.

A folder with `manifest.json` and Parquet shards of `activations_schema`; every query_id has one row. Row order has no
meaning: readers join on `query_id` and check `prompt_digest`. The states of one (pooling, layer) are one column, so
that the layer probe reads only the columns it needs. pyarrow opens the folder and ignores the manifest:

    pyarrow.dataset.dataset(folder, format="parquet", exclude_invalid_files=True)

shards.py writes the dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from pydantic import BaseModel, ValidationError

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, one_line
from prefill_router.files import read_json, sha256_strings
from prefill_router.locations import ObjectPath, location, readable
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import (
    LATER_COLUMNS,
    UNKNOWN_LIMIT,
    EncoderInfo,
    activations_schema,
    with_recorded_limit,
)

MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"
LAYER_INDEX = (
    "0 is the embedding output, l the output of block l (1..L) before the final norm; "
    "`mean` is over all tokens kept, special tokens included"
)
AnyManifest = TypeVar("AnyManifest", bound=BaseModel)
VERIFIED = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)
CHUNK = 512  # rows converted at once, so that they fit in the CPU cache
BATCH_ROWS = 8192  # rows of a column read at once; a shard of `jobs.prefill` has at most 1,024
SIGN_AND_HALF = np.int32(-0x80000000 | 0x0FFFE000)
INDEX = ["query_id", "prompt_digest", "n_tokens", "n_dropped", *LATER_COLUMNS, "tokens_digest", "error"]


@dataclass(frozen=True)
class DatasetType:
    """Terms for one type of dataset in error messages.

    The types are activations, and text features (semantic/text_features.py). `name`: the dataset; `rows`: its content;
    `values`: what a row with an error lacks; `job`: the job that writes it; `work`: the process.
    """

    name: str
    rows: str
    values: str
    job: str
    work: str


ACTIVATIONS = DatasetType("activations dataset", "activations", "states", "prefill", "prefill")


class Counts(FrozenModel):
    """Counts of rows, rows with errors, tokens before truncation, truncated rows, dropped tokens and bytes on disk.

    `unknown_rows` counts the rows whose `unknown_share` is above UNKNOWN_LIMIT; None in manifests from before this
    count existed.
    """

    rows: int
    errors: int
    tokens: int
    truncated_rows: int
    dropped_tokens: int
    duplicates_after_truncation: int
    unknown_rows: int | None = None
    bytes: int

    @property
    def unknown_warning(self) -> str | None:
        """A warning if the tokenizer does not know the text of some prompts."""
        if not self.unknown_rows:
            return None
        return (
            f"the encoder cannot read {self.unknown_rows:,} of {self.rows:,} prompts: more than "
            f"{100 * UNKNOWN_LIMIT:.0f} % of their text is unknown to its tokenizer; use an encoder "
            "whose tokenizer covers the script"
        )


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
    """An activations dataset. The small columns are read on first use, states one column at a time."""

    folder: Path
    manifest: Manifest

    @property
    def encoder(self) -> EncoderInfo:
        return self.manifest.encoder

    @property
    def encoder_config(self) -> EncoderConfig:
        """The configuration that the encoder was loaded with, with the former default of max_length if it had that."""
        config = EncoderConfig.model_validate(self.manifest.config["encoder"])
        return with_recorded_limit(config, self.encoder.max_length)

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
        """States of one column as float32, in the order of `query_ids`.

        Raises InputError for an unknown column, and with the first query that is missing, whose prompt does not match
        `prompt_digests`, or that has an error instead of states.
        """
        if column not in self.columns:
            raise InputError(f"{self.folder}: no column {column!r}; allowed are {', '.join(self.columns)}")
        rows = self._positions(query_ids)
        check_rows(self._index, rows, query_ids, prompt_digests, self.folder, ACTIVATIONS)
        return self._read(column, rows)

    def check(self, query_ids: Sequence[str] | np.ndarray, prompt_digests: Sequence[str]) -> None:
        """Raises InputError for queries that `states` would refuse; reads no states."""
        check_rows(self._index, self._positions(query_ids), query_ids, prompt_digests, self.folder, ACTIVATIONS)

    def n_tokens(self, query_ids: Sequence[str] | np.ndarray) -> Int[np.ndarray, " queries"]:
        """Tokens per prompt before truncation. Raises InputError with the first missing query."""
        return self._counts("n_tokens", query_ids)

    def n_dropped(self, query_ids: Sequence[str] | np.ndarray) -> Int[np.ndarray, " queries"]:
        """Tokens per prompt that truncation removed. Raises InputError with the first missing query."""
        return self._counts("n_dropped", query_ids)

    def tokens_digests(self, query_ids: Sequence[str] | np.ndarray) -> list[str | None]:
        """Digests that are equal for prompts with the same tokens after truncation; None for rows without tokens.

        Raises InputError with the first missing query.
        """
        digests: list[str | None] = (
            self._index.column("tokens_digest").take(pa.array(self._positions(query_ids))).to_pylist()
        )
        return digests

    def rows(self, query_ids: Sequence[str] | np.ndarray) -> pa.Table:
        """All columns in the order of `query_ids`, rows with errors included. Raises InputError for a missing query."""
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
        return read_shards(self.folder, self.manifest.shards, columns, self._schema)

    def _read(self, column: str, rows: Int[np.ndarray, " queries"]) -> Float[np.ndarray, "queries hidden"]:
        """States of the row numbers `rows`. In memory are the result and some shards, not the column."""
        hidden = self.manifest.hidden_size
        states = np.empty((len(rows), hidden), np.float32)
        order = np.argsort(rows, kind="stable")
        ordered, first = rows[order], 0
        for batch in read_batches(self.folder, self.manifest.shards, column, self._schema):
            begin, end = np.searchsorted(ordered, [first, first + len(batch)])
            values = batch.flatten().to_numpy(zero_copy_only=False).reshape(-1, hidden)
            states[order[begin:end]] = as_float32(values[ordered[begin:end] - first])
            first += len(batch)
        return states

    @property
    def _schema(self) -> pa.Schema:
        return activations_schema(self.columns, self.manifest.hidden_size, self.encoder.states_dtype)

    def _counts(self, column: str, query_ids: Sequence[str] | np.ndarray) -> Int[np.ndarray, " queries"]:
        return self._index.column(column).to_numpy()[self._positions(query_ids)].astype(np.int64)

    def _positions(self, query_ids: Sequence[str] | np.ndarray) -> Int[np.ndarray, " queries"]:
        return find_rows(self._index, query_ids, self.folder, ACTIVATIONS)


def read_activations(folder: Path | str) -> Activations:
    """Opens a finished dataset. Raises InputError if it is missing, unfinished, damaged or of another version."""
    folder = location(folder)
    return Activations(folder, read_manifest(folder, Manifest, ACTIVATIONS))


def read_manifest(folder: Path, model: type[AnyManifest], kind: DatasetType) -> AnyManifest:
    """The manifest of a finished dataset; `model` has a field `shards`.

    Raises InputError if the dataset is missing, unfinished, damaged or of another format version, or if a shard is
    missing.
    """
    if not (folder / MANIFEST).is_file():
        if (folder / PARTIAL).is_file():
            raise InputError(f"{folder}: this {kind.work} is unfinished; run the same command again to complete it")
        raise InputError(f"{folder}: no {kind.name} here (no {MANIFEST}); create one with python -m jobs.{kind.job}")
    try:
        manifest = model.model_validate(read_json(folder / MANIFEST))
    except ValidationError as error:
        raise InputError(f"{folder / MANIFEST}: {one_line(error)}") from None
    present = {path.name for path in folder.iterdir()}
    missing = [name for name in manifest.model_dump()["shards"] if name not in present]
    if missing:
        raise InputError(
            f"{folder}: shard {missing[0]} is missing; run the same jobs.{kind.job} command again: it writes the "
            "missing rows"
        )
    return manifest


def find_rows(
    index: pa.Table, query_ids: Sequence[str] | np.ndarray, folder: Path, kind: DatasetType
) -> Int[np.ndarray, " queries"]:
    """Row numbers of the queries in `index`. Raises InputError with the first missing query."""
    found = pc.index_in(pa.array(query_ids, pa.string()), value_set=index.column("query_id"))
    if found.null_count:
        first = pc.index(pc.is_null(found), True).as_py()
        raise InputError(
            f"{folder}: query_id {query_ids[first]!r} has no {kind.rows} ({found.null_count} "
            f"of {len(query_ids)} have none); run jobs.{kind.job} on this input first"
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
    """Raises InputError with the first query that was encoded from another prompt or has an error."""
    found = index.select(["prompt_digest", "error"]).take(pa.array(rows))
    same = pc.equal(found.column("prompt_digest"), pa.array(prompt_digests, pa.string()))
    differs = pc.index(pc.fill_null(same, False), False).as_py()
    errored = pc.index(pc.is_valid(found.column("error")), True).as_py()
    # A null prompt has no digest to compare; its error is reported below.
    if differs >= 0 and found.column("error")[differs].as_py() is None:
        raise InputError(
            f"{folder}: query_id {query_ids[differs]!r} was encoded from another prompt; "
            f"run jobs.{kind.job} on this input with another output folder"
        )
    if errored >= 0:
        raise InputError(
            f"{folder}: query_id {query_ids[errored]!r} has no {kind.values}: "
            f"{found.column('error')[errored].as_py()}; correct the prompt or remove the query"
        )


def list_values(column: pa.ChunkedArray, width: int) -> Float[np.ndarray, "queries width"]:
    """A column of fixed-size lists as one array. Null components become NaN."""
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]).reshape(
        -1, width
    )


def read_shards(
    folder: Path, shards: Sequence[str], columns: list[str] | None, schema: pa.Schema | None = None
) -> pa.Table:
    """The rows of the shards, in the given order of shards. Raises InputError if a shard is damaged.

    Checksums of the pages that are read show changed bytes. A column of `schema` that a shard lacks is null in its
    rows. None: the schema of the first shard.
    """
    with _reading(folder, shards, columns):
        return _opened(folder, shards, schema).to_table(columns=columns)


def read_batches(folder: Path, shards: Sequence[str], column: str, schema: pa.Schema) -> Iterator[pa.Array]:
    """One column, as `read_shards`, in batches of rows in order; a few shards are in memory at a time."""
    with _reading(folder, shards, [column]):
        batches = _opened(folder, shards, schema).to_batches(
            columns=[column], batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=4
        )
        for batch in batches:
            yield batch.column(0)


def _opened(folder: Path, shards: Sequence[str], schema: pa.Schema | None) -> ds.Dataset:
    files: list[Any] = [folder / name for name in shards]
    store = None
    if isinstance(folder, ObjectPath):
        files, store = [path.key for path in files], folder.filesystem
    return ds.dataset(files, format=VERIFIED, schema=schema, filesystem=store)


@contextmanager
def _reading(folder: Path, shards: Sequence[str], columns: list[str] | None) -> Iterator[None]:
    """Raises InputError with the damaged shard for an error of reading."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        name = next((name for name in shards if _is_damaged(folder / name, columns)), "a shard")
        raise InputError(
            f"{folder}: {name} cannot be read ({' '.join(str(error).split())[:200]}); delete it and run the job that "
            "wrote it again: it writes the missing rows"
        ) from None


def _is_damaged(shard: Path, columns: list[str] | None) -> bool:
    try:
        own = pq.read_schema(readable(shard)).names
        known = None if columns is None else [name for name in columns if name in own]
        pq.read_table(readable(shard), columns=known, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError):
        return True
    return False


def as_float32(states: np.ndarray) -> Float[np.ndarray, "queries hidden"]:
    """Finite states as float32. float16 is converted bitwise, three times as fast as by numpy."""
    if states.dtype != np.float16:
        return states.astype(np.float32)
    out = np.empty(states.shape, np.float32)
    for start in range(0, len(states), CHUNK):
        bits = states[start : start + CHUNK].view(np.int16).astype(np.int32)  # sign-extended
        bits <<= 13  # moves exponent and mantissa to their float32 positions
        bits &= SIGN_AND_HALF
        np.multiply(bits.view(np.float32), np.float32(2.0 ** (127 - 15)), out=out[start : start + CHUNK])
    return out


def activations_digest(manifest: Manifest) -> str:
    """sha256 of the dataset's identity: encoder fingerprint, stored dtype, columns, and all (query_id, prompt) pairs.

    It covers the inputs of the states, not their bytes: it does not depend on row order, number of shards or rounding.
    """
    return sha256_strings(
        [manifest.fingerprint, manifest.encoder.states_dtype, *sorted(manifest.columns), manifest.input_digest]
    )
