"""Prefill job: prompts in, activations datasets out, on all CPUs or GPUs of a Ray cluster.

In: a Parquet file with query_id and prompt, for example an outcomes table. Out: one activations dataset per encoder
(docs/data-formats.md). After an interruption the same command encodes the missing prompts; for a finished dataset it
does nothing.
"""

from __future__ import annotations

import re
import statistics
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from jobs.placement import ActorPool, place
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
from prefill_router.errors import InputError
from prefill_router.locations import Location
from prefill_router.locks import locked
from prefill_router.prefill.adapter import read_manifest
from prefill_router.prefill.backends import RUNTIME_FIELDS, current_digest, encoder_class, load_encoder
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import ACTIVATIONS, Manifest, read_activations
from prefill_router.prefill.encoder import EncoderInfo, with_recorded_limit
from prefill_router.prefill.isolation import Deadline, characters_per_prompt, ends_after
from prefill_router.prefill.loading import EncoderShape, describe
from prefill_router.prefill.locating import absence
from prefill_router.prefill.sample_check import check_sample, sample_prompts
from prefill_router.prefill.shards import (
    SAMPLE_ROWS,
    ActivationsHeader,
    OpenedDataset,
    count_pending,
    estimate_bytes,
    finish,
    is_complete,
    open_dataset,
    read_header,
    rows_of_shard,
)

PREFLIGHT_ROUNDS, PREFLIGHT_S = 3, 10.0  # maximum rounds, and seconds after which no further round starts
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class PrefillConfig(FrozenModel):
    """Configuration of the prefill job."""

    input: Annotated[
        Location, Field(description="Parquet file with query_id and prompt, for example an outcomes table")
    ]
    output: Annotated[
        Location, Field(description="activations folder; for several nodes, on shared storage or in an object store")
    ]
    encoder: EncoderConfig = EncoderConfig()
    encoders: Annotated[
        dict[str, EncoderConfig] | None,
        Field(description="several encoders by name, instead of encoder; each writes to OUTPUT/NAME"),
    ] = None
    rows_per_shard: RowsPerShard = None
    shard_timeout_s: ShardTimeout = None
    actors: Annotated[
        int | None, Field(ge=1, description="number of actors; None: as many as fit, 1 for backend vllm_server")
    ] = None
    cpus_per_actor: Annotated[
        int | None,
        Field(
            ge=1,
            description="CPUs and threads per actor; None: 1 per GPU, 1 for small models and vllm_server, else up to 8",
        ),
    ] = None
    gpus_per_actor: Annotated[
        float | None,
        Field(
            ge=0,
            description="GPUs per actor; None: tensor_parallel_size if above 1, 0.25 for small transformers models, "
            "else 1; 0 for vllm_server and if the cluster has no GPU now",
        ),
    ] = None

    @model_validator(mode="after")
    def _check_encoders(self) -> PrefillConfig:
        if self.encoders is None:
            return self
        if "encoder" in self.model_fields_set:
            raise ValueError("encoder and encoders are both given; move the settings of encoder to encoders.NAME")
        if not self.encoders:
            raise ValueError("encoders: got no encoder; give at least one, or leave the field out")
        for name in self.encoders:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"encoders: {name!r} is not a valid name of an output folder; allowed are letters, digits, "
                    "`.`, `_` and `-`, starting with a letter or digit"
                )
        return self

    @property
    def datasets(self) -> dict[str, PrefillConfig]:
        """Configurations with a single encoder each, by name of the dataset; the name is empty for `encoder`."""
        if self.encoders is None:
            return {"": self}
        return {
            name: self.model_copy(update={"encoder": encoder, "encoders": None, "output": self.output / name})
            for name, encoder in self.encoders.items()
        }


@dataclass(frozen=True)
class Preflight:
    """Result of a short test of one encoder on the cluster: its identity, loaded part, throughput and errors."""

    info: EncoderInfo
    loaded: str
    tokens_per_s: float
    seconds_per_prompt: float
    characters_per_prompt: float
    bare_tokens_per_s: float | None  # of the forward pass alone; None if unknown
    errors: tuple[str | None, ...]  # of the sampled prompts

    @property
    def speed(self) -> str:
        """Throughput of one actor, for messages."""
        ratio = (
            f", {self.tokens_per_s / self.bare_tokens_per_s:.2f} of the bare forward" if self.bare_tokens_per_s else ""
        )
        return f"{self.tokens_per_s:,.0f} tokens/s each{ratio}"


@dataclass(frozen=True)
class Plan:
    """An open dataset with its pending prompts and the actors that encode them."""

    label: str
    config: PrefillConfig
    pool: ActorPool
    rows_per_shard: int
    preflight: Preflight
    header: ActivationsHeader
    opened: OpenedDataset

    @property
    def bytes(self) -> int:
        """Estimated bytes of the pending rows."""
        info, columns = self.header.encoder, len(self.header.columns)
        return estimate_bytes(self.opened.pending.num_rows, columns, info.hidden_size, info.states_dtype)


