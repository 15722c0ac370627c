"""Labels from a decision log: feedback becomes rows of an outcomes table.

In: decisions of a log (decisions/log.py) with prompts and feedback, and earlier outcomes or none. Out: an outcomes
table (docs/data-formats.md). A decision gives one label, of the model that the feedback is about. The last feedback
counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prefill_router.decisions.log import rated_model
from prefill_router.errors import InputError
from prefill_router.files import prompt_digest
from prefill_router.outcomes.table import validate_outcomes

SCHEMA = pa.schema(
    {
        "query_id": pa.string(),
        "benchmark": pa.string(),
        "prompt": pa.string(),
        "model": pa.string(),
        "correct": pa.int8(),
        "input_tokens": pa.int32(),
        "output_tokens": pa.int32(),
        "cost_usd": pa.float64(),
        "latency_s": pa.float32(),
        "group": pa.string(),
    }
)


@dataclass(frozen=True)
class Learned:
    """An outcomes table, and how many decisions became labels of it, or why they did not."""

    table: pa.Table
    labels: int
    without_feedback: int
    without_prompt: int
    known: int  # decisions whose query and model have a label in the earlier outcomes, or from a later decision


def learn(
    log: Mapping[str, Mapping[str, Any]], benchmark: str, correct_from: float, before: pa.Table | None = None
) -> Learned:
    """The outcomes of a log, after the rows of `before`.

    An answer with a feedback score of at least `correct_from` is correct. Decisions with the same prompt are one query:
    its id is that of `before` if the prompt is there, else `log-` and the prompt's digest. A label of `before` is kept.
    `benchmark` is the benchmark of new queries. Raises InputError if no decision has a prompt and feedback.
    """
    ids: dict[str, tuple[str, str, str | None]] = {}
    known: set[tuple[str, str]] = set()
    if before is not None:
        columns = [before.column(name).to_pylist() for name in ("query_id", "benchmark", "prompt", "model", "correct")]
        groups = before.column("group").to_pylist() if "group" in before.column_names else [None] * len(before)
        for query, own, prompt, model, correct, group in zip(*columns, groups, strict=True):
            ids.setdefault(prompt_digest(prompt), (query, own, group))
            if correct is not None:
                known.add((query, model))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    without_feedback = without_prompt = repeated = 0
    for name, one in log.items():
        answer, feedback, model = one.get("answer", {}), one.get("feedback", []), rated_model(name, one)
        if not feedback or model is None:
            without_feedback += 1
            continue
        prompt = one["decision"].get("prompt")
        if prompt is None:
            without_prompt += 1
            continue
        digest = prompt_digest(prompt)
        query, own_benchmark, group = ids.setdefault(digest, (f"log-{digest}", benchmark, None))
        pair = query, model
        if pair in known or pair in rows:
            repeated += 1
        if pair in known:
            continue
        rows[pair] = {
            "query_id": query,
            "benchmark": own_benchmark,
            "prompt": prompt,
            "model": model,
            "correct": int(feedback[-1]["score"] >= correct_from),
            "input_tokens": _count(answer.get("input_tokens")),
            "output_tokens": _count(answer.get("output_tokens")),
            "cost_usd": answer.get("cost_usd"),
            "latency_s": answer.get("latency_s"),
            "group": group,
        }
    if not rows:
        raise InputError(
            f"log: none of its {len(log):,} decisions gives a label: {without_feedback:,} have no known model or "
            f"no feedback (POST /v1/feedback), {without_prompt:,} no prompt (gateway.log.prompts), {repeated:,} are in "
            "outcomes"
        )
    table = pa.Table.from_pylist(list(rows.values()), SCHEMA)
    if before is not None:
        kept = _without(before, set(rows))
        if pa.types.is_floating(kept.column("correct").type):  # fractional labels
            place = table.column_names.index("correct")
            table = table.set_column(place, "correct", table.column("correct").cast(pa.float32()))
        typed = [kept.column(name).cast(table.field(name).type) for name in kept.column_names]
        table = pa.concat_tables([pa.table(typed, kept.column_names), table], promote_options="default")
    validate_outcomes(table, "labels of the log")
    return Learned(table, len(rows), without_feedback, without_prompt, repeated)


def _count(tokens: int | None) -> int | None:
    return tokens if tokens is not None and tokens < 2**31 else None


def _without(table: pa.Table, pairs: set[tuple[str, str]]) -> pa.Table:
    """The rows of other (query, model) pairs: a null label gives way to a label of the log."""
    names = zip(table.column("query_id").to_pylist(), table.column("model").to_pylist(), strict=True)
    return table.filter(pa.array(np.array([pair not in pairs for pair in names], dtype=bool)))
