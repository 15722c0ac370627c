"""An outcomes table with its optional columns about answers, pivoted to matrices for the checks of labels.

In: a validated outcomes table (`outcomes.table.validate_outcomes`) that may have the columns `OPTIONAL`. Out:
`LabelTable`, with arrays on the axes `queries` (order of first appearance) and `models`. Knows nothing of files.

parsed        bool, null unknown: false if no final answer was found in the text. With several answers in a row: false
              if none was found in at least one of them
stop          text, null unknown: why generation stopped: stop, max_tokens, content_filter, ... With several answers in
              a row: their distinct reasons, joined by ", "
answer        text, null unknown: the answer itself. With several answers in a row: the first of them
judge_scores  list of numbers from 0 to 1, null unknown: the scores that several judges gave to one answer
answers       number, null unknown: the answers whose mean score is `correct`
scored_by     text, null unknown: the metric, scorer or judge that made the label
tokens_from   text, null unknown: the source of the token counts
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from prefill_router.errors import InputError
from prefill_router.outcomes.table import HALF, Outcomes, pivot
from prefill_router.text_columns import encode_text

TEXT = ("stop", "answer", "scored_by", "tokens_from")
OPTIONAL = ("parsed", "answers", "judge_scores", *TEXT)


@dataclass(frozen=True)
class Texts:
    """A text column: `values[code]` for each (query, model), code -1 for no text. `values` are distinct strings."""

    codes: Int[np.ndarray, "queries models"]
    values: pa.Array

    @property
    def known(self) -> Bool[np.ndarray, "queries models"]:
        """Whether there is a text."""
        return np.asarray(self.codes >= 0)

    def where(self, flags: Bool[np.ndarray, " values"]) -> Bool[np.ndarray, "queries models"]:
        """Whether the value of each pair is flagged; False without a text."""
        return np.asarray(np.append(flags, False)[self.codes])

    def is_in(self, wanted: Collection[str]) -> Bool[np.ndarray, "queries models"]:
        """Whether a part of the text is one of `wanted`, in any case. Parts are joined by ", "."""
        parts = [value.lower().split(", ") for value in self.values.to_pylist()]
        return self.where(np.array([any(part in wanted for part in one) for one in parts], dtype=bool))

    def at(self, query: int, model: int) -> str | None:
        """The text of a pair; None without one."""
        code = int(self.codes[query, model])
        return None if code < 0 else str(self.values[code].as_py())


@dataclass(frozen=True)
class Judges:
    """Scores of several judges by (query, model): their number, and how many are at least one half."""

    count: Int[np.ndarray, "queries models"]
    right: Int[np.ndarray, "queries models"]


@dataclass(frozen=True)
class LabelTable:
    """Outcomes and optional columns. None: the table has no such column. NaN in a matrix: unknown.

    `has_row` says whether the table has a row for the pair; its label may be null. `parsed` is 1 or 0.
    """

    outcomes: Outcomes
    has_row: Bool[np.ndarray, "queries models"]
    parsed: Float[np.ndarray, "queries models"] | None = None
    answers: Float[np.ndarray, "queries models"] | None = None
    judges: Judges | None = None
    stop: Texts | None = None
    answer: Texts | None = None
    scored_by: Texts | None = None
    tokens_from: Texts | None = None

    @property
    def models(self) -> tuple[str, ...]:
        return self.outcomes.models

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """The benchmarks in alphabetical order."""
        return tuple(sorted(set(self.outcomes.benchmarks)))

    @property
    def of_benchmark(self) -> Int[np.ndarray, " queries"]:
        """The position of each query's benchmark in `benchmarks`."""
        place = {name: number for number, name in enumerate(self.benchmarks)}
        return np.array([place[name] for name in self.outcomes.benchmarks], dtype=np.int64)

    @property
    def columns(self) -> tuple[str, ...]:
        """The optional columns that the table has."""
        present = {
            "judge_scores" if name == "judges" else name for name, value in vars(self).items() if value is not None
        }
        return tuple(name for name in OPTIONAL if name in present)


def label_table(table: pa.Table, models: Sequence[str] | None = None) -> LabelTable:
    """Pivots a validated table to the models, by default all models in order of first appearance.

    Raises InputError for a model without rows, an optional column of a wrong type, and a value out of range.
    """
    model_column = encode_text(table.column("model"), "model", "outcomes")
    outcomes = pivot(table, model_column.dictionary.to_pylist() if models is None else models)
    query = _places(encode_text(table.column("query_id"), "query_id", "outcomes"), outcomes.query_ids)
    model = _places(model_column, outcomes.models)
    rows = np.flatnonzero((query >= 0) & (model >= 0))
    row_of = np.full(outcomes.correct.shape, -1)
    row_of[query[rows], model[rows]] = rows
    texts = {name: _texts(table, name, row_of) for name in TEXT if name in table.column_names}
    parsed, answers = (
        _numbers(table, name, row_of) if name in table.column_names else None for name in ("parsed", "answers")
    )
    if parsed is not None and not np.isin(parsed[np.isfinite(parsed)], (0, 1)).all():
        raise InputError("outcomes: column 'parsed' has values other than 0 and 1; allowed are true, false and null")
    judges = _judges(table.column("judge_scores"), row_of) if "judge_scores" in table.column_names else None
    return LabelTable(outcomes, row_of >= 0, parsed, answers, judges, **texts)


def _places(column: pa.DictionaryArray, names: Sequence[str] | np.ndarray) -> Int[np.ndarray, " rows"]:
    """The position of each row's value in `names`, -1 if it is not there."""
    place = {name: number for number, name in enumerate(names)}
    of_value = np.array([place.get(value, -1) for value in column.dictionary.to_pylist()], dtype=np.int64)
    return np.asarray(of_value[column.indices.to_numpy(zero_copy_only=False)])


def _texts(table: pa.Table, name: str, row_of: np.ndarray) -> Texts:
    encoded = encode_text(table.column(name), name, "outcomes")
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return Texts(np.append(codes, -1)[row_of], encoded.dictionary)


def _numbers(table: pa.Table, name: str, row_of: np.ndarray) -> Float[np.ndarray, "queries models"]:
    column = table.column(name)
    try:
        values = column.cast(pa.float64())
    except pa.ArrowException:
        values = None
    if values is None or pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raise InputError(f"outcomes: column {name!r} must hold numbers or booleans, it holds {column.type}; convert it")
    return np.append(values.to_numpy().astype(np.float64), np.nan)[row_of]


def _judges(column: pa.ChunkedArray, row_of: np.ndarray) -> Judges:
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # a table without chunks
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], pa.list_(pa.float64()))
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)) or not (
        pa.types.is_floating(lists.type.value_type) or pa.types.is_integer(lists.type.value_type)
    ):
        raise InputError(
            f"outcomes: column 'judge_scores' must hold lists of numbers, it holds {lists.type}; convert it"
        )
    scores = lists.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False)
    row = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    known = np.isfinite(scores)
    if (bad := np.flatnonzero(known & ((scores < 0) | (scores > 1)))).size:
        raise InputError(
            f"outcomes: column 'judge_scores', row {row[bad[0]]}: got {scores[bad[0]]:g}, allowed are numbers from 0 "
            "to 1; divide them by the largest score"
        )
    counts = [np.bincount(row[chosen], minlength=len(lists)) for chosen in (known, known & (scores >= HALF))]
    count, right = (np.append(values, 0)[row_of] for values in counts)
    return Judges(count, right)
