"""Resumable writing of an activations dataset, or another dataset with one row per query.

`open_dataset` writes the properties that all rows share (the encoder) to `manifest.partial.json` and returns the
pending prompts. The caller writes any number of Parquet shards into the folder. `finish` checks them and writes
`manifest.json`. A job killed at any time resumes with the same calls; every row is stored once. Independent of encoders
and clusters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from prefill_router.errors import InputError, UnavailableError, one_line
from prefill_router.files import prompt_digest, read_json, sha256_strings, write_atomically, write_json
from prefill_router.locations import ObjectPath, readable
from prefill_router.prefill.adapter import keep_manifest
from prefill_router.prefill.dataset import (
    ACTIVATIONS,
    INDEX,
    MANIFEST,
    PARTIAL,
    Counts,
    DatasetType,
    Manifest,
    read_shards,
)
from prefill_router.prefill.encoder import LATER_COLUMNS, UNKNOWN_LIMIT, EncoderInfo, activations_schema, unknown_share
from prefill_router.prefill.prompts import on_disk

VERSIONS = ("prefill-router", "torch", "transformers", "tokenizers", "pyarrow", "numpy")
# Hidden states do not compress, and their values do not repeat. Readers verify the checksums.
PARQUET: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
CHECKSUM = "CRC checksum verification failed"  # pyarrow's message
ROW_BYTES = 100  # bytes per row besides the states: id, digests, counts
SAMPLE_ROWS, MAX_ROWS = 64, 1024  # prompts that are tested before a run; maximum prompts of a shard by default
SHARD_S = 30.0  # seconds of work per shard by default
BLOCK = 65_536  # rows that are Python objects at a time


class DatasetHeader(BaseModel, ABC):
    """Properties that all rows of a dataset share. Written before the first shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[DatasetType]

    @abstractmethod
    def require(self, wanted: Any, folder: Path) -> None:
        """Raises InputError if rows with the header `wanted` (same class) do not fit the dataset in `folder`."""


AnyHeader = TypeVar("AnyHeader", bound=DatasetHeader)


class ActivationsHeader(DatasetHeader):
    """Encoder, columns and resolved configuration of an activations dataset."""

    kind: ClassVar[DatasetType] = ACTIVATIONS

    encoder: EncoderInfo
    columns: tuple[str, ...]
    config: dict[str, Any]

    def require(self, wanted: Any, folder: Path) -> None:
        """Raises InputError for another encoder, stored dtype or columns."""
        if self.encoder.fingerprint != wanted.encoder.fingerprint:
            was, now = dict(self.encoder), dict(wanted.encoder)
            field = next(
                name for name in was if was[name] != now[name] and name not in ("model", "revision", "backend")
            )
            raise InputError(
                f"{folder}: holds the states of another encoder: {field} was {shorten(was[field])}, is now "
                f"{shorten(now[field])}; choose another output folder"
            )
        if self.encoder.states_dtype != wanted.encoder.states_dtype:
            raise InputError(
                f"{folder}: holds {self.encoder.states_dtype} states, requested are "
                f"{wanted.encoder.states_dtype}; choose another output folder"
            )
        if self.columns != wanted.columns:
            raise InputError(
                f"{folder}: holds the columns {', '.join(self.columns)}, requested are "
                f"{', '.join(wanted.columns)}; choose another output folder"
            )


@dataclass(frozen=True)
class OpenedDataset:
    """A dataset that is ready for new shards.

    `pending` holds the prompts without a row, `n_present` counts the prompts with a row, `removed_shards` names the
    damaged shards that were deleted.
    """

    pending: pa.Table
    n_present: int
    removed_shards: tuple[str, ...]


def estimate_bytes(rows: int, columns: int, hidden_size: int, states_dtype: str) -> int:
    """Estimated bytes of `rows` rows on disk: the exact size of the states plus 100 bytes per row."""
    return rows * (columns * hidden_size * np.dtype(states_dtype).itemsize + ROW_BYTES)


def rows_of_shard(seconds_per_prompt: float) -> int:
    """The number of prompts that take about `SHARD_S` seconds, between 64 and 1,024.

    A shard is the step of progress bars and the work that an interruption loses; a larger one has less padding.
    """
    return int(np.clip(SHARD_S / max(seconds_per_prompt, 1e-9), SAMPLE_ROWS, MAX_ROWS))


def read_header(folder: Path, header: type[AnyHeader]) -> AnyHeader | None:
    """The header of the dataset in `folder`; None if there is no dataset.

    Raises InputError if the manifest is damaged or belongs to another type of dataset.
    """
    for name in (PARTIAL, MANIFEST):
        path = folder / name
        if path.is_file():
            record = read_json(path)
            try:
                return header.model_validate({key: record[key] for key in header.model_fields})
            except ValidationError as error:
                raise InputError(f"{path}: {one_line(error)}; choose another output folder") from None
            except (KeyError, TypeError) as error:
                raise InputError(
                    f"{path}: not the manifest of {header.kind.rows} ({error!r}); choose another output folder"
                ) from None
    return None


