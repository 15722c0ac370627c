"""What a prefill run takes: hours, cost, bytes, shards and memory of the driver, for any number of GPUs.

In: the size of the prompts, and the measured speed and the price of a GPU. Out: an `Estimate` per number of GPUs. Knows
nothing of encoders, files and clusters. Times are in seconds unless a name says otherwise, costs in USD.

The model: all shards take equally long, and a GPU that is done takes the next one, so the run has ceil(shards / slots)
rounds. Efficiency divides the speed. An interruption, of a spot instance for example, costs a GPU half a shard on
average and the time until its replacement works. docs/results/scale.md measures what the model leaves out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prefill_router.errors import InputError
from prefill_router.prefill.shards import rows_of_shard

HOUR_S = 3600.0
# Memory of the driver for a prompts file (docs/results/scale.md): the process, and what each prompt takes.
DRIVER_BASE_BYTES = 250 * 2**20
DRIVER_ROW_BYTES = 135.0


@dataclass(frozen=True)
class Workload:
    """Prompts, their mean tokens after truncation, and the bytes of a row of the dataset."""

    prompts: int
    tokens_per_prompt: float
    row_bytes: float

    @property
    def tokens(self) -> float:
        """Tokens of all prompts."""
        return self.prompts * self.tokens_per_prompt

    @property
    def bytes(self) -> float:
        """Bytes that the run writes."""
        return self.prompts * self.row_bytes

    @property
    def driver_bytes(self) -> float:
        """Peak memory of the process that runs the job. It does not depend on the number of GPUs."""
        return DRIVER_BASE_BYTES + self.prompts * DRIVER_ROW_BYTES


@dataclass(frozen=True)
class Fleet:
    """The GPUs of a run, all alike.

    `tokens_per_s`: of one GPU, with `actors_per_gpu` encoders. `efficiency`: share of that speed when many GPUs work.
    `start_s`: until the first GPU works. `interruptions_per_hour`: of one GPU. `restart_s`: until its replacement
    works. `usd_per_hour`: of everything but the GPUs.
    """

    tokens_per_s: float
    usd_per_gpu_hour: float
    usd_per_hour: float = 0.0
    actors_per_gpu: int = 1
    efficiency: float = 1.0
    start_s: float = 0.0
    interruptions_per_hour: float = 0.0
    restart_s: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """A run on `gpus` GPUs. `shards_per_slot`: shards of one encoder; below about 10 the last round wastes time."""

    gpus: int
    rows_per_shard: int
    shards: int
    shard_s: float
    shards_per_slot: float
    hours: float
    usd: float

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs, idle ones included."""
        return self.hours * self.gpus


def estimate(work: Workload, fleet: Fleet, gpus: int, rows_per_shard: int | None = None) -> Estimate:
    """The time and cost of a run. `rows_per_shard`: None selects that of `jobs.prefill`.

    Raises InputError if interruptions leave a GPU no time to work.
    """
    prompt_s = work.tokens_per_prompt * fleet.actors_per_gpu / fleet.tokens_per_s  # of an actor
    rows = rows_per_shard or rows_of_shard(prompt_s)
    shards, slots = math.ceil(work.prompts / rows), gpus * fleet.actors_per_gpu
    shard_s = min(rows, work.prompts) * prompt_s / fleet.efficiency
    lost = fleet.interruptions_per_hour * (shard_s / 2 + fleet.restart_s) / HOUR_S
    if lost >= 1:
        raise InputError(
            f"interruptions_per_hour: got {fleet.interruptions_per_hour:g}, but an interruption costs "
            f"{shard_s / 2 + fleet.restart_s:,.0f} s, so that no time is left; use instances that stay"
        )
    hours = (fleet.start_s + math.ceil(shards / slots) * shard_s / (1 - lost)) / HOUR_S
    return Estimate(
        gpus, rows, shards, shard_s, shards / slots, hours, hours * (gpus * fleet.usd_per_gpu_hour + fleet.usd_per_hour)
    )
