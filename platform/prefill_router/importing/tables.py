"""Rows of Parquet and CSV files as records.

In: a file. Out: its column names, and a `Record` per row. Empty fields of a CSV file are missing.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from prefill_router.errors import InputError
from prefill_router.importing.records import Record

ROWS = 1024  # rows of a Parquet file read at once
UNREADABLE = (OSError, ValueError, csv.Error)  # of files; text that is not UTF-8 and Arrow's errors are ValueErrors


def columns_of(path: Path) -> list[str]:
    """The column names. Raises InputError for a file that cannot be read."""
    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        with path.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def rows_of(path: Path) -> Iterator[Record]:
    """The rows, in order. Raises InputError for a file that cannot be read, and for a row with too many fields."""
    try:
        yield from _rows(path, columns_of(path))
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def _rows(path: Path, names: list[str]) -> Iterator[Record]:
    if path.suffix == ".parquet":
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(ROWS):
            for row in batch.to_pylist():
                yield Record({name: value for name, value in row.items() if value is not None}, f"{path}, row {number}")
                number += 1
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(file)
        next(reader, None)
        for values in reader:
            place = f"{path}, line {reader.line_num}"
            if len(values) > len(names):
                raise InputError(f"{place}: {len(values)} fields, but the first line has {len(names)} names")
            yield Record({name: value for name, value in zip(names, values, strict=False) if value != ""}, place)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})")
