"""Servers with another API than OpenAI's: what they receive, and what the gateway makes of their answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from stub_anthropic import AnthropicStub, stub_anthropic
from stub_upstream import Stub, stub_upstream

from prefill_router.pool import Endpoint, Pool, TargetModel
from serve import answers
from serve.answers import Note
from serve.chat import read_chat, upstream_body
from serve.config import UpstreamConfig
from serve.events import EventSplitter, data_of
from serve.upstream import Answer, NoAnswer, Upstream, Upstreams, upstreams_of

pytest.importorskip("any_llm")
FAST = UpstreamConfig(connect_s=10, first_byte_s=10, answer_s=10, idle_s=10, max_wait_s=0.5)
MODEL = TargetModel(name="claude", input_usd_per_mtok=1.0, output_usd_per_mtok=10.0)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def stub() -> Iterator[AnthropicStub]:
    with stub_anthropic() as running:
        yield running


@pytest.fixture
def other() -> Iterator[Stub]:
    with stub_upstream() as running:
        yield running


def upstream(stub: AnthropicStub) -> Upstream:
    endpoint = Endpoint(base_url=stub.url, model="claude-large", provider="anthropic", api_key_env="KEY")
    found, missing = upstreams_of(Pool(models=(MODEL,)), {"KEY": "secret"}, {"claude": endpoint})
    assert not missing
    return found["claude"]


def ask(order: list[Upstream], stream: bool = False, **fields: Any) -> tuple[Answer, bytes, Any]:
    """The answer, the bytes that the client gets, and the reported usage."""
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields}
    text = json.dumps(body)
    request = read_chat(text.encode())
    usages: list[Any] = []

    async def run() -> tuple[Answer, bytes]:
        upstreams = Upstreams(FAST)
        answer = await upstreams.ask(order, lambda one: upstream_body(text, one.model, request), stream, len(order))
        note = Note(MODEL, 0.5, {"decision_id": "d"})

        def end(usage: Any, error: str | None) -> None:
            usages.append(usage)

        if answer.is_stream:
            events = [event async for event in answers.stream(answer, note, True, 60, end)]
            sent = b"".join(events)
        else:
            sent = await answers.whole(answer, note, end)
        await upstreams.close()
        return answer, sent

    answer, sent = asyncio.run(run())
    return answer, sent, usages[0]


def chunks(sent: bytes) -> list[dict[str, Any]]:
    data = [data_of(event) for event in EventSplitter()(sent)]
    assert data[-1] == b"[DONE]"
    return [json.loads(one) for one in data[:-1] if one is not None]


def test_a_chat_is_asked_in_the_api_of_the_provider(stub: AnthropicStub) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]
    answer, sent, usage = ask([upstream(stub)], messages=messages, max_tokens=7, stop=["x"])
    received, headers = stub.seen[0]
    assert (received["model"], received["max_tokens"], received["system"]) == ("claude-large", 7, "Be short.")
    assert received["stop_sequences"] == ["x"]
    keys = [value for name, value in headers.items() if name.lower() in ("x-api-key", "authorization")]
    assert keys in (["secret"], ["Bearer secret"])  # of anthropic 0 and 2
    found = json.loads(sent)
    assert answer.status == 200
    assert found["choices"][0]["message"]["content"] == "one two"
    assert found["choices"][0]["finish_reason"] == "stop"
    assert (found["model"], found["router"]) == ("claude", {"decision_id": "d", "cost_usd": pytest.approx(4e-5)})
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (10, 3)
    assert found["usage"]["cost"] == pytest.approx((10 * 1 + 3 * 10) / 1e6)


def test_a_stream_has_the_chunks_of_openai(stub: AnthropicStub) -> None:
    _, sent, usage = ask([upstream(stub)], stream=True)
    found = chunks(sent)
    assert "".join(choice["delta"].get("content") or "" for one in found for choice in one["choices"]) == "one two"
    assert [c["finish_reason"] for one in found for c in one["choices"] if c["finish_reason"]] == ["stop"]
    assert len({one["id"] for one in found}) == 1
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (10, 3)
    assert found[-1]["usage"]["cost"] == pytest.approx(40 / 1e6)
    assert [found[place]["router"]["cost_usd"] for place in (0, -1)] == [0.5, pytest.approx(4e-5)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(stub: AnthropicStub, stream: bool) -> None:
    stub.script = ["call"]
    _, sent, _ = ask([upstream(stub)], stream, tools=[TOOL])
    if stream:
        calls = [call for one in chunks(sent) for c in one["choices"] for call in c["delta"].get("tool_calls") or ()]
        name, arguments = calls[0]["function"]["name"], "".join(call["function"]["arguments"] for call in calls)
    else:
        call = json.loads(sent)["choices"][0]["message"]["tool_calls"][0]["function"]
        name, arguments = call["name"], call["arguments"]
    assert (name, json.loads(arguments)) == ("f", {"a": 1})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("step", "status"), [("429", 429), ("500", 500), ("401", 401), ("529", 529)])
def test_the_next_model_answers_if_the_provider_does_not(
    stub: AnthropicStub, other: Stub, step: str, status: int, stream: bool
) -> None:
    stub.script = [f"{step}:7"]
    second = Upstream("b", "b-large", f"{other.url}/chat/completions", {"Content-Type": "application/json"})
    answer, _, _ = ask([upstream(stub), second], stream)
    assert answer.upstream.name == "b"
    assert [(one.model, one.reason, one.status) for one in answer.attempts] == [("claude", "status", status)]
    assert len(stub.seen) == 1  # the provider's library does not ask again
    if step == "429":
        assert answer.attempts[0].retry_after_s == 7


def test_an_error_before_the_first_chunk_of_a_stream_is_a_failed_attempt(stub: AnthropicStub) -> None:
    stub.script = ["overloaded"]
    with pytest.raises(NoAnswer, match="claude: 5"):
        ask([upstream(stub)], stream=True)


def test_a_server_that_is_not_there_is_a_failed_attempt(stub: AnthropicStub) -> None:
    gone = upstream(AnthropicStub("http://127.0.0.1:9"))
    with pytest.raises(NoAnswer, match="claude: connection"):
        ask([gone])


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_is_passed_on(stub: AnthropicStub, stream: bool) -> None:
    stub.script = ["400"]
    answer, sent, _ = ask([upstream(stub)], stream)
    assert answer.status == 400
    assert "status 400" in json.loads(sent)["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("tools", [{"type": "function"}]),
        (
            "messages",
            [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]},
                {"role": "tool", "tool_call_id": "1", "content": "x"},
            ],
        ),
    ],
)
def test_a_request_that_cannot_be_translated_is_no_failure_of_the_provider(
    stub: AnthropicStub, field: str, value: Any
) -> None:
    answer, sent, _ = ask([upstream(stub)], **{field: value})
    assert (answer.status, answer.attempts, stub.seen) == (400, (), [])
    assert json.loads(sent)["error"]["message"]


def test_the_new_name_of_the_limit_is_translated(stub: AnthropicStub) -> None:
    ask([upstream(stub)], max_completion_tokens=9, user="bob")
    assert stub.seen[0][0]["max_tokens"] == 9


@pytest.mark.parametrize(("field", "value"), [("verbosity", "low"), ("extra_headers", {"x-api-key": "mine"}), ("n", 2)])
def test_a_field_that_the_provider_lacks_is_refused(stub: AnthropicStub, field: str, value: Any) -> None:
    answer, sent, _ = ask([upstream(stub)], **{field: value})
    assert answer.status == 400
    assert field in json.loads(sent)["error"]["message"]
    assert not stub.seen


def test_a_stream_that_breaks_ends_with_an_error(stub: AnthropicStub) -> None:
    stub.script = ["break"]
    _, sent, _ = ask([upstream(stub)], stream=True)
    last = chunks(sent)[-1]
    assert last["choices"][0]["finish_reason"] == "error"
    assert "the connection to claude broke" in last["error"]["message"]


def test_closing_an_answer_ends_the_request_to_the_provider(stub: AnthropicStub) -> None:
    stub.script = ["slow"]
    text = json.dumps({"model": "claude", "messages": [{"role": "user", "content": "hi"}], "stream": True})

    async def run() -> None:
        upstreams = Upstreams(FAST)
        answer = await upstreams.ask([upstream(stub)], lambda _: text.encode(), True, 1)
        parts = answer.chunks()
        await anext(parts)
        answer.close()
        for _ in range(50):
            if stub.left:
                break
            await asyncio.sleep(0.1)
        await upstreams.close()

    asyncio.run(run())
    assert stub.left == ["slow"]


def test_a_provider_that_cannot_be_used_is_missing_with_the_reason() -> None:
    pool = Pool(models=(MODEL,))

    def reason(**endpoint: Any) -> str:
        return upstreams_of(pool, {}, {"claude": Endpoint(**endpoint)})[1]["claude"]

    assert "'nobody', which cannot be used" in reason(provider="nobody")
    assert "KEY, which is not set" in reason(provider="anthropic", api_key_env="KEY")
    with pytest.raises(ValidationError, match="base_url: got none; give the base URL"):
        Endpoint(model="x")


def test_a_provider_without_any_llm_sdk_is_missing_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.providers.INSTALLED", False)
    _, missing = upstreams_of(Pool(models=(MODEL,)), {}, {"claude": Endpoint(provider="anthropic")})
    assert "pip install 'prefill-router[providers]'" in missing["claude"]
