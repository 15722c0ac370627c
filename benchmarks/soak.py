"""Soak of the gateway: chats at a fixed rate while parts of the application fail.

The application of `serve` runs on this machine with two encoder replicas. Two servers answer every chat with its own
prompt; one of them is `flapping`: for 20 s of each minute it answers 429, 500 or closes the connection, in turns. The
models of the pool are on them in turns; the first model, on the other server, is the default model. A process sends
chats at `load` times the measured capacity, a quarter of them streamed. Every `kill_s` seconds an encoder replica is
killed (SIGKILL), and every `swap_s` seconds the other one of the two checkpoints becomes live.

A chat is lost if its status is not 200 or its answer breaks, and wrong if its answer is not its prompt. Memory is the
unique set size: pages that no other process has. While one of two encoder replicas is dead, the mapped weights count
for the other one. The slope is that of a straight line after the first quarter. With `noop_encoder` every prompt has
the same states, so that the rate is high enough to fill what the application keeps: the newest decisions, and
KEPT_SESSIONS conversations. Afterwards every decision of the log is decided again (`jobs.replay`) and has to be the
same bit for bit.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import psutil
from aiohttp import web
from pydantic import Field
from tqdm import tqdm

from benchmarks.serve import constant_encoder, encoded, free_port, upstream_server
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.decisions.log import read_decisions
from prefill_router.decisions.replay import logged_decisions, reproduced
from prefill_router.errors import InputError
from prefill_router.files import write_json
from prefill_router.locations import LocalPath
from prefill_router.outcomes.sample import load_sample
from prefill_router.pool import Endpoint
from prefill_router.routing.checkpoint import load_checkpoint
from serve.config import EncoderDeploymentConfig, GatewayConfig, RouterAppConfig
from serve.decision_log import DecisionLogConfig
from serve.sessions import SessionsConfig

QUESTIONS = 512
REPLICAS = 2  # of the encoder
CAPACITY_CONNECTIONS, CAPACITY_S = 16, 20.0  # of the measurement of the capacity
SAMPLE_S = 5.0  # between two measurements of the memory
SHOWN = 20  # errors in the figures
KEPT_SESSIONS = 10_000


class SoakConfig(FrozenModel):
    """The two checkpoints, the load, and the times between failures, in seconds."""

    checkpoints: Annotated[
        tuple[LocalPath, LocalPath], Field(description="two checkpoint folders with the same pool, a list")
    ]
    output: Annotated[LocalPath, Field(description="folder for soak.json and the decision log")] = Path(
        "runs/benchmarks/soak"
    )
    seconds: Annotated[float, Field(gt=0, description="duration")] = 900.0
    load: Annotated[float, Field(gt=0, le=1, description="rate of the chats, as a share of the capacity")] = 0.7
    kill_s: Annotated[float, Field(gt=0, description="time between two kills of an encoder replica")] = 120.0
    swap_s: Annotated[float, Field(gt=0, description="time between two swaps of the checkpoint")] = 180.0
    flap: Annotated[bool, Field(description="whether one upstream server fails for 20 s of each minute")] = True
    noop_encoder: Annotated[bool, Field(description="an encoder that returns the same states for every prompt")] = False


def run(config: SoakConfig) -> str:
    """Send chats while replicas die, a server fails and checkpoints change; count what was lost or wrong."""
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")  # as python -m serve
    from ray import serve as ray_serve

    from serve import local
    from serve.app import build_with
    from serve.encoder import Encoder

    routers = [load_checkpoint(path) for path in config.checkpoints]
    prompts = load_sample(QUESTIONS)[0].prompts.tolist()
    log = config.output / "log"
    if log.is_dir() and any(log.iterdir()):
        raise InputError(f"output: {log} holds the log of an earlier run; choose another folder")
    steady, flapping = free_port(), free_port()
    names = routers[0].pool.names
    endpoints = {
        name: Endpoint(base_url=f"http://127.0.0.1:{(steady, flapping)[position % 2]}/v1")
        for position, name in enumerate(names)
    }

    def application(checkpoint: Path) -> RouterAppConfig:
        return RouterAppConfig(
            checkpoint=str(checkpoint),
            gateway=GatewayConfig(
                endpoints=endpoints,
                default_model=names[0],
                log=DecisionLogConfig(folder=log),
            ),
            encoder=EncoderDeploymentConfig(replicas=REPLICAS),
            sessions=SessionsConfig(most=KEPT_SESSIONS),
        )

    encoder_class: type = Encoder
    if config.noop_encoder:
        encoder_class = constant_encoder([(router, encoded(router, prompts[0])) for router in routers])
    context = multiprocessing.get_context("spawn")
    with (
        upstream_server(steady, answer_with_prompt),
        upstream_server(flapping, answer_and_flap if config.flap else answer_with_prompt),
        ProcessPoolExecutor(1, context) as client,
    ):
        url = local.start(application(config.checkpoints[0]), free_port(), encoder_class)
        try:
            capacity = client.submit(measure_capacity, url, prompts).result()
            rate = config.load * capacity
            if rate * config.seconds < 1:
                raise InputError(f"seconds: the application answers {capacity:.2f} chats/s, too few for a soak")
            print(f"capacity {capacity:.1f} chats/s; {rate:.1f} chats/s for {config.seconds:.0f} s", flush=True)
            sending = client.submit(send, url, prompts, rate, config.seconds)
            kills, swaps, memory = 0, 0, []
            started = time.monotonic()
            with tqdm(total=round(config.seconds), desc="soak", unit=" s", mininterval=10) as bar:
                while not sending.done():
                    elapsed = time.monotonic() - started
                    bar.update(min(round(elapsed), round(config.seconds)) - bar.n)
                    memory.append((elapsed, *memory_mib()))
                    if elapsed < config.seconds - config.kill_s / 2:  # the last chats see no new failure
                        if elapsed >= (kills + 1) * config.kill_s:
                            kills += kill_encoder(kills)
                        if elapsed >= (swaps + 1) * config.swap_s:
                            swaps += 1
                            live = build_with(application(config.checkpoints[swaps % 2]), encoder_class)
                            ray_serve.run(live, name="prefill-router", route_prefix="/")
                    time.sleep(SAMPLE_S)
            figures = sending.result()
        finally:
            local.stop()
    figures |= {"capacity_per_s": capacity, "rate_per_s": rate, "kills": kills, "swaps": swaps}
    figures |= {"memory": memory_slopes(memory), "replayed": replayed(log, routers)}
    print(json.dumps(figures, indent=1))
    samples = [{"seconds": at, "total_mib": total, "largest_mib": by_name} for at, total, by_name in memory]
    write_json(config.output / "soak.json", figures | {"samples": samples, "config": config.model_dump(mode="json")})
    slope = figures["memory"]["total"]["mib_per_hour"]
    same, decisions = figures["replayed"]["reproduced"], figures["replayed"]["decisions"]
    return (
        f"{figures['chats']:,} chats, {figures['lost']:,} lost, {figures['wrong']:,} wrong; {kills} encoder replicas "
        f"killed, {swaps} swaps; memory {slope:+.0f} MiB/h; {same:,} of {decisions:,} decisions reproduced; figures: "
        f"{config.output / 'soak.json'}"
    )


# Upstream servers


def answer_with_prompt(port: int) -> None:
    """Runs a server that answers every chat with its last message."""
    _serve(port, lambda: "ok")


def answer_and_flap(port: int) -> None:
    """Runs a server that fails for 20 s of each minute."""
    count = 0

    def step() -> str:
        nonlocal count
        count += 1
        return ("429", "500", "reset")[count % 3] if time.time() % 60 < 20 else "ok"

    _serve(port, step)


def _serve(port: int, step: Callable[[], str]) -> None:
    async def chat(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        what = step()
        if what == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if what != "ok":
            return web.json_response({"error": {"message": what}}, status=int(what))
        text = asked["messages"][-1]["content"]
        common = {"id": "chatcmpl-1", "created": 1, "model": asked["model"]}
        usage = {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}
        if not asked.get("stream"):
            message = {"role": "assistant", "content": text}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            return web.json_response(common | {"object": "chat.completion", "choices": choices, "usage": usage})
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        half = len(text) // 2
        for delta, end in (({"content": text[:half]}, None), ({"content": text[half:]}, None), ({}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": end}
            event = common | {"object": "chat.completion.chunk", "choices": [choice]}
            await reply.write(f"data: {json.dumps(event)}\n\n".encode())
        await reply.write(b"data: [DONE]\n\n")
        return reply

    application = web.Application()
    application.router.add_post("/v1/chat/completions", chat)
    web.run_app(application, host="127.0.0.1", port=port, print=None, access_log=None)


# The client


async def _ask(client: aiohttp.ClientSession, url: str, prompt: str, stream: bool) -> str:
    """`ok`, `wrong`, or the error."""
    body = {"model": "auto", "messages": [{"role": "user", "content": prompt}], "stream": stream}
    try:
        async with client.post(f"{url}/v1/chat/completions", json=body) as reply:
            text = (await reply.read()).decode()
            if reply.status != 200:
                return f"status {reply.status}: {text[:200]}"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    try:
        if not stream:
            answer = json.loads(text)["choices"][0]["message"]["content"]
        else:
            lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
            if lines[-1] != "[DONE]":
                return f"stream without an end: {lines[-1][:200]}"
            events = [json.loads(line) for line in lines[:-1]]
            if errors := [event["error"] for event in events if event.get("error")]:
                return f"broken stream: {errors[0]}"
            deltas = [choice["delta"] for event in events for choice in event["choices"]]
            answer = "".join(delta.get("content") or "" for delta in deltas)
    except (ValueError, LookupError) as error:
        return f"broken answer ({error}): {text[:200]}"
    return "ok" if answer == prompt else "wrong"


def measure_capacity(url: str, prompts: list[str]) -> float:
    """Chats per second with CAPACITY_CONNECTIONS connections."""

    async def all_chats() -> float:
        answered = 0
        begin = time.perf_counter()

        async def chats(first: int) -> None:
            nonlocal answered
            position = first
            while time.perf_counter() < begin + CAPACITY_S:
                outcome = await _ask(client, url, prompts[position % len(prompts)], False)
                answered += outcome == "ok"
                position += CAPACITY_CONNECTIONS

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
            await asyncio.gather(*(chats(first) for first in range(CAPACITY_CONNECTIONS)))
        return answered / (time.perf_counter() - begin)

    return asyncio.run(all_chats())


def send(url: str, prompts: list[str], rate: float, seconds: float) -> dict[str, Any]:
    """Sends chats at `rate` per second, whether earlier ones are answered or not; counts and quantiles of latency."""
    results: Counter[str] = Counter()
    latencies: list[float] = []

    async def one(client: aiohttp.ClientSession, number: int) -> None:
        started = time.perf_counter()
        prompt = f"{prompts[number % len(prompts)]} ({number})"
        outcome = await _ask(client, url, prompt, stream=number % 4 == 0)
        results[outcome] += 1
        latencies.append(time.perf_counter() - started)

    async def all_chats() -> None:
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as client:
            begin, tasks = time.perf_counter(), []
            for number in range(round(rate * seconds)):
                await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
                tasks.append(asyncio.ensure_future(one(client, number)))
            await asyncio.gather(*tasks)

    asyncio.run(all_chats())
    errors = {text: count for text, count in results.most_common() if text not in ("ok", "wrong")}
    p50, p95, p99 = (np.quantile(latencies, [0.5, 0.95, 0.99]) * 1e3).tolist()
    return {
        "chats": sum(results.values()),
        "lost": sum(errors.values()),
        "wrong": results["wrong"],
        "errors": dict(list(errors.items())[:SHOWN]),
        "latency_ms": {"p50": p50, "p95": p95, "p99": p99, "max": 1e3 * max(latencies)},
    }


# The application's processes


def _processes() -> list[tuple[str, psutil.Process]]:
    """The replicas and the proxy of this process' Ray, by deployment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        for name in ("Gateway", "Encoder", "Router", "Sessions"):
            if title.startswith(f"ray::ServeReplica:prefill-router:{name}"):
                found.append((name, process))
        if title.startswith("ray::ProxyActor"):
            found.append(("Proxy", process))
    return found


