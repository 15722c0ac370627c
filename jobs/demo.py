"""The demo: all steps of the method on the built-in, simulated sample, each by its command.

Writes OUTPUT. A second run reuses the activations and the registered version. At the end a chat is routed and answered:
`transformers serve` runs SmolLM2, which answers in place of the simulated models. The servers run in separate
processes, which end with the demo.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from pydantic import Field

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, UnavailableError
from prefill_router.locations import LocalPath
from prefill_router.logs import is_structured
from prefill_router.outcomes.sample import MODELS, write_sample
from prefill_router.prefill.config import SMOLLM2, EncoderConfig
from prefill_router.prefill.locating import locate
from prefill_router.registry import sqlite_uri

QUESTION = (
    "Three friends share 48 stickers so that each gets twice as many as the one before, except that the last "
    "one gives away half of hers first. How many does the first friend get?"
)


ANSWER_TOKENS = 80  # maximum length of the chat's answer
MODEL_START_S = 120  # maximum time until the model's server answers


class DemoConfig(FrozenModel):
    """The output folder, the encoder, the size of the sample, and the prompt to route."""

    output: Annotated[LocalPath, Field(description="output folder")] = Path("runs/demo")
    encoder: Annotated[
        Literal["smollm2", "minilm"],
        Field(description="smollm2: a language model, minutes; minilm: a sentence encoder, seconds"),
    ] = "smollm2"
    queries: Annotated[int, Field(ge=500, description="number of queries in the simulated sample")] = 800
    question: Annotated[str, Field(min_length=1, description="prompt to route")] = QUESTION


def plan(config: DemoConfig) -> list[str]:
    """What a dry run says: the steps."""
    steps = "sample, prefill, probe, train, evaluate, register, promote, serve, one request and one chat"
    return [
        f"runs {steps}, with {config.encoder} and {config.queries:,} simulated queries",
        "costs minutes of this machine alone",
    ]


def run(config: DemoConfig) -> str:
    """Prefill, probe, train, evaluate, register, promote, serve and route a request, on a simulated sample."""
    started, out = time.monotonic(), config.output
    # A separate registry: a router of simulated data must not become the champion of the real registry.
    os.environ["MLFLOW_TRACKING_URI"] = sqlite_uri(out / "mlflow.db")
    _say("sample: generated from a seed; the questions are original, the six target models are SIMULATED")
    write_sample(out / "sample", n_queries=config.queries)
    outcomes = out / "sample" / "outcomes.parquet"
    inputs = ["--outcomes", outcomes, "--pool", out / "sample" / "pool.yaml", "--activations", out / "activations"]
    layers = ["--encoder.model", config.encoder, "--encoder.layers", "all"]
    _job("prefill", "--input", outcomes, "--output", out / "activations", *layers)
    _job("probe", *inputs, "--output", out / "probe")
    _job("train", *inputs, "--output", out)
    _job("evaluate", *inputs, "--checkpoint", out / "checkpoint", "--output", out / "evaluation")
    registered = _job("register", "--checkpoint", out / "checkpoint", "--evaluation", out / "evaluation")
    version = registered.partition(" version ")[2].split()[0]
    # Forced only on a later run, with another encoder or sample, which has a champion of other queries.
    why = ["--force", "--reason", "the demo serves the router that it has just trained"]
    _job("promote", "--version", version, "--output", out / "promote", *why)
    model = str(locate(EncoderConfig(model=SMOLLM2)))
    with (
        run_model(model, out / "model.log") as endpoint,
        run_server("models:/prefill-router@champion", "--gateway.endpoints", _endpoints(model, endpoint)) as url,
    ):
        request = {"prompt": config.question}
        _say(f"POST {url}/v1/route {request}")
        answer = httpx.post(f"{url}/v1/route", json=request, timeout=60)
        answer.raise_for_status()
        decision = answer.json()
        _print_decision(decision)
        _say(f"POST {url}/v1/chat/completions: SmolLM2 answers in place of every simulated model")
        _chat(url, config.question)
    print(f"\nreport: {(out / 'evaluation' / 'report.html').resolve()}")
    return (
        f"done in {time.monotonic() - started:.0f} s; at lambda {decision['lambda']:.2f} the question goes to "
        f"{decision['model']}"
    )


def _print_decision(decision: dict[str, Any]) -> None:
    print(f"\n{'model':<18}{'confidence':>12}{'uncertainty':>13}{'USD per 1,000':>15}{'score':>9}")
    for candidate in decision["candidates"]:
        print(
            f"{candidate['model']:<18}{candidate['confidence']:>12.3f}{candidate['uncertainty']:>13.3f}"
            f"{1000 * candidate['cost_usd']:>15.3f}{candidate['score']:>9.3f}"
        )


def _chat(url: str, question: str) -> None:
    """Asks `auto` and prints the answer while it arrives."""
    request = {
        "model": "auto",
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
    }
    router: dict[str, Any] = {}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=120) as answer:
        if answer.is_error:
            answer.read()
            raise UnavailableError(f"the chat failed with status {answer.status_code}: {answer.text}")
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            router = event.get("router", router)
            for choice in event.get("choices", ()):
                print(choice["delta"].get("content") or "", end="", flush=True)
    print(f"\n\nselected {router['selected']}, decision {router['decision_id']}")


def _say(text: str) -> None:
    print(f"\n\033[1m==> {text}\033[0m" if sys.stdout.isatty() else f"\n==> {text}", flush=True)


def _job(name: str, *options: object) -> str:
    """Runs a job in a subprocess, prints its output and returns its last line, the summary."""
    command = [sys.executable, "-m", f"jobs.{name}", *map(str, options)]
    _say(" ".join(["python", *command[1:]]))
    errors = subprocess.STDOUT if is_structured() else None  # so that its progress becomes objects too
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        summary = ""
        for line in process.stdout or ():
            print(line, end="", flush=True)
            summary = line
    if process.returncode:
        said = f"jobs.{name} failed with exit code {process.returncode}; see its message above"
        raise InputError(said) if process.returncode == 2 else UnavailableError(said)
    return summary


@contextmanager
def run_model(folder: str, log: Path) -> Iterator[str]:
    """Runs `transformers serve` for the model in `folder` on a free port; yields the base URL, and stops it at exit.

    Its output goes to the file `log`.
    """
    port, program = _free_port(), str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    _say(" ".join(["transformers", *command[1:]]))
    command += ["--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=log.open("wb"))
    try:
        for _ in range(MODEL_START_S):
            with suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            if process.poll() is not None:
                raise UnavailableError(f"transformers serve failed with exit code {process.returncode}; its log: {log}")
            time.sleep(1)
        else:
            raise UnavailableError(f"transformers serve did not start within {MODEL_START_S} s; its log: {log}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _endpoints(model: str, base_url: str) -> str:
    """The server at `base_url`, with its `model`, as the endpoint of every simulated model."""
    return json.dumps({name: {"base_url": base_url, "model": model} for name in MODELS})


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def run_server(checkpoint: str, *options: str) -> Iterator[str]:
    """Runs `python -m serve` on a free port; yields its URL when it is ready, and stops it at exit."""
    command = [sys.executable, "-m", "serve", "--checkpoint", checkpoint, "--port", str(_free_port())]
    _say(" ".join(["python", *command[1:], *options[:1], *("..." for _ in options[1:])]))
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if line.startswith("serve: ready at "):
                yield line.split()[-1]
                break
        else:
            raise UnavailableError(f"the server failed with exit code {process.wait()}; see its message above")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


if __name__ == "__main__":
    main(DemoConfig, run, plan=plan)
