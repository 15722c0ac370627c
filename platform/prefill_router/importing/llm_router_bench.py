"""LLMRouterBench: `DATASET/SPLIT/MODEL/TIME.json`, one file per data set and model, with a record per question.

Data set, split and model are in the path only. Of several files of one model the newest is read (the last in
alphabetical order), and the others are left out. The cost 0 is read as unknown: models without a price have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefill_router.errors import InputError
from prefill_router.importing.answers import Answer
from prefill_router.importing.records import Record, beginning, json_object

NAME = "llm_router_bench"


def matches(path: Path) -> bool:
    """Whether the file is one of LLMRouterBench."""
    start = beginning(path)
    return path.suffix == ".json" and '"records"' in start and '"performance"' in start


def read(path: Path, metric: str | None = None) -> Iterator[Answer]:
    """The answers of a file. Raises InputError for a broken file, and if `metric` is given: there is one score."""
    if metric is not None:
        raise InputError(f"metric: got {metric!r}, but {NAME} has one score for each answer; leave it out")
    if path.name != max(one.name for one in path.parent.glob("*.json") if matches(one)):
        return
    if len(path.absolute().parts) < 5:
        raise InputError(f"{path}: expected a path that ends in DATASET/SPLIT/MODEL/FILE.json")
    dataset, split, model = path.absolute().parts[-4:-1]
    records = json_object(path).get("records")
    if not isinstance(records, list):
        raise InputError(f"{path}: 'records' must be a list")
    for number, values in enumerate(records):
        if not isinstance(values, dict):
            raise InputError(f"{path}: record {number} must be an object")
        one = Record(values, f"{path}, record {number}")
        cost = one.number("cost")
        yield Answer(
            f"{dataset}/{split}/{one.text('index')}",
            dataset,
            one.text("prompt", "origin_query"),
            model,
            one.number("score"),
            NAME,
            input_tokens=one.count("prompt_tokens"),
            output_tokens=one.count("completion_tokens"),
            cost_usd=cost or None,
            answer=str(one.values["raw_output"]) if one.values.get("raw_output") else None,
        )
