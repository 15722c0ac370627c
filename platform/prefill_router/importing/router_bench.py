"""RouterBench's wide table: a row per question, and for each model its score, response and cost in USD.

In: a Parquet or CSV file with the columns `sample_id`, `prompt`, `eval_name`, and for each model MODEL,
`MODEL|model_response` and `MODEL|total_cost`. The published files are pickles, whose loading can run code: they are
refused, with the command that converts them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from prefill_router.errors import InputError
from prefill_router.importing.answers import Answer
from prefill_router.importing.tables import columns_of, rows_of

NAME = "router_bench"
COST, RESPONSE = "|total_cost", "|model_response"


def matches(path: Path) -> bool:
    """Whether the file is a wide table of RouterBench, or a pickle named like one."""
    if path.suffix == ".pkl":
        return path.name.startswith("routerbench")
    if path.suffix not in (".parquet", ".csv"):
        return False
    try:
        names = columns_of(path)
    except InputError:
        return False
    return {"sample_id", "prompt", "eval_name"} <= set(names) and any(name.endswith(COST) for name in names)


def read(path: Path, metric: str | None = None) -> Iterator[Answer]:
    """The answers of a table. Raises InputError for a pickle, and if a choice of `metric` is given: there is one."""
    if path.suffix == ".pkl":
        raise InputError(
            f"{path}: loading a pickle can run code; if you trust it, convert it in Python: "
            f"pandas.read_pickle('{path.name}').astype(str).to_csv('{path.stem}.csv', index=False)"
        )
    if metric is not None:
        raise InputError(f"metric: got {metric!r}, but {NAME} has one score for each answer; leave it out")
    models = [name.removesuffix(COST) for name in columns_of(path) if name.endswith(COST)]
    for row in rows_of(path):
        for model in models:
            yield Answer(
                row.text("sample_id"),
                row.text("eval_name"),
                _turns(row.text("prompt")),
                model,
                row.number(model),
                NAME,
                cost_usd=row.number(f"{model}{COST}"),
                answer=_turns(str(row.values.get(f"{model}{RESPONSE}") or "")) or None,
            )


def _turns(text: str) -> str:
    """The turns of a text that is the representation of a Python list, joined by newlines; other texts as they are."""
    if text.startswith("["):
        try:
            turns = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return text
        if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
            return "\n".join(turns)
    return text
