"""Inputs of the layer search, training and evaluation: an outcomes table, a pool, and activations datasets, joined."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.locations import Location
from prefill_router.outcomes.duplicates import count_equal, near_duplicates
from prefill_router.outcomes.splits import Scheme, Split, split_queries
from prefill_router.outcomes.table import load_outcomes
from prefill_router.pool import Pool, load_pool
from prefill_router.prefill.adapter import MANIFEST, recorded_adapter, seen_prompts
from prefill_router.prefill.dataset import read_activations
from prefill_router.signals.join import Signals, join


class SignalsConfig(FrozenModel):
    """Paths of the inputs and of the output folder."""

    outcomes: Annotated[Location, Field(description="outcomes table, a Parquet file")]
    pool: Annotated[Location, Field(description="pool of target models, a YAML file")]
    activations: Annotated[
        tuple[Location, ...], Field(min_length=1, description="activations datasets: a folder or a list of folders")
    ]
    output: Annotated[Location, Field(description="output folder")]

    @field_validator("activations", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value


def load_signals(config: SignalsConfig) -> tuple[Pool, Signals]:
    """Reads and joins the inputs, and prints their size and the number of queries with equal prompts.

    Raises InputError as the readers and `join` do.
    """
    pool = load_pool(config.pool)
    signals = join(load_outcomes(config.outcomes, pool), [read_activations(folder) for folder in config.activations])
    outcomes = signals.outcomes
    print(
        f"{len(outcomes):,} queries x {len(pool.models)} models, {int(outcomes.labelled.sum()):,} labels, "
        f"{len(signals.layer_keys)} candidate layers",
        flush=True,
    )
    if signals.left_out:
        print(f"{len(signals.left_out):,} queries without states are left out, the first: {signals.left_out[0]}")
    if equal := count_equal(outcomes.prompt_digests):
        print(f"{equal:,} queries have the prompt of another query; queries with equal prompts are in one group")
    return pool, signals


def note_fallback_only(pool: Pool) -> None:
    """Prints a warning that names the models with `fallback_only`, which fit and evaluation treat as candidates."""
    if names := [model.name for model in pool.models if model.fallback_only]:
        print(
            f"warning: fallback_only of {', '.join(names)} does not hold in fit and evaluation: decisions of these "
            "figures treat them as candidates",
            flush=True,
        )


def split_signals(signals: Signals, seed: int, scheme: Scheme) -> Split:
    """Splits the queries and prints the sizes of the parts and the number of near-duplicates across parts.

    Raises InputError as `check_adapters` does.
    """
    split = split_queries(signals.outcomes, seed, scheme)
    check_adapters(signals, split)
    print(
        f"split {scheme}, seed {seed}: {len(split.train):,} train, {len(split.calibration):,} calibration, "
        f"{len(split.test):,} test",
        flush=True,
    )
    if near := near_duplicates(signals.outcomes.prompts, (split.train, split.calibration, split.test)):
        print(
            f"{near:,} queries have a near-duplicate in another part: the prompts differ only in case, punctuation or "
            "white space; give them one `group` to keep them together",
            flush=True,
        )
    return split


def check_adapters(signals: Signals, split: Split) -> None:
    """Raises InputError if the training of an encoder's adapter read prompts of the calibration or test part.

    Raises InputError as well if neither the dataset nor the adapter's folder has the digests of these prompts.
    """
    digests = signals.outcomes.prompt_digests
    held_out = [digests[row] for row in (*split.calibration, *split.test)]
    for dataset in signals.activations.values():
        digest, folder = dataset.encoder.adapter, dataset.encoder_config.adapter
        if digest is None or folder is None:
            continue
        manifest = recorded_adapter(dataset.folder, folder, digest)
        if manifest is None:
            raise InputError(
                f"adapter: {folder} no longer holds the adapter of encoder {dataset.fingerprint}, so that the queries "
                f"of its training are unknown; copy its {MANIFEST} to {dataset.folder}"
            )
        if seen := seen_prompts(manifest, held_out):
            raise InputError(
                f"seed: the training of the adapter {folder} read {seen:,} of the {len(held_out):,} calibration and "
                "test queries of this split; use the seed and scheme of its adapter.json, or train another adapter"
            )


def refuse_adapters(signals: Signals, field: str, remedy: str) -> None:
    """Raises InputError if an encoder has an adapter: its training read labels of every benchmark.

    `field` is the setting of leave-one-benchmark-out, `remedy` switches it off.
    """
    for dataset in signals.activations.values():
        if dataset.encoder.adapter is not None:
            raise InputError(
                f"{field}: encoder {dataset.fingerprint} has an adapter, whose training read labels of the benchmark "
                f"to leave out; {remedy}, or use activations without adapter"
            )
