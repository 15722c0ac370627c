"""Writing an activations dataset, or another of one row per query, in any number of attempts, each row once.

`open_dataset` pins what all rows share (the encoder) in `manifest.partial.json` and finds the prompts still to read,
whoever encodes them writes any number of Parquet shards into the folder, and `finish` writes `manifest.json` when
everything is in. A job killed at any moment is continued by doing the same again. Knows nothing of encoders' insides or
clusters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from prefill_router.errors import InputError, one_line
from prefill_router.files import prompt_digest, read_json, sha256_strings, write_atomically, write_json
from prefill_router.prefill.dataset import ACTIVATIONS, MANIFEST, PARTIAL, Counts, DatasetType, Manifest, read_shards
from prefill_router.prefill.encoder import EncoderInfo, activations_schema

VERSIONS = ("prefill-router", "torch", "transformers", "tokenizers", "pyarrow", "numpy")
# States are noise to a compressor, and to a dictionary.
PARQUET: dict[str, Any] = {"compression": "none", "use_dictionary": False}
ROW_BYTES = 100  # of a shard besides the states: id, digests, counts
WINDOW_S = 60.0  # seconds that a rate is over, or more


class DatasetHeader(BaseModel, ABC):
    """What a dataset's every row must share. Written before the first shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[DatasetType]

    @abstractmethod
    def require(self, wanted: Any, folder: Path) -> None:
        """Raises InputError where rows of `wanted`, a pin of the same class, cannot stand in `folder` beside these."""


Rows = TypeVar("Rows", bound=DatasetHeader)


class ActivationsHeader(DatasetHeader):
    """What the rows of an activations dataset share."""

    kind: ClassVar[DatasetType] = ACTIVATIONS

    encoder: EncoderInfo
    columns: tuple[str, ...]
    config: dict[str, Any]

    def require(self, wanted: Any, folder: Path) -> None:
        """Another encoder, kept dtype or columns are refused."""
        if self.encoder.fingerprint != wanted.encoder.fingerprint:
            was, now = self.encoder.model_dump(), wanted.encoder.model_dump()
            field = next(
                name for name in was if was[name] != now[name] and name not in ("model", "revision", "backend")
            )
            raise InputError(
                f"{folder}: holds the states of another encoder: {field} was {short(was[field])}, is now "
                f"{short(now[field])}; choose another output folder"
            )
        if self.encoder.states_dtype != wanted.encoder.states_dtype:
            raise InputError(
                f"{folder}: holds {self.encoder.states_dtype} states, asked for are "
                f"{wanted.encoder.states_dtype}; choose another output folder"
            )
        if self.columns != wanted.columns:
            raise InputError(
                f"{folder}: holds the columns {', '.join(self.columns)}, asked for are "
                f"{', '.join(wanted.columns)}; choose another output folder"
            )


@dataclass(frozen=True)
class Opened:
    """A dataset ready to be written to: the prompts still to read, how many of the input's rows are in already, and
    the damaged shards that were taken away."""

    pending: pa.Table
    there: int
    removed: tuple[str, ...]


def read_prompts(path: Path) -> pa.Table:
    """A plain prompts file as (query_id, prompt), one row per query_id, in order of first appearance.

    A prompt may be null or blank: its row gets an error, not the job. Raises InputError naming column and row: a
    missing column, a null query_id, two prompts for one query_id, a text that is not UTF-8, no rows.
    """
    columns = ["query_id", "prompt"]
    try:
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in columns if name in names])
        table.validate(full=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())[:200]})") from None
    for name in columns:
        if name not in names:
            raise InputError(f"{path}: column {name!r} is missing; a prompts file has query_id and prompt")
    if table.num_rows == 0:
        raise InputError(f"{path}: the table has no rows")
    table = pa.table({name: _decoded(table.column(name)) for name in table.column_names})
    ids = table.column("query_id")
    if not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise InputError(f"{path}: column 'query_id' must hold strings, it holds {ids.type}")
    if ids.null_count:
        raise InputError(f"{path}: column 'query_id', row {pc.index(ids.is_null(), True).as_py()}: null is not allowed")
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first, of = np.unique(codes, return_index=True, return_inverse=True)
    prompts = table.column("prompt").to_pylist()
    for row, start in enumerate(first[of]):
        if prompts[row] != prompts[start]:
            raise InputError(
                f"{path}: column 'prompt', row {row}: query_id {ids[row].as_py()!r} stands with two "
                "different prompts; one prompt per query_id is allowed"
            )
    return table.take(pa.array(np.sort(first))).combine_chunks()


