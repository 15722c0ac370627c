"""Serving: the HTTP contract on a running Ray Serve, and checkpoint swaps under load."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from serve_application import ORIGIN, Server, save_checkpoints, under_load
from states_server import states_server
from test_any_input import any_input
from test_any_request import bodies
from tiny_models import save_model
from tiny_router import MODELS, tiny_router

from prefill_router.prefill.backends import load_encoder
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from serve.schemas import RouteReply

LIMIT = 1_048_576  # maximum size of a request body, bytes


@pytest.fixture(scope="module")
def checkpoints(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `save_checkpoints`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoints(folder, minilm)
    return folder


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
    assert set(body) == set(RouteReply.model_json_schema()["properties"])
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
    assert [one["model"] for one in body["excluded"]] == ["cheap", "dear"]
    assert body["excluded"][0]["reason"] == "not in the request's models"
    assert body["excluded"][1]["reason"].endswith("USD exceeds the maximum of 0.001 USD")


def test_features_and_length_of_a_request_exclude_models_with_the_reason(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    body = server.route(prompt="Rain?", tools=tools, response_format={"type": "json_object"}).json()
    assert body["model"] == "middle"
    assert body["excluded"] == [
        {"model": "cheap", "reason": "does not declare json, tools"},
        {"model": "dear", "reason": "does not declare json"},
    ]
    body = server.route(messages=[{"role": "user", "content": "tree " * 10_000}], max_tokens=500).json()
    assert [(one["model"], "500 output tokens exceed" in one["reason"]) for one in body["excluded"]] == [
        ("cheap", True),
        ("middle", True),
    ]


def test_a_decision_reports_unknown_tokens_novelty_and_extrapolated_costs(server: Server) -> None:
    short = server.route(prompt="What is 2 + 2?").json()
    assert (short["reason"], short["novelty"], short["unknown_share"]) == ("score", None, 0)
    assert short["cost_extrapolated"] is False
    long = server.route(prompt="ไ" * 60_000).json()  # one unknown token
    assert long["unknown_share"] == 1
    assert long["cost_extrapolated"] is True


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": "hi", "lambda": 1.5}, "lambda", "less than or equal to 1 (got 1.5)"),
        ({"prompt": "hi", "lambda": -0.1}, "lambda", "greater than or equal to 0 (got -0.1)"),
        ({"prompt": "hi", "lambda": "0.5"}, "lambda", "valid number (got '0.5')"),
        ({"prompt": "hi", "models": ["cheap", "gpt-9"]}, "models", "'gpt-9' is not in the pool; known: cheap, middle"),
        ({"prompt": "hi", "models": []}, "models", "at least 1 item"),
        (
            {"prompt": "hi", "max_cost_usd": 1e-9},
            "max_cost_usd",
            "cheap: estimated cost 4.03e-05 USD exceeds the maximum",
        ),
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
        ({"prompt": "hi", "require": ["vision"]}, "require", "dear: does not declare vision"),
        ({"prompt": "hi", "tools": [{}], "models": ["cheap"]}, "tools", "no model is left"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image_url"}]}]},
            "messages",
            "does not declare vision",
        ),
        (
            {"messages": [{"role": "user", "content": "tree " * 3000}], "models": ["cheap"]},
            "messages",
            "shorten the prompt",
        ),
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


HOSTILE = {
    "empty": b"",
    "not closed": b"{",
    "a string": b'"text"',
    "no text encoding": b"\xff\xfe",
    "UTF-16": '{"prompt": "hi"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"prompt": "hi"}',
    "NaN": b'{"prompt": "hi", "lambda": NaN}',
    "infinity": b'{"prompt": "hi", "max_cost_usd": 1e999}',
    "5,000 digits": b'{"prompt": "hi", "lambda": 1' + b"0" * 5_000 + b"}",
    "400 digits": b'{"prompt": "hi", "max_tokens": 1' + b"0" * 400 + b"}",
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "raw control character": b'{"prompt": "a\x01"}',
    "deep nesting": b'{"prompt": "hi", "tools": ' + b"[" * 100_000 + b"}",
    "two keys, the last wrong": b'{"prompt": "hi", "prompt": 7}',
    "half a million wrong messages": b'{"messages": [' + b",".join([b"1"] * 500_000) + b"]}",
    "a hundred thousand unknown fields": b"{" + b",".join(b'"%x":1' % i for i in range(100_000)) + b"}",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_wrong_body_is_a_short_400(server: Server, body: bytes) -> None:
    reply = server.http.post("/v1/route", content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]
    assert len(reply.content) < 1_000


@pytest.mark.parametrize("prompt", ["\x1b[0m\x07", "\ufeffhi", "\U0010ffff", "e" + "\u0301" * 5_000], ids=repr)
def test_unusual_characters_are_routed(server: Server, prompt: str) -> None:
    assert server.route(prompt=prompt).status_code == 200


@pytest.mark.parametrize("prompt", ["\0", "\u200b"], ids=repr)
def test_a_text_without_tokens_is_a_400(server: Server, prompt: str) -> None:
    for body, param in (
        ({"prompt": prompt}, "prompt"),
        ({"messages": [{"role": "user", "content": prompt}]}, "messages"),
    ):
        reply = server.http.post("/v1/route", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert reply.json()["error"]["message"].startswith(f"{param}: the encoder has no states for it")


def test_headers_and_transfer_of_a_body(server: Server) -> None:
    body = b'{"prompt": "What is 2 + 2?"}'
    post = lambda content, **headers: server.http.post("/v1/route", content=content, headers=headers)  # noqa: E731
    assert post(body, **{"Content-Type": "text/plain; charset=utf-16"}).status_code == 200  # JSON is UTF-8
    assert post(iter([body[:5], body[5:]])).status_code == 200  # chunked
    packed = post(gzip.compress(body), **{"Content-Encoding": "gzip"})
    assert (packed.status_code, packed.json()["error"]["code"]) == (415, "unsupported_encoding")


@any_input
@given(body=bodies())
def test_any_body_over_http_gets_a_decision_or_a_4xx(server: Server, body: bytes) -> None:
    reply = server.http.post("/v1/route", content=body)
    assert reply.status_code == 200 or 400 <= reply.status_code < 500, reply.text
    assert ("error" in reply.json()) == (reply.status_code != 200)


def test_a_client_that_leaves_in_the_middle_of_its_body_does_no_harm(server: Server) -> None:
    with socket.create_connection((server.http.base_url.host, server.http.base_url.port)) as half:
        half.sendall(b'POST /v1/route HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"prompt": "')
        time.sleep(0.2)
    assert server.route(prompt="What is 2 + 2?").status_code == 200


def test_500_clients_that_give_up_after_20_ms_do_no_harm(server: Server) -> None:
    async def ask(client: httpx.AsyncClient) -> bool:
        try:
            await client.post("/v1/route", json={"prompt": "What is 2 + 2?"}, timeout=0.02)
        except httpx.TimeoutException:
            return True
        return False

    async def all_of_them() -> list[bool]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.http.base_url, limits=limits) as client:
            return await asyncio.gather(*(ask(client) for _ in range(500)))

    assert sum(asyncio.run(all_of_them())) > 250
    end = time.monotonic() + 20
    while (reply := server.route(prompt="What is 2 + 2?")).status_code == 503 and time.monotonic() < end:
        time.sleep(0.1)  # until the abandoned requests are done
    assert reply.status_code == 200


def test_a_prompt_of_1_mb_does_not_disturb_small_ones(server: Server) -> None:
    alone = server.route(prompt="What is 2 + 2?").json()["candidates"]
    with ThreadPoolExecutor(4) as clients:
        large = clients.submit(server.route, prompt="tree " * 200_000)
        small = list(clients.map(lambda _: server.route(prompt="What is 2 + 2?"), range(12)))
        assert large.result().json()["model"] == "dear"
    for reply in small:
        assert [c["confidence"] for c in reply.json()["candidates"]] == pytest.approx(
            [c["confidence"] for c in alone], abs=1e-3
        )


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


def test_one_model_is_shown_or_refused_as_openai_does(server: Server) -> None:
    for name in ("auto", "cheap"):
        assert server.http.get(f"/v1/models/{name}").json()["id"] == name
    reply = server.http.get("/v1/models/org/gpt-9")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert "'org/gpt-9' is not in the pool; known: auto, cheap" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/v1/models/auto", "/v1/status"])
def test_head_answers_as_get_without_a_body(server: Server, path: str) -> None:
    reply = server.http.head(path)
    assert (reply.status_code, reply.content) == (200, b"")


def test_scripts_of_a_configured_origin_may_call_and_others_may_not(server: Server) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization"}
    allowed = server.http.options("/v1/route", headers={"Origin": ORIGIN, **ask})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    for reply in (
        server.http.post("/v1/route", json={"prompt": "hi"}, headers={"Origin": ORIGIN}),
        server.http.post("/v1/route", json={}, headers={"Origin": ORIGIN}),
    ):
        assert reply.headers["access-control-allow-origin"] == ORIGIN  # errors too
    refused = server.http.options("/v1/route", headers={"Origin": "https://evil.example", **ask})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "cors")
    plain = server.http.options("/v1/route")
    assert (plain.status_code, plain.json()["error"]["code"]) == (405, "unknown_url")


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


def test_more_requests_than_may_wait_are_answered_429(server: Server) -> None:
    with ThreadPoolExecutor(64) as clients:
        replies = list(clients.map(lambda _: server.route(prompt="What is 2 + 2?"), range(128)))
    refused = [reply for reply in replies if reply.status_code == 429]
    assert {reply.status_code for reply in replies} == {200, 429}
    assert {reply.json()["error"]["code"] for reply in refused} == {"overloaded"}
    assert {reply.headers["retry-after"] for reply in refused} == {"1"}


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


def test_canary_and_shadow_decide_beside_the_live_checkpoint(server: Server, checkpoints: Path) -> None:
    ids = {name: load_checkpoint(checkpoints / name).id for name in ("cheap", "dear", "layer3")}
    live: dict[str, Any] = {
        "checkpoint": str(checkpoints / "cheap"),
        "canary": {"checkpoint": str(checkpoints / "dear"), "share": 0.5},
        "shadow": str(checkpoints / "layer3"),
    }
    server.deploy(checkpoints / "cheap", live)
    assert server.settle().startswith("RUNNING")
    health = server.http.get("/healthz").json()
    assert (health["checkpoint"], health["canary"], health["shadow"], health["refused"]) == (*ids.values(), None)
    replies = [server.route(prompt=f"What is {n} + 2?").json() for n in range(30)]
    assert {(reply["checkpoint"], reply["model"]) for reply in replies} == {
        (ids["cheap"], "cheap"),
        (ids["dear"], "dear"),
    }
    for reply in replies:
        for _ in range(100):  # the other decisions are logged after the replies
            logged = server.http.get(f"/v1/decisions/{reply['decision_id']}").json()
            if len(logged.get("observed", ())) == 2:
                break
            time.sleep(0.1)
        decision = logged["decision"]
        acting, other = ("live", "canary") if reply["model"] == "cheap" else ("canary", "live")
        assert (decision["arm"], decision["share"], decision["propensity"]) == (acting, 0.5, 0.5)
        observed = {one["arm"]: (one["checkpoint"], one["model"], one["share"]) for one in logged["observed"]}
        chosen = "dear" if other == "canary" else "cheap"
        assert observed == {other: (ids[chosen], chosen, 0.5), "shadow": (ids["layer3"], "middle", 0.0)}
    server.deploy(checkpoints / "cheap", live | {"shadow": str(checkpoints / "torn")})
    assert server.settle().startswith("RUNNING")
    health = server.http.get("/healthz").json()
    assert "sha256" in health["refused"]
    assert health["shadow"] == ids["layer3"]
    server.deploy(checkpoints / "cheap", checkpoints / "cheap")
    assert server.settle().startswith("RUNNING")
    assert server.http.get("/healthz").json()["canary"] is None


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
