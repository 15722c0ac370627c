"""Serving: the HTTP contract on a running Ray Serve, and checkpoint swaps under load."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from states_server import states_server
from tiny_models import save_model
from tiny_router import MODELS, tiny_router

from prefill_router.errors import InputError
from prefill_router.prefill.backends import load_encoder
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from serve.cache import LoadCache
from serve.config import EncoderDeploymentConfig, RouterAppConfig
from serve.schemas import Message, as_prompt, invalid, read_request

APP = "prefill-router"
LIMIT = 4096  # maximum size of a request body, bytes


@pytest.fixture(scope="module")
def checkpoints(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints named after the model that they choose.

    `layer3` reads another layer, `foreign` another encoder, `torn` is corrupt.
    """
    from prefill_router.prefill.transformers_backend import TransformersEncoder

    folder = tmp_path_factory.mktemp("checkpoints")
    encoder = TransformersEncoder(EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))
    for name, router in {
        "cheap": tiny_router(encoder.info.fingerprint, "cheap"),
        "dear": tiny_router(encoder.info.fingerprint, "dear"),
        "layer3": tiny_router(encoder.info.fingerprint, "middle", layer=3),
        "foreign": tiny_router("f" * 16, "middle"),
    }.items():
        save_checkpoint(router, folder / name)
    save_checkpoint(tiny_router(encoder.info.fingerprint, "middle"), folder / "torn")
    (folder / "torn/checkpoint.safetensors").write_bytes(b"torn")
    return folder


