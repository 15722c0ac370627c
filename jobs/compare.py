"""Compares evaluations on the same test set: a table, comparison.json and comparison.html."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.locations import Location
from prefill_router.metrics.compare import compare, read_runs
from prefill_router.reports.comparison import as_text, headline, write_comparison


class CompareConfig(FrozenModel):
    """The evaluations to compare, and the reference."""

    runs: Annotated[
        tuple[Location, ...],
        Field(json_schema_extra={"positional": True}, description="output folders of jobs.evaluate; at least two"),
    ] = ()
    output: Annotated[Location, Field(description="output folder")] = Path("runs/compare")
    resamples: Annotated[int, Field(ge=0, description="bootstrap resamples of the test queries, by group")] = 1000
    seed: Annotated[int, Field(ge=0, description="seed of the bootstrap")] = 0
    reference: Annotated[
        str | None, Field(description="run or router that the others are compared with; null: the first run")
    ] = None


def plan(config: CompareConfig) -> list[str]:
    """What a dry run says. Raises InputError as `run` does for evaluations that cannot be compared."""
    read_runs(config.runs)
    return [f"costs nothing but the time of this machine: {config.resamples:,} resamples"]


def run(config: CompareConfig) -> str:
    """Compare evaluations on the same test set, with paired differences. Different test sets are refused."""
    runs = read_runs(config.runs)
    comparison = compare(runs, n_resamples=config.resamples, seed=config.seed, reference=config.reference)
    page = write_comparison(config.output, comparison)
    print(as_text(comparison))
    return f"{headline(comparison)}; page: {page}"


if __name__ == "__main__":
    main(CompareConfig, run, plan=plan)
