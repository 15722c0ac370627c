"""Added latency and throughput of chats through the gateway, compared with the upstream server alone.

A server on this machine answers every chat at once with the same text: it is the upstream server of every model. One
client sends chats with 1, 8 and 32 connections, each the next chat as soon as the last one is answered, to

- `upstream alone`: the server itself;
- `no-op encoder`: the application of `serve`, with an encoder that returns the same states for every prompt;
- `default encoder`: the application of `serve`;
- every server in `peers`, which has to run already and to use the upstream server at `upstream_port`.

The prompts are questions of the built-in sample. The throughput of the encoder alone is measured on the same prompts,
in full batches and without a server. All processes share the cores of this machine.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import pyarrow as pa
from aiohttp import web
from pydantic import Field

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.controller import encode_prompts, load_encoder
from prefill_router.errors import InputError
from prefill_router.files import write_json
from prefill_router.locations import LocalPath
from prefill_router.outcomes.sample import load_sample
from prefill_router.pool import Endpoint
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.router import Router
from serve.config import EncoderDeploymentConfig, GatewayConfig, RouterAppConfig
from serve.transport import packed

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "upstream",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
}
QUESTIONS = 64
START_S = 30.0  # maximum time until the upstream server answers
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Peer(FrozenModel):
    """A running server to compare with: the base URL of its API, its model name, and its key."""

    base_url: Annotated[str, Field(pattern="^https?://", description="URL of the API, including /v1")]
    model: Annotated[str, Field(description="model of the chats")]
    api_key: Annotated[str, Field(description="key of the API", exclude=True)] = "none"


class ServeBenchmarkConfig(FrozenModel):
    """The checkpoint, the servers to compare, and the load."""

    checkpoint: Annotated[LocalPath, Field(description="checkpoint folder, for example that of the demo")] = Path(
        "runs/demo/checkpoint"
    )
    output: Annotated[LocalPath, Field(description="folder for serve.json")] = Path("runs/benchmarks/serve")
    peers: Annotated[dict[str, Peer], Field(description="running servers by name, a mapping")] = {}
    upstream_port: Annotated[int, Field(ge=1, le=65535, description="port of the upstream server")] = 8399
    connections: Annotated[tuple[int, ...], Field(min_length=1, description="concurrent chats, a list")] = (1, 8, 32)
    seconds: Annotated[float, Field(gt=0, description="duration of each measurement")] = 10.0
    warm_up_s: Annotated[float, Field(ge=0, description="time before each measurement")] = 2.0
    rounds: Annotated[int, Field(ge=1, description="rounds of measurements of each server; medians are printed")] = 3
    gateways: Annotated[int, Field(ge=1, description="gateway replicas")] = 1


def run(config: ServeBenchmarkConfig) -> str:
    """Measure latency and throughput of chats through the gateway."""
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")  # as python -m serve
    from serve import local  # imports Ray

    router = load_checkpoint(config.checkpoint)
    prompts = load_sample(QUESTIONS)[0].prompts.tolist()
    rows, alone = _encoder_alone(router, prompts)
    upstream = f"http://127.0.0.1:{config.upstream_port}/v1"
    found: dict[str, dict[str, Any]] = {}
    with (
        upstream_server(config.upstream_port, _answer_all),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client,
    ):

        def measure(name: str, base_url: str, model: str, key: str = "none") -> None:
            found[name] = {}
            for connections in config.connections:
                load = (base_url, model, key, prompts, connections, config.warm_up_s, config.seconds)
                rounds = [client.submit(_load, *load).result() for _ in range(config.rounds)]
                found[name][str(connections)] = _median(rounds)
                print(f"{name}, {connections} connections: {_shown(found[name][str(connections)])}", flush=True)

        measure("upstream alone", upstream, "upstream")
        for name, encoder_class in (("no-op encoder", constant_encoder([(router, rows)])), ("default encoder", None)):
            endpoints = {model: Endpoint(base_url=upstream) for model in router.pool.names}
            application = RouterAppConfig(
                checkpoint=str(config.checkpoint),
                gateway=GatewayConfig(endpoints=endpoints, replicas=config.gateways),
                encoder=EncoderDeploymentConfig(max_batch_size=32),
            )
            url = local.start(application, free_port(), *([encoder_class] if encoder_class else []))
            try:
                measure(name, f"{url}/v1", "auto")
            finally:
                local.stop()
        for name, peer in config.peers.items():
            measure(name, peer.base_url, peer.model, peer.api_key)
    figures = {"encoder_alone_per_s": alone, "servers": found, "config": config.model_dump(mode="json")}
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(config.output / "serve.json", figures)
    print(_table(found, config.connections))
    most = str(max(config.connections))
    per_s = found["default encoder"][most]["per_s"]
    return (
        f"default encoder: {per_s:.0f} chats/s with {most} connections, {per_s / alone:.2f} of the encoder alone "
        f"({alone:.0f} prompts/s); figures: {config.output / 'serve.json'}"
    )


def _encoder_alone(router: Router, prompts: Sequence[str]) -> tuple[dict[str, pa.Table], float]:
    """Activations of one prompt by encoder, and prompts per second of all encoders in full batches."""
    rows, seconds = {}, 0.0
    for fingerprint, config in router.encoders.items():
        with _closing(fingerprint, config) as encoder:
            encode_prompts(encoder, prompts)  # warm-up
            started = time.perf_counter()
            table = encode_prompts(encoder, prompts)
            seconds += time.perf_counter() - started
            rows[fingerprint] = table.take([0])
    return rows, len(prompts) / seconds


def encoded(router: Router, prompt: str) -> dict[str, pa.Table]:
    """The activations row of `prompt` from each encoder of the router, by fingerprint."""
    rows = {}
    for fingerprint, config in router.encoders.items():
        with _closing(fingerprint, config) as encoder:
            rows[fingerprint] = encode_prompts(encoder, [prompt])
    return rows


@contextmanager
def _closing(fingerprint: str, config: EncoderConfig) -> Iterator[Any]:
    import torch

    torch.set_num_threads(1)  # as an encoder replica with one CPU
    encoder = load_encoder(fingerprint, config)
    try:
        yield encoder
    finally:
        encoder.close()


def constant_encoder(known: Sequence[tuple[Router, Mapping[str, pa.Table]]]) -> type:
    """A class in place of serve's Encoder that returns the same row for every prompt.

    `known` are the routers with one row for each of their encoders.
    """
    made = {(name, router.encoders[name]): packed(row) for router, rows in known for name, row in rows.items()}

    class ConstantEncoder:
        def __init__(self, _: EncoderDeploymentConfig, __: Any = None) -> None:
            pass

        async def reconfigure(self, _: dict[str, Any]) -> None:
            pass

        async def encode(self, _: str, fingerprint: str, config: EncoderConfig) -> bytes:
            return made[fingerprint, config]

    return ConstantEncoder


@contextmanager
def upstream_server(port: int, serve: Callable[[int], None]) -> Iterator[None]:
    """Runs `serve(port)` in a process, and waits until it answers."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise InputError(f"upstream_port: another server answers at port {port}; choose a free port")
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    process.start()
    try:
        ended = time.monotonic() + START_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if not process.is_alive() or time.monotonic() > ended:
                raise InputError(f"upstream_port: nothing answers at port {port}; choose a free port")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.join()