def kill_encoder(turn: int) -> int:
    """Kills one encoder replica; returns how many were killed: 0 if there is only one."""
    encoders = sorted((one for name, one in _processes() if name == "Encoder"), key=lambda one: one.pid)
    if len(encoders) < REPLICAS:
        return 0
    os.kill(encoders[turn % len(encoders)].pid, signal.SIGKILL)
    return 1


def memory_mib() -> tuple[float, dict[str, float]]:
    """Memory of all processes of the application, and of the largest process of every deployment.

    It is the unique set size: the pages that no other process has.
    """
    sizes: dict[str, list[float]] = {}
    for name, process in _processes():
        try:
            sizes.setdefault(name, []).append(process.memory_full_info().uss / 2**20)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return sum(map(sum, sizes.values())), {name: max(values) for name, values in sizes.items()}


def memory_slopes(samples: list[tuple[float, float, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """First and last MiB, and MiB per hour after the first quarter, of the total and by deployment."""
    later = samples[len(samples) // 4 :]

    def of(values: list[tuple[float, float]]) -> dict[str, float]:
        seconds, mib = np.array(values).T
        slope = np.polyfit(seconds, mib, 1)[0] * 3600 if len(values) > 1 else 0.0
        return {"first_mib": mib[0], "last_mib": mib[-1], "mib_per_hour": float(slope)}

    names = sorted({name for _, _, own in later for name in own})
    by_name = {name: [(at, own[name]) for at, _, own in later if name in own] for name in names}
    return {"total": of([(at, total) for at, total, _ in later])} | {name: of(one) for name, one in by_name.items()}


def replayed(log: Path, routers: list[Any]) -> dict[str, int]:
    """How many decisions of the log the checkpoints make again, bit for bit."""
    decisions, same = 0, 0
    read = read_decisions(log)
    made_by = {one["decision"]["checkpoint"] for one in read.values() if one["decision"].get("candidates")}
    for router in routers:
        if router.id in made_by:
            logged = logged_decisions(read, router.pool.names, router.id)
            decisions += len(logged.ids)
            same += int(reproduced(logged, router).sum())
    return {"decisions": decisions, "reproduced": same}


if __name__ == "__main__":
    main(SoakConfig, run)
