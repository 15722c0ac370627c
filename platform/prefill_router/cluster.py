"""The Ray cluster that a job runs on: the one at RAY_ADDRESS or that submitted the job, else a local one.

Out: what the cluster has, and what its tasks answer. Workers import `prefill_router` and `jobs` as the driver does.
Knows nothing of the jobs.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

import prefill_router
from prefill_router.errors import InputError, UnavailableError

ROOTS = (Path(prefill_router.__file__).parents[1], Path(__file__).parents[1])  # platform/ and the repository
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # a cluster open to others sets `token`
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who asked for no GPU sees none
}


@dataclass(frozen=True)
class Cluster:
    """What Ray found: (CPUs, GPUs) of each node there now (an autoscaler may bring more), and whether it is our own."""

    nodes: tuple[tuple[int, int], ...]
    local: bool

    @property
    def cpus(self) -> int:
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(gpus for _, gpus in self.nodes)

    @property
    def largest(self) -> tuple[int, int]:
        """The most CPUs and the most GPUs that any node has."""
        return max((cpus for cpus, _ in self.nodes), default=0), max((gpus for _, gpus in self.nodes), default=0)

    def fitting(self, cpus: int, gpus: float) -> int:
        """How many actors of so many CPUs and GPUs there is room for. None spans nodes, and no fraction two GPUs."""

        def of_gpus(there: int) -> int:
            return there * int(1 / gpus) if gpus < 1 else int(there / gpus)

        return sum(
            min(node_cpus // cpus, of_gpus(node_gpus)) if gpus else node_cpus // cpus
            for node_cpus, node_gpus in self.nodes
        )


def is_given() -> bool:
    """Whether there is a cluster to connect to, so that no local one would be started."""
    return bool(os.environ.get("RAY_ADDRESS")) or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or ray.is_initialized()


def connect(num_cpus: int | None = None) -> Cluster:
    """Connects to RAY_ADDRESS, or the cluster a job was submitted to; else starts a local Ray for this process.

    `num_cpus` are the logical CPUs of the local one; None: what the machine has.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # the job's runtime_env is set already
    local = not os.environ.get("RAY_ADDRESS") and not submitted
    paths = os.pathsep.join([*map(str, ROOTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    if local:
        os.environ["PYTHONPATH"] = paths  # inherited by the workers; a runtime_env would start each of them anew
    if not ray.is_initialized():
        ours: dict[str, Any] = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        theirs = {} if submitted else {"runtime_env": {"env_vars": {"PYTHONPATH": paths}}}
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **(ours if local else theirs))
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in there), local)


def answer(task: Any) -> Any:
    """The task's answer; its InputError or UnavailableError comes back as itself."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (InputError, UnavailableError)):
            raise error.cause from None
        raise
