"""Features job: prompts in, text features dataset out, over all the CPUs or GPUs of a Ray cluster.

In: any Parquet file with query_id and prompt (an outcomes table has them). Out: a text features dataset folder
(docs/data-formats.md): complexity, and perplexity where a language model is given. Started again after any interruption
it computes what is missing; over a finished dataset it does nothing. Knows nothing of features or file formats.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import ray
from pydantic import Field

from jobs.cli import main
from jobs.cluster import Cluster, answer, connect
from jobs.shards import input_prompts, write_shards
from prefill_router.config import FrozenModel
from prefill_router.prefill.loading import locate, weights_digest
from prefill_router.prefill.shards import is_complete, open_dataset, read_header
from prefill_router.semantic import complexity
from prefill_router.semantic.extraction import TextExtractor
from prefill_router.semantic.perplexity import PerplexityConfig
from prefill_router.semantic.text_features import (
    Family,
    FeaturesManifest,
    FeaturesPin,
    finish_features,
    read_text_features,
)

NOT_IDENTITY = {"batch_tokens", "device"}  # how fast, not what


class FeaturesConfig(FrozenModel):
    """Configuration of the features job."""

    input: Annotated[Path, Field(description="Parquet file with query_id and prompt, an outcomes table for example")]
    output: Annotated[Path, Field(description="features folder; on several nodes, on storage that all of them see")]
    perplexity: Annotated[PerplexityConfig | None, Field(description="language model; None: complexity only")] = None
    rows_per_shard: Annotated[int, Field(ge=1, description="prompts of one task, and of one Parquet shard")] = 1024
    actors: Annotated[int | None, Field(ge=1, description="extractors at work; None: all that fit")] = None
    gpus_per_actor: Annotated[
        float | None,
        Field(
            ge=0,
            description="GPUs of one extractor; None: 1 where a language "
            "model is given and the cluster has any, else 0",
        ),
    ] = None


def run(config: FeaturesConfig) -> str:
    """Computes complexity features of every prompt, and perplexity where --perplexity.model is given."""
    prompts = input_prompts(config.input)
    if _is_done(config, prompts):
        manifest = read_text_features(config.output).manifest
        return f"nothing to do: all {prompts.num_rows:,} prompts are in {config.output} ({_counts(manifest)})"
    resources, actors = _resources(config, connect())
    families = answer(ray.remote(**resources)(_families).remote(config.perplexity))
    header = FeaturesPin(families=families, config=config.model_dump(mode="json"))
    opened = open_dataset(config.output, header, prompts)
    for name in opened.removed:
        print(
            f"features: {config.output / name} was cut off while it was written; removed, its rows are computed again"
        )
    if opened.there:
        print(f"features: {opened.there:,} of {prompts.num_rows:,} prompts are there already")
    started, rows = time.monotonic(), opened.pending.num_rows
    if rows:
        actors = min(actors, -(-rows // config.rows_per_shard))
        print(f"features: {rows:,} prompts, {' and '.join(families)}, {actors} extractors", flush=True)
        _extract(config, opened.pending, resources, actors)
    manifest = finish_features(config.output, header)
    if not is_complete(config.output, prompts):
        raise RuntimeError(f"{config.output}: rows are missing after the run; run the same command again")
    seconds = time.monotonic() - started
    return f"features of {rows:,} prompts in {seconds:.0f} s into {config.output} ({_counts(manifest)})"


def _families(config: PerplexityConfig | None) -> dict[str, Family]:
    """What the pool's extractors will compute."""
    return TextExtractor(config).families


def _is_done(config: FeaturesConfig, prompts: pa.Table) -> bool:
    """Without starting Ray or loading a model: same configuration, same weights, every prompt there."""
    header = read_header(config.output, FeaturesPin)
    if header is None or header.families["complexity"].identity != {"version": complexity.VERSION}:
        return False
    asked, had = config.perplexity, header.config["perplexity"]
    if (asked is None) != (had is None):
        return False
    if asked is not None:
        same = asked.model_dump(mode="json", exclude=NOT_IDENTITY) == {
            key: value for key, value in had.items() if key not in NOT_IDENTITY
        }
        encoder = asked.as_encoder()
        if (
            not same
            or weights_digest(locate(encoder), encoder) != header.families["perplexity"].identity["weights_digest"]
        ):
            return False
    return is_complete(config.output, prompts)


def _resources(config: FeaturesConfig, cluster: Cluster) -> tuple[dict[str, Any], int]:
    """Ray resources of one extractor, and how many to run."""
    given = config.gpus_per_actor
    gpus = float(config.perplexity is not None and cluster.gpus > 0) if given is None else given
    return {"num_cpus": 1, "num_gpus": gpus}, config.actors or max(1, cluster.fitting(1, gpus))


def _extract(config: FeaturesConfig, prompts: pa.Table, resources: dict[str, Any], actors: int) -> None:
    write_shards(
        "features", config.output, prompts, TextExtractor, config.perplexity, config.rows_per_shard, actors, resources
    )


def _counts(manifest: FeaturesManifest) -> str:
    counts = manifest.counts
    return f"{counts.rows:,} rows, {counts.errors:,} without features, {counts.bytes / 2**20:,.1f} MiB"


if __name__ == "__main__":
    main(FeaturesConfig, run)
