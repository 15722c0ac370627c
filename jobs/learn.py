"""Learn job: a server's decision log with feedback in, an outcomes table out, for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.decisions.learn import Learned, learn
from prefill_router.decisions.log import read_decisions
from prefill_router.errors import InputError
from prefill_router.files import write_parquet
from prefill_router.locations import LocalPath, Location
from prefill_router.outcomes.table import read_note, read_outcomes
from prefill_router.text_columns import read_columns


class LearnConfig(FrozenModel):
    """The log, earlier outcomes, and the meaning of feedback."""

    log: Annotated[LocalPath, Field(description="folder of the decision log, gateway.log.folder of the server")]
    output: Annotated[Location, Field(description="outcomes file to write (Parquet)")]
    outcomes: Annotated[
        Location | None, Field(description="earlier outcomes, written before the labels of the log; None: none")
    ] = None
    benchmark: Annotated[str, Field(min_length=1, description="benchmark of queries that are not in outcomes")] = "log"
    correct_from: Annotated[
        float, Field(gt=0, le=1, description="feedback score from which an answer counts as correct")
    ] = 0.5


def plan(config: LearnConfig) -> list[str]:
    """What a dry run says. Raises InputError as `run` does for the log and the outcomes."""
    log, learned = _learned(config)
    return [
        f"writes {learned.labels:,} labels of {len(log):,} decisions, {learned.table.num_rows:,} rows in all",
        "costs nothing but the time of this machine",
    ]


def run(config: LearnConfig) -> str:
    """Turn the feedback of a decision log into outcomes."""
    log, learned = _learned(config)
    note = None if config.outcomes is None else read_note(config.outcomes)
    write_parquet(config.output, learned.table.replace_schema_metadata(None if note is None else {"note": note}))
    return (
        f"{learned.labels:,} labels of {len(log):,} decisions in {config.output} ({learned.table.num_rows:,} rows); "
        f"left out: {learned.without_feedback:,} without a known model or feedback, {learned.without_prompt:,} without "
        f"prompt, {learned.known:,} repeated"
    )


def _learned(config: LearnConfig) -> tuple[dict[str, dict[str, Any]], Learned]:
    """The log, and the outcomes that it gives."""
    if config.outcomes == config.output:
        raise InputError(f"output: got {config.output}, the file of outcomes; choose another file")
    log = read_decisions(config.log)
    before = None if config.outcomes is None else _earlier(config.outcomes)
    return log, learn(log, config.benchmark, config.correct_from, before)


def _earlier(path: Path) -> pa.Table:
    """Validated outcomes with their costs and latencies."""
    table = read_outcomes(path)
    more = read_columns(path, ["cost_usd", "latency_s"], [])
    for name in more.column_names:
        table = table.append_column(name, more.column(name))
    return table


if __name__ == "__main__":
    main(LearnConfig, run, plan=plan)