def open_dataset(folder: Path, header: DatasetHeader, prompts: pa.Table) -> OpenedDataset:
    """Creates or reopens the dataset, writes its header, deletes damaged shards, and finds the pending prompts.

    Raises InputError and changes nothing if the dataset has another header (encoder, columns or stored dtype), if a
    query's prompt has changed, or if the folder holds other files.
    """
    was = _header_or_room(folder, type(header))
    if was is not None:
        was.require(header, folder)
    stored, damaged = _stored_rows(folder)
    remaining = pending_prompts(prompts, stored, folder)
    if was is None or remaining.num_rows or damaged:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PARTIAL, header.model_dump(mode="json"))
    for name in damaged:
        (folder / name).unlink(missing_ok=True)
    return OpenedDataset(remaining, prompts.num_rows - remaining.num_rows, damaged)


def count_pending(folder: Path, kind: type[AnyHeader], prompts: pa.Table) -> int:
    """The number of prompts without a row in `folder`, a dataset of `kind` or a place for one. Changes nothing.

    Raises InputError as `open_dataset` does, except for a dataset with another header.
    """
    _header_or_room(folder, kind)
    return int(_checked_rows(prompts, _stored_rows(folder)[0], folder).null_count)


def _header_or_room(folder: Path, kind: type[AnyHeader]) -> AnyHeader | None:
    """As `read_header`. Raises InputError if there is no dataset and the folder holds other files."""
    was = read_header(folder, kind)
    if was is not None or not folder.exists():
        return was
    if not folder.is_dir() or any(not one.name.startswith(".") for one in folder.iterdir()):
        raise InputError(
            f"{folder}: the folder is not empty and holds no {kind.kind.name}; choose another output folder"
        )
    return None


def is_complete(folder: Path, prompts: pa.Table) -> bool:
    """Whether `folder` holds a finished dataset with all `prompts`. Raises InputError if a query's prompt changed."""
    if not (folder / MANIFEST).is_file() or (folder / PARTIAL).exists():
        return False
    stored, damaged = _stored_rows(folder)
    return not damaged and _checked_rows(prompts, stored, folder).null_count == 0


def pending_prompts(prompts: pa.Table, stored: pa.Table, folder: Path) -> pa.Table:
    """The (query_id, prompt) rows without a row in `stored`. Raises InputError if a query's prompt has changed."""
    at = _checked_rows(prompts, stored, folder)
    if at.null_count == len(at):
        return prompts
    blocks = range(0, prompts.num_rows, BLOCK)
    pending = (prompts.slice(start, BLOCK).filter(at.slice(start, BLOCK).is_null()) for start in blocks)
    return on_disk(pending, prompts.schema)


def _checked_rows(prompts: pa.Table, stored: pa.Table, folder: Path) -> pa.Array:
    """The row in `stored` of each prompt, null for none. Raises InputError if a query's prompt has changed."""
    at = pc.index_in(prompts.column("query_id"), value_set=stored.column("query_id").combine_chunks()).combine_chunks()
    digests = stored.column("prompt_digest")
    for start in range(0, prompts.num_rows, BLOCK):
        block, found = prompts.slice(start, BLOCK), at.slice(start, BLOCK)
        known = block.filter(found.is_valid())
        rows = (column.to_pylist() for column in (*known.columns, digests.take(found.drop_null())))
        for query_id, prompt, digest in zip(*rows, strict=True):
            if (prompt_digest(prompt) if isinstance(prompt, str) else None) != digest:
                raise InputError(
                    f"{folder}: query_id {query_id!r} was encoded from another prompt than the input has now; "
                    "choose another output folder"
                )
    return at


def _stored_rows(folder: Path) -> tuple[pa.Table, tuple[str, ...]]:
    """(query_id, prompt_digest) of the rows in readable shards, and the names of the damaged shards."""
    schema = pa.schema([("query_id", pa.string()), ("prompt_digest", pa.string())])
    intact, damaged = [schema.empty_table()], []
    for path in sorted(folder.glob("*.parquet")):
        try:
            intact.append(pq.read_table(readable(path), columns=schema.names, page_checksum_verification=True))
        except (pa.ArrowInvalid, OSError) as error:  # the writer was killed
            is_store = isinstance(path, ObjectPath) and isinstance(error, OSError)
            if is_store and CHECKSUM not in str(error):  # the object store failed
                raise UnavailableError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
            damaged.append(path.name)
    return pa.concat_tables(intact).combine_chunks(), tuple(damaged)


def remove_damaged(folder: Path) -> None:
    """Deletes the shards that a failed writer left incomplete."""
    for name in _stored_rows(folder)[1]:
        (folder / name).unlink(missing_ok=True)


