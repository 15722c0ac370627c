"""Answers of models, as files of evaluations record them, and the outcomes table that they make.

In: an iterator of `Answer`. Out: an outcomes table (docs/data-formats.md), one row per (query, model). Several answers
of a model to a query make one row, with their mean score. Knows no format of files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from prefill_router.errors import InputError


@dataclass(frozen=True)
class Answer:
    """One answer of a model to a query.

    `score`: 0 wrong to 1 right; None: not scored. `scored_by`: what gave the score, such as a metric or a scorer.
    `output_tokens` include `reasoning_tokens`. `cost_usd` in USD, `latency_s` in seconds. None: not recorded.
    `tokens_from`: where the token counts are from.
    """

    query_id: str
    benchmark: str
    prompt: str
    model: str
    score: float | None
    scored_by: str
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost_usd: float | None = None
    latency_s: float | None = None
    group: str | None = None
    answer: str | None = None  # its text, from which tokens can be estimated
    stop: str | None = None  # why it ended, such as stop or max_tokens
    parsed: bool | None = None  # whether a final answer was found in its text
    error: str | None = None  # why there is no answer
    tokens_from: str = "reported"

    def estimated(self, count: Callable[[str], int], name: str) -> Answer:
        """The answer with estimates of the token counts that are missing, by `count`, the counter called `name`."""
        inputs = count(self.prompt) if self.input_tokens is None else self.input_tokens
        outputs = self.output_tokens
        if outputs is None and self.answer is not None:
            outputs = count(self.answer)
        if (inputs, outputs) == (self.input_tokens, self.output_tokens):
            return self
        return replace(self, input_tokens=inputs, output_tokens=outputs, tokens_from=f"estimated with {name}")


@dataclass
class _Mean:
    """The mean of the values that are not None; None without any."""

    total: float = 0.0
    count: int = 0

    def add(self, value: int | float | None) -> None:
        if value is not None:
            self.total += value
            self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


NUMBERS = ("score", "input_tokens", "output_tokens", "reasoning_tokens", "cost_usd", "latency_s")


@dataclass
class _Row:
    answers: int = 0
    scored_by: set[str] = field(default_factory=set)
    tokens_from: set[str] = field(default_factory=set)
    stop: set[str] = field(default_factory=set)
    parsed: bool | None = None
    text: str | None = None
    means: dict[str, _Mean] = field(default_factory=lambda: {name: _Mean() for name in NUMBERS})


@dataclass(frozen=True)
class Imported:
    """An outcomes table, and the answers that are not in it, by reason."""

    table: pa.Table
    answers: int
    failed: int  # answers with an error: no row
    unscored: int  # rows whose `correct` is null

    @property
    def summary(self) -> str:
        """One line about the table."""
        columns = {name: len(set(self.table.column(name).to_pylist())) for name in ("query_id", "model", "benchmark")}
        return (
            f"{self.answers:,} answers, {self.table.num_rows:,} rows: {columns['query_id']:,} queries, "
            f"{columns['model']:,} models, {columns['benchmark']:,} benchmarks; {self.failed:,} answers failed, "
            f"{self.unscored:,} rows have no score"
        )


def outcomes_of(answers: Iterable[Answer], correct_from: float | None = None, texts: bool = False) -> Imported:
    """The outcomes table of `answers`, in order of first appearance.

    `correct` and `score` are the mean score of the answers, null if none is scored; with `correct_from`, `correct` is 1
    from this mean on, else 0. `answers` is their number, `scored_by` the scorers, `tokens_from` the sources of token
    counts, which are rounded means. `stop` says why the answers ended, and `parsed` whether every one of them had a
    final answer; the columns are there if an answer has a value. With `texts` the column `answer` is the text of the
    first answer. Raises InputError for a score outside 0 to 1, two prompts or benchmarks of one
    query, and if there is no answer.
    """
    queries: dict[str, tuple[str, str, str | None]] = {}
    rows: dict[tuple[str, str], _Row] = {}
    n_answers = failed = 0
    for one in answers:
        n_answers += 1
        if one.error is not None:
            failed += 1
            continue
        if one.score is not None and not 0 <= one.score <= 1:  # also NaN
            raise InputError(
                f"score: got {one.score:g} for {one.model!r} and query {one.query_id!r}, allowed is 0 to 1; choose "
                "another metric, or a scale in a mapping file"
            )
        for name in NUMBERS:
            value = getattr(one, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(
                    f"{name}: got {value:g} for {one.model!r} and query {one.query_id!r}, allowed is 0 or more"
                )
        if not _is_text(one.prompt):
            raise InputError(f"prompt: that of query {one.query_id!r} has characters that no UTF-8 text can have")
        about = (one.benchmark, one.prompt, one.group)
        if (known := queries.setdefault(one.query_id, about)) != about:
            which = next(
                name for name, a, b in zip(("benchmark", "prompt", "group"), known, about, strict=True) if a != b
            )
            raise InputError(
                f"query_id: {one.query_id!r} has two values of {which}; import the files with different questions one "
                "by one, or give the queries other ids"
            )
        row = rows.setdefault((one.query_id, one.model), _Row())
        row.answers += 1
        row.scored_by.add(one.scored_by)
        if one.input_tokens is not None or one.output_tokens is not None:
            row.tokens_from.add(one.tokens_from)
        if one.stop is not None:
            row.stop.add(one.stop)
        if one.parsed is not None:
            row.parsed = one.parsed and row.parsed is not False
        if texts and row.text is None:
            row.text = one.answer
        for name, mean in row.means.items():
            mean.add(getattr(one, name))
    if not rows:
        raise InputError(f"input: {n_answers:,} answers, and none without an error; check the files")
    scores = [row.means["score"].value for row in rows.values()]

    def rounded(name: str) -> pa.Array:
        values = [row.means[name].value for row in rows.values()]
        return pa.array([None if value is None else math.floor(value + 0.5) for value in values], pa.int32())

    def joined(name: str) -> pa.Array:
        return pa.array([", ".join(sorted(getattr(row, name))) or None for row in rows.values()], pa.string())

    of_query = [queries[query_id] for query_id, _ in rows]
    columns = {
        "query_id": pa.array([query_id for query_id, _ in rows], pa.string()),
        "benchmark": pa.array([benchmark for benchmark, _, _ in of_query], pa.string()),
        "prompt": pa.array([prompt for _, prompt, _ in of_query], pa.string()),
        "model": pa.array([model for _, model in rows], pa.string()),
        "correct": _labels(scores, correct_from),
        "score": pa.array(scores, pa.float32()),
        "answers": pa.array([row.answers for row in rows.values()], pa.int32()),
        "scored_by": joined("scored_by"),
        "input_tokens": rounded("input_tokens"),
        "output_tokens": rounded("output_tokens"),
        "reasoning_tokens": rounded("reasoning_tokens"),
        "tokens_from": joined("tokens_from"),
        "cost_usd": pa.array([row.means["cost_usd"].value for row in rows.values()], pa.float64()),
        "latency_s": pa.array([row.means["latency_s"].value for row in rows.values()], pa.float32()),
    }
    if any(group is not None for _, _, group in of_query):
        columns["group"] = pa.array([group for _, _, group in of_query], pa.string())
    if any(row.stop for row in rows.values()):
        columns["stop"] = joined("stop")
    if any(row.parsed is not None for row in rows.values()):
        columns["parsed"] = pa.array([row.parsed for row in rows.values()], pa.bool_())
    if texts:
        columns["answer"] = pa.array([row.text for row in rows.values()], pa.string())
    return Imported(pa.table(columns), n_answers, failed, sum(score is None for score in scores))


def _labels(scores: Sequence[float | None], correct_from: float | None) -> pa.Array:
    """The labels: int8 if all are 0 or 1, else float32."""
    if correct_from is not None:
        scores = [None if score is None else float(score >= correct_from) for score in scores]
    whole = all(score in (None, 0.0, 1.0) for score in scores)
    return pa.array(scores, pa.float32()).cast(pa.int8() if whole else pa.float32())


def _is_text(value: str) -> bool:
    """Whether the string can be written as UTF-8: a file of JSON may have half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