def _answer_all(port: int) -> None:
    async def chat(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response(ANSWER)

    application = web.Application()
    application.router.add_post("/v1/chat/completions", chat)
    web.run_app(application, host="127.0.0.1", port=port, print=None, access_log=None)


def _load(
    base_url: str, model: str, key: str, prompts: Sequence[str], connections: int, warm_up_s: float, seconds: float
) -> dict[str, float]:
    """Chats per second and quantiles of the latency in ms, of the chats that end in the measured time.

    Raises InputError for a status other than 200.
    """
    latencies: list[float] = []

    async def chats(client: aiohttp.ClientSession, first: int, begin: float) -> None:
        position = first
        while (started := time.perf_counter()) < begin + seconds:
            message = {"role": "user", "content": prompts[position % len(prompts)]}
            async with client.post(
                f"{base_url}/chat/completions", json={"model": model, "messages": [message]}
            ) as reply:
                body = await reply.read()
                if reply.status != 200:
                    raise InputError(f"{base_url}: status {reply.status}: {body[:300]!r}")
            if begin <= time.perf_counter() < begin + seconds:
                latencies.append(time.perf_counter() - started)
            position += connections

    async def all_chats() -> None:
        timeout = aiohttp.ClientTimeout(total=120)
        headers = {"Authorization": f"Bearer {key}"}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as client:
            begin = time.perf_counter() + warm_up_s
            await asyncio.gather(*(chats(client, first, begin) for first in range(connections)))

    asyncio.run(all_chats())
    quantiles = np.quantile(latencies, list(QUANTILES.values())) * 1e3
    return {"per_s": len(latencies) / seconds, **dict(zip(QUANTILES, quantiles.tolist(), strict=True))}


def _median(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([one[name] for one in rounds])) for name in rounds[0]}


def _shown(figures: dict[str, float]) -> str:
    quantiles = ", ".join(f"{name} {figures[name]:.1f}" for name in QUANTILES)
    return f"{figures['per_s']:.0f} chats/s, ms: {quantiles}"


def _table(found: dict[str, dict[str, Any]], connections: Sequence[int]) -> str:
    """Chats per second, and the latency above that of the upstream server alone, in ms."""
    heading = "| server | connections | chats/s | " + " | ".join(f"added {name}, ms" for name in QUANTILES) + " |"
    lines = [heading, "|" + "---|" * (3 + len(QUANTILES))]
    for name, by_connections in found.items():
        for count in map(str, connections):
            own, base = by_connections[count], found["upstream alone"][count]
            added = " | ".join(f"{own[quantile] - base[quantile]:.1f}" for quantile in QUANTILES)
            lines.append(f"| {name} | {count} | {own['per_s']:.0f} | {added} |")
    return "\n".join(lines)


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main(ServeBenchmarkConfig, run)
