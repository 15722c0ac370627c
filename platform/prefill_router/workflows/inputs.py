"""The inputs that probe, train and evaluate share: an outcomes table, a pool, activations datasets; joined.

Configuration and plumbing only; the joining is `prefill_router.signals.join`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from prefill_router.config import FrozenModel
from prefill_router.outcomes.splits import Scheme, Split, split_queries
from prefill_router.outcomes.table import load_outcomes
from prefill_router.pool import Pool, load_pool
from prefill_router.prefill.dataset import read_activations
from prefill_router.signals.join import Signals, join


class SignalsConfig(FrozenModel):
    """Where the inputs are."""

    outcomes: Annotated[Path, Field(description="outcomes table, a Parquet file")]
    pool: Annotated[Path, Field(description="pool.yaml with the target models")]
    activations: Annotated[tuple[Path, ...], Field(min_length=1, description="activations datasets: a path, or a list")]
    output: Annotated[Path, Field(description="folder to write")]

    @field_validator("activations", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value


def load(config: SignalsConfig) -> tuple[Pool, Signals]:
    """Reads and joins; says how much there is and what was left out."""
    pool = load_pool(config.pool)
    signals = join(load_outcomes(config.outcomes, pool), [read_activations(folder) for folder in config.activations])
    outcomes = signals.outcomes
    print(
        f"{len(outcomes):,} queries x {len(pool.models)} models, {int(outcomes.labelled.sum()):,} labels, "
        f"{len(signals.layer_keys)} candidate blocks",
        flush=True,
    )
    if signals.left_out:
        print(f"left out {len(signals.left_out):,} queries without states, the first: {signals.left_out[0]}")
    return pool, signals


def split(signals: Signals, seed: int, scheme: Scheme) -> Split:
    """The split, announced."""
    parts = split_queries(signals.outcomes, seed, scheme)
    print(
        f"split {scheme}, seed {seed}: {len(parts.train):,} train, {len(parts.calibration):,} calibration, "
        f"{len(parts.test):,} test",
        flush=True,
    )
    return parts
