"""Features job: prompts in, text features dataset out, on all CPUs or GPUs of a Ray cluster.

In: a Parquet file with query_id and prompt, for example an outcomes table. Out: a text features dataset
(docs/data-formats.md): complexity, and perplexity unless it is switched off. After an interruption the same command
computes the missing rows; for a finished dataset it does nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from jobs.shards import (
    ROUNDS,
    TEST_TIMEOUT_S,
    RowsPerShard,
    ShardTimeout,
    check_space,
    input_prompts,
    load_limit,
    run_on_sample,
    write_shards,
)
from prefill_router.cli import main
from prefill_router.cluster import Cluster, connect, where
from prefill_router.config import FrozenModel
from prefill_router.locations import Location
from prefill_router.locks import locked
from prefill_router.prefill.isolation import Deadline, characters_per_prompt, ends_after
from prefill_router.prefill.loading import weights_digest
from prefill_router.prefill.locating import absence, locate
from prefill_router.prefill.sample_check import check_sample, sample_prompts
from prefill_router.prefill.shards import (
    ROW_BYTES,
    SAMPLE_ROWS,
    count_pending,
    is_complete,
    open_dataset,
    read_header,
    rows_of_shard,
)
from prefill_router.semantic import complexity
from prefill_router.semantic.extraction import TextExtractor
from prefill_router.semantic.perplexity import PerplexityConfig
from prefill_router.semantic.text_features import (
    TEXT_FEATURES,
    Family,
    FeaturesHeader,
    FeaturesManifest,
    finish_features,
    read_text_features,
)

VALUE_BYTES = 4  # float32
RUNTIME_FIELDS = {"batch_tokens", "device"}  # fields that change the speed but not the features


class FeaturesConfig(FrozenModel):
    """Configuration of the features job."""

    input: Annotated[
        Location, Field(description="Parquet file with query_id and prompt, for example an outcomes table")
    ]
    output: Annotated[
        Location, Field(description="features folder; for several nodes, on shared storage or in an object store")
    ]
    perplexity: Annotated[
        PerplexityConfig | None, Field(description="language model of the perplexity features; null: none")
    ] = PerplexityConfig()
    complexity_only: Annotated[bool, Field(description="no perplexity features, and so no language model")] = False
    rows_per_shard: RowsPerShard = None
    shard_timeout_s: ShardTimeout = None
    actors: Annotated[int | None, Field(ge=1, description="number of actors; None: as many as fit")] = None
    gpus_per_actor: Annotated[
        float | None,
        Field(
            ge=0,
            description="GPUs per actor; None: 1 if a language model is configured and the cluster has GPUs, else 0",
        ),
    ] = None


@dataclass(frozen=True)
class Preflight:
    """Result of a short test on the cluster: the computed feature families, an actor's speed, a warning of errors."""

    families: dict[str, Family]
    seconds_per_prompt: float
    characters_per_prompt: float
    warning: str | None


def plan(config: FeaturesConfig) -> list[str]:
    """What a dry run says: the pending prompts. Loads no model."""
    if config.complexity_only:
        config = config.model_copy(update={"perplexity": None})
    prompts = input_prompts(config.input)
    pending = count_pending(config.output, FeaturesHeader, prompts)
    first = None if config.perplexity is None else absence(config.perplexity.as_encoder())
    work = f"{pending:,} of {prompts.num_rows:,} prompts to compute"
    if not first and _is_finished(config, prompts):
        work = "finished, nothing to do"
    names = "complexity and perplexity" if config.perplexity else "complexity"
    return [f"computes {names}: {work}{f'; {first}' if first else ''}", f"costs the time of {where()}"]


def run(config: FeaturesConfig) -> str:
    """Compute complexity and perplexity features of every prompt."""
    if config.complexity_only:
        config = config.model_copy(update={"perplexity": None})
    prompts = input_prompts(config.input)
    if _is_finished(config, prompts):
        manifest = read_text_features(config.output).manifest
        return f"nothing to do: all {prompts.num_rows:,} prompts are in {config.output} ({_counts(manifest)})"
    with locked(config.output):
        return _compute(config, prompts)


