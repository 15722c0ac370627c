"""The serving benchmark runs every server and writes what it prints."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_router import tiny_router

from prefill_router.files import read_json
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.routing.checkpoint import save_checkpoint

pytestmark = pytest.mark.ray


def test_every_server_answers_and_the_figures_are_written(minilm: str, tmp_path: Path) -> None:
    encoder = TransformersEncoder(EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))
    save_checkpoint(tiny_router(encoder.info.fingerprint), tmp_path / "checkpoint")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = {"checkpoint": tmp_path / "checkpoint", "output": tmp_path / "out", "upstream-port": port}
    options |= {"connections": "[1, 2]", "seconds": 0.5, "warm-up-s": 0.2, "rounds": 1}
    command = [sys.executable, "-m", "benchmarks.serve"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)  # its Ray ends with it
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = read_json(tmp_path / "out" / "serve.json")
    servers = figures["servers"]
    assert list(servers) == ["upstream alone", "no-op encoder", "default encoder"]
    assert all(one["per_s"] > 0 for by_connections in servers.values() for one in by_connections.values())
    assert servers["upstream alone"]["1"]["p50"] < servers["no-op encoder"]["1"]["p50"]
    share = servers["default encoder"]["2"]["per_s"] / figures["encoder_alone_per_s"]
    assert f"{share:.2f} of the encoder alone" in done.stdout.splitlines()[-1]
    assert "| default encoder | 2 |" in done.stdout