def plan(config: PrefillConfig) -> list[str]:
    """What a dry run says: the pending prompts and bytes of every dataset. Loads no model, asks no server."""
    prompts = _prompts(config)
    lines = []
    for one in config.datasets.values():
        encoder, first = one.encoder, absence(one.encoder)
        pending = count_pending(one.output, ActivationsHeader, prompts)
        done = not pending and first is None and (encoder.backend == "vllm_server" or _is_finished(one, prompts))
        work = "finished, nothing to do" if done else f"{pending:,} of {prompts.num_rows:,} prompts to encode"
        if first is None:
            shape = describe(encoder)
            size = estimate_bytes(pending, len(shape.columns), shape.hidden_size, encoder.states_dtype)
            work += f", {size / 2**20:,.1f} MiB to write"
        lines.append(f"encodes with {encoder.model} into {one.output}: {work}{f'; {first}' if first else ''}")
    return [*lines, f"costs the time of {where()}; the run says how long after a test on {SAMPLE_ROWS} prompts"]


def run(config: PrefillConfig) -> str:
    """Encode every prompt with one or several encoders and store pooled hidden states of the candidate layers."""
    prompts = _prompts(config)
    datasets = config.datasets
    shapes = {name: describe(one.encoder) for name, one in datasets.items()}
    missing = [name for name, one in datasets.items() if not _is_finished(one, prompts)]
    location = str(config.output) if config.encoders is None else f"{config.output}/{{{','.join(datasets)}}}"
    if not missing:
        return f"nothing to do: all {prompts.num_rows:,} prompts are in {location} ({_counts(datasets)})"
    with ExitStack() as locks:
        for name in missing:
            locks.enter_context(locked(datasets[name].output))
        cluster = connect()
        # All encoders pass the preflight before the first starts: an error of the last one shows before hours of work.
        plans = [_plan(name, datasets[name], shapes[name], cluster, prompts) for name in missing]
        check_space({plan.config.output: plan.bytes for plan in plans})
        started = time.monotonic()
        # Encoders run one after another, each on the full cluster: the throughput is the same, and a node holds the
        # weights of one encoder at a time.
        for plan in plans:
            _execute(plan, prompts)
    rows, seconds = sum(plan.opened.pending.num_rows for plan in plans), time.monotonic() - started
    by = f" by {len(plans)} encoders" if len(plans) > 1 else ""
    return f"{rows:,} prompts encoded{by} in {seconds:.0f} s into {location} ({_counts(datasets)})"


def _prompts(config: PrefillConfig) -> pa.Table:
    """The prompts. Raises InputError if they cannot be read, or if OUTPUT cannot hold several datasets."""
    prompts = input_prompts(config.input)
    if config.encoders is not None and read_header(config.output, ActivationsHeader) is not None:
        raise InputError(
            f"{config.output}: holds the activations of one encoder; choose another output folder for several encoders"
        )
    return prompts


