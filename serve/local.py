"""Starts and stops the application on this machine.

In: a `RouterAppConfig` and a port on 127.0.0.1. Out: the URL of the application. On a cluster use `serve deploy`.
"""

from __future__ import annotations

import logging
import os
import socket
import time

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from prefill_router import registry
from prefill_router.cluster import set_environment
from prefill_router.errors import InputError
from serve.app import build_with
from serve.config import RouterAppConfig
from serve.encoder import Encoder

HOST = "127.0.0.1"
APP = "prefill-router"


def start(config: RouterAppConfig, port: int, encoder_class: type = Encoder) -> str:
    """Runs the application and returns its URL as soon as it answers requests.

    Uses the Ray cluster of this process, or starts a local one with enough logical CPUs for the deployments. Raises
    InputError if the port is in use or the checkpoint does not exist, RuntimeError if the application does not start.
    """
    _check_port(port)
    # A downloaded version is shared by all replicas on this machine, which then need no access to the registry.
    kept = None if config.canary is None or not config.compared else config.canary.checkpoint  # its version is tagged
    resolved = config.moved(
        lambda where: where if config.follows(where) or where == kept else str(registry.resolve(where))
    )
    application = build_with(resolved, encoder_class)
    if not ray.is_initialized():
        _start_ray(config)
    ray_serve.start(http_options=HTTPOptions(host=HOST, port=port))
    ray_serve.run(application, name=APP, route_prefix="/", logging_config=LoggingConfig(enable_access_log=False))
    return f"http://{HOST}:{port}"


def stop(within_s: float = 90.0) -> None:
    """Stops the application and disconnects from Ray; a Ray that `start` started ends.

    Answers under way are completed, if they take no longer than `gateway.drain_s`, and `within_s` is longer than that.
    """
    # `shutdown` alone also stops the proxy, and with it the answers.
    ray_serve.delete(APP, _blocking=False)
    end = time.monotonic() + within_s
    while APP in ray_serve.status().applications and time.monotonic() < end:
        time.sleep(0.2)
    ray_serve.shutdown()
    ray.shutdown()


def _start_ray(config: RouterAppConfig) -> None:
    set_environment()
    deployments = (config.gateway, config.encoder, config.router)
    needed = config.sessions.cpus + sum(deployment.replicas * deployment.cpus for deployment in deployments)
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
                f"port: {HOST}:{port} is not available ({error.strerror}); choose another with --port"
            ) from None
