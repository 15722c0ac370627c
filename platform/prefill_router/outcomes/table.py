"""The outcomes table: one row per (query, model), validated and pivoted to matrices.

In: a Parquet file or Arrow table (docs/data-formats.md). Out: `Outcomes`: arrays on the axes `queries` (order of first
appearance) and `models` (order of the pool). Knows nothing of splits or features.

A missing label is NaN in `correct`, never 0, so that code without a mask returns NaN instead of counting a wrong
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from prefill_router.errors import InputError
from prefill_router.files import prompt_digest, sha256_strings
from prefill_router.locations import location, readable
from prefill_router.outcomes.duplicates import join_groups
from prefill_router.pool import Pool
from prefill_router.text_columns import column_names, decode_text, encode_text, is_text, read_columns

REQUIRED = {
    "query_id": pa.string(),
    "benchmark": pa.string(),
    "prompt": pa.string(),
    "model": pa.string(),
    "correct": pa.int8(),
}
OPTIONAL = {"input_tokens": pa.int32(), "output_tokens": pa.int32(), "group": pa.string()}
KINDS = REQUIRED | OPTIONAL
TEXT = [name for name, kind in KINDS.items() if kind == pa.string()]
NULLABLE = {"correct", *OPTIONAL}
HALF = 0.5  # fractional labels from this value count as right


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of the models of a pool, one row per query. NaN is a missing value.

    `groups` has the id of the query if the table has no group; queries with equal prompts are in one group. `correct`
    is 1 (correct) or 0 (wrong), for a fractional label 1 from one half; `fractions` are the labels as given, None if
    none is fractional. `input_tokens` and `output_tokens` are counts.
    """

    query_ids: np.ndarray
    benchmarks: np.ndarray
    prompts: np.ndarray
    groups: np.ndarray
    models: tuple[str, ...]
    correct: Float[np.ndarray, "queries models"]
    input_tokens: Float[np.ndarray, "queries models"]
    output_tokens: Float[np.ndarray, "queries models"]
    fractions: Float[np.ndarray, "queries models"] | None = None

    @classmethod
    def from_frame(cls, frame: Any, pool: Pool) -> Outcomes:
        """The outcomes of the pool's models in a pandas DataFrame. Columns: docs/data-formats.md, outcomes.parquet.

        Raises InputError as `validate_outcomes` and `pivot` do, or if a column cannot be converted to Arrow.
        """
        names = list(frame.columns)
        _check_names(names, "frame")
        try:
            table = pa.Table.from_pandas(frame[[name for name in names if name in KINDS]], preserve_index=False)
        except (pa.ArrowException, UnicodeEncodeError, TypeError) as error:
            raise InputError(f"frame: cannot be converted to Arrow ({' '.join(str(error).split())[:200]})") from None
        return pivot(validate_outcomes(table, "frame"), pool.names)

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def shares(self) -> Float[np.ndarray, "queries models"]:
        """The labels as given, from 0 to 1: shares of right answers. The trunk learns them."""
        return self.correct if self.fractions is None else self.fractions

    @property
    def labelled(self) -> Bool[np.ndarray, "queries models"]:
        """Whether `correct` is known."""
        return np.isfinite(self.correct)

    @property
    def complete(self) -> Bool[np.ndarray, " queries"]:
        """Whether the labels of a query are known for every model. These queries count in the accuracy-cost curve."""
        return np.asarray(self.labelled.all(axis=1))

    def take(self, rows: Int[np.ndarray, " part"]) -> Outcomes:
        """The outcomes of the queries at `rows`, in this order."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "models"}
        taken = replace(self, **{name: array[rows] for name, array in arrays.items() if array is not None})
        if "prompt_digests" in self.__dict__:  # long prompts are not hashed again
            taken.__dict__["prompt_digests"] = [self.prompt_digests[row] for row in rows]
        return taken

    @cached_property
    def prompt_digests(self) -> list[str]:
        """The digest of each prompt (16 hex digits)."""
        return [prompt_digest(prompt) for prompt in self.prompts]

    @cached_property
    def prompt_bytes(self) -> Int[np.ndarray, " queries"]:
        """UTF-8 bytes of each prompt."""
        return np.array([len(prompt.encode("utf-8", "surrogatepass")) for prompt in self.prompts], dtype=np.int64)

    def digest(self) -> str:
        """sha256 of everything that training depends on: ids, benchmarks, groups, prompts, models, labels, token
        counts."""
        rows = (
            f"{q}\x1f{b}\x1f{g}\x1f{p}"
            for q, b, g, p in zip(self.query_ids, self.benchmarks, self.groups, self.prompt_digests, strict=True)
        )
        numbers = np.stack([self.shares, self.input_tokens, self.output_tokens]).astype(np.float32)
        return sha256_strings([*rows, *self.models, np.ascontiguousarray(numbers).tobytes().hex()])


def partitions(correct: Float[np.ndarray, "queries models"]) -> np.ndarray:
    """The partition of each query: `all-correct`, `all-incorrect`, `disagreement` or `undecided` (paper 5.2).

    A query with missing labels is in `disagreement` if its known labels differ, and else `undecided`.
    """
    some_right = np.any(correct == 1, axis=1)
    some_wrong = np.any(correct == 0, axis=1)
    complete = ~np.isnan(correct).any(axis=1)
    names = np.full(len(correct), "undecided", dtype=object)
    names[complete & ~some_wrong] = "all-correct"
    names[complete & ~some_right] = "all-incorrect"
    names[some_right & some_wrong] = "disagreement"
    return names


def read_outcomes(path: Path | str) -> pa.Table:
    """Reads and validates the columns `REQUIRED` and `OPTIONAL` of an outcomes file.

    Other columns are not read. Raises InputError as `validate_outcomes` does, or if the file is unreadable.
    """
    path = location(path)
    _check_names(column_names(path), str(path))
    return _validated(read_columns(path, list(KINDS), TEXT), str(path))


def read_note(path: Path | str) -> str | None:
    """The schema metadata `note` of an outcomes file, such as a notice of simulated data; None if it has none."""
    path = location(path)
    metadata = {} if path.is_dir() else pq.read_schema(readable(path)).metadata or {}
    return metadata[b"note"].decode(errors="replace") if b"note" in metadata else None


def validate_outcomes(table: pa.Table, source: str = "outcomes") -> pa.Table:
    """The table with the types of docs/data-formats.md. Strings are dictionary-encoded, other columns are unchanged.

    Raises InputError with column, row (0-based) and value for: a missing column or two of one name, a wrong type, text
    that is not UTF-8, a null that is not allowed, a label outside 0 to 1, a NaN, infinite or negative number, a
    repeated (query, model) pair, several prompts, benchmarks or groups of one query_id, or a table without rows.
    """
    _check_names(table.column_names, source)
    for name in TEXT:
        if name in table.column_names:
            index = table.column_names.index(name)
            table = table.set_column(index, name, encode_text(table.column(name), name, source))
    return _validated(table, source)


def _validated(table: pa.Table, source: str) -> pa.Table:
    """`validate_outcomes` of a table whose strings are encoded."""
    if table.num_rows == 0:
        raise InputError(f"{source}: the table has no rows; at least one is needed")
    for name, kind in KINDS.items():
        if name not in table.column_names:
            continue
        column = table.column(name)
        if kind != pa.string():
            column = _number(column.combine_chunks(), name, kind, source)
            table = table.set_column(table.column_names.index(name), name, column)
        elif not pa.types.is_dictionary(column.type) or not is_text(column.type):
            raise InputError(f"{source}: column {name!r} must hold strings, it holds {column.type}; convert it to text")
        if name not in NULLABLE and column.null_count:
            row = pc.index(column.is_null(), True).as_py()
            raise InputError(f"{source}: column {name!r}, row {row}: null is not allowed here")
    _check_pairs(table, source)
    for name in ("prompt", "benchmark", "group"):
        if name in table.column_names:
            _check_one_per_query(table, name, source)
    return table


def pivot(table: pa.Table, models: Sequence[str]) -> Outcomes:
    """Pivots a validated table to matrices over `models`, without the rows of other models.

    Queries with equal prompts are in one group. Raises InputError for a model without rows.
    """
    model_code, names = _codes(table, "model"), _values(table, "model")
    known = {name: code for code, name in enumerate(names)}
    for model in models:
        if model not in known:
            raise InputError(f"models: the pool's {model!r} has no rows in the outcomes; they have {', '.join(names)}")
    axis = np.full(len(names), -1)
    axis[[known[model] for model in models]] = np.arange(len(models))
    keep = axis[model_code] >= 0
    query_code = _codes(table, "query_id")
    present, first, row = np.unique(query_code[keep], return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # queries in order of first appearance
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    where = (place[row], axis[model_code[keep]])
    first_rows = np.flatnonzero(keep)[first[order]]

    def matrix(name: str) -> np.ndarray:
        values = np.full((len(present), len(models)), np.nan, dtype=np.float32)
        if name in table.column_names:
            values[where] = table.column(name).to_numpy(zero_copy_only=False).astype(np.float32)[keep]
        return values

    def strings(name: str) -> np.ndarray:
        values = np.asarray([*_values(table, name), None], dtype=object)
        return np.asarray(values[_codes(table, name)[first_rows]])  # the code of null is -1

    query_ids = strings("query_id")
    groups = strings("group") if "group" in table.column_names else query_ids
    groups = np.asarray([q if g is None else g for q, g in zip(query_ids, groups, strict=True)], dtype=object)
    shares = matrix("correct")
    fractional = bool(((shares > 0) & (shares < 1)).any())
    return Outcomes(
        query_ids,
        strings("benchmark"),
        strings("prompt"),
        join_groups(groups, _codes(table, "prompt")[first_rows]),
        tuple(models),
        np.where(np.isnan(shares), shares, shares >= HALF) if fractional else shares,
        matrix("input_tokens"),
        matrix("output_tokens"),
        shares if fractional else None,
    )


def load_outcomes(path: Path | str, pool: Pool) -> Outcomes:
    """Reads, validates and pivots an outcomes file to the models of the pool. Raises InputError as these steps do."""
    return pivot(read_outcomes(path), pool.names)


def read_of_queries(
    path: Path | str, column: str, query_ids: Sequence[str] | np.ndarray
) -> Float[np.ndarray, " queries"]:
    """An additional column of an outcomes table with one number in [0, 1] per query; NaN for a null or missing query.

    Raises InputError for a missing column, a value out of range, or two values of one query.
    """
    path = location(path)
    if column not in (names := column_names(path)):
        raise InputError(f"{path}: column {column!r} is missing; the table has {', '.join(names)}")
    table = read_columns(path, ["query_id", column], ["query_id"])
    codes, ids = _codes(table, "query_id"), _values(table, "query_id")
    found: dict[str, float] = {}
    for code, value in zip(codes, table.column(column).to_pylist(), strict=True):
        if value is None or code < 0:
            continue
        query_id = ids[code]
        if not isinstance(value, int | float | Decimal) or not 0 <= value <= 1:
            raise InputError(
                f"{path}: column {column!r}, query_id {query_id!r}: got {value!r}, allowed is a number in "
                "[0, 1] or null"
            )
        if found.setdefault(query_id, float(value)) != float(value):
            raise InputError(
                f"{path}: column {column!r}: query_id {query_id!r} has both {found[query_id]:g} and "
                f"{value:g}; one value per query is allowed"
            )
    return np.array([found.get(query_id, np.nan) for query_id in query_ids])


def unique_prompts(table: pa.Table) -> pa.Table:
    """The distinct (query_id, prompt) pairs of a validated table, in order of first appearance.

    Both are of type string; large_string if they have more than 2 GiB of text.
    """
    _, first = np.unique(_codes(table, "query_id"), return_index=True)
    rows = np.sort(first)
    return pa.table({name: decode_text(_encoded(table, name), rows) for name in ("query_id", "prompt")})


def _check_names(names: Sequence[str], source: str) -> None:
    for name in KINDS:
        if names.count(name) > 1:
            raise InputError(f"{source}: column {name!r} occurs {names.count(name)} times; keep one of them")
        if name in REQUIRED and name not in names:
            raise InputError(f"{source}: column {name!r} is missing; the file has {', '.join(map(str, names))}")


def _number(column: pa.Array, name: str, kind: pa.DataType, source: str) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (
        pa.types.is_integer(column.type)
        or pa.types.is_floating(column.type)
        or pa.types.is_decimal(column.type)
        or pa.types.is_boolean(column.type)
        or pa.types.is_null(column.type)
    ):
        raise InputError(f"{source}: column {name!r} must hold numbers, it holds {column.type}; convert it to numbers")
    values = column.cast(pa.float64(), safe=False)
    good, allowed = pc.and_(pc.is_finite(values), pc.greater_equal(values, 0)), "a finite number of at least 0"
    if name == "correct":
        good, allowed = pc.and_(good, pc.less_equal(values, 1)), "a number from 0 (wrong) to 1 (right)"
        if pc.all(pc.or_(pc.equal(values, pc.round(values)), pc.invert(good))).as_py() is False:
            kind = pa.float32()  # fractional labels
    allowed += ", or null if it is unknown"
    bad = pc.index(pc.fill_null(pc.or_(good, values.is_null()), True), False).as_py()
    if bad >= 0:
        raise InputError(f"{source}: column {name!r}, row {bad}: got {column[bad].as_py()}, allowed is {allowed}")
    try:
        return (column if pa.types.is_integer(column.type) else values).cast(kind)
    except pa.ArrowInvalid as error:
        raise InputError(f"{source}: column {name!r} does not fit {kind}: {error}") from None


def _encoded(table: pa.Table, name: str) -> pa.DictionaryArray:
    column = table.column(name)
    if column.num_chunks == 1 and pa.types.is_dictionary(column.type):
        return column.chunk(0)
    return encode_text(column, name, "outcomes")  # the caller has sliced or concatenated validated tables


def _codes(table: pa.Table, name: str) -> np.ndarray:
    """The code of the value in each row, -1 for null."""
    codes = pc.fill_null(_encoded(table, name).indices, -1).to_numpy(zero_copy_only=False)
    return np.asarray(codes, dtype=np.int64)


def _values(table: pa.Table, name: str) -> list[str]:
    """The distinct values of a column, in the order of the codes. Every call makes new strings."""
    values: list[str] = _encoded(table, name).dictionary.to_pylist()
    return values


def _check_pairs(table: pa.Table, source: str) -> None:
    query, ids = _codes(table, "query_id"), _values(table, "query_id")
    model, names = _codes(table, "model"), _values(table, "model")
    pair = query * len(names) + model
    _, first = np.unique(pair, return_index=True)
    if len(first) < len(pair):
        row = int(np.setdiff1d(np.arange(len(pair)), first)[0])
        raise InputError(
            f"{source}: row {row}: the pair (query_id {ids[query[row]]!r}, model {names[model[row]]!r}) "
            "is repeated; keep one row per pair"
        )


def _check_one_per_query(table: pa.Table, name: str, source: str) -> None:
    query, value = _codes(table, "query_id"), _codes(table, name)
    first = np.zeros(query.max(initial=-1) + 1, dtype=np.int64)
    first[query[::-1]] = value[::-1]  # the value in the first row of each query
    differs = np.flatnonzero(value != first[query])
    if len(differs):
        row = int(differs[0])
        query_id = _values(table, "query_id")[query[row]]
        raise InputError(
            f"{source}: column {name!r}, row {row}: query_id {query_id!r} has two different values; one {name} per "
            "query_id is allowed"
        )
