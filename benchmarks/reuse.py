"""Time of the second prefill of a prompt on a vLLM server that has already returned its states to the router.

The server (prefill/vllm/server.py) runs a random Qwen3 on this machine. All prompts have the same number of tokens.
`first` is the request of the `vllm_server` backend, with the states of all layers; `second` is a completion request for
the same prompt, until the first token; `plain` is a completion request for another, new prompt of the same length.
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
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import write_json
from prefill_router.locations import LocalPath
from prefill_router.prefill.config import EncoderConfig, VLLMServerConfig


class ReuseConfig(FrozenModel):
    """Model shape, and number and length of the generated prompts."""

    output: Annotated[LocalPath, Field(description="folder for reuse.json")] = Path("runs/benchmarks/reuse")
    shape: Annotated[Literal["small", "0.6B", "8B"], Field(description="shape of the random Qwen3")] = "small"
    tokens: Annotated[int, Field(ge=16, lt=POSITIONS, description="tokens per prompt")] = 1000
    prompts: Annotated[int, Field(ge=1, description="number of generated prompts")] = 15
    dtype: Annotated[Literal["float32", "bfloat16"], Field(description="dtype of weights and arithmetic")] = "float32"
    seed: Annotated[int, Field(ge=0, description="seed of weights and prompts")] = 0


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
        "| request | median ms | relative to the first |\n|---|---|---|"
    )
    for name, value in medians.items():
        print(f"| {name} | {1e3 * value:,.0f} | {value / medians['first']:.3f} |")
    return (
        f"second prefill {medians['second'] / medians['first']:.3f} of the first; figures in "
        f"{config.output / 'reuse.json'}"
    )


@contextmanager
def server(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """Runs a vLLM server on a free port of 127.0.0.1 during the `with` block; yields its URL, including /v1."""
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
            process.kill()  # after the timeout


def _measure(config: ReuseConfig, encoder: Any, url: str) -> dict[str, list[float]]:
    rng = np.random.default_rng(config.seed)
    client = httpx.Client(base_url=url, timeout=300)
    model = client.get("models").json()["data"][0]["id"]

    def text() -> str:
        """A new prompt of `config.tokens` tokens; each word is one token."""
        return " ".join(rng.choice(WORDS, config.tokens - 2))  # the tokenizer adds [CLS] and [SEP]

    def timed(call: Any, *arguments: Any) -> float:
        began = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - began

    def prefill(prompt: str) -> None:
        row = encoder(pa.table({"query_id": ["q"], "prompt": [prompt]}))
        assert row.column("error")[0].as_py() is None, row.column("error")[0]
        assert (row.column("n_tokens")[0].as_py(), row.column("n_dropped")[0].as_py()) == (config.tokens, 0)

    def complete(prompt: str) -> None:
        client.post(
            "completions", json={"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        ).raise_for_status()

    prefill(text())
    complete(text())
    seconds: dict[str, list[float]] = {"first": [], "second": [], "plain": []}
    for _ in tqdm(range(config.prompts), desc="reuse", unit="prompt", leave=False):
        prompt = text()
        seconds["first"].append(timed(prefill, prompt))
        seconds["second"].append(timed(complete, prompt))
        seconds["plain"].append(timed(complete, text()))
    return seconds


if __name__ == "__main__":
    main(ReuseConfig, run)