def _plan(name: str, config: PrefillConfig, shape: EncoderShape, cluster: Cluster, prompts: pa.Table) -> Plan:
    """Runs the preflight and opens the dataset. Raises InputError if they do not fit, or if most prompts fail."""
    label = f"prefill {name}".strip()
    was = read_header(config.output, ActivationsHeader)
    encoder = config.encoder if was is None else with_recorded_limit(config.encoder, was.encoder.max_length)
    pool = place(encoder, shape, cluster, config.actors, config.cpus_per_actor, config.gpus_per_actor)
    if not cluster.fitting(pool.cpus, pool.gpus):
        print(f"{label}: no node has {pool.resources_summary} now; waiting for one", flush=True)
    sample = sample_prompts(prompts, SAMPLE_ROWS)
    print(f"{label}: testing {encoder.model} on {sample.num_rows} prompts", flush=True)
    limit_s = config.shard_timeout_s or TEST_TIMEOUT_S
    preflight = run_on_sample(label, _preflight, pool.encoder, sample, pool.resources, limit_s)
    if warning := check_sample(preflight.errors, f"encoders.{name}" if name else "encoder", ACTIVATIONS.values):
        print(f"{label}: warning: {warning}", flush=True)
    header = ActivationsHeader(encoder=preflight.info, columns=shape.columns, config=config.model_dump(mode="json"))
    opened = open_dataset(config.output, header, prompts)
    for shard in opened.removed_shards:
        print(
            f"{label}: {config.output / shard} is damaged by an interrupted write; deleted, its prompts are encoded "
            "again"
        )
    if opened.n_present:
        print(f"{label}: {opened.n_present:,} of {prompts.num_rows:,} prompts are already encoded")
    per_shard = config.rows_per_shard or rows_of_shard(preflight.seconds_per_prompt)
    rows, info = opened.pending.num_rows, preflight.info
    pool = replace(pool, actors=max(1, min(pool.actors, -(-rows // per_shard))))
    plan = Plan(label, config, pool, per_shard, preflight, header, opened)
    if rows:
        print(
            f"{label}: {info.architecture} {info.model}, {info.n_layers} blocks x {info.hidden_size}, "
            f"{info.attention}; {info.backend}; {preflight.loaded}; columns {', '.join(shape.columns)}\n"
            f"{label}: {rows:,} prompts to encode: {plan.bytes / 2**20:,.1f} MiB to write, about "
            f"{rows * preflight.seconds_per_prompt / pool.actors:,.0f} s with {pool.actors} actors of "
            f"{pool.resources_summary}, {preflight.speed}",
            flush=True,
        )
    return plan


def _execute(plan: Plan, prompts: pa.Table) -> None:
    """Encodes the pending prompts and finishes the dataset."""
    config, pending = plan.config, plan.opened.pending
    for _ in range(ROUNDS):
        if pending.num_rows:
            _encode(plan, pending)
        pending = open_dataset(config.output, plan.header, prompts).pending
        if not pending.num_rows:
            break
    else:
        raise RuntimeError(f"{config.output}: rows are missing after the run; run the same command again")
    counts = finish(config.output, plan.header).counts
    if counts.duplicates_after_truncation:
        print(
            f"{plan.label}: warning: truncation to {plan.preflight.info.max_length} tokens made "
            f"{counts.duplicates_after_truncation:,} different prompts equal to another prompt"
        )
    if counts.unknown_warning:
        print(f"{plan.label}: warning: {counts.unknown_warning}")


def _encode(plan: Plan, prompts: pa.Table) -> None:
    pool, test = plan.pool, plan.preflight
    limit = Deadline(test.seconds_per_prompt, test.characters_per_prompt, plan.config.shard_timeout_s)
    write_shards(
        plan.label,
        plan.config.output,
        prompts,
        encoder_class(pool.encoder),
        pool.encoder,
        plan.rows_per_shard,
        pool.actors,
        pool.resources,
        test.bare_tokens_per_s,
        limit,
        plan.bytes,
    )


def _preflight(config: EncoderConfig, prompts: pa.Table, limit_s: float = TEST_TIMEOUT_S) -> Preflight:
    """Times the encoder and its forward pass alone on the prompts. They alternate, so that a load peak affects both.

    Ends the process if loading takes longer than `load_limit`, or a round of the loaded encoder longer than `limit_s`.
    """
    with ends_after(load_limit(limit_s)):
        loaded = load_encoder(config)
    with closing(loaded) as encoder:  # a running engine would hold the GPU that the pool needs
        with ends_after(limit_s):
            encoder(prompts.slice(0, 1))  # warm-up: allocations
            encoder.bare_seconds(prompts.slice(0, 1))
        encoding: list[float] = []
        bare: list[float | None] = []
        began = time.perf_counter()
        while not encoding or (len(encoding) < PREFLIGHT_ROUNDS and time.perf_counter() - began < PREFLIGHT_S):
            started = time.perf_counter()
            with ends_after(limit_s):
                rows = encoder(prompts)
                encoding.append(time.perf_counter() - started)
                bare.append(encoder.bare_seconds(prompts))
    tokens = pc.sum(pc.subtract(rows.column("n_tokens"), rows.column("n_dropped"))).as_py() or 0
    seconds, known = statistics.median(encoding), [one for one in bare if one is not None]
    return Preflight(
        encoder.info,
        str(encoder.loaded),
        tokens / seconds,
        seconds / prompts.num_rows,
        characters_per_prompt(prompts),
        tokens / statistics.median(known) if known else None,
        tuple(rows.column("error").to_pylist()),
    )


def _is_finished(config: PrefillConfig, prompts: pa.Table) -> bool:
    """Whether the output holds all prompts, encoded with the same configuration and weights. Does not start Ray."""
    header = read_header(config.output, ActivationsHeader)
    if header is None:
        return False
    requested = config.encoder.model_dump(mode="json", exclude=RUNTIME_FIELDS)
    stored = {key: value for key, value in header.config["encoder"].items() if key not in RUNTIME_FIELDS}
    return (
        requested == stored
        and current_digest(config.encoder) == header.encoder.weights_digest
        and (config.encoder.adapter is None or read_manifest(config.encoder.adapter).digest == header.encoder.adapter)
        and is_complete(config.output, prompts)
    )


def _counts(datasets: dict[str, PrefillConfig]) -> str:
    """Total counts and fingerprints of the finished datasets, for messages."""
    manifests: list[Manifest] = [read_activations(one.output).manifest for one in datasets.values()]
    counts = [manifest.counts for manifest in manifests]
    unknown = sum(one.unknown_rows or 0 for one in counts)
    return (
        f"{sum(one.rows for one in counts):,} rows, {sum(one.errors for one in counts):,} without states, "
        f"{sum(one.truncated_rows for one in counts):,} truncated, "
        f"{f'{unknown:,} unknown to the tokenizer, ' if unknown else ''}"
        f"{sum(one.bytes for one in counts) / 2**20:,.1f} MiB, "
        f"{'encoder' if len(manifests) == 1 else 'encoders'} {', '.join(one.fingerprint for one in manifests)}"
    )


if __name__ == "__main__":
    main(PrefillConfig, run, plan=plan)
