"""Going live by steps under load: canaries that are equal, worse or fail, and promotions that the server follows.

`python -m serve`'s application runs on this machine with a registry of its own and follows the aliases `champion` and
`candidate`. Its encoder returns the same states for every prompt, and two servers answer: one every chat with its own
prompt, the other one each chat with status 500. A process sends chats over `connections` connections, each the next one
as soon as the last one is answered, and rates every answer: right with a probability that depends on the checkpoint.

1. `candidate` becomes, one after another: a version that is as good as the champion; one whose answers are rated worse;
   one whose chosen model is on the server that fails; one all of whose models are.
2. `champion` changes `promotions` times between two versions, with a damaged version among them.

A chat is lost if its status is not 200 or its answer is not its prompt. Afterwards every decision of the log is decided
again by the checkpoint that it names and has to be the same bit for bit: a request that mixed two would not be.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
from pydantic import Field

from benchmarks.rollout_client import Chat, answer_with_an_error, counted, send
from benchmarks.serve import constant_encoder, encoded, free_port, upstream_server
from benchmarks.soak import answer_with_prompt, replayed
from prefill_router import registry
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.files import read_json, write_json
from prefill_router.locations import LocalPath
from prefill_router.pool import Endpoint, Pool
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.router import Router
from serve.config import RouterAppConfig

WORSE = 0.4  # probability that an answer of the worse version is rated right
BEFORE_S, AFTER_S = 3.0, 5.0  # load before a change, and after what follows from it


class RolloutConfig(FrozenModel):
    """Two checkpoints that choose different models, and the load."""

    checkpoints: Annotated[
        tuple[LocalPath, LocalPath], Field(description="two checkpoint folders with the same pool and encoders, a list")
    ]
    output: Annotated[LocalPath, Field(description="folder for rollout.json, the registry and the decision log")] = (
        Path("runs/benchmarks/rollout")
    )
    seconds: Annotated[float, Field(gt=0, description="maximum duration of a canary")] = 40.0
    connections: Annotated[int, Field(ge=1, description="connections of the client")] = 8
    gateways: Annotated[int, Field(ge=1, description="gateway replicas")] = 2
    share: Annotated[float, Field(gt=0, lt=1, description="share of the canary")] = 0.2
    promotions: Annotated[int, Field(ge=1, description="changes of the champion")] = 5


def run(config: RolloutConfig) -> str:
    """Put canaries on trial and promote versions while chats are sent; count what was lost."""
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")  # as python -m serve
    folder = config.output.resolve()
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"output: {folder} holds an earlier run; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "MLFLOW_TRACKING_URI": registry.sqlite_uri(folder / "mlflow.db"),
        "XDG_CACHE_HOME": f"{folder}/cache",
    }
    from serve import local

    routers = [load_checkpoint(path) for path in config.checkpoints]
    rows = encoded(routers[0], "What is 2 + 2?")
    good, failing = free_port(), free_port()
    chosen = routers[1].decide(rows)[0].model
    versions = _register(folder, routers, chosen, good, failing)
    registry.promote(versions["champion"].number)
    application = RouterAppConfig.model_validate(
        {
            "checkpoint": "models:/prefill-router@champion",
            "canary": {"checkpoint": "models:/prefill-router@candidate", "share": config.share},
            "follow_s": 1.0,
            "gateway": {"replicas": config.gateways, "log": {"folder": folder / "log"}},
        }
    )
    encoder_class = constant_encoder([(router, rows) for router in routers])
    figures: dict[str, Any] = {"canaries": {}, "config": config.model_dump(mode="json")}
    with (
        upstream_server(good, answer_with_prompt),
        upstream_server(failing, answer_with_an_error),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        url = local.start(application, free_port(), encoder_class)
        try:
            load = Load(url, config, pool, {versions["worse"].router.id: WORSE})
            for name in ("equal", "worse", "failing model", "failing pool"):
                figures["canaries"][name] = _canary(load, versions[name], config.seconds)
                print(name, json.dumps(figures["canaries"][name]), flush=True)
            steps = [versions[("equal", "champion")[turn % 2]] for turn in range(config.promotions)]
            figures["promotions"] = _promotions(load, [*steps[:2], versions["damaged"], *steps[2:]])
            print("promotions", json.dumps(figures["promotions"]), flush=True)
        finally:
            local.stop()
    figures["replayed"] = replayed(folder / "log", [one.router for one in versions.values()])
    write_json(folder / "rollout.json", figures)
    parts = [*figures["canaries"].values(), figures["promotions"]]
    chats, lost = (sum(part[name] for part in parts) for name in ("chats", "lost"))
    same, decisions = figures["replayed"]["reproduced"], figures["replayed"]["decisions"]
    return (
        f"{chats:,} chats, {lost:,} lost; {same:,} of {decisions:,} decisions reproduced; figures: "
        f"{folder / 'rollout.json'}"
    )


@dataclass(frozen=True)
class Registered:
    """A version of the registry, and its router."""

    number: int
    router: Router


def _register(folder: Path, routers: list[Router], chosen: str, good: int, failing: int) -> dict[str, Registered]:
    """Registers copies of two checkpoints, with servers in their pools, as the versions of the trials.

    `chosen`: the model that the second one chooses; `good` and `failing`: ports.
    """
    names = routers[1].pool.names
    versions: dict[str, tuple[Router, Sequence[str]]] = {  # with the models on the server that fails
        "champion": (routers[0], ()),
        "equal": (routers[1], ()),
        "worse": (routers[1], ()),
        "failing model": (routers[1], [chosen]),
        "failing pool": (routers[1], names),
        "damaged": (routers[1], ()),
    }
    found = {}
    for name, (router, failed) in versions.items():
        endpoints = {
            model: Endpoint(
                base_url=f"http://127.0.0.1:{failing if model in failed else good}/v1",
                model=f"{model} of {name}",  # makes each copy another checkpoint
            )
            for model in names
        }
        models = tuple(model.model_copy(update={"endpoint": endpoints[model.name]}) for model in router.pool.models)
        path = folder / "checkpoints" / name.replace(" ", "-")
        save_checkpoint(replace(router, pool=Pool(models=models)), path)
        found[name] = Registered(registry.register(path).number, load_checkpoint(path))
    for manifest in (folder / "mlartifacts").rglob("manifest.json"):
        if read_json(manifest).get("id") == found["damaged"].router.id:
            (manifest.parent / "checkpoint.safetensors").write_bytes(b"damaged")
    return found


@dataclass(frozen=True)
class Load:
    """The running application and its client. `right`: as in `rollout_client.send`."""

    url: str
    config: RolloutConfig
    pool: ProcessPoolExecutor
    right: Mapping[str, float]

    @contextmanager
    def sent(self, chats: list[Chat]) -> Iterator[None]:
        """Sends chats meanwhile, and adds them to `chats`."""
        stop = self.config.output.resolve() / "stop"
        stop.unlink(missing_ok=True)
        sending = self.pool.submit(send, self.url, self.config.connections, stop, self.right)
        time.sleep(BEFORE_S)
        try:
            yield
            time.sleep(AFTER_S)
        finally:
            stop.touch()
            chats += sending.result()

    def until(self, field: str, value: Any, seconds: float) -> dict[str, Any]:
        """GET /healthz as soon as ten replies in a row, of all replicas, have the value; the last one after a time."""
        end, same = time.monotonic() + seconds, 0
        while True:
            health: dict[str, Any] = httpx.get(f"{self.url}/healthz", timeout=30).json()
            same = same + 1 if health[field] == value else 0
            if same >= 10 or time.monotonic() > end:
                return health
            time.sleep(0.02)


def _canary(load: Load, version: Registered, seconds: float) -> dict[str, Any]:
    """Puts a version on trial until it is stopped, at most for `seconds`."""
    chats: list[Chat] = []
    with load.sent(chats):
        begun = time.time()
        registry.set_alias(registry.CANDIDATE, version.number)
        load.until("canary", version.router.id, 20)
        health = load.until("canary", None, seconds)
        ended = time.time()
        registry.remove_alias(registry.CANDIDATE)
        load.until("canary", None, 20)
    own = [chat for chat in chats if chat.checkpoint == version.router.id]
    rollout = health["rollout"] or {}
    return counted(chats) | {
        "canary_chats": len(own),
        "first_s": round(min((chat.ended for chat in own), default=ended) - begun, 2),
        "last_s": round(max((chat.ended for chat in own), default=ended) - begun, 2),
        "state": rollout.get("state"),
        "reason": rollout.get("reason"),
        "verdicts": {name: one["verdict"] for name, one in rollout.get("bands", {}).items()},
        "tag": registry.version_tags(version.number).get("rollout"),
    }


def _promotions(load: Load, versions: Sequence[Registered]) -> dict[str, Any]:
    """Promotes versions one after another; waits until each is live, or refused."""
    chats: list[Chat] = []
    live_s: list[float | None] = []
    refused = []
    with load.sent(chats):
        for version in versions:
            begun = time.time()
            registry.promote(version.number)
            health = load.until("checkpoint", version.router.id, 8)
            live_s.append(round(time.time() - begun, 2) if health["checkpoint"] == version.router.id else None)
            if health["refused"]:
                refused.append(health["refused"][:300])
    known = {version.router.id for version in versions}
    seen = {str(chat.checkpoint) for chat in chats}
    return counted(chats) | {"live_s": live_s, "refused": refused, "unknown_checkpoints": len(seen - known)}


if __name__ == "__main__":
    main(RolloutConfig, run)
