"""Parts of the application without a running Serve: cache, router replicas, builder, configuration, command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from tiny_router import HIDDEN, tiny_router

from prefill_router.errors import InputError
from prefill_router.pool import Pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.checkpoint import save_checkpoint
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.router import Decision, Router
from prefill_router.signals.novelty import Novelty, Spread
from serve.cache import LoadCache
from serve.config import EncoderDeploymentConfig, GatewayConfig, RouterAppConfig, RouterDeploymentConfig
from serve.http import ApiError, RelayedStream, read_body
from serve.router import Checkpoint, RouterHead
from serve.schemas import Timings, route_reply
from serve.transport import packed


def test_concurrent_requests_share_one_load() -> None:
    loads = []

    async def ask() -> list[int]:
        cache: LoadCache[str, int] = LoadCache()
        return list(await asyncio.gather(*(cache.get("a", lambda: loads.append(1) or 7) for _ in range(5))))

    assert asyncio.run(ask()) == [7] * 5
    assert len(loads) == 1


def test_a_failed_load_is_repeated() -> None:
    async def ask() -> int:
        cache: LoadCache[str, int] = LoadCache()
        with pytest.raises(ZeroDivisionError):
            await cache.get("a", lambda: 1 // 0)
        return await cache.get("a", lambda: 7)

    assert asyncio.run(ask()) == 7


def test_the_cache_holds_the_two_most_recently_used_values() -> None:
    loads = []

    async def ask() -> None:
        cache: LoadCache[str, None] = LoadCache()
        for key in "abacab":
            await cache.get(key, lambda key=key: loads.append(key))
        assert len(cache) == 2

    asyncio.run(ask())
    assert loads == ["a", "b", "c", "b"]


def test_a_cancelled_caller_does_not_cancel_a_shared_load() -> None:
    async def ask() -> int:
        cache: LoadCache[str, int] = LoadCache()
        slow = lambda: time.sleep(0.2) or 7  # noqa: E731
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cache.get("a", slow), 0.02)
        return await cache.get("a", lambda: 8)

    assert asyncio.run(ask()) == 7


FINGERPRINT = "f" * 16


@dataclass
class Head:
    """A router replica without Serve, its checkpoint and the rows of one query."""

    replica: RouterHead
    checkpoint: Checkpoint
    rows: dict[str, pa.Table]

    @property
    def packed(self) -> dict[str, bytes]:
        return {name: packed(table) for name, table in self.rows.items()}

    def decide(self, **requirements: Any) -> Decision | InputError:
        own = self.checkpoint
        return asyncio.run(self.replica.decide(own.id, own.where, self.packed, None, Requirements(**requirements)))


def head_of(folder: Path, router: Router, **config: Any) -> Head:
    save_checkpoint(router, folder)
    replica = RouterHead(RouterDeploymentConfig(**config))
    (key,) = router.layer_keys
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(HIDDEN, np.float32)), HIDDEN)
    rows = pa.table({"n_tokens": pa.array([12], pa.int32()), "error": pa.nulls(1, pa.string()), key.column: values})
    return Head(replica, asyncio.run(replica.describe(str(folder))), {FINGERPRINT: rows})


def novel_router() -> Router:
    """A router for which every query is novel."""
    return replace(tiny_router(FINGERPRINT), novelty=Novelty((Spread(np.ones(4), 0.0),), np.array([-1.0])))


def test_a_novel_query_goes_to_the_configured_model(tmp_path: Path) -> None:
    decision = head_of(tmp_path / "a", novel_router()).decide()
    assert (decision.model, decision.reason, decision.novelty) == ("cheap", "score", 1.0)
    head = head_of(tmp_path / "b", novel_router(), novelty_above=0.999, fallback_model="dear")
    decision = head.decide()
    assert (decision.model, decision.reason) == ("dear", "novelty")
    reply = route_reply(
        decision, encoder=[], checkpoint="c", timings_ms=Timings(encode=1, route=1, total=2), decision_id="d"
    )
    assert (reply.model, reply.reason, reply.novelty) == ("dear", "novelty", 1.0)
    assert head.decide(models=("cheap", "middle")).reason == "score"


@pytest.mark.parametrize(
    ("router", "model", "says"),
    [
        (tiny_router(FINGERPRINT), "dear", "novelty_above: the checkpoint has no novelty"),
        (novel_router(), "huge", "fallback_model: 'huge' is not in the pool; known: cheap, middle, dear"),
    ],
)
def test_a_checkpoint_without_the_fallback_is_refused(tmp_path: Path, router: Router, model: str, says: str) -> None:
    from serve.app import build

    settings = {"novelty_above": 0.999, "fallback_model": model}
    save_checkpoint(router, tmp_path / "new")
    with pytest.raises(InputError, match=says):
        build(RouterAppConfig(checkpoint=str(tmp_path / "new"), router=RouterDeploymentConfig(**settings)))
    with pytest.raises(InputError, match=says):  # the reason in /healthz, if another checkpoint is live
        head_of(tmp_path / "new", router, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"novelty_above": 0.9}, "fallback_model: got none; novelty_above and fallback_model need each other"),
        ({"fallback_model": "dear"}, "novelty_above: got none"),
        ({"novelty_above": 1.0, "fallback_model": "dear"}, "less than 1"),
    ],
)
def test_a_fallback_needs_a_bound_and_a_model(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RouterDeploymentConfig(**settings)


def test_a_query_without_candidates_is_returned_as_an_error(tmp_path: Path) -> None:
    error = head_of(tmp_path / "a", tiny_router(FINGERPRINT)).decide(capabilities=frozenset({"vision"}))
    assert isinstance(error, InputError)
    assert str(error).startswith("require: no model is left")


def test_a_folder_with_another_checkpoint_does_not_decide(tmp_path: Path) -> None:
    head = head_of(tmp_path / "a", tiny_router(FINGERPRINT))
    decide = head.replica.decide("0" * 16, head.checkpoint.where, head.packed, None, Requirements())
    with pytest.raises(RuntimeError, match=f"now holds checkpoint {head.checkpoint.id}, but {'0' * 16} is live"):
        asyncio.run(decide)


def test_the_probe_passes_a_pool_of_small_context_windows(tmp_path: Path) -> None:
    router = tiny_router(FINGERPRINT)
    small = tuple(model.model_copy(update={"context_tokens": 8}) for model in router.pool.models)
    head = head_of(tmp_path / "a", replace(router, pool=Pool(models=small)))
    assert str(head.decide()).startswith("prompt: no model is left")
    asyncio.run(head.replica.probe(head.checkpoint, head.packed))


def test_a_body_that_never_ends_is_a_408() -> None:
    sent = [{"type": "http.request", "body": b'{"prompt": "', "more_body": True}]

    async def receive() -> dict[str, Any]:
        if not sent:
            await asyncio.sleep(60)
        return sent.pop()

    with pytest.raises(ApiError) as error:
        asyncio.run(read_body(Request({"type": "http", "headers": []}, receive), 100, 0.05))
    assert (error.value.status, error.value.detail.code) == (408, "body_timeout")


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "ftp://a", ""])
def test_an_origin_is_a_scheme_and_a_host(origin: str) -> None:
    with pytest.raises(ValidationError, match=r"cors_origins\.0"):
        GatewayConfig(cors_origins=(origin,))


def test_the_builder_refuses_a_missing_checkpoint() -> None:
    from serve.app import build

    with pytest.raises(InputError, match=r"checkpoint: got 'nowhere', expected a checkpoint folder"):
        build(RouterAppConfig(checkpoint="nowhere"))


def test_the_builder_refuses_a_torn_checkpoint(tmp_path: Path) -> None:
    from serve.app import build

    save_checkpoint(tiny_router("f" * 16), tmp_path / "torn")
    (tmp_path / "torn/checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="sha256"):
        build(RouterAppConfig(checkpoint=str(tmp_path / "torn")))


def test_an_encoder_other_than_the_checkpoints_is_refused(minilm: str) -> None:
    from prefill_router.controller import load_encoder

    with pytest.raises(InputError, match=r"encoder: 'minilm' has the fingerprint \w{16}, .* trained on ffffffff"):
        load_encoder("f" * 16, EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpoint", "nowhere"], "serve: error: checkpoint: got 'nowhere'"),
        (["--config", "nowhere.yaml"], "serve: error: --config nowhere.yaml: no such file"),
    ],
)
def test_the_command_line_answers_bad_input_in_one_line(arguments: list[str], says: str) -> None:
    ended = subprocess.run([sys.executable, "-m", "serve", *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(says)
    assert ended.stderr.count("\n") == 1


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    from serve.local import start

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="choose another with --port"):
            start(RouterAppConfig(checkpoint="nowhere"), taken.getsockname()[1])


def test_tensor_parallel_encoders_need_as_many_gpus() -> None:
    override = {"big": {"backend": "vllm", "vllm": {"tensor_parallel_size": 2}}}
    for gpus in (0, 2):
        EncoderDeploymentConfig(gpus=gpus, overrides=override)
    with pytest.raises(ValidationError, match="gpus: got 1, but big has tensor_parallel_size 2; set gpus to 2"):
        EncoderDeploymentConfig(gpus=1, overrides=override)


def test_unknown_configuration_is_refused() -> None:
    with pytest.raises(ValidationError, match="replica"):
        RouterAppConfig.model_validate({"checkpoint": "x", "encoder": {"replica": 2}})


def test_the_deploy_file_is_valid_and_swaps_in_one_place() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    raw = yaml.safe_load(Path("configs/serve.yaml").read_text())
    deploy = ServeDeploySchema.model_validate(raw)
    (application,) = deploy.applications
    assert deploy.http_options.host == "127.0.0.1"
    RouterAppConfig.model_validate(application.args)
    assert {deployment.name for deployment in application.deployments} == {"Gateway", "Encoder", "Router"}
    assert len({json.dumps(deployment.user_config) for deployment in application.deployments}) == 1


def test_a_stream_is_released_if_its_client_leaves_before_the_first_event() -> None:
    taken, released = list[bytes](), list[bool]()

    async def events() -> AsyncIterator[bytes]:
        taken.append(b"x")
        yield b"x"

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise OSError("the client left")

    async def run() -> None:
        stream = RelayedStream(events(), {}, lambda: released.append(True))
        with contextlib.suppress(ClientDisconnect, OSError):
            await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)

    asyncio.run(run())
    assert (taken, released) == ([], [True])
