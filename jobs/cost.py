"""Cost job: hours, USD, bytes and memory of a prefill run, for several numbers of GPUs.

In: prompts, or their number and length; the tokens per second of one GPU, as `jobs.prefill` prints them after its test;
prices. Out: a table on the terminal. Loads no model. The command of `prefill_router.prefill.sizing`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from jobs.shards import input_prompts
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.locations import Location
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import read_activations
from prefill_router.prefill.loading import describe
from prefill_router.prefill.locating import absence
from prefill_router.prefill.sample_check import sample_prompts
from prefill_router.prefill.shards import estimate_bytes
from prefill_router.prefill.sizing import Fleet, Workload, estimate

SAMPLE = 1024  # prompts whose tokens are counted


class CostConfig(FrozenModel):
    """The prompts, the GPUs and their prices. The prompts are given by one of input, activations and prompts."""

    input: Annotated[
        Location | None,
        Field(description="prompts file or outcomes table; its prompts are counted, and the tokens of a sample"),
    ] = None
    activations: Annotated[
        Location | None,
        Field(description="activations of a pilot run; gives tokens and bytes per prompt, and the number of prompts"),
    ] = None
    prompts: Annotated[
        int | None, Field(ge=1, description="number of prompts; None: those of input or activations")
    ] = None
    tokens_per_prompt: Annotated[
        float | None, Field(gt=0, description="mean tokens of a prompt; needed without input and activations")
    ] = None
    tokens_per_s: Annotated[float, Field(gt=0, description="measured tokens per second of one GPU, of all its actors")]
    actors_per_gpu: Annotated[int, Field(ge=1, description="encoders on one GPU")] = 1
    gpus: Annotated[tuple[int, ...], Field(min_length=1, description="numbers of GPUs, a list")] = (
        1,
        2,
        4,
        8,
        16,
        32,
        64,
    )
    usd_per_gpu_hour: Annotated[float, Field(ge=0, description="price of a GPU with its share of the machine")]
    usd_per_hour: Annotated[float, Field(ge=0, description="price of the head and of everything else")] = 0.0
    efficiency: Annotated[float, Field(gt=0, le=1, description="share of the measured speed when many GPUs work")] = 0.9
    start_s: Annotated[float, Field(ge=0, description="seconds until the GPUs work")] = 300.0
    interruptions_per_hour: Annotated[
        float, Field(ge=0, description="interruptions of one spot instance per hour; 0: instances that stay")
    ] = 0.0
    restart_s: Annotated[float, Field(ge=0, description="seconds until the replacement of an instance works")] = 300.0
    rows_per_shard: Annotated[int | None, Field(ge=1, description="as in jobs.prefill")] = None
    encoder: EncoderConfig = EncoderConfig()

    @model_validator(mode="after")
    def _has_prompts(self) -> CostConfig:
        if self.input is not None and self.activations is not None:
            raise ValueError("input and activations are both given; give one of them")
        known = self.input is not None or self.activations is not None
        if not known and (self.prompts is None or self.tokens_per_prompt is None):
            raise ValueError("give input or activations, or both prompts and tokens_per_prompt")
        return self


def plan(config: CostConfig) -> list[str]:
    """What a dry run says: the job itself only estimates."""
    first = absence(config.encoder) if config.activations is None else None
    return [*filter(None, [first]), "costs nothing but seconds of this machine, and writes nothing"]


def run(config: CostConfig) -> str:
    """Estimate hours, USD, bytes and memory of a prefill run from the measured speed of one GPU."""
    work = workload(config)
    fleet = Fleet(
        config.tokens_per_s,
        config.usd_per_gpu_hour,
        config.usd_per_hour,
        config.actors_per_gpu,
        config.efficiency,
        config.start_s,
        config.interruptions_per_hour,
        config.restart_s,
    )
    found = [estimate(work, fleet, gpus, config.rows_per_shard) for gpus in config.gpus]
    first = found[0]
    print(
        f"{work.prompts:,} prompts of {work.tokens_per_prompt:,.0f} tokens: {work.tokens / 1e6:,.1f} million tokens, "
        f"{work.bytes / 2**30:,.1f} GiB to write\n"
        f"{first.shards:,} shards of {first.rows_per_shard:,} prompts, {first.shard_s:,.1f} s and "
        f"{first.rows_per_shard * work.row_bytes / 2**20:,.1f} MiB each; memory of the driver for a prompts file about "
        f"{work.driver_bytes / 2**30:,.1f} GiB\n"
    )
    print("| GPUs | hours | GPU hours | USD | shards per encoder |\n|---|---|---|---|---|")
    for one in found:
        print(f"| {one.gpus} | {one.hours:,.2f} | {one.gpu_hours:,.1f} | {one.usd:,.2f} | {one.shards_per_slot:,.1f} |")
    cheapest, fastest = min(found, key=lambda one: one.usd), min(found, key=lambda one: one.hours)
    return (
        f"least cost {cheapest.usd:,.2f} USD in {cheapest.hours:,.2f} h on {cheapest.gpus} GPUs; least time "
        f"{fastest.hours:,.2f} h on {fastest.gpus} GPUs for {fastest.usd:,.2f} USD"
    )


def workload(config: CostConfig) -> Workload:
    """The prompts of the configuration. Raises InputError as the readers do."""
    if config.activations is not None:
        manifest = read_activations(config.activations).manifest
        counts = manifest.counts
        tokens = config.tokens_per_prompt or (counts.tokens - counts.dropped_tokens) / counts.rows
        rows, row_bytes = config.prompts or counts.rows, counts.bytes / counts.rows
        return Workload(rows, tokens, row_bytes)
    shape = describe(config.encoder)
    row_bytes = float(estimate_bytes(1, len(shape.columns), shape.hidden_size, config.encoder.states_dtype))
    if config.input is None:
        assert config.prompts is not None
        assert config.tokens_per_prompt is not None
        return Workload(config.prompts, config.tokens_per_prompt, row_bytes)
    from prefill_router.prefill.counting import token_counter  # loads transformers

    prompts = input_prompts(config.input)
    texts = [text or "" for text in sample_prompts(prompts, SAMPLE).column("prompt").to_pylist()]
    count, limit = token_counter(config.encoder.model), config.encoder.max_length
    lengths = [count(text) for text in texts]
    mean = sum(lengths if limit is None else [min(one, limit) for one in lengths]) / len(lengths)
    return Workload(config.prompts or prompts.num_rows, config.tokens_per_prompt or mean, row_bytes)


if __name__ == "__main__":
    main(CostConfig, run, plan=plan)
