"""The prompts of an input file, in a table whose text is on disk.

In: a Parquet file with query_id and prompt. Out: a table of both, memory-mapped from a temporary file without a name in
the system's folder of temporary files (`TMPDIR`). The operating system reads its pages when they are used and may drop
them again, so a job's memory grows with the number of prompts and not with their text. Knows nothing of datasets.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from prefill_router.errors import InputError
from prefill_router.files import disk_full, is_full
from prefill_router.text_columns import column_names, decode_text, read_parts, string_type

COLUMNS = ["query_id", "prompt"]


def read_prompts(path: Path) -> pa.Table:
    """The (query_id, prompt) rows of a prompts file, one per query_id, in order of first appearance.

    Texts are of type string, or large_string if a column has more than 2 GiB. A prompt may be null or blank; its row in
    the dataset then has an error. Raises InputError for a missing column, a null query_id, two prompts for one
    query_id, text that is not UTF-8, and a table without rows; UnavailableError if the disk is full.
    """
    names = column_names(path)
    for name in COLUMNS:
        if name not in names:
            raise InputError(f"{path}: column {name!r} is missing; a prompts file needs query_id and prompt")
    rows, schema = _first_rows(path)
    return on_disk(_rows(path, rows, schema), schema)


def on_disk(tables: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """The rows of all tables, memory-mapped from a temporary file. Raises UnavailableError if the disk is full."""
    try:
        with tempfile.TemporaryFile() as file:  # has no name: nothing remains if the process is killed
            with pa.ipc.new_file(file, schema) as writer:
                for table in tables:
                    writer.write_table(table)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if is_full(error):
            raise disk_full(Path(tempfile.gettempdir())) from None
        raise
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()


def _first_rows(path: Path) -> tuple[Int[np.ndarray, " queries"], pa.Schema]:
    """The number of the first row of each query, ascending, and the types of the result. Checks every row.

    In memory are the ids and 32 bytes per row; the text is read in parts.
    """
    ids, digests = [pa.array([], pa.large_string())], [pa.array([], pa.binary(16))]
    sizes, rows = {name: [np.zeros(0, np.int64)] for name in COLUMNS}, 0
    for part in read_parts(path, COLUMNS):
        names, prompts = (part.column(name).chunk(0) for name in COLUMNS)
        if names.null_count:
            row = rows + pc.index(names.is_null(), True).as_py()
            raise InputError(f"{path}: column 'query_id', row {row}: null is not allowed")
        ids.append(names.dictionary.cast(pa.large_string()).take(names.indices))
        digests.append(_digests(prompts))
        for name, texts in zip(COLUMNS, (names, prompts), strict=True):
            sizes[name].append(_sizes(texts))
        rows += part.num_rows
    if rows == 0:
        raise InputError(f"{path}: the table has no rows; at least one prompt is needed")
    coded, first = pa.concat_arrays(ids).dictionary_encode(), np.arange(rows)
    if len(coded.dictionary) < rows:
        _, first, of = np.unique(coded.indices.to_numpy(), return_index=True, return_inverse=True)
        _refuse_two_prompts(path, coded, pa.concat_arrays(digests), first[of])
    types = [string_type(int(np.concatenate(sizes[name])[first].sum())) for name in COLUMNS]
    return np.sort(first), pa.schema(zip(COLUMNS, types, strict=True))


def _sizes(texts: pa.DictionaryArray) -> Int[np.ndarray, " rows"]:
    """Bytes of the text of each row, 0 for null."""
    sizes = pc.binary_length(texts.dictionary).take(texts.indices)
    return np.asarray(pc.fill_null(sizes, 0).cast(pa.int64()))


def _digests(texts: pa.DictionaryArray) -> pa.Array:
    """16 bytes per row that are equal for equal texts; null for null."""
    of_value = [blake2b(text.encode(), digest_size=16).digest() for text in texts.dictionary.to_pylist()]
    return pa.array(of_value, pa.binary(16)).take(texts.indices)


def _refuse_two_prompts(path: Path, ids: pa.Array, digests: pa.Array, first: Int[np.ndarray, " rows"]) -> None:
    """Raises InputError with the first row whose prompt differs from that of `first`, the first row of its query."""
    codes = pc.fill_null(digests.dictionary_encode().indices, -1).to_numpy()
    if len(rows := np.flatnonzero(codes != codes[first])):
        row = int(rows[0])
        raise InputError(
            f"{path}: column 'prompt', row {row}: query_id {ids[row].as_py()!r} has two different prompts; one prompt "
            "per query_id is allowed"
        )


def _rows(path: Path, rows: Int[np.ndarray, " queries"], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows with the given numbers, which ascend, in parts."""
    start = 0
    for part in read_parts(path, COLUMNS):
        low, high = np.searchsorted(rows, [start, start + part.num_rows])
        texts = [decode_text(part.column(name).chunk(0), rows[low:high] - start) for name in COLUMNS]
        yield pa.Table.from_arrays(texts, names=COLUMNS).cast(schema)
        start += part.num_rows
