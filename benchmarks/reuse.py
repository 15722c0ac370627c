"""What a prompt costs an engine that has read it for the router before: the first prefill, with states, and the second.

A server (prefill/vllm/server.py) with a random Qwen3, on this machine. For each of several prompts of the same number
of tokens: `first` is the `engine` backend's request, with the states of all layers read; `second` sends the same
prompt as a client would to have it answered, and waits for the first token; `plain` is a prompt of the same length that
nobody has read, without states. Prompts take turns; every one is new to the server.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import httpx
import numpy as np
import pyarrow as pa
from pydantic import Field
from tqdm import tqdm

from benchmarks.prefill import POSITIONS, WORDS, save_qwen3
from jobs.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import write_json
from prefill_router.prefill.config import EncoderConfig, VLLMServerConfig


class ReuseConfig(FrozenModel):
    """How long the prompts are, and how many."""

    output: Annotated[Path, Field(description="folder for reuse.json")] = Path("runs/benchmarks/reuse")
    shape: Annotated[Literal["small", "0.6B", "8B"], Field(description="of the random Qwen3")] = "small"
    tokens: Annotated[int, Field(ge=16, lt=POSITIONS, description="of a prompt")] = 1000
    prompts: Annotated[int, Field(ge=1)] = 15
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Annotated[int, Field(ge=0)] = 0


def run(config: ReuseConfig) -> str:
    """Measure the first and the second prefill of the same prompt on a vLLM server."""
    from prefill_router.prefill.vllm_server_backend import VLLMServerEncoder

    with TemporaryDirectory() as scratch:
        folder = save_qwen3(Path(scratch) / "model", config.shape, config.seed)
        with server(folder, Path(scratch) / "log", "--layers", "all", "--dtype", config.dtype) as url:
            encoder = VLLMServerEncoder(
                EncoderConfig(
                    backend="vllm_server",
                    model=str(folder),
                    layers="all",
                    max_length=POSITIONS - 1,
                    dtype=config.dtype,
                    vllm_server=VLLMServerConfig(base_url=url),
                )
            )
            seconds = _measure(config, encoder, url)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    write_json(config.output / "reuse.json", {"config": config.model_dump(mode="json"), "seconds": seconds})
    print(
        f"\nrandom Qwen3 of shape {config.shape}, {config.dtype}, {config.prompts} prompts of {config.tokens:,} "
        f"tokens, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n\n"
        "| | median ms | of the first |\n|---|---|---|"
    )
    for name, value in medians.items():
        print(f"| {name} | {1e3 * value:,.0f} | {value / medians['first']:.3f} |")
    return (
        f"second prefill {medians['second'] / medians['first']:.3f} of the first; figures in "
        f"{config.output / 'reuse.json'}"
    )


@contextmanager
def server(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """A vLLM server on a free port of 127.0.0.1, which ends with the block; its URL up to /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "prefill_router.prefill.vllm.server", str(folder), "--port", str(port), *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            try:
                if httpx.get(f"{url}/health").is_success:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()  # where it has not ended by then


def _measure(config: ReuseConfig, encoder: Any, url: str) -> dict[str, list[float]]:
    rng = np.random.default_rng(config.seed)
    client = httpx.Client(base_url=url, timeout=300)
    model = client.get("models").json()["data"][0]["id"]

    def text() -> str:
        """A new prompt; words of one token each."""
        return " ".join(rng.choice(WORDS, config.tokens - 2))  # [CLS] and [SEP] are added

    def timed(call: Any, *arguments: Any) -> float:
        began = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - began

    def read(prompt: str) -> None:
        row = encoder(pa.table({"query_id": ["q"], "prompt": [prompt]}))
        assert row.column("error")[0].as_py() is None, row.column("error")[0]
        assert (row.column("n_tokens")[0].as_py(), row.column("n_dropped")[0].as_py()) == (config.tokens, 0)

    def answer(prompt: str) -> None:
        client.post(
            "completions", json={"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        ).raise_for_status()

    read(text())
    answer(text())
    seconds: dict[str, list[float]] = {"first": [], "second": [], "plain": []}
    for _ in tqdm(range(config.prompts), desc="reuse", unit="prompt", leave=False):
        prompt = text()
        seconds["first"].append(timed(read, prompt))
        seconds["second"].append(timed(answer, prompt))
        seconds["plain"].append(timed(answer, text()))
    return seconds


if __name__ == "__main__":
    main(ReuseConfig, run)
