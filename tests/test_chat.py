"""Chat completions on a running Ray Serve, asked by OpenAI's client, with stubs as upstream servers."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from anthropic import Anthropic, APIStatusError, BadRequestError, NotFoundError
from openai import AsyncOpenAI, OpenAI
from page_stub import chromium
from playwright.sync_api import expect
from serve_application import DECLARED, Server
from states_server import states_server
from stub_upstream import Stub, stub_upstream
from tiny_models import save_model
from tiny_router import MODELS, tiny_router

from prefill_router.decisions.log import read_log
from prefill_router.pool import Endpoint, Pool
from prefill_router.prefill.backends import load_encoder
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.router import Router
from serve import local
from serve.keys import digest_of
from serve.schemas import ReplicaTraffic, StatusReply

QUESTION: Any = [{"role": "user", "content": "What is 2 + 2?"}]
NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def stubs() -> Iterator[dict[str, Stub]]:
    with stub_upstream() as cheap, stub_upstream() as middle:
        yield {"cheap": cheap, "middle": middle}


def moved(stubs: dict[str, Stub]) -> dict[str, Any]:
    """The configured endpoint of `middle`: in pool.yaml it has an address that nobody answers."""
    return {"middle": {"base_url": stubs["middle"].url, "model": "middle-large"}}


def with_endpoints(router: Router, stubs: dict[str, Stub]) -> Router:
    """The router with the stubs as servers of its models, which have the limits of DECLARED."""
    models = tuple(
        model.model_copy(
            update=DECLARED[model.name]
            | {
                "endpoint": Endpoint(
                    base_url=stubs["cheap"].url if model.name == "cheap" else NOBODY, model="cheap-large"
                )
                if model.name in stubs
                else None
            }
        )
        for model in router.pool.models
    )
    return replace(router, pool=Pool(models=models))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the decision log."""
    return tmp_path_factory.mktemp("log")


