"""`python -m serve --checkpoint X --port P`: serves a checkpoint on this machine until SIGTERM or SIGINT.

Prints `serve: ready at URL` as soon as the application answers requests. Exit codes as in `prefill_router.cli`.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Annotated

from pydantic import Field

from prefill_router.cli import main
from serve.config import RouterAppConfig


class ServeConfig(RouterAppConfig):
    """The application and its HTTP port."""

    port: Annotated[int, Field(ge=0, le=65535, description="HTTP port on 127.0.0.1")] = 8000


def plan(config: ServeConfig) -> list[str]:
    """What a dry run says. Raises InputError for a checkpoint folder that does not exist. Asks no registry."""
    from prefill_router.doctor.machine import holder, is_free
    from prefill_router.registry.versions import at_hand  # imports torch

    lines = []
    for where in config.sources:
        folder = at_hand(where)
        lines.append(f"reads checkpoint: {where}{' of the registry, which is not asked now' if folder is None else ''}")
    state = "free" if not config.port or is_free(config.port) else f"in use by {holder(config.port)}"
    return [*lines, f"listens on port {config.port or 'any'} of 127.0.0.1: {state}", "costs the time of this machine"]


def run(config: ServeConfig) -> str:
    """Serve a checkpoint on this machine until SIGTERM or SIGINT."""
    # Ray Serve reads it when it is imported: replicas without a second thread, and calls between them by gRPC.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    from serve import local  # imports Ray; invalid arguments are refused before

    stopped = threading.Event()
    application = RouterAppConfig.model_validate(config.model_dump(exclude={"port"}))
    print("serve: starting; the replicas log to /tmp/ray/session_latest/logs/serve", flush=True)
    url = local.start(application, config.port)
    for signum in (signal.SIGTERM, signal.SIGINT):  # after Ray's start, which installs its own handlers
        signal.signal(signum, lambda *_: stopped.set())
    print(f"serve: ready at {url}", flush=True)
    stopped.wait()
    for signum in (signal.SIGTERM, signal.SIGINT):  # a second one ends the process
        signal.signal(signum, signal.SIG_DFL)
    print(f"serve: stopping; answers under way have {config.gateway.drain_s:g} s", flush=True)
    local.stop(config.gateway.drain_s + 30)  # replicas need some seconds to end
    return "stopped"


if __name__ == "__main__":
    main(ServeConfig, run, plan=plan)
