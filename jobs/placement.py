"""What of a cluster one encoder takes, and how many there are room for.

In: an encoder's configuration and shape, the cluster, and what the user asked for. Out: the resources that Ray is asked
for. Knows nothing of prompts and datasets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.cluster import Cluster
from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.loading import EncoderShape

SMALL = 250e6  # parameters
# That a small encoder takes: one alone leaves most of a card idle. Not one of vLLM, which measures the card as it
# starts, and would take what its neighbours do meanwhile for its own.
SHARE_OF_GPU = 0.25


@dataclass(frozen=True)
class ActorPool:
    """The encoder as each actor loads it, how many actors there are, and the CPUs and GPUs of one."""

    encoder: EncoderConfig
    actors: int
    cpus: int
    gpus: float

    @property
    def resources(self) -> dict[str, Any]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    @property
    def resources_text(self) -> str:
        return f"{self.cpus} CPUs and {self.gpus:g} GPUs"


def place(
    encoder: EncoderConfig,
    shape: EncoderShape,
    cluster: Cluster,
    actors: int | None,
    cpus: int | None,
    gpus: float | None,
) -> ActorPool:
    """The actors that run an encoder; `cpus` and `gpus` are of one, and None is for what suits the encoder.

    Raises InputError for GPUs that Ray or vLLM cannot take, and for an actor that a cluster of our own has no room for.

    An actor is on one node, and its processes see the GPUs that Ray gave it and no others. So the workers of a
    tensor-parallel vLLM engine need no placement group: an actor that asks for as many GPUs holds them while it lives,
    and Ray takes them back when it ends, however the job ends.
    """
    wanted, (largest_cpus, largest_gpus) = gpus, cluster.largest
    gpus = _gpus(encoder, shape, cluster, wanted)
    if cpus is None:
        # One thread each gets half as much again out of a core as two threads on one encoder; large models are not
        # copied for every core. Of a tensor-parallel encoder every GPU has a process.
        light = gpus or encoder.backend == "vllm_server" or shape.block_parameters < SMALL
        processes = encoder.vllm.tensor_parallel_size if encoder.backend == "vllm" else 1
        cpus = max(processes, int(gpus)) if light else min(8, max(1, largest_cpus))
    room = cluster.fitting(cpus, gpus)
    if cluster.local and not room:
        if wanted is None and gpus > largest_gpus:
            raise InputError(
                f"encoder.vllm.tensor_parallel_size: got {gpus:g}, allowed is {largest_gpus} at most, the "
                f"GPUs here; or connect to a cluster with a node of {gpus:g} GPUs (RAY_ADDRESS)"
            )
        raise InputError(
            f"cpus_per_actor, gpus_per_actor: an encoder would take {cpus} CPUs and {gpus:g} GPUs, here "
            f"are {cluster.cpus} and {cluster.gpus}"
        )
    if encoder.backend == "vllm" and 0 < gpus < 1:
        # vLLM takes its share of the whole card: the second actor there would find no room.
        share = encoder.vllm.gpu_memory_utilization * gpus
        encoder = encoder.model_copy(update={"vllm": encoder.vllm.model_copy(update={"gpu_memory_utilization": share})})
    if encoder.backend == "transformers" and not gpus and encoder.device == "auto":
        encoder = encoder.model_copy(update={"device": "cpu"})  # a GPU that it sees is not its own
    if actors is None:
        actors = 1 if encoder.backend == "vllm_server" else max(1, room)  # `vllm_server.concurrency` is of one actor
    return ActorPool(encoder, actors, cpus, gpus)


def _gpus(encoder: EncoderConfig, shape: EncoderShape, cluster: Cluster, wanted: float | None) -> float:
    together = encoder.vllm.tensor_parallel_size if encoder.backend == "vllm" else 1
    if wanted is None:
        on_cpu = encoder.backend == "vllm_server" or (encoder.backend == "transformers" and encoder.device == "cpu")
        if on_cpu or not cluster.gpus:
            return 0.0
        small = encoder.backend == "transformers" and shape.block_parameters < SMALL
        return float(together) if together > 1 else SHARE_OF_GPU if small else 1.0
    if wanted > 1 and wanted != int(wanted):
        raise InputError(f"gpus_per_actor: got {wanted:g}, allowed are shares of one GPU and whole numbers")
    if encoder.backend == "vllm" and wanted and max(wanted, together) > 1 and wanted != together:
        raise InputError(
            f"gpus_per_actor: got {wanted:g}, but encoder.vllm.tensor_parallel_size is {together}; leave "
            f"it out, or give {together}"
        )
    return wanted