def _compute(config: FeaturesConfig, prompts: pa.Table) -> str:
    resources, actors = _resources(config, connect())
    sample = sample_prompts(prompts, SAMPLE_ROWS)
    print(f"features: testing {sample.num_rows} prompts", flush=True)
    limit_s = config.shard_timeout_s or TEST_TIMEOUT_S
    preflight = run_on_sample("features", _preflight, config.perplexity, sample, resources, limit_s)
    if preflight.warning:
        print(f"features: warning: {preflight.warning}", flush=True)
    header = FeaturesHeader(families=preflight.families, config=config.model_dump(mode="json"))
    opened = open_dataset(config.output, header, prompts)
    for name in opened.removed_shards:
        print(f"features: {config.output / name} is damaged by an interrupted write; deleted, its rows are recomputed")
    if opened.n_present:
        print(f"features: {opened.n_present:,} of {prompts.num_rows:,} prompts already have features")
    started, rows = time.monotonic(), opened.pending.num_rows
    if rows:
        per_shard = config.rows_per_shard or rows_of_shard(preflight.seconds_per_prompt)
        actors = min(actors, -(-rows // per_shard))
        print(
            f"features: {rows:,} prompts, {' and '.join(preflight.families)}, about "
            f"{rows * preflight.seconds_per_prompt / actors:,.0f} s with {actors} actors",
            flush=True,
        )
        limit = Deadline(preflight.seconds_per_prompt, preflight.characters_per_prompt, config.shard_timeout_s)
        size = rows * (ROW_BYTES + VALUE_BYTES * sum(len(one.features) for one in preflight.families.values()))
        check_space({config.output: size})
        pending = opened.pending
        for _ in range(ROUNDS):
            write_shards(
                "features",
                config.output,
                pending,
                TextExtractor,
                config.perplexity,
                per_shard,
                actors,
                resources,
                None,
                limit,
                size,
            )
            pending = open_dataset(config.output, header, prompts).pending
            if not pending.num_rows:
                break
        else:
            raise RuntimeError(f"{config.output}: rows are missing after the run; run the same command again")
    manifest = finish_features(config.output, header)
    seconds = time.monotonic() - started
    return f"features of {rows:,} prompts in {seconds:.0f} s into {config.output} ({_counts(manifest)})"


def _preflight(config: PerplexityConfig | None, sample: pa.Table, limit_s: float = TEST_TIMEOUT_S) -> Preflight:
    """Computes the features of the sample. Raises InputError as `check_sample` does."""
    with ends_after(load_limit(limit_s)):
        extractor = TextExtractor(config)
    started = time.perf_counter()
    with ends_after(limit_s):
        errors = extractor(sample).column("error").to_pylist()
    seconds = (time.perf_counter() - started) / max(1, sample.num_rows)
    warning = check_sample(errors, "perplexity" if config else "input", TEXT_FEATURES.values)
    return Preflight(extractor.families, seconds, characters_per_prompt(sample), warning)


def _is_finished(config: FeaturesConfig, prompts: pa.Table) -> bool:
    """Whether the output holds all prompts, computed with the same configuration and weights. Loads no model."""
    header = read_header(config.output, FeaturesHeader)
    if header is None or header.families["complexity"].identity != {"version": complexity.VERSION}:
        return False
    requested, stored = config.perplexity, header.config["perplexity"]
    if (requested is None) != (stored is None):
        return False
    if requested is not None:
        same = requested.model_dump(mode="json", exclude=RUNTIME_FIELDS) == {
            key: value for key, value in stored.items() if key not in RUNTIME_FIELDS
        }
        encoder = requested.as_encoder()
        if (
            not same
            or weights_digest(locate(encoder), encoder) != header.families["perplexity"].identity["weights_digest"]
        ):
            return False
    return is_complete(config.output, prompts)


def _resources(config: FeaturesConfig, cluster: Cluster) -> tuple[dict[str, Any], int]:
    """Ray resources of one actor, and the number of actors."""
    given = config.gpus_per_actor
    gpus = float(config.perplexity is not None and cluster.gpus > 0) if given is None else given
    return {"num_cpus": 1, "num_gpus": gpus}, config.actors or max(1, cluster.fitting(1, gpus))


def _counts(manifest: FeaturesManifest) -> str:
    counts = manifest.counts
    return f"{counts.rows:,} rows, {counts.errors:,} without features, {counts.bytes / 2**20:,.1f} MiB"


if __name__ == "__main__":
    main(FeaturesConfig, run, plan=plan)
