"""Labels job: an outcomes table in, a page, figures and a list of its suspicious labels out. Nothing is changed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import sha256_file
from prefill_router.locations import Location
from prefill_router.outcomes.quality.check import check_labels
from prefill_router.outcomes.quality.table import OPTIONAL, TEXT, label_table
from prefill_router.outcomes.table import read_note, read_outcomes
from prefill_router.pool import load_pool
from prefill_router.progress import tqdm
from prefill_router.reports.labels_page import summary, write_labels
from prefill_router.text_columns import read_columns
from prefill_router.version import code_version


class LabelsConfig(FrozenModel):
    """The outcomes to check, and the models."""

    outcomes: Annotated[Location, Field(description="outcomes table, a Parquet file")]
    output: Annotated[Location, Field(description="output folder")] = Path("runs/labels")
    pool: Annotated[
        Location | None, Field(description="pool of target models, a YAML file; null: all models of the table")
    ] = None


def plan(config: LabelsConfig) -> list[str]:
    """What a dry run says. Raises InputError as `run` does for the outcomes and the pool."""
    models = None if config.pool is None else load_pool(config.pool).names
    rows = read_outcomes(config.outcomes).num_rows
    of = "all models" if models is None else f"{len(models)} models"
    return [f"costs nothing but the time of this machine: {rows:,} labels of {of}"]


def run(config: LabelsConfig) -> str:
    """Report suspicious labels of an outcomes table."""
    models = None if config.pool is None else load_pool(config.pool).names
    table = read_outcomes(config.outcomes)
    more = read_columns(config.outcomes, list(OPTIONAL), TEXT)
    for name in more.column_names:
        table = table.append_column(name, more.column(name))
    quality = check_labels(label_table(table, models), partial(tqdm, desc="labels", unit=" checks"))
    note = read_note(config.outcomes)
    provenance = {
        **({} if note is None else {"notice": note}),
        **{name: None if value is None else str(value) for name, value in config},
        "outcomes_sha256": None if config.outcomes.is_dir() else sha256_file(config.outcomes),
        "code_version": code_version(),
    }
    page = write_labels(config.output, quality, provenance)
    return f"{summary(quality)}; page: {page}"


if __name__ == "__main__":
    main(LabelsConfig, run, plan=plan)
