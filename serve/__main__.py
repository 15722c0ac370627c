"""`python -m serve --checkpoint X --port P`: serves on this machine until SIGTERM or SIGINT.

Prints `serve: ready at URL` once requests are answered. Exit codes as the jobs': 0 stopped, 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from prefill_router.errors import InputError
from prefill_router.files import read_yaml
from serve.config import RouterAppConfig


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serve", description="Serves a checkpoint on this machine.", allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="checkpoint folder, or models:/prefill-router@champion")
    source.add_argument("--config", type=Path, metavar="FILE.yaml", help="a whole RouterAppConfig")
    parser.add_argument("--port", type=int, default=8000, help="port of 127.0.0.1 (default: 8000)")
    options = parser.parse_args()
    stopped = threading.Event()
    try:
        config = (
            read_yaml(options.config, RouterAppConfig)
            if options.config
            else RouterAppConfig(checkpoint=options.checkpoint)
        )
        from serve import local  # Ray, only once the arguments are sound

        print("serve: starting; the replicas' logs are in /tmp/ray/session_latest/logs/serve", flush=True)
        url = local.start(config, options.port)
    except InputError as error:
        print(f"serve: error: {error}", file=sys.stderr)
        return 2
    for signum in (signal.SIGTERM, signal.SIGINT):  # after Ray's start, which sets handlers of its own
        signal.signal(signum, lambda *_: stopped.set())
    print(f"serve: ready at {url}", flush=True)
    stopped.wait()
    local.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
