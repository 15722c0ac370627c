"""The demo: the whole flow on the built-in, simulated sample, every step by the command that a user would type.

Writes runs/demo/. Run again, it finds the prefill done and the version registered. The server is a process of its own,
ended by its pid.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
from pydantic import Field

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.outcomes.sample import write_sample

QUESTION = (
    "Three friends share 48 stickers so that each gets twice as many as the one before, except that the last "
    "one gives away half of hers first. How many does the first friend get?"
)


class DemoConfig(FrozenModel):
    """Where the demo writes and what it asks."""

    output: Annotated[Path, Field(description="folder to write")] = Path("runs/demo")
    queries: Annotated[int, Field(ge=500, description="questions of the simulated sample")] = 3600
    question: Annotated[str, Field(min_length=1, description="the prompt to route")] = QUESTION


def run(config: DemoConfig) -> str:
    """Prefill, probe, train, evaluate, register, promote, serve and route one request, on the built-in sample."""
    started, out = time.monotonic(), config.output
    # Its own registry always: a simulated router must not become the champion of a real one.
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{(out / 'mlflow.db').resolve()}"
    _say("sample: made from a seed; questions are original, the six target models are SIMULATED")
    write_sample(out / "sample", n_queries=config.queries)
    outcomes = out / "sample" / "outcomes.parquet"
    inputs = ["--outcomes", outcomes, "--pool", out / "sample" / "pool.yaml", "--activations", out / "activations"]
    _job("prefill", "--input", outcomes, "--output", out / "activations", "--encoder.layers", "all")
    _job("probe", *inputs, "--output", out / "probe")
    _job("train", *inputs, "--output", out)
    _job("evaluate", *inputs, "--checkpoint", out / "checkpoint", "--output", out / "evaluation")
    registered = _job("register", "--checkpoint", out / "checkpoint", "--evaluation", out / "evaluation")
    _job("promote", "--version", registered.partition(" version ")[2].split()[0])
    with run_server("models:/prefill-router@champion") as url:
        request = {"prompt": config.question}
        _say(f"POST {url}/v1/route {request}")
        answer = httpx.post(f"{url}/v1/route", json=request, timeout=60)
        answer.raise_for_status()
        decision = answer.json()
    print(f"\n{'model':<18}{'confidence':>12}{'uncertainty':>13}{'USD per 1,000':>15}{'score':>9}")
    for candidate in decision["candidates"]:
        print(
            f"{candidate['model']:<18}{candidate['confidence']:>12.3f}{candidate['uncertainty']:>13.3f}"
            f"{1000 * candidate['cost_usd']:>15.3f}{candidate['score']:>9.3f}"
        )
    print(f"\nreport: {(out / 'evaluation' / 'report.html').resolve()}")
    return (
        f"done in {time.monotonic() - started:.0f} s; at lambda {decision['lambda']:.2f} the question goes to "
        f"{decision['model']}"
    )


def _say(text: str) -> None:
    print(f"\n\033[1m==> {text}\033[0m" if sys.stdout.isatty() else f"\n==> {text}", flush=True)


def _job(name: str, *options: object) -> str:
    """Runs a job as its own process, shows what it prints, and returns its summary line."""
    command = [sys.executable, "-m", f"jobs.{name}", *map(str, options)]
    _say(" ".join(["python", *command[1:]]))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        summary = ""
        for line in process.stdout or ():
            print(line, end="", flush=True)
            summary = line
    if process.returncode:
        print(
            f"demo: the step {name} ended with exit code {process.returncode}; see its message above",
            file=sys.stderr,
        )
        sys.exit(process.returncode)
    return summary


@contextmanager
def run_server(checkpoint: str) -> Iterator[str]:
    """A server on a free port of this machine, from its ready line to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serve", "--checkpoint", checkpoint, "--port", str(port)]
    _say(" ".join(["python", *command[1:]]))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if line.startswith("serve: ready at "):
                yield line.split()[-1]
                break
        else:
            sys.exit(f"demo: the server ended with exit code {process.wait()}; see its message above")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


if __name__ == "__main__":
    main(DemoConfig, run)
