"""Writers of outcomes in the layouts of other evaluations, for round trips through jobs.import."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]  # of an outcomes table


def write_lm_eval(rows: Sequence[Row], folder: Path) -> None:
    """`MODEL/samples_TASK_DATE.jsonl` with two filters, and `MODEL/results_DATE.json`."""
    date = "2026-01-05T10-00-00.123456"
    for (model, benchmark), own in by(rows, "model", "benchmark").items():
        place = folder / model.replace("/", "__")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"results_{date}.json").write_text(json.dumps({"model_name": model, "results": {}}))
        lines = []
        for row in own:
            for kind, score in (("strict-match", row["correct"]), ("flexible-extract", 1)):
                arguments = {"gen_args_0": {"arg_0": row["prompt"], "arg_1": {"until": ["\n"]}}}
                line = {"doc_id": row["query_id"], "doc": {}, "target": "7", "arguments": arguments, "filter": kind}
                metric = {"exact_match": score, "metrics": ["exact_match"]}
                lines.append(line | {"resps": [["It is 7."]], "filtered_resps": ["7"]} | metric)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (place / f"samples_{benchmark}_{date}.jsonl").write_text(text)


def write_llm_router_bench(rows: Sequence[Row], folder: Path) -> None:
    """`DATASET/test/MODEL/TIME.json`, and an older file of a shorter run, which does not count."""
    for (model, benchmark), own in by(rows, "model", "benchmark").items():
        place = folder / benchmark / "test" / model
        place.mkdir(parents=True, exist_ok=True)
        records = [
            {
                "index": row["query_id"],
                "origin_query": row["prompt"],
                "prompt": row["prompt"],
                "prediction": "7",
                "ground_truth": "7",
                "score": row["correct"],
                "prompt_tokens": row["input_tokens"],
                "completion_tokens": row["output_tokens"],
                "cost": row["cost_usd"],
                "raw_output": "It is 7.",
            }
            for row in own
        ]
        for name, kept in (
            ("20260105_100000", records),
            ("20260101_100000", [records[0] | {"score": 1 - (records[0]["score"] or 0)}]),
        ):
            (place / f"{name}.json").write_text(json.dumps({"performance": 0.5, "time_taken": 1.0, "records": kept}))


def write_router_bench(rows: Sequence[Row], path: Path) -> None:
    """The wide table as CSV."""
    models = sorted({row["model"] for row in rows})
    with path.open("w", newline="", encoding="utf-8") as file:
        names = ["sample_id", "prompt", "eval_name", *models, *(f"{m}|model_response" for m in models)]
        writer = csv.DictWriter(file, [*names, *(f"{m}|total_cost" for m in models), "oracle_model_to_route_to"])
        writer.writeheader()
        for (query_id,), own in by(rows, "query_id").items():
            line = {"sample_id": query_id, "prompt": repr([own[0]["prompt"]]), "eval_name": own[0]["benchmark"]}
            for row in own:
                line[row["model"]] = row["correct"]
                line[f"{row['model']}|model_response"] = "['It is 7.']"
                line[f"{row['model']}|total_cost"] = row["cost_usd"]
            writer.writerow(line)


def write_router_arena(rows: Sequence[Row], folder: Path) -> None:
    """Cached results of every model but the last, and the predictions of a router that always takes the last."""
    models = sorted({row["model"] for row in rows})
    (folder / "cached_results").mkdir(parents=True)
    predictions = []
    for row in rows:
        usage = {"input_tokens": row["input_tokens"], "output_tokens": row["output_tokens"], "total_tokens": 0}
        result = {"generated_answer": "It is 7.", "success": True, "token_usage": usage, "provider": "x", "error": None}
        if row["model"] != models[-1]:
            line = {"global_index": row["query_id"], "question": row["prompt"], "llm_selected": row["model"], **result}
            verdict = {"score": row["correct"], "metric": "mcq_accuracy", "inference_cost": row["cost_usd"]}
            with (folder / "cached_results" / f"{row['model']}.jsonl").open("a") as file:
                file.write(f"{json.dumps(line | {'evaluation_result': verdict})}\n")
        else:
            line = {"global index": row["query_id"], "prompt": row["prompt"], "prediction": row["model"]}
            figures = {"cost": row["cost_usd"], "accuracy": row["correct"], "for_optimality": False}
            predictions.append(line | {"generated_result": result} | figures)
    (folder / "router.json").write_text(json.dumps(predictions, indent=2))


def write_inspect(rows: Sequence[Row], folder: Path) -> None:
    """Logs of inspect_ai by its own writer, one for each model and benchmark."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalSample, EvalSpec, write_eval_log
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput, ModelUsage
    from inspect_ai.scorer import Score

    folder.mkdir(parents=True, exist_ok=True)
    for (model, benchmark), own in by(rows, "model", "benchmark").items():
        samples = []
        for row in own:
            usage = ModelUsage(
                input_tokens=row["input_tokens"] - 1,
                input_tokens_cache_read=1,
                output_tokens=row["output_tokens"],
                total_cost=row["cost_usd"],
            )
            value = float("nan") if row["correct"] is None else "CI"[1 - row["correct"]]
            samples.append(
                EvalSample(
                    id=row["query_id"],
                    epoch=1,
                    input=row["prompt"],
                    target="7",
                    messages=[ChatMessageUser(content=row["prompt"]), ChatMessageAssistant(content="7")],
                    output=ModelOutput.from_content(model, "It is 7."),
                    scores={"match": Score(value=value)},
                    model_usage={model: usage},
                    working_time=row["latency_s"],
                    total_time=99.0,
                )
            )
        spec = EvalSpec(
            created="2026-01-05T10:00:00+00:00",
            task=f"own/{benchmark}",
            dataset=EvalDataset(),
            model=model,
            config=EvalConfig(),
        )
        log = EvalLog(status="success", eval=spec, samples=samples)
        write_eval_log(log, str(folder / f"2026-01-05T10-00-00_{benchmark}_{model}.eval"))


def by(rows: Sequence[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by the values of the columns `names`."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups
