"""Prefill job: prompts in, activations datasets out, over all the CPUs or GPUs of a Ray cluster.

In: any Parquet file with query_id and prompt (an outcomes table has them). Out: an activations dataset folder
(docs/data-formats.md), or one for each of several encoders. Started again after any interruption it encodes what is
missing; over a finished dataset it does nothing. Knows nothing of encoders' insides or file formats.
"""

from __future__ import annotations

import re
import statistics
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field, model_validator

from jobs.cli import main
from jobs.cluster import Cluster, answer, connect
from jobs.placement import ActorPool, place
from jobs.shards import input_prompts, write_shards
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.prefill.backends import NOT_IDENTITY, current_digest, encoder_class, load_encoder
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import Manifest, read_activations
from prefill_router.prefill.encoder import EncoderInfo
from prefill_router.prefill.loading import EncoderShape, describe
from prefill_router.prefill.shards import (
    ActivationsHeader,
    Opened,
    estimate_bytes,
    finish,
    is_complete,
    open_dataset,
    read_header,
    sample_prompts,
)

SAMPLE_ROWS = 64
ROUNDS, ROUNDS_S = 3, 10.0  # turns of the try-out, and seconds after which none is begun
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class PrefillConfig(FrozenModel):
    """Configuration of the prefill job."""

    input: Annotated[Path, Field(description="Parquet file with query_id and prompt, an outcomes table for example")]
    output: Annotated[Path, Field(description="activations folder; on several nodes, on storage that all of them see")]
    encoder: EncoderConfig = EncoderConfig()
    encoders: Annotated[
        dict[str, EncoderConfig] | None,
        Field(description="several encoders by name, in place of encoder; the activations of each in OUTPUT/NAME"),
    ] = None
    rows_per_shard: Annotated[int, Field(ge=1, description="prompts of one task, and of one Parquet shard")] = 1024
    actors: Annotated[
        int | None, Field(ge=1, description="encoders at work; None: all that fit, and 1 for a server")
    ] = None
    cpus_per_actor: Annotated[
        int | None,
        Field(
            ge=1,
            description="CPUs, and threads, of one encoder; None: 1 for each GPU, for small models and servers, else 8",
        ),
    ] = None
    gpus_per_actor: Annotated[
        float | None,
        Field(
            ge=0,
            description="GPUs of one encoder; None: where the cluster has any now tensor_parallel_size, 0.25 for "
            "small models under transformers, else 1; 0 without GPUs and for servers",
        ),
    ] = None

    @model_validator(mode="after")
    def _one_way_to_name_encoders(self) -> PrefillConfig:
        if self.encoders is None:
            return self
        if "encoder" in self.model_fields_set:
            raise ValueError("encoder and encoders are both given; with encoders, set everything under encoders.NAME")
        if not self.encoders:
            raise ValueError("encoders: there are none; allowed is one at least, or no encoders at all")
        for name in self.encoders:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"encoders: {name!r} cannot be a folder's name here; allowed are letters, digits, "
                    "`.`, `_` and `-`, the first a letter or digit"
                )
        return self

    @property
    def datasets(self) -> dict[str, PrefillConfig]:
        """By name, what makes each dataset as if it were the only one. The only one has no name."""
        if self.encoders is None:
            return {"": self}
        return {
            name: self.model_copy(update={"encoder": encoder, "encoders": None, "output": self.output / name})
            for name, encoder in self.encoders.items()
        }


@dataclass(frozen=True)
class Preflight:
    """Who the encoder is, how much of it was loaded, and how fast it reads where the pool's will run."""

    info: EncoderInfo
    loaded: str
    tokens_per_s: float
    seconds_per_prompt: float
    bare_tokens_per_s: float | None  # of its forward pass alone; None where that is not known

    @property
    def speed(self) -> str:
        share = (
            f", {self.tokens_per_s / self.bare_tokens_per_s:.2f} of the bare forward" if self.bare_tokens_per_s else ""
        )
        return f"{self.tokens_per_s:,.0f} tokens/s each{share}"


@dataclass(frozen=True)
class Plan:
    """A dataset that is open, with what is still to be read into it and by whom."""

    label: str
    config: PrefillConfig
    pool: ActorPool
    preflight: Preflight
    header: ActivationsHeader
    opened: Opened


def run(config: PrefillConfig) -> str:
    """Reads every prompt with an encoder, or several, and keeps the pooled hidden states of its candidate layers."""
    prompts = input_prompts(config.input)
    if config.encoders is not None and read_header(config.output, ActivationsHeader) is not None:
        raise InputError(
            f"{config.output}: holds the activations of one encoder; choose another output folder for those of several"
        )
    datasets = config.datasets
    shapes = {name: describe(one.encoder) for name, one in datasets.items()}
    missing = [name for name, one in datasets.items() if not _is_done(one, prompts)]
    where = str(config.output) if config.encoders is None else f"{config.output}/{{{','.join(datasets)}}}"
    if not missing:
        return f"nothing to do: all {prompts.num_rows:,} prompts are in {where} ({_counts(datasets)})"
    cluster = connect()
    # All are tried out before any reads: what is wrong with the last one shows before the first has taken its hours.
    plans = [_plan(name, datasets[name], shapes[name], cluster, prompts) for name in missing]
    started = time.monotonic()
    # One after the other, each over the whole cluster: the throughput is the same, and a node holds one encoder's
    # weights at a time.
    for plan in plans:
        _read(plan, prompts)
    rows, seconds = sum(plan.opened.pending.num_rows for plan in plans), time.monotonic() - started
    by = f" by {len(plans)} encoders" if len(plans) > 1 else ""
    return f"{rows:,} prompts read{by} in {seconds:.0f} s into {where} ({_counts(datasets)})"


