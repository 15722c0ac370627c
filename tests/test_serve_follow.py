"""A running application follows the aliases of a registry, and stops a canary by itself."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_application import Server, save_checkpoints, under_load

from prefill_router import registry
from prefill_router.files import read_json

CHAMPION, CANDIDATE = "models:/prefill-router@champion", "models:/prefill-router@candidate"


@pytest.fixture
def versions(store: Path, minilm: str) -> dict[str, registry.Version]:
    """The registered checkpoints `cheap` and `dear`, and `layer3`, whose files are damaged afterwards."""
    save_checkpoints(store, minilm)
    found = {name: registry.register(store / name) for name in ("cheap", "dear", "layer3")}
    for manifest in (store / "mlartifacts").rglob("manifest.json"):
        if read_json(manifest)["id"] == found["layer3"].checkpoint:
            (manifest.parent / "checkpoint.safetensors").write_bytes(b"damaged")
    registry.promote(found["cheap"].number)
    return found


@pytest.fixture
def server(ray_cluster: object, versions: dict[str, registry.Version], store: Path) -> Iterator[Server]:
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray_serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    own = Server(port)
    live = {"checkpoint": CHAMPION, "canary": {"checkpoint": CANDIDATE, "share": 0.5}, "follow_s": 0.5}
    environment = {name: os.environ[name] for name in ("MLFLOW_TRACKING_URI", "XDG_CACHE_HOME")}
    own.deploy(CHAMPION, live, environment=environment)
    assert own.settle().startswith("RUNNING")
    yield own
    own.http.close()
    ray_serve.shutdown()


def until(server: Server, wanted: Callable[[dict[str, Any]], object], seconds: float = 60) -> dict[str, Any]:
    """GET /healthz as soon as it is as wanted."""
    end = time.monotonic() + seconds
    while not wanted(health := server.http.get("/healthz").json()):
        assert time.monotonic() < end, health
        time.sleep(0.1)
    return dict(health)


def test_promotions_go_live_without_a_lost_request_and_a_worse_canary_is_stopped(
    server: Server, versions: dict[str, registry.Version]
) -> None:
    cheap, dear, damaged = (versions[name] for name in ("cheap", "dear", "layer3"))
    assert server.checkpoint() == cheap.checkpoint

    def promotions() -> None:
        registry.promote(dear.number)
        until(server, lambda health: health["checkpoint"] == dear.checkpoint)
        registry.promote(damaged.number)
        refused = until(server, lambda health: health["refused"])
        assert refused["checkpoint"] == dear.checkpoint
        assert f"models:/prefill-router/{damaged.number}: " in refused["refused"]
        registry.promote(cheap.number)
        until(server, lambda health: health["checkpoint"] == cheap.checkpoint and health["refused"] is None)

    seen = under_load(server, promotions)
    assert set(seen) == {(200, cheap.checkpoint, "cheap"), (200, dear.checkpoint, "dear")}

    registry.set_alias("candidate", dear.number)
    until(server, lambda health: health["canary"] == dear.checkpoint)
    for _ in range(300):
        decision = server.route(prompt="What is 2 + 2?").json()
        score = float(decision["checkpoint"] == cheap.checkpoint)
        server.http.post("/v1/feedback", json={"decision_id": decision["decision_id"], "score": score})
        if server.http.get("/healthz").json()["canary"] is None:
            break
    rollout = until(server, lambda health: health["canary"] is None)["rollout"]
    assert (rollout["state"], rollout["canary"]) == ("stopped", f"models:/prefill-router/{dear.number}")
    assert rollout["reason"].startswith("feedback: mean 1 over ")
    assert server.http.get("/v1/status").json()["rollout"] == rollout
    until(server, lambda _: "candidate" not in registry.aliases())
    assert registry.version_tags(dear.number)["rollout"] == f"stopped: {rollout['reason']}"
    assert {server.route(prompt="What is 2 + 2?").json()["checkpoint"] for _ in range(20)} == {cheap.checkpoint}
