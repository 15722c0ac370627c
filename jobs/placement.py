"""Placement of encoders on a cluster: CPUs and GPUs per actor, and the number of actors.

In: an encoder's configuration and shape, the cluster, and the user's settings. Out: an `ActorPool` with the resources
to request from Ray. Independent of prompts and datasets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prefill_router.cluster import Cluster
from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig

if TYPE_CHECKING:  # imports torch, which jobs.shards and its actors need not load
    from prefill_router.prefill.loading import EncoderShape

SMALL = 250e6  # parameters in transformer blocks; an encoder with fewer is small
# GPU fraction of an actor with a small encoder; one alone leaves most of the GPU idle. Does not apply to vLLM: a
# starting engine profiles the GPU's memory and would count the allocations of other processes as its own.
SMALL_ENCODER_GPUS = 0.25


def on_this_node() -> dict[str, Any]:
    """Ray options of an actor without CPUs on the node of this process, so that it is lost only together with it."""
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


@dataclass(frozen=True)
class ActorPool:
    """The encoder configuration of every actor, the number of actors, and the CPUs and GPUs per actor."""

    encoder: EncoderConfig
    actors: int
    cpus: int
    gpus: float

    @property
    def resources(self) -> dict[str, Any]:
        """Ray resources of one actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    @property
    def resources_summary(self) -> str:
        """CPUs and GPUs of one actor, for messages."""
        return f"{self.cpus} CPUs and {self.gpus:g} GPUs"


def place(
    encoder: EncoderConfig,
    shape: EncoderShape,
    cluster: Cluster,
    actors: int | None,
    cpus: int | None,
    gpus: float | None,
) -> ActorPool:
    """The pool of actors for an encoder. `cpus` and `gpus` are per actor; None selects a default for the encoder.

    Raises InputError for a number of GPUs that Ray or vLLM does not support, and for an actor that does not fit a local
    cluster.

    An actor runs on one node, and its child processes see only the actor's GPUs. The workers of a tensor-parallel vLLM
    engine therefore need no placement group: the actor requests all their GPUs, and Ray releases them when it ends.
    """
    requested, (largest_cpus, largest_gpus) = gpus, cluster.largest
    gpus = _gpus(encoder, shape, cluster, requested)
    if cpus is None:
        # Encoders with one thread each have 1.5 times the throughput per core of encoders with two threads. Large
        # models use more threads to limit the number of copies in memory. Tensor parallelism has one process per GPU.
        light = gpus or encoder.backend == "vllm_server" or shape.block_parameters < SMALL
        processes = encoder.vllm.tensor_parallel_size if encoder.backend == "vllm" else 1
        cpus = max(processes, int(gpus)) if light else min(8, max(1, largest_cpus))
    room = cluster.fitting(cpus, gpus)
    if cluster.local and not room:
        if requested is None and gpus > largest_gpus:
            raise InputError(
                f"encoder.vllm.tensor_parallel_size: got {gpus:g}, allowed is at most {largest_gpus}, the GPUs of this "
                f"machine; or connect to a cluster with a node of {gpus:g} GPUs (RAY_ADDRESS)"
            )
        raise InputError(
            f"cpus_per_actor, gpus_per_actor: an encoder needs {cpus} CPUs and {gpus:g} GPUs, this machine has "
            f"{cluster.cpus} and {cluster.gpus}; set lower values or connect to a cluster (RAY_ADDRESS)"
        )
    if encoder.backend == "vllm" and 0 < gpus < 1:
        # gpu_memory_utilization is a fraction of the full GPU, which several actors share.
        share = encoder.vllm.gpu_memory_utilization * gpus
        encoder = encoder.model_copy(update={"vllm": encoder.vllm.model_copy(update={"gpu_memory_utilization": share})})
    if encoder.backend == "transformers" and not gpus and encoder.device == "auto":
        encoder = encoder.model_copy(update={"device": "cpu"})  # a visible GPU may belong to another actor
    if actors is None:
        actors = 1 if encoder.backend == "vllm_server" else max(1, room)  # `vllm_server.concurrency` is per actor
    return ActorPool(encoder, actors, cpus, gpus)


def _gpus(encoder: EncoderConfig, shape: EncoderShape, cluster: Cluster, requested: float | None) -> float:
    """GPUs of one actor. Raises InputError for a fraction above 1 and a conflict with tensor_parallel_size."""
    parallel = encoder.vllm.tensor_parallel_size if encoder.backend == "vllm" else 1
    if requested is None:
        on_cpu = encoder.backend == "vllm_server" or (encoder.backend == "transformers" and encoder.device == "cpu")
        if on_cpu or not cluster.gpus:
            return 0.0
        small = encoder.backend == "transformers" and shape.block_parameters < SMALL
        return float(parallel) if parallel > 1 else SMALL_ENCODER_GPUS if small else 1.0
    if requested > 1 and requested != int(requested):
        raise InputError(f"gpus_per_actor: got {requested:g}, allowed are fractions below 1 and whole numbers")
    if encoder.backend == "vllm" and requested and max(requested, parallel) > 1 and requested != parallel:
        raise InputError(
            f"gpus_per_actor: got {requested:g}, but encoder.vllm.tensor_parallel_size is {parallel}; leave it out, "
            f"or set it to {parallel}"
        )
    return requested
