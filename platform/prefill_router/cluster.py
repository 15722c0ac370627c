"""The Ray cluster that jobs and sweeps run on: RAY_ADDRESS, the cluster of a submitted job, or a local one.

No other module of the library imports Ray; this one imports it at the first call. Workers can import `prefill_router`,
`jobs` and `tune`.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefill_router.errors import InputError, UnavailableError

PLATFORM = Path(__file__).parents[1]
ROOTS = (PLATFORM, PLATFORM.parent)  # the library, and the repository with jobs/ and tune/
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # a cluster that is open to others sets `token`
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a task that asks for no GPU sees none
}


@dataclass(frozen=True)
class Cluster:
    """Present nodes as (CPUs, GPUs); an autoscaler may add more. `local`: the process started this cluster itself."""

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
        """Largest number of CPUs and largest number of GPUs of any node."""
        return max((cpus for cpus, _ in self.nodes), default=0), max((gpus for _, gpus in self.nodes), default=0)

    def fitting(self, cpus: int, gpus: float) -> int:
        """Number of actors with these CPUs and GPUs that fit. An actor uses one node, a GPU fraction uses one GPU."""

        def of_gpus(node_gpus: int) -> int:
            return node_gpus * int(1 / gpus) if gpus < 1 else int(node_gpus / gpus)

        return sum(
            min(node_cpus // cpus, of_gpus(node_gpus)) if gpus else node_cpus // cpus
            for node_cpus, node_gpus in self.nodes
        )


def set_environment() -> None:
    """Sets the variables of ENVIRONMENT that are not set. Call it before Ray is imported or started."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def is_given() -> bool:
    """Whether a cluster exists to connect to, so that `connect` would not start a local one."""
    ray = sys.modules.get("ray")
    return (
        bool(os.environ.get("RAY_ADDRESS"))
        or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        or (ray is not None and ray.is_initialized())
    )


def connect(num_cpus: int | None = None) -> Cluster:
    """Connects to RAY_ADDRESS or the cluster of the submitted job; otherwise starts a local Ray for this process.

    `num_cpus` are the logical CPUs of a local Ray; None means the CPUs of the machine.
    """
    set_environment()
    import ray

    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # the job's runtime_env is set already
    local = not os.environ.get("RAY_ADDRESS") and not submitted
    paths = os.pathsep.join([*map(str, ROOTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    if local:
        os.environ["PYTHONPATH"] = paths  # inherited by the workers; a runtime_env would restart each of them
    if not ray.is_initialized():
        ours: dict[str, Any] = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        theirs = {} if submitted else {"runtime_env": {"env_vars": {"PYTHONPATH": paths}}}
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **(ours if local else theirs))
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive), local)


def answer(task: Any) -> Any:
    """The result of a Ray task. Raises the task's own InputError or UnavailableError instead of Ray's wrapper."""
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (InputError, UnavailableError)):
            raise error.cause from None
        raise
