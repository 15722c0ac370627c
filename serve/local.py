"""The application on a Ray of its own on this machine: started, healthy, stopped.

In: a `RouterAppConfig` and a port of 127.0.0.1. Out: the URL that answers. The cluster way is `serve deploy`.
"""

from __future__ import annotations

import logging
import os
import socket

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from prefill_router import registry
from prefill_router.errors import InputError
from serve.app import build
from serve.config import RouterAppConfig

HOST = "127.0.0.1"


def start(config: RouterAppConfig, port: int) -> str:
    """Runs the application and returns its URL once a probe has gone through it.

    Uses the Ray that this process has joined, or starts one with as many logical CPUs as the deployments ask for.
    Raises InputError for a port that is taken or a checkpoint that is not there, RuntimeError when it does not come up.
    """
    _check_port(port)
    # Replicas on this machine can share what is fetched here, and need not ask the registry each.
    application = build(config.model_copy(update={"checkpoint": str(registry.resolve(config.checkpoint))}))
    if not ray.is_initialized():
        _start_ray(config)
    ray_serve.start(http_options=HTTPOptions(host=HOST, port=port))
    ray_serve.run(
        application, name="prefill-router", route_prefix="/", logging_config=LoggingConfig(enable_access_log=False)
    )
    return f"http://{HOST}:{port}"


def stop() -> None:
    """Stops the application and the Ray that `start` started or joined."""
    ray_serve.shutdown()
    ray.shutdown()


def _start_ray(config: RouterAppConfig) -> None:
    for name, value in {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    }.items():  # who asked for no GPU sees none
        os.environ.setdefault(name, value)
    parts = (config.gateway, config.encoder, config.router)
    needed = sum(part.replicas * part.cpus for part in parts)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, int(needed) + 1),
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"port: {HOST}:{port} cannot be had ({error.strerror}); choose another with --port"
            ) from None
