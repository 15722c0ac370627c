"""String columns as codes of distinct values, so that no text is decoded row by row.

In: Parquet files and Arrow arrays of any string type, dictionary-encoded or not, in one or several chunks. Out:
dictionary arrays with distinct values in order of first appearance, of type string, or large_string above 2 GiB. The
memory that a column needs is that of its distinct values. Knows nothing of outcomes or prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from prefill_router.errors import InputError
from prefill_router.locations import ObjectPath, readable

STRING_BYTES = 2**31 - 1  # the most bytes of an array of type string
PART_BYTES = 2**28  # text that is encoded, or read from several row groups, at once
GROUP_BYTES = 2**30  # text of a row group that is read at once
SMALL_PART_BYTES = 2**24  # the same two limits of `read_parts`
PIECES = 16  # parts in which distinct values are copied to Arrow, each freed before the next
PART_ROWS = 1024  # rows read at once from pages that pyarrow cannot read as a dictionary
# Encodings of Parquet pages that pyarrow reads as a dictionary.
DICTIONARY_ENCODINGS = {"PLAIN", "PLAIN_DICTIONARY", "RLE", "RLE_DICTIONARY", "BIT_PACKED"}
# Some tools write text as bytes without a type.
TEXT = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())


class DistinctText:
    """The distinct values of a string column and the code of every row, collected chunk by chunk."""

    def __init__(self, name: str, source: str, first_row: int = 0) -> None:
        """`name`, `source`, and `first_row`, the number of the first row, are for messages."""
        self._name, self._source = name, source
        self._codes: dict[str, int] = {}
        self._rows: list[Int[np.ndarray, " rows"]] = []
        self._n_rows = first_row

    def add(self, chunk: pa.Array) -> None:
        """Adds the rows of a chunk. Raises InputError if it does not hold text, or text that is not UTF-8."""
        if not is_text(chunk.type):
            raise InputError(
                f"{self._source}: column {self._name!r} must hold strings, it holds {chunk.type}; convert it to text"
            )
        if isinstance(chunk, pa.ExtensionArray):
            chunk = chunk.storage
        if isinstance(chunk, pa.DictionaryArray):
            self._add_encoded(chunk)
            return
        rows = max(1, len(chunk) * PART_BYTES // max(1, chunk.nbytes))
        for start in range(0, len(chunk), rows):
            self._add_encoded(_plain(chunk.slice(start, rows)).dictionary_encode())

    def array(self) -> pa.DictionaryArray:
        """All rows as one array. No rows can be added afterwards."""
        values: list[str | None] = list(self._codes)
        self._codes = {}
        pieces = [pa.array([], pa.large_string())]
        step = -(-len(values) // PIECES) or 1
        for start in range(0, len(values), step):
            pieces.append(pa.array(values[start : start + step], pa.large_string()))
            values[start : start + step] = [None] * len(pieces[-1])  # frees the strings
        codes = np.concatenate([np.zeros(0, np.int32), *self._rows])
        return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), _shortest(pa.concat_arrays(pieces)))

    def _add_encoded(self, chunk: pa.DictionaryArray) -> None:
        at = pc.fill_null(chunk.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
        used, first = np.unique(at, return_index=True)
        used = used[np.argsort(first)]  # in order of first appearance
        used = used[used >= 0]
        codes = np.full(len(chunk.dictionary) + 1, -1, np.int32)  # the last one is the code of a null
        codes[used] = [
            # A dictionary may hold a null.
            -1 if value is None else self._codes.setdefault(value, len(self._codes))
            for value in self._values(_plain(chunk.dictionary), used, at)
        ]
        self._rows.append(codes[at])
        self._n_rows += len(at)

    def _values(self, values: pa.Array, used: np.ndarray, at: np.ndarray) -> list[str | None]:
        """The values at the positions `used`. `at` has the position of every row, for the error message."""
        try:
            if np.array_equal(used, np.arange(len(values))):
                return list(values.to_pylist())
            return [values[entry].as_py() for entry in used.tolist()]
        except UnicodeDecodeError:
            entry, error = next(found for found in map(partial(_undecodable, values), used.tolist()) if found)
        row = self._n_rows + int(np.flatnonzero(at == entry)[0])
        raise InputError(
            f"{self._source}: column {self._name!r}, row {row}: the text is not UTF-8 ({error.reason} at byte "
            f"{error.start}); convert it to UTF-8"
        )


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings, or bytes, in which some tools write strings, or only nulls."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in TEXT or pa.types.is_null(kind)


def encode_text(column: pa.Array | pa.ChunkedArray, name: str, source: str, first_row: int = 0) -> pa.DictionaryArray:
    """The column as one dictionary array of distinct values.

    `name`, `source`, and `first_row`, the number of its first row, are for messages. Raises InputError as
    `DistinctText.add`.
    """
    text = DistinctText(name, source, first_row)
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        text.add(chunk)
    return text.array()


def decode_text(column: pa.DictionaryArray, rows: Int[np.ndarray, " part"]) -> pa.Array:
    """The strings at `rows`, as type string, or as large_string above 2 GiB."""
    codes = column.indices.take(pa.array(rows, pa.int64()))
    return _shortest(column.dictionary.cast(pa.large_string()).take(codes))


def column_names(path: Path) -> list[str]:
    """The names of the columns of a Parquet file, or of a folder of such files.

    Raises InputError if it is missing or unreadable.
    """
    return list(_schema(path).names)


def read_columns(path: Path, names: Sequence[str], text: Collection[str]) -> pa.Table:
    """Reads those of the columns `names` that the file has, and no others.

    Columns in `text` are returned as `encode_text` returns them if they hold text. Another column of a folder has
    the common type of its files. Raises InputError if the file is missing or unreadable, has two columns of one name,
    types without a common type, or text that is not UTF-8.
    """
    kinds = _types(path, names)
    encoded = {name: DistinctText(name, str(path)) for name, kind in kinds.items() if name in text and is_text(kind)}
    others: dict[str, list[pa.Array]] = {name: [] for name in kinds if name not in encoded}
    with _readable(path):
        for part in _parts(path, list(kinds), list(encoded), PART_BYTES, GROUP_BYTES):
            for name, values in encoded.items():
                for chunk in part.column(name).chunks:
                    values.add(chunk)
            for name, chunks in others.items():
                chunks += part.column(name).chunks
    return pa.table(
        {
            name: encoded.pop(name).array() if name in encoded else _joined(others[name], kind, name, path)
            for name, kind in kinds.items()
        }
    )


def read_parts(path: Path, names: Sequence[str]) -> Iterator[pa.Table]:
    """The text columns `names`, which the file has, in parts of about SMALL_PART_BYTES, for files larger than memory.

    The columns of a part are returned as `encode_text` returns them. Raises InputError as `read_columns`, and if a
    column does not hold text.
    """
    kinds, row = list(_types(path, names)), 0
    with _readable(path):
        for part in _parts(path, kinds, kinds, SMALL_PART_BYTES, SMALL_PART_BYTES):
            yield pa.table({name: encode_text(part.column(name), name, str(path), row) for name in names})
            row += part.num_rows


def _types(path: Path, names: Sequence[str]) -> dict[str, pa.DataType]:
    """The types of those of the columns `names` that the file has. Raises InputError for two columns of one name."""
    schema = _schema(path)
    for name in names:
        if (count := schema.names.count(name)) > 1:
            raise InputError(f"{path}: column {name!r} occurs {count} times; keep one of them")
    return {name: schema.field(name).type for name in names if name in schema.names}


def _joined(chunks: list[pa.Array], kind: pa.DataType, name: str, path: Path) -> pa.ChunkedArray:
    """The chunks as one column of their common type. `kind` is the type of a column without chunks."""
    tables = [pa.table({name: chunk}) for chunk in (pa.array([], kind), *chunks)]
    try:
        return pa.concat_tables(tables, promote_options="permissive").column(name)
    except pa.ArrowException as error:
        raise InputError(
            f"{path}: column {name!r} has several types in the files of this folder "
            f"({' '.join(str(error).split())[:200]}); convert them to one type"
        ) from None


def _parts(path: Path, names: list[str], text: list[str], part_bytes: int, group_bytes: int) -> Iterator[pa.Table]:
    """The rows of a file in parts of limited memory; the columns `text` are dictionary-encoded if pyarrow can do it.

    Parts have about `part_bytes` of text; a row group of at most `group_bytes` is read at once.
    """
    if path.is_dir():
        files = _files(path)
        if all(set(names) <= set(pq.read_schema(readable(file)).names) for file in files):
            for file in files:
                yield from _parts(file, names, text, part_bytes, group_bytes)
        else:  # a column is in the names of the folders
            source, store = _folder(path)
            yield pq.read_table(source, columns=names, read_dictionary=text, filesystem=store)
        return
    metadata = pq.read_metadata(readable(path))
    leaves = {metadata.schema.column(index).path: index for index in range(metadata.num_columns)}
    flat = [name for name in text if name in leaves]  # not lists or structs
    with (
        pq.ParquetFile(readable(path), read_dictionary=flat) as encoded,
        pq.ParquetFile(readable(path), buffer_size=2**20) as plain,
    ):
        groups: list[int] = []
        pending = 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(leaves[name]) for name in flat]
            size = sum(column.total_uncompressed_size for column in columns)
            in_batches = size > group_bytes or any(
                not DICTIONARY_ENCODINGS.issuperset(column.encodings) for column in columns
            )
            if groups and (in_batches or pending + size > part_bytes):
                yield encoded.read_row_groups(groups, columns=names)
                groups, pending = [], 0
            if in_batches:
                rows = max(1, min(PART_ROWS, group.num_rows * part_bytes // size))
                for batch in plain.iter_batches(rows, row_groups=[number], columns=names):
                    yield pa.Table.from_batches([batch])
            else:
                groups.append(number)
                pending += size
        if groups:
            yield encoded.read_row_groups(groups, columns=names)


def _schema(path: Path) -> pa.Schema:
    with _readable(path):
        if not path.is_dir():
            return pq.read_schema(readable(path))
        source, store = _folder(path)
        return pq.ParquetDataset(source, filesystem=store).schema


def _files(path: Path) -> list[Path]:
    """The Parquet files in a folder."""
    source, store = _folder(path)
    names = pq.ParquetDataset(source, filesystem=store).files
    return [path / name.removeprefix(f"{source}/") if store else Path(name) for name in names]


def _folder(path: Path) -> tuple[Path | str, Any]:
    """pyarrow's arguments for a folder: the path, and its file system if it is in an object store."""
    return (path.key, path.filesystem) if isinstance(path, ObjectPath) else (path, None)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises InputError for errors of reading the file."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a Parquet file") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())[:200]})") from None


def _plain(values: pa.Array) -> pa.Array:
    """Text of any type as an array of strings. Does not check that bytes are UTF-8."""
    if pa.types.is_null(values.type):
        return values.cast(pa.string())
    if values.type == pa.string_view():
        return values.cast(pa.large_string())
    if values.type == pa.binary_view():
        values = values.cast(pa.large_binary())
    if values.type == pa.large_binary():
        return values.view(pa.large_string())
    return values.view(pa.string()) if values.type == pa.binary() else values


def _undecodable(values: pa.Array, entry: int) -> tuple[int, UnicodeDecodeError] | None:
    try:
        values[entry].as_py()
    except UnicodeDecodeError as error:
        return entry, error
    return None


def string_type(size: int) -> pa.DataType:
    """The type of an array of text with `size` bytes: string, or large_string above 2 GiB."""
    return pa.string() if size <= STRING_BYTES else pa.large_string()


def _shortest(strings: pa.Array) -> pa.Array:
    """An array of type large_string as type string if its text has less than 2 GiB."""
    return strings.cast(string_type(pc.sum(pc.binary_length(strings)).as_py() or 0))