def estimate_bytes(rows: int, columns: int, hidden_size: int, states_dtype: str) -> int:
    """Bytes that `rows` rows take on disk: the states exactly, the rest of a row at about 100 bytes."""
    return rows * (columns * hidden_size * np.dtype(states_dtype).itemsize + ROW_BYTES)


def sample_prompts(prompts: pa.Table, rows: int) -> pa.Table:
    """Up to `rows` prompts, evenly spaced over the range of text lengths: their mean stands for all."""
    lengths = np.asarray([len(text) if isinstance(text, str) else 0 for text in prompts.column("prompt").to_pylist()])
    order = np.argsort(lengths, kind="stable")
    spaced = (np.arange(min(rows, len(order))) + 0.5) * len(order) / min(rows, len(order))
    return prompts.take(pa.array(order[spaced.astype(np.int64)]))


def read_header(folder: Path, header: type[Rows]) -> Rows | None:
    """What the folder's rows share; None for a folder without a dataset. Raises InputError when it is damaged, or of
    another kind."""
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
                    f"{path}: {error!r}: it is of no {header.kind.name}; choose another output folder"
                ) from None
    return None


def open_dataset(folder: Path, header: DatasetHeader, prompts: pa.Table) -> Opened:
    """Makes or reopens the dataset, pins what its rows share, takes damaged shards away, and finds the prompts to read.

    Raises InputError, with nothing changed, when the folder holds rows of another pin (another encoder, other columns
    or another kept dtype), when a query's prompt has changed, or when the folder is no such dataset.
    """
    was = read_header(folder, type(header))
    if was is not None:
        was.require(header, folder)
    elif folder.exists() and (not folder.is_dir() or any(not n.name.startswith(".") for n in folder.iterdir())):
        raise InputError(
            f"{folder}: there is something here that is no {header.kind.name}; choose another output folder"
        )
    there, damaged = _present(folder)
    rest = pending(prompts, there, folder)
    if was is None or rest.num_rows or damaged:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PARTIAL, header.model_dump(mode="json"))
    for name in damaged:
        (folder / name).unlink()
    return Opened(rest, prompts.num_rows - rest.num_rows, damaged)


def is_complete(folder: Path, prompts: pa.Table) -> bool:
    """Whether a finished dataset holds all of `prompts`. Raises InputError when a query's prompt has changed."""
    if not (folder / MANIFEST).is_file() or (folder / PARTIAL).exists():
        return False
    there, damaged = _present(folder)
    return not damaged and pending(prompts, there, folder).num_rows == 0


def pending(prompts: pa.Table, there: pa.Table, folder: Path) -> pa.Table:
    """The (query_id, prompt) rows that `there` lacks. Raises InputError when a query's prompt has changed."""
    at = pc.index_in(prompts.column("query_id"), value_set=there.column("query_id").combine_chunks())
    if at.null_count == len(at):
        return prompts
    known = prompts.filter(pc.is_valid(at))
    was = there.column("prompt_digest").take(at.drop_null()).to_pylist()
    for query_id, prompt, digest in zip(
        known.column("query_id").to_pylist(), known.column("prompt").to_pylist(), was, strict=True
    ):
        if (prompt_digest(prompt) if isinstance(prompt, str) else None) != digest:
            raise InputError(
                f"{folder}: query_id {query_id!r} was encoded from another prompt than the input has now; "
                "choose another output folder"
            )
    return prompts.filter(pc.is_null(at)).combine_chunks()


def _present(folder: Path) -> tuple[pa.Table, tuple[str, ...]]:
    """(query_id, prompt_digest) of the rows in readable shards, and the names of the damaged ones."""
    schema = pa.schema([("query_id", pa.string()), ("prompt_digest", pa.string())])
    good, damaged = [schema.empty_table()], []
    for path in sorted(folder.glob("*.parquet")):
        try:
            good.append(pq.read_table(path, columns=schema.names))
        except (pa.ArrowInvalid, OSError):  # cut off while it was written
            damaged.append(path.name)
    return pa.concat_tables(good).combine_chunks(), tuple(damaged)


class ShardCounter:
    """Rows, and tokens read, in the shards that came after it was made; it reads each once, and no states.

    `now` is in seconds of any one clock.
    """

    def __init__(self, folder: Path, now: float) -> None:
        self._folder = folder
        self._counted = {path.name for path in folder.glob("*.parquet")}
        self._marks = deque([(now, 0)])
        self.rows = 0
        self.tokens = 0

    def update(self, now: float) -> None:
        """Counts the shards that became whole since the last call."""
        for path in self._folder.glob("*.parquet"):
            if path.name not in self._counted:
                with suppress(pa.ArrowInvalid, OSError):  # still being written
                    rows, tokens = _rows_and_tokens(path)
                    self._counted.add(path.name)
                    self.rows += rows
                    self.tokens += tokens
        if self.tokens > self._marks[-1][1]:
            self._marks.append((now, self.tokens))
            while now - self._marks[1][0] >= WINDOW_S:
                self._marks.popleft()

    def tokens_per_s(self, now: float) -> float | None:
        """Between the newest shard and those a minute older, or more where shards take longer: many encoders finish
        theirs together. None before the first, and when none has come for twice that time."""
        (first, before), (last, tokens) = self._marks[0], self._marks[-1]
        return None if last == first or now - last > 2 * (last - first) else (tokens - before) / (last - first)


def _rows_and_tokens(path: Path) -> tuple[int, int]:
    """Rows of a shard, and tokens that were read: those that truncation left. 0 where a shard has no such counts."""
    with pq.ParquetFile(path) as shard:
        if not {"n_tokens", "n_dropped"} <= set(shard.schema_arrow.names):
            return shard.metadata.num_rows, 0
        counts = shard.read(["n_tokens", "n_dropped"])
    return counts.num_rows, _sum(counts, "n_tokens") - _sum(counts, "n_dropped")


def finish(folder: Path, header: ActivationsHeader) -> Manifest:
    """Checks the shards, writes `manifest.json` atomically and returns it. Call when every row is in.

    Raises AssertionError when a shard has another schema.
    """
    shards = settle(folder, activations_schema(header.columns, header.encoder.hidden_size, header.encoder.states_dtype))
    index = read_shards(
        folder, shards, ["query_id", "prompt_digest", "n_tokens", "n_dropped", "tokens_digest", "error"]
    )
    counts = Counts(
        rows=index.num_rows,
        errors=index.num_rows - index.column("error").null_count,
        tokens=_sum(index, "n_tokens"),
        truncated_rows=_sum(index, "n_dropped", positive=True),
        dropped_tokens=_sum(index, "n_dropped"),
        duplicates_after_truncation=_same_tokens(index),
        bytes=size(folder, shards),
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
    complete(folder, manifest)
    return manifest


def settle(folder: Path, schema: pa.Schema) -> tuple[str, ...]:
    """The names of the shards, when every row is in them and stands once. Raises AssertionError for another schema."""
    shards = sorted(path.name for path in folder.glob("*.parquet"))
    for name in shards:
        assert pq.read_schema(folder / name).equals(schema), f"{folder / name}: {pq.read_schema(folder / name)}"
    _drop_repeated(folder, shards)
    return tuple(name for name in shards if (folder / name).exists())


def complete(folder: Path, manifest: BaseModel) -> None:
    """Writes the manifest: from here on the dataset is a finished one."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    (folder / PARTIAL).unlink(missing_ok=True)


def input_digest(index: pa.Table) -> str:
    """sha256 over the (query_id, prompt_digest) pairs, whatever the order of rows."""
    return sha256_strings(
        sorted(
            f"{query}\x1f{digest}"
            for query, digest in zip(
                index.column("query_id").to_pylist(), index.column("prompt_digest").to_pylist(), strict=True
            )
        )
    )


def size(folder: Path, shards: Sequence[str]) -> int:
    """Bytes of the shards."""
    return sum((folder / name).stat().st_size for name in shards)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def short(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _drop_repeated(folder: Path, shards: list[str]) -> None:
    """A task that outlived its killed driver may have written rows that the resumed job wrote too: one stays."""
    seen: set[str] = set()
    for name in shards:
        ids = pq.read_table(folder / name, columns=["query_id"]).column("query_id").to_pylist()
        keep = [query not in seen for query in ids]
        seen.update(ids)
        if not any(keep):
            (folder / name).unlink()
        elif not all(keep):
            rest = pq.read_table(folder / name).filter(pa.array(keep))
            write_atomically(folder / name, lambda path, rest=rest: pq.write_table(rest, path, **PARQUET))  # type: ignore[misc]


def _sum(index: pa.Table, name: str, positive: bool = False) -> int:
    column = index.column(name)
    return int(pc.sum(pc.greater(column, 0) if positive else column).as_py() or 0)


def _same_tokens(index: pa.Table) -> int:
    """Prompts that differ, but not in the tokens that truncation left of them."""
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
