"""RouterArena: predictions of routers (`predictions/ROUTER.json`) and answers of models (`cached_results/MODEL.jsonl`).

Its terms allow evaluation only: no part of a router may be trained on this data. The output says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefill_router.errors import InputError
from prefill_router.importing.answers import Answer
from prefill_router.importing.records import Record, beginning, json_lines

NAME = "router_arena"
TERMS = (
    "RouterArena is for evaluation only: its terms forbid training, fitting or tuning any part of a router on this "
    "data, label files included"
)


def matches(path: Path) -> bool:
    """Whether the file has predictions or cached results of RouterArena."""
    start = beginning(path)
    if path.suffix == ".json":
        return '"global index"' in start or ('"global_index"' in start and '"prediction"' in start)
    return path.suffix == ".jsonl" and '"global_index"' in start and '"llm_selected"' in start


def read(path: Path, metric: str | None = None) -> Iterator[Answer]:
    """The answers of a file; predictions without an answer are left out. Raises InputError for a broken record."""
    if metric is not None:
        raise InputError(f"metric: got {metric!r}, but {NAME} has one score for each answer; leave it out")
    for one in json_lines(path):
        index = one.text("global index", "global_index")
        if "llm_selected" in one.values:
            result, model, prompt = one, one.text("llm_selected"), one.text("question")
            verdict = one.part("evaluation_result")
            score, cost = verdict.number("score"), verdict.number("inference_cost")
        else:
            if one.values.get("generated_result") is None:
                continue
            result, model, prompt = one.part("generated_result"), one.text("prediction"), one.text("prompt")
            score, cost = one.number("accuracy"), one.number("cost")
        yield _answer(index, prompt, model, score, cost, result)


def _answer(index: str, prompt: str, model: str, score: float | None, cost: float | None, result: Record) -> Answer:
    tokens, failed = result.part("token_usage"), result.values.get("success") is False
    return Answer(
        index,
        index.rpartition("_")[0] or index,
        prompt,
        model,
        score,
        NAME,
        input_tokens=tokens.count("input_tokens"),
        output_tokens=tokens.count("output_tokens"),
        cost_usd=cost,
        answer=str(result.values.get("generated_answer") or "") or None,
        error=str(result.values.get("error") or "no success") if failed else None,
    )
