"""A collection under faults and kills: whether every question is answered once, and what is spent.

In: the number of questions. A stub server with four models meets `faults` of the requests with 429, 500, dropped
streams, malformed chunks, answers without usage and slow tokens. The job runs with a budget of half the cost, is killed
with SIGKILL at three points (its own process twice, all of its processes once), and then ends with enough budget. Out:
answers that the server sent more than once, missing pairs, spending beyond the budget, and questions per second.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow.parquet as pq
import yaml
from pydantic import Field

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.files import write_json
from prefill_router.locations import LocalPath

ROOT = Path(__file__).parents[1]
MODELS = ("share-0.9", "share-0.7", "share-0.5", "share-0.3")
USD_PER_ANSWER = 2e-4  # 100 input tokens at 1 USD and 50 output tokens at 2 USD per million
KILLS = ((0.15, False), (0.3, True), (0.4, False))  # share of the answers, and whether all processes are killed


class CollectBenchmarkConfig(FrozenModel):
    """The size of the collection."""

    questions: Annotated[int, Field(ge=40, description="number of questions")] = 2000
    connections: Annotated[int, Field(ge=1, description="requests at a time")] = 64
    faults: Annotated[float, Field(ge=0, lt=1, description="share of requests that meet a fault")] = 0.2
    output: Annotated[LocalPath, Field(description="folder of the collection; emptied first")] = Path(
        "runs/benchmarks/collect"
    )


def run(config: CollectBenchmarkConfig) -> str:
    """Collect answers of a faulty server, kill the job three times, and count."""
    shutil.rmtree(config.output, ignore_errors=True)
    config.output.mkdir(parents=True)
    stub, url, answers = _stub(config)
    try:
        _write_inputs(config, url)
        total = config.questions * len(MODELS)
        cap = total * USD_PER_ANSWER / 2
        started, kills = time.monotonic(), list[dict[str, Any]]()
        for share, tree in KILLS:
            kills.append(_killed(config, answers, cap, round(share * total), tree))
        _job(config, cap).wait()
        at_cap = sum(_counts(answers).values())
        spent = _spent(config)
        _job(config, 10 * cap).wait()
        seconds = time.monotonic() - started
    finally:
        stub.kill()
        stub.wait()
    counts = _counts(answers)
    table = pq.read_table(config.output / "out/outcomes.parquet").to_pandas()
    figures = {
        "questions": config.questions,
        "models": len(MODELS),
        "connections": config.connections,
        "faults": config.faults,
        "pairs": total,
        "pairs_in_table": len(table),
        "rows_per_pair": int(table.groupby(["query_id", "model"]).size().max()),
        "answers_sent": sum(counts.values()),
        "sent_again": sum(counts.values()) - len(counts),
        "kills": kills,
        "cap_usd": cap,
        "spent_at_cap_usd": spent,
        "answers_at_cap": at_cap,
        "beyond_cap_answers": round((spent - cap) / USD_PER_ANSWER, 1),
        "seconds": seconds,
        "right": table.groupby("model").correct.mean().to_dict(),
        "estimated": int((table.tokens_from != "reported").sum()),
    }
    write_json(config.output / "collect.json", figures)
    return (
        f"{len(table):,} of {total:,} pairs answered; {figures['sent_again']} answers sent again after "
        f"{len(KILLS)} kills; {figures['beyond_cap_answers']} answers beyond the budget; {seconds:,.0f} s; "
        f"{config.output / 'collect.json'}"
    )


def _stub(config: CollectBenchmarkConfig) -> tuple[subprocess.Popen[bytes], str, Path]:
    port, answers = config.output / "port", config.output / "answers.jsonl"
    stub = subprocess.Popen([sys.executable, ROOT / "tests/stub_models.py", port, answers, str(config.faults)])
    while not port.exists():
        if stub.poll() is not None:
            raise InputError("tests/stub_models.py: the stub ended; run it by hand to see why")
        time.sleep(0.1)
    return stub, f"http://127.0.0.1:{port.read_text()}/v1", answers


def _write_inputs(config: CollectBenchmarkConfig, url: str) -> None:
    models = [
        {"name": name, "input_usd_per_mtok": 1.0, "output_usd_per_mtok": 2.0, "endpoint": {"base_url": url}}
        for name in MODELS
    ]
    (config.output / "pool.yaml").write_text(yaml.safe_dump({"models": models}))
    sums = [(number, number * 7 % 13) for number in range(config.questions)]
    lines = [json.dumps({"question": f"What is {a} + {b}?", "kind": "numeric", "answer": a + b}) for a, b in sums]
    (config.output / "sums.jsonl").write_text("\n".join(lines) + "\n")


def _job(config: CollectBenchmarkConfig, budget: float) -> subprocess.Popen[bytes]:
    folder = config.output
    arguments = {
        "pool": folder / "pool.yaml",
        "benchmarks": f"[{folder / 'sums.jsonl'}]",
        "output": folder / "out",
        "budget-usd": budget,
        "connections": config.connections,
    }
    given = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, "-m", "jobs.collect", *given], cwd=ROOT)


def _killed(config: CollectBenchmarkConfig, answers: Path, cap: float, after: int, tree: bool) -> dict[str, Any]:
    """Starts the job and kills it once `after` answers were sent; `tree`: with all of its processes."""
    job = _job(config, cap)
    while sum(_counts(answers).values()) < after:
        if job.poll() is not None:
            raise InputError(f"questions: the job ended before {after} answers; choose more questions")
        time.sleep(0.2)
    victims = [*psutil.Process(job.pid).children(recursive=True)] if tree else []
    job.kill()
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    job.wait()
    return {"answers": sum(_counts(answers).values()), "all_processes": tree}


def _counts(answers: Path) -> Counter[tuple[str, str]]:
    """Complete answers by (model, question)."""
    text = answers.read_text() if answers.exists() else ""
    return Counter((model, question) for model, question, *_ in map(json.loads, text.splitlines()))


def _spent(config: CollectBenchmarkConfig) -> float:
    lines = (config.output / "out/ledger.jsonl").read_text().splitlines()
    return sum(json.loads(line)["usd"] for line in lines)


if __name__ == "__main__":
    main(CollectBenchmarkConfig, run)
