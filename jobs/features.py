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
import ray
from pydantic import Field

from jobs.shards import RowsPerShard, input_prompts, write_shards
from prefill_router.cli import main
from prefill_router.cluster import Cluster, answer, connect
from prefill_router.config import FrozenModel
from prefill_router.locations import Location
from prefill_router.prefill.loading import weights_digest
from prefill_router.prefill.locating import locate
from prefill_router.prefill.sample_check import check_sample, sample_prompts
from prefill_router.prefill.shards import (
    SAMPLE_ROWS,
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
    warning: str | None


def run(config: FeaturesConfig) -> str:
    """Compute complexity and perplexity features of every prompt."""
    if config.complexity_only:
        config = config.model_copy(update={"perplexity": None})
    prompts = input_prompts(config.input)
    if _is_finished(config, prompts):
        manifest = read_text_features(config.output).manifest
        return f"nothing to do: all {prompts.num_rows:,} prompts are in {config.output} ({_counts(manifest)})"
    resources, actors = _resources(config, connect())
    sample = sample_prompts(prompts, SAMPLE_ROWS)
    print(f"features: testing {sample.num_rows} prompts", flush=True)
    preflight = answer(ray.remote(**resources)(_preflight).remote(config.perplexity, sample))
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
        write_shards(
            "features", config.output, opened.pending, TextExtractor, config.perplexity, per_shard, actors, resources
        )
    manifest = finish_features(config.output, header)
    if not is_complete(config.output, prompts):
        raise RuntimeError(f"{config.output}: rows are missing after the run; run the same command again")
    seconds = time.monotonic() - started
    return f"features of {rows:,} prompts in {seconds:.0f} s into {config.output} ({_counts(manifest)})"


def _preflight(config: PerplexityConfig | None, sample: pa.Table) -> Preflight:
    """Computes the features of the sample. Raises InputError as `check_sample` does."""
    extractor = TextExtractor(config)
    started = time.perf_counter()
    errors = extractor(sample).column("error").to_pylist()
    seconds = (time.perf_counter() - started) / max(1, sample.num_rows)
    warning = check_sample(errors, "perplexity" if config else "input", TEXT_FEATURES.values)
    return Preflight(extractor.families, seconds, warning)


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
    main(FeaturesConfig, run)
