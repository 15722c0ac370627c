"""The Ray cluster that jobs and sweeps run on: RAY_ADDRESS, the cluster of a submitted job, or a local one.

No other module of the library imports Ray; this one imports it at the first call. Workers can import `prefill_router`,
`jobs` and `tune`.
"""

from __future__ import annotations

import logging
import os
import socket
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

PROBE_S = 5.0  # time for a cluster to accept a connection
WAY_OUT = "unset RAY_ADDRESS to run on this machine, or set it to `auto` on a node of the cluster"
DASHBOARD = (
    "the address of a dashboard, which only `ray job submit` takes; submit the job, or set RAY_ADDRESS to HOST:PORT of "
    "the cluster (port 6379 unless `ray start --port` says otherwise), to `auto` on a node of the cluster, or unset it "
    "to run on this machine"
)


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


def where() -> str:
    """What `connect` would connect to or start, for messages. Contacts nothing."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return "the cluster of the submitted job"
    address = os.environ.get("RAY_ADDRESS")
    return f"the cluster at {address}" if address else f"a Ray of its own on this machine, {os.cpu_count()} CPUs"


def connect(num_cpus: int | None = None) -> Cluster:
    """Connects to RAY_ADDRESS or the cluster of the submitted job; otherwise starts a local Ray for this process.

    `num_cpus` are the logical CPUs of a local Ray; None means the CPUs of the machine. Raises InputError if RAY_ADDRESS
    is not the address of a cluster, UnavailableError if nothing answers there.
    """
    set_environment()
    import ray

    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # the job's runtime_env is set already
    local = not os.environ.get("RAY_ADDRESS") and not submitted
    paths = os.pathsep.join([*map(str, ROOTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    if local:
        os.environ["PYTHONPATH"] = paths  # inherited by the workers; a runtime_env would restart each of them
    if not ray.is_initialized():
        if not local and not submitted:
            check_address(os.environ["RAY_ADDRESS"])
        ours: dict[str, Any] = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        theirs = {} if submitted else {"runtime_env": {"env_vars": {"PYTHONPATH": paths}}}
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **(ours if local else theirs))
        except ConnectionError as error:  # of `auto`, and of a Ray client
            if local:
                raise
            raise UnavailableError(f"RAY_ADDRESS: {error}; {WAY_OUT}") from None
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive), local)


def check_address(address: str) -> None:
    """Checks a RAY_ADDRESS within seconds; Ray itself retries for minutes.

    Raises InputError for the address of a dashboard and for another form than HOST:PORT, ray://HOST:PORT, `auto` and
    `local`; UnavailableError if nothing accepts a connection.
    """
    if address in ("auto", "local"):
        return
    if address.startswith(("http://", "https://")):
        raise InputError(f"RAY_ADDRESS: got {address!r}, {DASHBOARD}")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"RAY_ADDRESS: got {address!r}, expected HOST:PORT of the cluster, for example 10.0.0.1:6379; {WAY_OUT}"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PROBE_S) as connection:
            if not address.startswith("ray://") and _speaks_http(connection, host):
                raise InputError(f"RAY_ADDRESS: got {address!r}, {DASHBOARD}")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnavailableError(f"RAY_ADDRESS: {address} does not answer ({reason}); {WAY_OUT}") from None


def _speaks_http(connection: socket.socket, host: str) -> bool:
    """Whether an HTTP/1 server answers, as Ray's dashboard; the cluster's own port speaks gRPC."""
    connection.settimeout(1)
    try:
        connection.sendall(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return connection.recv(7).startswith(b"HTTP/1.")
    except OSError:
        return False


def answer(task: Any) -> Any:
    """The result of a Ray task. Raises the task's own InputError or UnavailableError instead of Ray's wrapper."""
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (InputError, UnavailableError)):
            raise error.cause from None
        raise