def _plan(name: str, config: PrefillConfig, shape: EncoderShape, cluster: Cluster, prompts: pa.Table) -> Plan:
    """Tries the encoder out and opens its dataset. Raises InputError for whatever keeps it from being read into."""
    label = f"prefill {name}".strip()
    pool = place(config.encoder, shape, cluster, config.actors, config.cpus_per_actor, config.gpus_per_actor)
    if not cluster.fitting(pool.cpus, pool.gpus):
        print(f"{label}: no node has {pool.resources_text} now; waiting for one", flush=True)
    preflight = answer(
        ray.remote(**pool.resources)(_preflight).remote(pool.encoder, sample_prompts(prompts, SAMPLE_ROWS))
    )
    header = ActivationsHeader(encoder=preflight.info, columns=shape.columns, config=config.model_dump(mode="json"))
    opened = open_dataset(config.output, header, prompts)
    for shard in opened.removed:
        print(f"{label}: {config.output / shard} was cut off while it was written; removed, its rows are read again")
    if opened.there:
        print(f"{label}: {opened.there:,} of {prompts.num_rows:,} prompts are there already")
    if rows := opened.pending.num_rows:
        info, pool = preflight.info, replace(pool, actors=min(pool.actors, -(-rows // config.rows_per_shard)))
        size = estimate_bytes(rows, len(shape.columns), shape.hidden_size, info.states_dtype)
        print(
            f"{label}: {info.architecture} {info.model}, {info.n_layers} blocks x {info.hidden_size}, "
            f"{info.attention}; {info.backend}; {preflight.loaded}; columns {', '.join(shape.columns)}\n"
            f"{label}: {rows:,} prompts to read: {size / 2**20:,.1f} MiB to write, about "
            f"{rows * preflight.seconds_per_prompt / pool.actors:,.0f} s with {pool.actors} encoders of "
            f"{pool.resources_text}, {preflight.speed}",
            flush=True,
        )
    return Plan(label, config, pool, preflight, header, opened)


def _read(plan: Plan, prompts: pa.Table) -> None:
    """Reads what is missing and finishes the dataset."""
    config = plan.config
    if plan.opened.pending.num_rows:
        _encode(plan, plan.opened.pending)
    counts = finish(config.output, plan.header).counts
    if not is_complete(config.output, prompts):
        raise RuntimeError(f"{config.output}: rows are missing after the run; run the same command again")
    if counts.duplicates_after_truncation:
        print(
            f"{plan.label}: warning: truncation to {plan.preflight.info.max_length} tokens made "
            f"{counts.duplicates_after_truncation:,} different prompts equal to another"
        )


def _encode(plan: Plan, prompts: pa.Table) -> None:
    pool = plan.pool
    write_shards(
        plan.label,
        plan.config.output,
        prompts,
        encoder_class(pool.encoder),
        pool.encoder,
        plan.config.rows_per_shard,
        pool.actors,
        pool.resources,
        plan.preflight.bare_tokens_per_s,
    )


def _preflight(config: EncoderConfig, prompts: pa.Table) -> Preflight:
    """Reads the prompts and runs the bare forward pass over them by turns, so that a slow moment slows both."""
    with closing(load_encoder(config)) as encoder:  # an engine of its own would keep its GPU from the pool's
        encoder(prompts.slice(0, 1))  # the first call pays for allocations
        encoder.bare_seconds(prompts.slice(0, 1))
        reading: list[float] = []
        bare: list[float | None] = []
        began = time.perf_counter()
        while not reading or (len(reading) < ROUNDS and time.perf_counter() - began < ROUNDS_S):
            started = time.perf_counter()
            rows = encoder(prompts)
            reading.append(time.perf_counter() - started)
            bare.append(encoder.bare_seconds(prompts))
    tokens = pc.sum(pc.subtract(rows.column("n_tokens"), rows.column("n_dropped"))).as_py() or 0
    seconds, known = statistics.median(reading), [one for one in bare if one is not None]
    return Preflight(
        encoder.info,
        str(encoder.loaded),
        tokens / seconds,
        seconds / prompts.num_rows,
        tokens / statistics.median(known) if known else None,
    )


def _is_done(config: PrefillConfig, prompts: pa.Table) -> bool:
    """Without starting Ray or loading a model: same configuration, same weights, every prompt there."""
    header = read_header(config.output, ActivationsHeader)
    if header is None:
        return False
    asked = config.encoder.model_dump(mode="json", exclude=NOT_IDENTITY)
    had = {key: value for key, value in header.config["encoder"].items() if key not in NOT_IDENTITY}
    return (
        asked == had
        and current_digest(config.encoder) == header.encoder.weights_digest
        and is_complete(config.output, prompts)
    )


def _counts(datasets: dict[str, PrefillConfig]) -> str:
    """Of finished datasets, summed up."""
    manifests: list[Manifest] = [read_activations(one.output).manifest for one in datasets.values()]
    counts = [manifest.counts for manifest in manifests]
    return (
        f"{sum(one.rows for one in counts):,} rows, {sum(one.errors for one in counts):,} without states, "
        f"{sum(one.truncated_rows for one in counts):,} truncated, "
        f"{sum(one.bytes for one in counts) / 2**20:,.1f} MiB, "
        f"{'encoder' if len(manifests) == 1 else 'encoders'} {', '.join(one.fingerprint for one in manifests)}"
    )


if __name__ == "__main__":
    main(PrefillConfig, run)