def finish(folder: Path, header: ActivationsHeader) -> Manifest:
    """Checks the shards, writes `manifest.json` atomically and returns it. Call it when every row is written.

    Raises AssertionError if a shard has another schema.
    """
    schema = activations_schema(header.columns, header.encoder.hidden_size, header.encoder.states_dtype)
    shards = check_shards(folder, schema, LATER_COLUMNS)
    index = read_shards(folder, shards, INDEX, schema)
    counts = Counts(
        rows=index.num_rows,
        errors=index.num_rows - index.column("error").null_count,
        tokens=_sum(index, "n_tokens"),
        truncated_rows=_sum(index, "n_dropped", positive=True),
        dropped_tokens=_sum(index, "n_dropped"),
        duplicates_after_truncation=_duplicates_after_truncation(index),
        unknown_rows=int((unknown_share(index) > UNKNOWN_LIMIT).sum()),
        bytes=total_bytes(folder, shards),
    )
    manifest = Manifest(
        encoder=header.encoder,
        fingerprint=header.encoder.fingerprint,
        columns=header.columns,
        hidden_size=header.encoder.hidden_size,
        versions={name: version(name) for name in VERSIONS},
        input_digest=input_digest(index),
        counts=counts,
        shards=shards,
        config=header.config,
    )
    if header.encoder.adapter is not None:
        keep_manifest(folder, header.config.get("encoder", {}).get("adapter"), header.encoder.adapter)
    write_manifest(folder, manifest)
    return manifest


def check_shards(folder: Path, schema: pa.Schema, optional: Sequence[str] = ()) -> tuple[str, ...]:
    """Removes repeated rows and returns the names of the shards. Raises AssertionError if one has another schema.

    A shard of an earlier version may lack the columns `optional`.
    """
    shards = sorted(path.name for path in folder.glob("*.parquet"))
    earlier = pa.schema([field for field in schema if field.name not in optional])
    for name in shards:
        found = pq.read_schema(readable(folder / name))
        assert found.equals(schema) or found.equals(earlier), f"{folder / name}: {found}"
    _drop_repeated_rows(folder, shards)
    return tuple(name for name in shards if (folder / name).exists())


def write_manifest(folder: Path, manifest: BaseModel) -> None:
    """Writes `manifest.json` and deletes `manifest.partial.json`, which marks the dataset as finished."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    (folder / PARTIAL).unlink(missing_ok=True)


def input_digest(index: pa.Table) -> str:
    """sha256 of the (query_id, prompt_digest) pairs, independent of row order."""
    query, digest = (index.column(name).cast(pa.large_string()) for name in ("query_id", "prompt_digest"))
    pairs = pc.binary_join_element_wise(query, pc.fill_null(digest, "None"), pa.scalar("\x1f", pa.large_string()))
    pairs = pairs.take(pc.sort_indices(pairs))  # by bytes of UTF-8, which is the order of Python's strings
    return sha256_strings(
        pair for start in range(0, len(pairs), BLOCK) for pair in pairs.slice(start, BLOCK).to_pylist()
    )


def total_bytes(folder: Path, shards: Sequence[str]) -> int:
    """Total bytes of the shards on disk."""
    return sum((folder / name).stat().st_size for name in shards)


def shorten(value: object) -> str:
    """The repr of a value for an error message, at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _drop_repeated_rows(folder: Path, shards: list[str]) -> None:
    """Keeps the first row of every query. A task that outlives its killed driver may write rows twice."""
    ids = read_shards(folder, shards, ["query_id"]).column("query_id") if shards else None
    if ids is None or pc.count_distinct(ids).as_py() == len(ids):
        return
    seen: set[str] = set()
    for name in shards:
        ids = pq.read_table(readable(folder / name), columns=["query_id"]).column("query_id").to_pylist()
        keep = [query not in seen for query in ids]
        seen.update(ids)
        if not any(keep):
            (folder / name).unlink()
        elif not all(keep):
            kept = pq.read_table(readable(folder / name)).filter(pa.array(keep))
            write_atomically(folder / name, lambda path, kept=kept: pq.write_table(kept, path, **PARQUET))  # type: ignore[misc]


def _sum(index: pa.Table, name: str, positive: bool = False) -> int:
    column = index.column(name)
    return int(pc.sum(pc.greater(column, 0) if positive else column).as_py() or 0)


def _duplicates_after_truncation(index: pa.Table) -> int:
    """Number of different prompts whose tokens are equal to another prompt's after truncation."""
    groups = (
        index.filter(pc.is_valid(index.column("tokens_digest")))
        .group_by("tokens_digest")
        .aggregate([("prompt_digest", "count_distinct"), ("n_dropped", "max")])
    )
    merged = groups.filter(
        pc.and_(
            pc.greater(groups.column("prompt_digest_count_distinct"), 1), pc.greater(groups.column("n_dropped_max"), 0)
        )
    )
    return int(pc.sum(merged.column("prompt_digest_count_distinct")).as_py() or 0)
