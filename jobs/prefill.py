"""Prefill job: prompts in, activations dataset out, over all the CPUs or GPUs of a Ray cluster.

In: any Parquet file with query_id and prompt (an outcomes table has them). Out: an activations dataset folder
(docs/data-formats.md). Started again after any interruption it encodes what is missing; over a finished
dataset it does nothing. Knows nothing of encoders' insides or file formats.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import ray
from pydantic import Field

from jobs.cli import JobConfig, main
from jobs.cluster import Cluster, answer, connect
from jobs.shards import input_prompts, write_shards
from prefill_router.errors import InputError
from prefill_router.prefill.backends import NOT_IDENTITY, encoder_class, load_encoder
from prefill_router.prefill.dataset import Manifest, read_activations
from prefill_router.prefill.encoder import EncoderConfig, EncoderInfo
from prefill_router.prefill.loading import EncoderShape, describe, locate, weights_digest
from prefill_router.prefill.shards import (
    Pin,
    estimate_bytes,
    finish,
    is_complete,
    open_dataset,
    read_pin,
    sample_prompts,
)

SAMPLE_ROWS = 64
SMALL = 250e6  # parameters


class PrefillConfig(JobConfig):
    """Configuration of the prefill job."""

    input: Annotated[Path, Field(description="Parquet file with query_id and prompt, an outcomes table for example")]
    output: Annotated[Path, Field(description="activations folder; on several nodes, on storage that all of them see")]
    encoder: EncoderConfig = EncoderConfig()
    rows_per_shard: Annotated[int, Field(ge=1, description="prompts of one task, and of one Parquet shard")] = 1024
    actors: Annotated[int | None, Field(ge=1, description="encoders at work; None: all that fit")] = None
    cpus_per_actor: Annotated[int | None, Field(ge=1, description="CPUs, and threads, of one encoder; None: 1 beside "
                                                                  "a GPU and for small models, else 8")] = None
    gpus_per_actor: Annotated[float | None, Field(ge=0, description="GPUs of one encoder; None: 1 where the cluster "
                                                                    "has any now, else 0")] = None


def run(config: PrefillConfig) -> str:
    """Reads every prompt with an encoder and keeps the pooled hidden states of its candidate layers."""
    prompts = input_prompts(config.input)
    shape = describe(config.encoder)
    if _is_done(config, prompts):
        manifest = read_activations(config.output).manifest
        return f"nothing to do: all {prompts.num_rows:,} prompts are in {config.output} ({_counts(manifest)})"
    cluster = connect()
    resources, actors = _resources(config, shape, cluster)
    info, loaded, tokens_per_s, seconds_per_prompt = answer(
        ray.remote(**resources)(_try_out).remote(config.encoder, sample_prompts(prompts, SAMPLE_ROWS)))
    pin = Pin(encoder=info, columns=shape.columns, config=config.model_dump(mode="json"))
    opened = open_dataset(config.output, pin, prompts)
    for name in opened.removed:
        print(f"prefill: {config.output / name} was cut off while it was written; removed, its rows are read again")
    if opened.there:
        print(f"prefill: {opened.there:,} of {prompts.num_rows:,} prompts are there already")
    started, rows = time.monotonic(), opened.pending.num_rows
    if rows:
        actors = min(actors, -(-rows // config.rows_per_shard))
        size = estimate_bytes(rows, len(shape.columns), shape.hidden_size, info.states_dtype)
        print(f"prefill: {info.architecture} {info.model}, {info.n_layers} blocks x {info.hidden_size}, "
              f"{info.attention}; {loaded}; columns {', '.join(shape.columns)}\n"
              f"prefill: {rows:,} prompts to read: {size / 2**20:,.1f} MiB to write, about "
              f"{rows * seconds_per_prompt / actors:,.0f} s with {actors} encoders of {resources['num_cpus']} CPUs and "
              f"{resources['num_gpus']:g} GPUs, {tokens_per_s:,.0f} tokens/s each", flush=True)
        _encode(config, opened.pending, resources, actors)
    manifest = finish(config.output, pin)
    if not is_complete(config.output, prompts):
        raise RuntimeError(f"{config.output}: rows are missing after the run; run the same command again")
    if manifest.counts.duplicates_after_truncation:
        print(f"prefill: warning: truncation to {info.max_length} tokens made "
              f"{manifest.counts.duplicates_after_truncation:,} different prompts equal to another")
    seconds = time.monotonic() - started
    return f"{rows:,} prompts read in {seconds:.0f} s into {config.output} ({_counts(manifest)})"


def _try_out(config: EncoderConfig, prompts: pa.Table) -> tuple[EncoderInfo, str, float, float]:
    """Who the encoder is, how much of it was loaded, and how fast it reads where the pool's will run: tokens/s, seconds
    per prompt."""
    encoder = load_encoder(config)
    encoder(prompts.slice(0, 1))  # the first call pays for allocations
    started = time.monotonic()
    tokens = sum(encoder(prompts).column("n_tokens").to_pylist())
    seconds = time.monotonic() - started
    return encoder.info, str(encoder.loaded), tokens / seconds, seconds / prompts.num_rows


def _is_done(config: PrefillConfig, prompts: pa.Table) -> bool:
    """Without starting Ray or loading a model: same configuration, same weights, every prompt there."""
    pin = read_pin(config.output, Pin)
    if pin is None:
        return False
    asked = config.encoder.model_dump(mode="json", exclude=NOT_IDENTITY)
    had = {key: value for key, value in pin.config["encoder"].items() if key not in NOT_IDENTITY}
    return asked == had and weights_digest(locate(config.encoder), config.encoder) == pin.encoder.weights_digest \
        and is_complete(config.output, prompts)


def _resources(config: PrefillConfig, shape: EncoderShape, cluster: Cluster) -> tuple[dict[str, Any], int]:
    """Ray resources of one encoder, and how many encoders to run."""
    gpus = config.gpus_per_actor if config.gpus_per_actor is not None else float(cluster.gpus > 0)
    # One thread each gets half as much again out of a core as two threads on one encoder; large models are not copied
    # for every core.
    cpus = config.cpus_per_actor or (1 if gpus or shape.block_parameters < SMALL else min(8, max(1, cluster.cpus)))
    if cluster.local and (gpus > cluster.gpus or cpus > cluster.cpus):
        raise InputError(f"cpus_per_actor, gpus_per_actor: an encoder would take {cpus} CPUs and {gpus:g} GPUs, here "
                         f"are {cluster.cpus} and {cluster.gpus}")
    fitting = min(cluster.cpus // cpus, int(cluster.gpus / gpus) if gpus else cluster.cpus)
    return {"num_cpus": cpus, "num_gpus": gpus}, config.actors or max(1, fitting)


def _encode(config: PrefillConfig, prompts: pa.Table, resources: dict[str, Any], actors: int) -> None:
    write_shards("prefill", config.output, prompts, encoder_class(config.encoder), config.encoder,
                 config.rows_per_shard, actors, resources)


def _counts(manifest: Manifest) -> str:
    counts = manifest.counts
    return (f"{counts.rows:,} rows, {counts.errors:,} without states, {counts.truncated_rows:,} truncated, "
            f"{counts.bytes / 2**20:,.1f} MiB, encoder {manifest.fingerprint}")


if __name__ == "__main__":
    main(PrefillConfig, run)
