"""Any CSV, Parquet or JSON Lines file, by a mapping file that names its columns.

In: a `Mapping`. A long file has a row per answer and a column with the model; a wide one has a row per query and
columns for each model.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.importing.answers import Answer
from prefill_router.importing.records import Record, json_lines
from prefill_router.importing.tables import columns_of, rows_of

NAME = "mapped"

Column = Annotated[str, Field(min_length=1)]


class Columns(FrozenModel):
    """The columns of one answer."""

    score: Annotated[Column, Field(description="score of the answer, from score_min (wrong) to score_max (right)")]
    input_tokens: Annotated[Column | None, Field(description="input tokens")] = None
    output_tokens: Annotated[Column | None, Field(description="output tokens, those of reasoning included")] = None
    reasoning_tokens: Annotated[Column | None, Field(description="tokens of reasoning")] = None
    cost_usd: Annotated[Column | None, Field(description="cost of the answer, USD")] = None
    latency_s: Annotated[Column | None, Field(description="time of the answer, seconds")] = None
    answer: Annotated[Column | None, Field(description="text of the answer, to estimate tokens from")] = None


class Mapping(FrozenModel):
    """Names of columns. `columns` with `model` is for a long file, `models` for a wide one."""

    query_id: Annotated[Column, Field(description="id of the query")]
    prompt: Annotated[Column, Field(description="text of the query")]
    benchmark: Annotated[Column | None, Field(description="benchmark of the query; none: `benchmark_name`")] = None
    benchmark_name: Annotated[str, Field(min_length=1, description="benchmark of all queries")] = "imported"
    group: Annotated[Column | None, Field(description="group of the query")] = None
    model: Annotated[Column | None, Field(description="model of a long file")] = None
    columns: Annotated[Columns | None, Field(description="columns of a long file")] = None
    models: Annotated[dict[str, Columns] | None, Field(description="columns of a wide file, by model")] = None
    score_min: Annotated[float, Field(allow_inf_nan=False, description="score of a wrong answer")] = 0.0
    score_max: Annotated[float, Field(allow_inf_nan=False, description="score of a right answer")] = 1.0

    @model_validator(mode="after")
    def _long_or_wide(self) -> Mapping:
        long = self.model is not None and self.columns is not None
        if long == (self.models is not None) or (self.models is not None and (self.model or self.columns)):
            raise ValueError(
                "models: give either `model` and `columns` (a row per answer) or `models` (a row per query)"
            )
        if not self.score_min < self.score_max:
            raise ValueError(f"score_max: got {self.score_max:g}, it must be above score_min {self.score_min:g}")
        return self


def read(path: Path, mapping: Mapping) -> Iterator[Answer]:
    """The answers of a file. Raises InputError for a bad value, and a row without an id, a prompt or a model."""
    if path.suffix not in (".csv", ".parquet", ".jsonl", ".json"):
        raise InputError(f"{path}: a mapping reads .csv, .parquet, .jsonl and .json files")
    table = path.suffix in (".csv", ".parquet")
    seen = set(columns_of(path)) if table else set[str]()
    if table:
        _check_columns(path, mapping, seen)
    for row in rows_of(path) if table else json_lines(path):
        seen |= row.values.keys()
        if mapping.models is not None:
            for model, columns in mapping.models.items():
                if columns.score in row.values:
                    yield _answer(row, mapping, model, columns)
        else:
            assert mapping.model is not None
            assert mapping.columns is not None
            yield _answer(row, mapping, row.text(mapping.model), mapping.columns)
    _check_columns(path, mapping, seen)


def _check_columns(path: Path, mapping: Mapping, seen: Set[str]) -> None:
    """Raises InputError for a column of the mapping that the file does not have."""
    own = [mapping.columns] if mapping.columns is not None else list((mapping.models or {}).values())
    named = [mapping.query_id, mapping.prompt, mapping.benchmark, mapping.group, mapping.model]
    named += [name for columns in own for name in columns.model_dump().values()]
    missing = [name for name in named if name is not None and name not in seen]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}, which the mapping names; it has {', '.join(sorted(seen))}")


def _answer(row: Record, mapping: Mapping, model: str, columns: Columns) -> Answer:
    score = row.number(columns.score)
    if score is not None:
        score = (score - mapping.score_min) / (mapping.score_max - mapping.score_min)
    return Answer(
        row.text(mapping.query_id),
        mapping.benchmark_name if mapping.benchmark is None else row.text(mapping.benchmark),
        row.text(mapping.prompt),
        model,
        score,
        f"{NAME} {columns.score}",
        input_tokens=None if columns.input_tokens is None else row.count(columns.input_tokens),
        output_tokens=None if columns.output_tokens is None else row.count(columns.output_tokens),
        reasoning_tokens=None if columns.reasoning_tokens is None else row.count(columns.reasoning_tokens),
        cost_usd=None if columns.cost_usd is None else row.number(columns.cost_usd),
        latency_s=None if columns.latency_s is None else row.number(columns.latency_s),
        group=None if mapping.group is None or row.values.get(mapping.group) is None else row.text(mapping.group),
        answer=None if columns.answer is None or row.values.get(columns.answer) is None else row.text(columns.answer),
    )