class Server:
    """The application on the Ray of the test session, deployed as by `serve deploy`."""

    def __init__(self, port: int) -> None:
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def deploy(self, checkpoint: Path, live: Path | None = None, **encoder: Any) -> None:
        """Deploys `checkpoint`. `live`: user_config of all deployments; `encoder`: further settings of the encoder."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        override = (
            [{"name": name, "user_config": {"checkpoint": str(live)}} for name in ("Gateway", "Encoder", "Router")]
            if live
            else []
        )
        _get_global_client().deploy_apps(
            ServeDeploySchema.model_validate(
                {
                    "applications": [
                        {
                            "name": APP,
                            "route_prefix": "/",
                            "import_path": "serve.app:build",
                            "args": {
                                "checkpoint": str(checkpoint),
                                "gateway": {"cpus": 0.1, "max_body_bytes": LIMIT},
                                "router": {"cpus": 0.1},
                                "encoder": {"cpus": 0.5, "max_batch_size": 4, "max_queued_requests": 8} | encoder,
                            },
                            "deployments": override,
                        }
                    ]
                }
            )
        )

    def settle(self, seconds: float = 240) -> str:
        """Waits until the application runs or has failed; returns its status and messages."""
        from ray import serve as ray_serve

        time.sleep(0.5)  # until the controller has the new target
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = ray_serve.status().applications[APP]
            if status.status in ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY"):
                return f"{status.status.value} {status.message} " + " ".join(
                    deployment.message for deployment in status.deployments.values()
                )
            time.sleep(0.2)
        raise AssertionError(f"the application did not settle: {status}")

    def route(self, **body: Any) -> httpx.Response:
        return self.http.post(
            "/v1/route",
            json={name.replace("lam", "lambda") if name == "lam" else name: value for name, value in body.items()},
        )

    def checkpoint(self) -> str:
        return self.http.get("/healthz").json()["checkpoint"]


@pytest.fixture(scope="module")
def server(ray_cluster: object, checkpoints: Path) -> Iterator[Server]:
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray_serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    running = Server(port)
    running.deploy(checkpoints / "cheap")
    assert running.settle().startswith("RUNNING")
    yield running
    ray_serve.shutdown()


def test_a_prompt_is_routed(server: Server, checkpoints: Path) -> None:
    reply = server.route(prompt="What is 2 + 2?", lam=0.25)
    assert reply.status_code == 200
    body = reply.json()
    assert set(body) == {"model", "lambda", "candidates", "encoder", "checkpoint", "timings_ms", "decision_id"}
    router = load_checkpoint(checkpoints / "cheap")
    assert (body["model"], body["lambda"]) == ("cheap", 0.25)
    assert (body["checkpoint"], body["encoder"]) == (router.id, list(router.encoders))
    assert {c["model"] for c in body["candidates"]} == set(MODELS)
    scores = [c["score"] for c in body["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert body["candidates"][0]["model"] == "cheap"
    assert all(0 <= c["confidence"] <= 1 and c["uncertainty"] >= 0 and c["cost_usd"] > 0 for c in body["candidates"])
    times = body["timings_ms"]
    assert 0 < times["encode"] + times["route"] <= times["total"] + 1e-6


def test_lambda_defaults_to_the_value_of_the_checkpoint(server: Server) -> None:
    body = server.route(prompt="What is 2 + 2?").json()
    assert body["lambda"] == 0.0
    assert body["decision_id"] != server.route(prompt="What is 2 + 2?").json()["decision_id"]


def test_messages_decide_as_their_text_does(server: Server) -> None:
    spoken = server.route(messages=[{"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]}]).json()
    plain = server.route(prompt="What is 2 + 2?").json()
    assert spoken["candidates"] == plain["candidates"]


def test_models_and_max_cost_restrict_the_choice(server: Server) -> None:
    body = server.route(prompt="What is 2 + 2?", models=["dear", "middle"], max_cost_usd=1e-3).json()
    assert [c["model"] for c in body["candidates"]] == ["middle"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": "hi", "lambda": 1.5}, "lambda", "less than or equal to 1 (got 1.5)"),
        ({"prompt": "hi", "lambda": -0.1}, "lambda", "greater than or equal to 0 (got -0.1)"),
        ({"prompt": "hi", "lambda": "0.5"}, "lambda", "valid number (got '0.5')"),
        ({"prompt": "hi", "models": ["cheap", "gpt-9"]}, "models", "'gpt-9' is not in the pool; known: cheap, middle"),
        ({"prompt": "hi", "models": []}, "models", "at least 1 item"),
        ({"prompt": "hi", "max_cost_usd": 1e-9}, "max_cost_usd", "got 1e-09, the cheapest allowed model"),
        ({"prompt": "hi", "max_cost_usd": -1}, "max_cost_usd", "greater than or equal to 0"),
        ({"prompt": ""}, "prompt", "got no text"),
        ({"prompt": " \n"}, "prompt", "got no text"),
        ({"prompt": 7}, "prompt", "valid string (got 7)"),
        ({}, "prompt", "got neither of prompt and messages"),
        (
            {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]},
            "prompt",
            "got both of prompt and messages",
        ),
        ({"messages": []}, "messages", "got no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "got no text"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role", "'user'"),
        ({"prompt": "hi", "lamda": 0.5}, "lamda", "allowed fields: prompt, messages, lambda, models, max_cost_usd"),
    ],
)
def test_bad_input_is_a_400_that_names_field_and_value(
    server: Server, body: dict[str, Any], param: str, says: str
) -> None:
    reply = server.http.post("/v1/route", json=body)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(param.split(".")[0])
    assert says in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b'"text"', b"\xff\xfe", b'{"prompt": "hi", "lambda": NaN}', b'{"prompt": "\\ud800"}']
)
def test_a_body_that_is_no_json_object_is_a_400(server: Server, body: bytes) -> None:
    reply = server.http.post("/v1/route", content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_a_body_over_the_limit_is_a_413(server: Server) -> None:
    reply = server.route(prompt="x" * LIMIT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert f"larger than {LIMIT} bytes" in reply.json()["error"]["message"]


def test_unknown_paths_and_methods_answer_in_the_same_shape(server: Server) -> None:
    for reply, status in ((server.http.get("/v2/route"), 404), (server.http.get("/v1/route"), 405)):
        assert reply.status_code == status
        assert "POST /v1/route" in reply.json()["error"]["message"]


def test_models_are_listed_as_openai_lists_them(server: Server) -> None:
    body = server.http.get("/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["auto", *MODELS]
    assert all(model["object"] == "model" for model in body["data"])


def test_concurrent_prompts_get_the_answers_of_single_prompts(server: Server) -> None:
    prompts = [f"Question {i}: how many {'very ' * i}old trees are there?" for i in range(8)]
    alone = [server.route(prompt=prompt).json()["candidates"] for prompt in prompts]
    together: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.update({i: server.route(prompt=prompts[i]).json()}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        for one, other in zip(alone[i], together[i]["candidates"], strict=True):
            assert one["model"] == other["model"]
            assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-3)  # float16 states


def test_more_requests_than_may_wait_are_answered_503(server: Server) -> None:
    with ThreadPoolExecutor(64) as clients:
        replies = list(clients.map(lambda _: server.route(prompt="What is 2 + 2?"), range(128)))
    refused = [reply for reply in replies if reply.status_code == 503]
    assert {reply.status_code for reply in replies} == {200, 503}
    assert {reply.json()["error"]["code"] for reply in refused} == {"overloaded"}
    assert {reply.headers["retry-after"] for reply in refused} == {"1"}


def under_load(server: Server, action: Callable[[], None]) -> list[tuple[int, str, str]]:
    """(status, checkpoint, model) of the requests of three clients before, during and after `action`."""
    seen: list[tuple[int, str, str]] = []
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            reply = server.route(prompt="What is 2 + 2?")
            body = reply.json()
            seen.append((reply.status_code, body.get("checkpoint", reply.text), body.get("model", "")))

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.5)
        action()
        time.sleep(0.5)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return seen


@pytest.mark.parametrize(("name", "model"), [("dear", "dear"), ("layer3", "middle")])
def test_a_swap_loses_no_request_and_mixes_no_checkpoints(
    server: Server, checkpoints: Path, name: str, model: str
) -> None:
    server.deploy(checkpoints / "cheap", checkpoints / "cheap")
    assert server.settle().startswith("RUNNING")
    old, new = (load_checkpoint(checkpoints / which).id for which in ("cheap", name))

    def swap() -> None:
        server.deploy(checkpoints / "cheap", checkpoints / name)
        assert server.settle().startswith("RUNNING")

    seen = under_load(server, swap)
    assert {status for status, _, _ in seen} == {200}
    assert {(checkpoint, chosen) for _, checkpoint, chosen in seen} == {(old, "cheap"), (new, model)}
    assert server.checkpoint() == new


@pytest.mark.parametrize(
    ("name", "reason"),
    [("torn", "sha256"), ("foreign", "was trained on ffffffffffffffff"), ("nowhere", "expected a checkpoint folder")],
)
def test_a_bad_checkpoint_is_refused_and_the_old_one_serves_on(
    server: Server, checkpoints: Path, name: str, reason: str
) -> None:
    server.deploy(checkpoints / "cheap", checkpoints / "cheap")
    assert server.settle().startswith("RUNNING")

    def swap() -> None:
        server.deploy(checkpoints / "cheap", checkpoints / name)
        assert server.settle().startswith("RUNNING")

    seen = under_load(server, swap)
    health = server.http.get("/healthz").json()
    old = load_checkpoint(checkpoints / "cheap").id
    assert {(status, checkpoint) for status, checkpoint, _ in seen} == {(200, old)}
    assert reason in health["refused"]


def test_an_encoder_server_that_stops_answering_gives_a_503(server: Server, tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "llama")
    trained = EncoderConfig(model=str(model), layers=(2,), poolings=("mean",), max_length=100, states_dtype="float32")
    with states_server() as encoder_server:
        elsewhere = {"backend": "vllm_server", "vllm_server": {"base_url": encoder_server.url}}
        fingerprint = load_encoder(EncoderConfig(**trained.model_dump() | elsewhere)).info.fingerprint
        router = replace(tiny_router(fingerprint, "middle", hidden=48), encoders={fingerprint: trained})
        save_checkpoint(router, tmp_path / "checkpoint")
        server.deploy(tmp_path / "checkpoint", overrides={fingerprint: elsewhere})
        assert server.settle().startswith("RUNNING")
        assert server.route(prompt="ba do").json()["encoder"] == [fingerprint]
    reply = server.route(prompt="ba do")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["code"] == "encoder_unavailable"


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


def test_the_prompt_of_a_conversation_ends_with_the_question() -> None:
    messages = [
        Message(role="system", content="Be short."),
        Message(role="user", content="Weather?"),
        Message(role="assistant", content=None),
        Message(role="tool", content="rain"),
    ]
    assert as_prompt(messages) == "Be short.\nrain\nWeather?"
    assert as_prompt(messages[:1]) == "Be short."
    assert (
        as_prompt(
            [
                Message(role="user", content="a"),
                Message(role="assistant", content="b"),
                Message(role="user", content="c"),
            ]
        )
        == "a\nb\nc"
    )


def test_invalid_json_has_its_own_code() -> None:
    with pytest.raises(ValidationError) as error:
        read_request(b"{")
    assert invalid(error.value).code == "invalid_json"


def test_the_builder_refuses_a_missing_checkpoint() -> None:
    from serve.app import build

    with pytest.raises(InputError, match=r"checkpoint: got 'nowhere', expected a checkpoint folder"):
        build(RouterAppConfig(checkpoint="nowhere"))


def test_the_builder_refuses_a_torn_checkpoint(checkpoints: Path) -> None:
    from serve.app import build

    with pytest.raises(InputError, match="sha256"):
        build(RouterAppConfig(checkpoint=str(checkpoints / "torn")))


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
