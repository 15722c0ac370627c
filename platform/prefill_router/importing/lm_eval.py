"""Samples of lm-evaluation-harness: `samples_TASK_DATE.jsonl` beside `results_DATE.json`, with `--log_samples`.

A line has no model, tokens, cost or time: the model is that of the results file, or the name of the folder. A line is
one answer through one filter: of several filters one is read. The prompt is the context of the first request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefill_router.errors import InputError
from prefill_router.importing.answers import Answer
from prefill_router.importing.records import Record, beginning, json_lines, json_object

NAME = "lm_eval"
ORDER = ("exact_match", "acc", "pass@1", "pass_at_1", "acc_norm")  # metrics that are read without a choice


def matches(path: Path) -> bool:
    """Whether the file has samples of lm-evaluation-harness."""
    start = beginning(path)
    return path.name.startswith("samples_") and path.suffix == ".jsonl" and '"doc_id"' in start


def read(path: Path, metric: str | None = None) -> Iterator[Answer]:
    """The answers of a file of samples. `metric`: METRIC or METRIC,FILTER as in the results; None: the first of ORDER.

    Without a filter, that of the first line is read. Raises InputError for an unknown metric or a broken line.
    """
    task, _, date = path.stem.removeprefix("samples_").rpartition("_")
    model = _model(path.with_name(f"results_{date}.json"), path.parent)
    name, _, wanted = (metric or "").partition(",")
    for one in json_lines(path):
        used = str(one.values.get("filter", "none"))
        wanted = wanted or used
        if used != wanted:
            continue
        name = name or _metric(one)
        if name not in one.values:
            raise InputError(
                f"{one.place}: no metric {name!r}; it has {', '.join(one.values.get('metrics', ())) or 'none'}"
            )
        yield Answer(
            f"{task}/{one.text('doc_id')}",
            task,
            _context(one),
            model,
            one.number(name),
            f"{NAME} {name},{wanted}",
            answer=_response(one.values.get("resps")),
        )


def _metric(one: Record) -> str:
    given = one.values.get("metrics")
    names = list(map(str, given)) if isinstance(given, list) else [name for name in ORDER if name in one.values]
    chosen = next((name for name in ORDER if name in names), None)
    if chosen is None:
        raise InputError(f"{one.place}: the metrics are {', '.join(names) or 'none'}; choose one as metric")
    return chosen


def _model(results: Path, folder: Path) -> str:
    if not results.exists():
        return folder.name.replace("__", "/")
    found = json_object(results)
    named = found.values.get("model_name")
    return str(named) if named else folder.name.replace("__", "/")


def _context(one: Record) -> str:
    """The context of the first request: of `{"gen_args_0": {"arg_0": ...}}`, or of the older `[[context, ...]]`."""
    arguments: Any = one.get("arguments")
    first = next(iter(arguments.values())) if isinstance(arguments, dict) and arguments else arguments
    if isinstance(first, dict):
        first = first.get("arg_0")
    while isinstance(first, list) and first:
        first = first[0]
    if not isinstance(first, str):
        raise InputError(f"{one.place}: 'arguments' has no text of a first request")
    if first.startswith("[{"):  # the messages of a chat, as JSON
        with suppress(ValueError, RecursionError, TypeError, KeyError):
            return "\n".join(message["content"] for message in json.loads(first) if message["role"] != "system")
    return first


def _response(given: Any) -> str | None:
    """The text of a generated answer; None for likelihoods of choices."""
    generated = isinstance(given, list) and len(given) == 1 and isinstance(given[0], list) and len(given[0]) >= 1
    return given[0][0] if generated and isinstance(given[0][0], str) else None