@pytest.fixture(scope="module")
def checkpoint(minilm: str, stubs: dict[str, Stub], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint that chooses `cheap`. `dear` has no endpoint."""
    from prefill_router.prefill.transformers_backend import TransformersEncoder

    encoder = TransformersEncoder(EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))
    folder = tmp_path_factory.mktemp("checkpoint") / "cheap"
    save_checkpoint(with_endpoints(tiny_router(encoder.info.fingerprint, "cheap"), stubs), folder)
    return folder


@pytest.fixture(scope="module")
def server(ray_cluster: object, checkpoint: Path, stubs: dict[str, Stub], log: Path) -> Iterator[Server]:
    """The application with this checkpoint."""
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray_serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    running = Server(port)
    breaker = {"failures": 1000}  # the tests share one gateway
    upstream = {"first_byte_s": 5, "max_wait_s": 1, "breaker": breaker}
    log_to = {"folder": str(log), "prompts": True}
    running.deploy(checkpoint, gateway={"upstream": upstream, "log": log_to, "endpoints": moved(stubs)})
    assert running.settle().startswith("RUNNING")
    yield running
    ray_serve.shutdown()


@pytest.fixture
def client(server: Server, stubs: dict[str, Stub]) -> OpenAI:
    for stub in stubs.values():
        stub.script.clear()
        stub.seen.clear()
        stub.left.clear()
    return OpenAI(base_url=f"{server.http.base_url}/v1", api_key="none", max_retries=0)


def test_a_chat_is_answered_by_the_chosen_model(client: OpenAI, stubs: dict[str, Stub]) -> None:
    raw = client.chat.completions.with_raw_response.create(model="auto:0.25", messages=QUESTION)
    reply = raw.parse()
    assert (reply.model, reply.choices[0].message.content) == ("cheap", "Gr\u00fc\u00dfe")
    router = reply.model_extra["router"]
    assert set(router) == {
        "decision_id",
        "requested",
        "selected",
        "served",
        "reason",
        "confidence",
        "novelty",
        "cost_usd",
        "lambda",
        "fallbacks",
        "checkpoint",
        "overhead_ms",
    }
    assert (router["requested"], router["selected"], router["served"]) == ("auto:0.25", "cheap", "cheap")
    assert (router["reason"], router["lambda"], router["fallbacks"]) == ("score", 0.25, [])
    assert 0 < router["confidence"] < 1
    assert router["overhead_ms"] > 0
    assert reply.usage.model_extra["cost"] == router["cost_usd"] > 0
    assert raw.headers["x-router-decision-id"] == router["decision_id"]
    assert (raw.headers["x-router-model"], raw.headers["x-router-attempted-fallbacks"]) == ("cheap", "0")
    assert json.loads(stubs["cheap"].seen[0][0])["model"] == "cheap-large"


def test_an_async_stream_has_the_decision_in_its_first_and_last_chunk(server: Server, client: OpenAI) -> None:
    async def run() -> list[Any]:
        async with AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as own:
            chunks = await own.chat.completions.create(model="auto", messages=QUESTION, stream=True)
            return [chunk async for chunk in chunks]

    chunks = asyncio.run(run())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "onetwothree"
    assert chunks[0].model_extra["router"]["served"] == "cheap"
    assert chunks[-1].model_extra["router"]["cost_usd"] == chunks[-1].usage.model_extra["cost"]


def test_everything_that_was_sent_reaches_the_server(server: Server, stubs: dict[str, Stub], client: OpenAI) -> None:
    text = (
        '{"model": "auto", "messages": [{"role": "user", "content": "2 + 2 \\u00bd"}], "seed": 1.0, "logprobs":true,'
        '"tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}], "n" : 2 }'
    )
    reply = server.http.post("/v1/chat/completions", content=text)
    assert reply.status_code == 200
    assert reply.json()["model"] == "middle"  # declares tools
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1]
    assert stubs["middle"].seen[0][0].decode() == text.replace('"auto"', '"middle-large"')


def test_a_model_of_the_pool_is_asked_without_a_decision(client: OpenAI) -> None:
    reply = client.chat.completions.create(model="middle", messages=QUESTION)
    assert reply.model == "middle"
    assert (reply.model_extra["router"]["reason"], reply.model_extra["router"]["confidence"]) == ("requested", None)


def test_the_next_candidate_answers_if_the_chosen_model_does_not(client: OpenAI, stubs: dict[str, Stub]) -> None:
    stubs["cheap"].script = ["500"]
    reply = client.chat.completions.create(model="auto", messages=QUESTION, stream=True)
    router = next(iter(reply)).model_extra["router"]
    assert (router["selected"], router["served"]) == ("cheap", "middle")
    assert router["fallbacks"] == [{"model": "cheap", "reason": "status", "status": 500, "retry_after_s": None}]


def test_a_storm_of_429_loses_no_request(server: Server, client: OpenAI, stubs: dict[str, Stub]) -> None:
    stubs["cheap"].script = ["429:1"] * 64

    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as own:
            found = []
            for _ in range(8):  # 8 at a time: the encoder's queue is short here
                asked = [own.chat.completions.create(model="auto", messages=QUESTION) for _ in range(8)]
                found += [reply.model for reply in await asyncio.gather(*asked)]
            return found

    assert "middle" in asyncio.run(run())
    stubs["cheap"].script = ["429:4"]
    assert client.chat.completions.create(model="auto", messages=QUESTION).model == "middle"
    after = client.chat.completions.create(model="auto", messages=QUESTION)  # the server is left alone
    router = after.model_extra["router"]
    assert (router["selected"], router["served"], router["reason"]) == ("middle", "middle", "health")
    assert router["fallbacks"] == []
    time.sleep(4)  # until it may be asked again, by the other tests


def test_without_an_answer_the_status_says_whether_a_deadline_was_missed(
    client: OpenAI, stubs: dict[str, Stub]
) -> None:
    stubs["cheap"].script, stubs["middle"].script = ["500"], ["503"]
    with pytest.raises(openai.InternalServerError, match="cheap: 500, middle: 503") as error:
        client.chat.completions.create(model="auto", messages=QUESTION)
    assert error.value.status_code == 502
    stubs["cheap"].script = ["hang"]
    with pytest.raises(openai.InternalServerError, match="cheap: deadline") as error:
        client.chat.completions.create(model="cheap", messages=QUESTION, stream=True)
    assert error.value.status_code == 504
    assert len(stubs["middle"].seen) == 1  # a model of the pool has no fallbacks


def test_an_error_of_the_request_is_passed_on(client: OpenAI, stubs: dict[str, Stub]) -> None:
    stubs["cheap"].script = ["400"]
    with pytest.raises(openai.BadRequestError, match="status 400"):
        client.chat.completions.create(model="auto", messages=QUESTION)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"extra_body": {"router": {"lambda": 2}}}, "router.lambda", "less than or equal to 1"),
        ({"extra_body": {"router": {"mode": 1}}}, "router.mode", "allowed fields: lambda, models"),
        ({"extra_body": {"router": {"models": ["x"]}}}, "router.models", "'x' is not in the pool"),
        ({"extra_body": {"router": {"models": ["dear"]}}}, "router.models", "dear has no endpoint in gateway"),
        ({"extra_body": {"router": {"min_confidence": 1}}}, "router.min_confidence", "the highest confidence is 0."),
        ({"extra_body": {"router": {"max_cost_usd": 1e-9}}}, "router.max_cost_usd", "no model is left"),
        ({"extra_body": {"router": {"off": True}}}, "router.off", "no default_model"),
        ({"extra_headers": {"x-router-lambda": "much"}}, None, "allowed is a lambda from 0"),
        ({"model": "auto:much"}, "model", "allowed is a lambda from 0"),
        ({"model": "dear"}, "model", "dear has no endpoint"),
        ({"model": "cheap", "extra_body": {"router": {"fallbacks": 1}}}, "router.fallbacks", "with model 'cheap'"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "got no text"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(
    client: OpenAI, fields: dict[str, Any], param: str | None, says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**({"model": "auto", "messages": QUESTION} | fields))
    assert says in error.value.body["message"]
    assert error.value.body["param"] == param


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not in the pool; known: auto, cheap, middle, dear"):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)


def test_an_explained_reply_has_all_models(client: OpenAI) -> None:
    body = {"router": {"explain": True, "lambda": 0.5}}
    router = client.chat.completions.create(model="auto", messages=QUESTION, extra_body=body).model_extra["router"]
    assert [one["model"] for one in router["candidates"]] == ["cheap", "middle"]
    assert {one["model"] for one in router["candidates"] + router["excluded"]} == set(MODELS)


def test_a_conversation_of_ten_turns_stays_where_it_began(client: OpenAI) -> None:
    add: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    messages: list[Any] = [{"role": "user", "content": "Add 2 and 2, please."}]
    first = client.chat.completions.create(model="auto", messages=messages, tools=add)
    served = [(first.model, first.model_extra["router"]["reason"])]
    for turn in range(9):
        messages += [{"role": "assistant", "content": "4"}, {"role": "user", "content": f"And {turn} more?"}]
        reply = client.chat.completions.create(model="auto", messages=messages)
        served.append((reply.model, reply.model_extra["router"]["reason"]))
    assert served == [("middle", "score"), *[("middle", "session")] * 9]  # only the first turn needs its tools
    new = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "And 8 more?"}])
    assert new.model == "cheap"


def test_a_conversation_with_an_id_stays_where_it_began(client: OpenAI) -> None:
    add: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    headers = {"x-session-id": "conversation-7"}
    client.chat.completions.create(model="auto", messages=QUESTION, tools=add, extra_headers=headers)
    again = client.chat.completions.create(model="auto", messages=QUESTION, extra_headers=headers)
    assert (again.model, again.model_extra["router"]["reason"]) == ("middle", "session")


def test_a_client_that_leaves_ends_the_request_to_the_server(
    server: Server, client: OpenAI, stubs: dict[str, Stub]
) -> None:
    stubs["cheap"].script = ["silent"]
    body = {"model": "auto", "messages": QUESTION, "stream": True}
    with httpx.stream("POST", f"{server.http.base_url}/v1/chat/completions", json=body, timeout=30) as reply:
        assert next(reply.iter_lines()).startswith("data: ")
    left = time.monotonic()
    while not stubs["cheap"].left and time.monotonic() < left + 20:
        time.sleep(0.01)
    assert stubs["cheap"].left == ["silent"]


def test_the_anthropic_client_gets_messages(server: Server, client: OpenAI, stubs: dict[str, Stub]) -> None:
    """`client` clears the stubs."""
    anthropic = Anthropic(base_url=str(server.http.base_url), api_key="none", max_retries=0)
    asked: Any = {"model": "auto", "max_tokens": 100, "messages": QUESTION}
    reply = anthropic.messages.with_raw_response.create(**asked, extra_body={"router": {"lambda": 0.25}})
    message = reply.parse()
    assert (message.model, message.content[-1].text, message.stop_reason) == ("cheap", "Gr\u00fc\u00dfe", "end_turn")
    assert (message.usage.input_tokens, message.model_extra["router"]["lambda"]) == (10, 0.25)
    assert reply.headers["x-router-model"] == "cheap"
    sent = json.loads(stubs["cheap"].seen[-1][0])
    assert (sent["model"], sent["max_tokens"], "router" in sent) == ("cheap-large", 100, False)
    with anthropic.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert (text, final.model, final.usage.output_tokens) == ("onetwothree", "cheap", 3)
    decision = stream.response.headers["x-router-decision-id"]
    logged = server.http.get(f"/v1/decisions/{decision}").json()
    assert (logged["answer"]["error"], logged["answer"]["output_tokens"]) == (None, 3)
    assert anthropic.messages.count_tokens(model="auto", messages=QUESTION).input_tokens > 5
    stubs["cheap"].script = ["break"]
    with pytest.raises(APIStatusError, match=r"ended early|broke"), anthropic.messages.stream(**asked) as stream:
        stream.get_final_message()
    with pytest.raises(NotFoundError, match="'x' is not in the pool"):
        anthropic.messages.create(**asked | {"model": "x"})
    with pytest.raises(BadRequestError, match="lambda") as refused:
        anthropic.messages.create(**asked, extra_body={"router": {"lambda": 2}})
    assert refused.value.response.json()["error"]["type"] == "invalid_request_error"


def test_the_openai_client_gets_responses(server: Server, client: OpenAI, stubs: dict[str, Stub]) -> None:
    raw = client.responses.with_raw_response.create(
        model="auto", input="What is 2 + 2?", max_output_tokens=100, extra_body={"router": {"lambda": 0.25}}
    )
    response = raw.parse()
    assert (response.model, response.output_text, response.status) == ("cheap", "Gr\u00fc\u00dfe", "completed")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert (response.usage.input_tokens, response.model_extra["router"]["lambda"]) == (10, 0.25)
    assert (raw.headers["x-router-model"], response.store) == ("cheap", False)
    sent = json.loads(stubs["cheap"].seen[-1][0])
    assert (sent["model"], sent["max_completion_tokens"], "router" in sent) == ("cheap-large", 100, False)
    with client.responses.stream(model="auto", input="What is 2 + 2?") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert (text, final.output_text, final.model, final.usage.output_tokens) == ("onetwothree",) * 2 + ("cheap", 3)
    logged = server.http.get(f"/v1/decisions/{final.model_extra['router']['decision_id']}").json()
    assert (logged["answer"]["error"], logged["answer"]["output_tokens"]) == (None, 3)
    stubs["middle"].script = ["call", "ok"]
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "name": "add", "parameters": parameters, "strict": True}, {"type": "web_search"}]
    asked: list[Any] = [{"role": "user", "content": "Add 1 and 1, please."}]
    with client.responses.stream(model="auto", input=asked, tools=tools) as stream:
        call = stream.get_final_response().output[0]
    assert (call.type, call.name, call.parsed_arguments) == ("function_call", "add", {"a": 1})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    asked += [call.model_dump(exclude={"parsed_arguments"}), result]
    last = client.responses.create(model="auto", input=asked, tools=tools)
    assert (last.model, last.output_text, last.model_extra["router"]["reason"]) == (
        "middle",
        "Gr\u00fc\u00dfe",
        "session",
    )
    assert [one["role"] for one in json.loads(stubs["middle"].seen[-1][0])["messages"]] == ["user", "assistant", "tool"]
    stubs["cheap"].script = ["break"]
    events = list(client.responses.create(model="auto", input="What is 2 + 2?", stream=True))
    assert events[-1].type == "response.failed"
    assert re.search("ended early|broke", events[-1].response.error.message)
    stubs["cheap"].script = ["422"]
    with pytest.raises(openai.UnprocessableEntityError, match="status 422"):
        client.responses.create(model="auto", input="What is 2 + 2?")
    with pytest.raises(openai.NotFoundError, match="'x' is not in the pool"):
        client.responses.create(model="x", input="What is 2 + 2?")
    with pytest.raises(openai.BadRequestError, match="the whole conversation"):
        client.responses.create(model="auto", input="And 3?", previous_response_id=response.id)


def raw_chat(server: Server, stream: bool) -> socket.socket:
    """A connection that has sent a chat and has read nothing."""
    body = json.dumps({"model": "auto", "messages": QUESTION, "stream": stream}).encode()
    connection = socket.create_connection((server.http.base_url.host, server.http.base_url.port), timeout=60)
    head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
    connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}\r\n\r\n"]).encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_the_examples_of_the_openapi_document_get_documented_answers(
    server: Server, client: OpenAI, stream: bool
) -> None:
    document = server.http.get("/openapi.json").json()
    named = re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))
    assert {"ChatRequest", "Part", "RouterOptions", "MessagesErrorReply"} <= set(named)
    assert set(named) <= set(document["components"]["schemas"])
    assert "$defs" not in json.dumps(document)
    seen = []
    for path, operations in document["paths"].items():
        operation = operations.get("post", {"responses": {"200": {"content": {}}}})
        streams = "text/event-stream" in operation["responses"]["200"]["content"]
        if "requestBody" not in operation or (stream and not streams) or path == "/v1/feedback":
            continue
        example = operation["requestBody"]["content"]["application/json"]["example"]
        reply = server.http.post(path, json=example | ({"stream": True} if stream else {}))
        expected = "text/event-stream" if stream else "application/json"
        assert (reply.status_code, reply.headers["content-type"].partition(";")[0]) == (200, expected), path
        seen.append(path)
        refused = server.http.post(path, json=[])
        assert refused.status_code == 400
        assert ("type" in refused.json()) == ("messages" in path)
    assert len(seen) == (3 if stream else 5)


def test_five_hundred_clients_that_leave_early_harm_nobody(server: Server, client: OpenAI) -> None:
    for number in range(500):
        raw_chat(server, stream=number % 2 == 0).close()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            reply = client.chat.completions.create(model="auto", messages=QUESTION)
            break
        except openai.RateLimitError:  # their decisions are still waiting
            time.sleep(0.5)
    assert reply.choices[0].message.content == "Gr\u00fc\u00dfe"
    assert server.http.get("/readyz").status_code == 200


def test_a_client_that_reads_a_byte_per_second_stalls_nobody(
    server: Server, client: OpenAI, stubs: dict[str, Stub]
) -> None:
    stubs["cheap"].script = ["flood"]
    with raw_chat(server, stream=True) as slow:
        assert slow.recv(1) == b"H"
        slowest = 0.0
        for _ in range(4):
            started = time.monotonic()
            for _ in range(5):
                assert client.chat.completions.create(model="auto", messages=QUESTION).model == "cheap"
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(1)
            assert slow.recv(1)
        assert slowest < 20  # seconds for five chats; the complete stream would take the slow client months


def test_a_decision_is_logged_with_its_answer_and_feedback(server: Server, client: OpenAI, log: Path) -> None:
    for stream in (False, True):
        reply = client.chat.completions.create(model="auto:0.25", messages=QUESTION, stream=stream)
        router = ([*reply][-1] if stream else reply).model_extra["router"]
        path = f"/v1/decisions/{router['decision_id']}"
        assert server.http.post(
            "/v1/feedback", json={"decision_id": router["decision_id"], "correct": True}
        ).json() == {
            "decision_id": router["decision_id"],
            "recorded": True,
        }
        logged = server.http.get(path).json()
        decision, answer = logged["decision"], logged["answer"]
        assert (decision["requested"], decision["model"], decision["lambda"]) == ("auto:0.25", "cheap", 0.25)
        assert (decision["propensity"], "prompt" in decision) == (1.0, False)
        assert {one["model"] for one in decision["candidates"] + decision["excluded"]} == set(MODELS)
        assert (answer["served"], answer["status"], answer["error"]) == ("cheap", 200, None)
        assert (answer["input_tokens"], answer["output_tokens"]) == (10, 3)
        assert answer["cost_usd"] == router["cost_usd"]
        assert [one["score"] for one in logged["feedback"]] == [1.0]
    routed = server.route(prompt="What is 2 + 2?").json()
    logged = server.http.get(f"/v1/decisions/{routed['decision_id']}").json()
    assert logged["decision"]["candidates"] == routed["candidates"]
    for _ in range(100):  # written by a thread
        records = list(read_log(log, routed["decision_id"]))
        if records:
            break
        time.sleep(0.05)
    assert [record["prompt"] for record in records] == ["What is 2 + 2?"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"decision_id": "none", "correct": True}, 404, "'none' is not in the log"),
        ({"decision_id": "x"}, 400, "give exactly one of correct and score"),
        ({"decision_id": "x", "score": 2}, 400, "less than or equal to 1"),
        ({"decision_id": "x", "score": 1, "by": "me"}, 400, "allowed fields: decision_id, correct, score, source"),
    ],
)
def test_feedback_that_cannot_be_logged_is_refused(server: Server, body: Any, status: int, says: str) -> None:
    reply = server.http.post("/v1/feedback", json=body)
    assert reply.status_code == status
    assert says in reply.json()["error"]["message"]


def test_metrics_count_decisions_fallbacks_tokens_and_cost(
    server: Server, client: OpenAI, stubs: dict[str, Stub]
) -> None:
    stubs["cheap"].script = ["500"]
    reply = client.chat.completions.create(model="auto:0.5", messages=QUESTION)
    assert reply.model == "middle"
    end = time.monotonic() + 60
    while time.monotonic() < end:  # Ray exports every ten seconds
        lines = [line for line in server.http.get("/metrics").text.splitlines() if 'deployment="Gateway"' in line]
        spent = [line for line in lines if line.startswith("ray_router_spent_usd") and 'model="middle"' in line]
        if spent and any(line.startswith("ray_router_fallbacks") for line in lines):
            break
        time.sleep(1)
    names = {line.partition("{")[0] for line in lines}
    assert {
        "ray_router_decisions_total",
        "ray_router_confidence_bucket",
        "ray_router_fallbacks_total",
        "ray_router_spent_usd_total",
        "ray_router_stage_seconds_bucket",
        "ray_gen_ai_client_token_usage_bucket",
        "ray_gen_ai_client_operation_duration_count",
        "ray_gen_ai_server_time_to_first_token_sum",
    } <= names
    assert float(spent[0].rpartition(" ")[2]) >= reply.usage.model_extra["cost"] * 0.999
    tried = [line for line in lines if line.startswith("ray_router_fallbacks_total")]
    assert any('model="cheap"' in line and 'reason="status 500"' in line for line in tried)
    for policy in ("most_expensive", "best_single"):
        reference = [line for line in lines if line.startswith("ray_router_reference_usd") and policy in line]
        assert float(reference[0].rpartition(" ")[2]) > 0


def test_the_page_may_talk_to_its_server_only(server: Server) -> None:
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=|https?://", page.text)


def counters(seen: ReplicaTraffic) -> Counter[tuple[str, ...]]:
    """The counters of a status by name, model and reason."""
    found = Counter({("answers", model): count for model, count in seen.answers.items()})
    found.update({("errors", model): count for model, count in seen.errors.items()})
    for name, counted in (("decisions", seen.decisions), ("fallbacks", seen.fallbacks)):
        found.update({(name, model, reason): n for model, reasons in counted.items() for reason, n in reasons.items()})
    return found


def test_the_page_shows_what_the_running_gateway_has_seen(
    server: Server, client: OpenAI, stubs: dict[str, Stub]
) -> None:
    before = StatusReply.model_validate_json(server.http.get("/v1/status").content).replica
    stubs["cheap"].script, stubs["middle"].script = ["500", "500"], ["ok", "500"]
    cost = client.chat.completions.create(model="auto", messages=QUESTION).usage.model_extra["cost"]
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="auto", messages=QUESTION)
    routed = server.route(prompt="What is 2 + 2?").json()
    status = StatusReply.model_validate_json(server.http.get("/v1/status").content)
    assert counters(status.replica) - counters(before) == {
        ("decisions", "cheap", "score"): 3,
        ("answers", "middle"): 1,
        ("errors", "middle"): 1,
        ("fallbacks", "cheap", "status 500"): 2,
        ("fallbacks", "middle", "status 500"): 1,
    }
    assert status.replica.spent_usd["middle"] - before.spent_usd.get("middle", 0) == pytest.approx(cost)
    assert status.checkpoint == server.checkpoint()
    assert {name: one.state for name, one in status.servers.items()} == {
        "cheap": "closed",
        "middle": "closed",
        "dear": "missing",
    }
    assert [(one.model, one.served, one.failed) for one in status.latest[:3]] == [
        ("cheap", None, None),
        ("cheap", None, True),
        ("cheap", "middle", False),
    ]
    assert status.latest[0].decision_id == routed["decision_id"]
    with chromium() as browser:
        page = browser.new_page()
        page.goto(str(server.http.base_url))
        expect(page.locator("#latest tr").filter(has_text=routed["decision_id"])).to_have_count(1, timeout=60_000)
        expect(page.locator("#servers tr").filter(has_text="dear")).to_contain_text("has no endpoint")
        page.get_by_role("button", name="Ask the chosen model").click()
        expect(page.locator("#answer")).to_have_text("onetwothree", timeout=60_000)


def test_models_have_their_limits_and_prices(client: OpenAI) -> None:
    models = {model.id: model.model_extra["metadata"] for model in client.models.list()}
    assert models["middle"] == {
        "context_tokens": 8192,
        "capabilities": ["tools", "json"],
        "input_usd_per_mtok": 1.0,
        "output_usd_per_mtok": 4.0,
        "can_answer": True,
    }
    assert models["dear"]["can_answer"] is False
    assert models["auto"] is None
    assert client.models.retrieve("cheap").model_extra["metadata"]["context_tokens"] == 2000


def store_actors() -> set[str]:
    """Names of the actors of the deployment `Sessions`."""
    from ray.util import list_named_actors

    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    return {name for name in names if "#Sessions#" in name}


def until(status: int, ask: Callable[[], httpx.Response]) -> httpx.Response:
    """The first reply with this status, of at most a minute of requests."""
    end = time.monotonic() + 60
    while (reply := ask()).status_code != status:
        assert time.monotonic() < end, reply.text
        time.sleep(0.05)
    return reply


def test_a_key_over_a_limit_is_refused_also_after_a_restart_of_the_store(
    server: Server, client: OpenAI, checkpoint: Path, stubs: dict[str, Stub], log: Path
) -> None:
    """Replaces the application of the tests above."""
    import ray

    rated = {"digest": digest_of("rated"), "requests_per_minute": 1}
    keys = {"rated": rated, "spending": {"digest": digest_of("spending"), "usd_per_day": 1e-9}}
    server.deploy(checkpoint, gateway={"keys": keys, "log": {"folder": str(log)}, "endpoints": moved(stubs)})
    assert server.settle().startswith("RUNNING")
    client = client.with_options(api_key="rated")
    reply = client.chat.completions.with_raw_response.create(model="auto", messages=QUESTION)
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(openai.RateLimitError, match="requests_per_minute") as refused:
        client.chat.completions.create(model="auto", messages=QUESTION)
    assert (refused.value.code, int(refused.value.response.headers["retry-after"]) > 0) == ("rate_limited", True)

    def post(path: str, **body: Any) -> httpx.Response:
        return server.http.post(path, headers={"x-api-key": "spending"}, json=body)

    def unreadable() -> httpx.Response:
        return post("/v1/chat/completions")  # costs nothing

    answered = post("/v1/chat/completions", model="auto", messages=QUESTION)
    until(429, unreadable)  # the spend reaches the store after the answer
    assert unreadable().json()["error"]["code"] == "budget_exhausted"
    assert post("/v1/messages").json()["error"]["type"] == "rate_limit_error"
    assert post("/v1/route", prompt="hi").status_code == 200
    path = f"/v1/decisions/{answered.json()['router']['decision_id']}"
    logged = server.http.get(path, headers={"x-api-key": "spending"}).json()["answer"]
    assert (logged["key"], logged["charged_usd"]) == ("spending", logged["cost_usd"])

    (before,) = store_actors()
    ray.kill(ray.get_actor(before, namespace="serve"))
    while store_actors() <= {before}:
        time.sleep(0.05)
    assert until(429, unreadable).json()["error"]["code"] == "budget_exhausted"


def test_a_canary_decides_whole_conversations_and_others_are_logged(
    server: Server, client: OpenAI, stubs: dict[str, Stub], checkpoint: Path, tmp_path: Path
) -> None:
    """Last but two: it changes the checkpoints of the application."""
    fingerprint = next(iter(load_checkpoint(checkpoint).encoders))
    save_checkpoint(with_endpoints(tiny_router(fingerprint, "middle"), stubs), tmp_path / "canary")
    live = {
        "checkpoint": str(checkpoint),
        "canary": {"checkpoint": str(tmp_path / "canary"), "share": 0.5},
        "shadow": str(tmp_path / "canary"),
    }
    server.deploy(checkpoint, live, gateway={"endpoints": moved(stubs)})
    assert server.settle().startswith("RUNNING")
    served = set()
    for n in range(12):
        arms = []
        for turn in range(2):
            history: Any = [*QUESTION, {"role": "assistant", "content": "4"}, *QUESTION] if turn else QUESTION
            reply = client.chat.completions.create(
                model="auto", messages=history, extra_headers={"x-router-session-id": f"canary {n}"}
            )
            router = reply.model_extra["router"]
            for _ in range(100):
                logged = server.http.get(f"/v1/decisions/{router['decision_id']}").json()
                if len(logged.get("observed", ())) == 2:
                    break
                time.sleep(0.1)
            decision = logged["decision"]
            arms.append(decision["arm"])
            assert reply.model == ("middle" if decision["arm"] == "canary" else "cheap")
            assert {one["arm"] for one in (decision, *logged["observed"])} == {"live", "canary", "shadow"}
            assert decision["propensity"] == 0.5
            assert decision["checkpoint"] == router["checkpoint"]
        assert len(set(arms)) == 1
        served.add(arms[0])
    assert served == {"live", "canary"}


def test_the_default_model_answers_if_the_encoder_does_not(
    server: Server, client: OpenAI, stubs: dict[str, Stub], tmp_path: Path
) -> None:
    """Last: it replaces the application of the other tests."""
    model = save_model("llama", tmp_path / "llama")
    trained = EncoderConfig(model=str(model), layers=(2,), poolings=("mean",), max_length=100, states_dtype="float32")
    with states_server() as encoder_server:
        elsewhere = {"backend": "vllm_server", "vllm_server": {"base_url": encoder_server.url}}
        fingerprint = load_encoder(EncoderConfig(**trained.model_dump() | elsewhere)).info.fingerprint
        router = replace(tiny_router(fingerprint, "cheap", hidden=48), encoders={fingerprint: trained})
        save_checkpoint(with_endpoints(router, stubs), tmp_path / "checkpoint")
        gateway = {"default_model": "middle", "keys": {"team": digest_of("secret")}, "endpoints": moved(stubs)}
        server.deploy(tmp_path / "checkpoint", gateway=gateway, overrides={fingerprint: elsewhere})
        assert server.settle().startswith("RUNNING")
        question: Any = [{"role": "user", "content": "ba do"}]
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            client.chat.completions.create(model="auto", messages=question)
        client = client.with_options(api_key="secret")
        assert client.chat.completions.create(model="auto", messages=question).model == "cheap"
        assert server.http.get("/readyz").status_code == 200
    assert (server.http.get("/readyz").status_code, server.http.get("/healthz").status_code) == (503, 200)
    reply = client.chat.completions.create(model="auto", messages=question)
    router = reply.model_extra["router"]
    assert (reply.model, router["reason"]) == ("middle", "router_unavailable")
    headers = {"Authorization": "Bearer secret"}
    logged = server.http.get(f"/v1/decisions/{router['decision_id']}", headers=headers).json()
    assert logged["decision"]["key"] == "team"
    with pytest.raises(openai.InternalServerError, match="does not answer"):
        client.chat.completions.create(model="auto", messages=question, extra_body={"router": {"models": ["cheap"]}})
    off = client.chat.completions.create(model="auto", messages=question, extra_headers={"x-router-off": "1"})
    assert (off.model, off.model_extra["router"]["reason"]) == ("middle", "off")


def test_a_stream_under_way_is_completed_when_the_application_stops(
    server: Server, client: OpenAI, stubs: dict[str, Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last: it stops the application of the other tests."""
    monkeypatch.setattr(local.ray, "shutdown", lambda: None)  # the Ray of the test session stays
    stubs["middle"].script = ["slow:1"]
    stream = client.with_options(api_key="secret").chat.completions.create(
        model="middle", messages=QUESTION, stream=True
    )
    first = next(iter(stream))
    stopping = threading.Thread(target=local.stop)
    stopping.start()
    words = [chunk.choices[0].delta.content for chunk in (first, *stream) if chunk.choices]
    assert words[:3] == ["one", "two", "three"]
    stopping.join(120)
    assert not stopping.is_alive()
