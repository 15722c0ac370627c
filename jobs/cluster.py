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
from prefill_router.errors import InputError

ROOTS = (Path(prefill_router.__file__).parents[1], Path(__file__).parents[1])  # platform/ and the repository
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # a cluster open to others sets `token`
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Cluster:
    """What Ray found: CPUs and GPUs there now (an autoscaler may bring more), and whether it is our own."""

    cpus: int
    gpus: int
    local: bool


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
    there = ray.cluster_resources()
    return Cluster(int(there.get("CPU", 0)), int(there.get("GPU", 0)), local)


def answer(task: Any) -> Any:
    """The task's answer; its InputError comes back as itself."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
