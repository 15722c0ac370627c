"""Anthropic's Messages API: translation of requests, answers and streams, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from anthropic.types import Message
from pydantic import TypeAdapter

from prefill_router.errors import InputError
from serve import messages

ASKED = {"model": "auto", "max_tokens": 100, "messages": [{"role": "user", "content": "Why?"}]}
TOOL = {
    "name": "add",
    "description": "adds",
    "input_schema": {"type": "object", "properties": {"a": {"type": "number"}}},
}
ANSWER: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "cheap",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "So."}}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13, "cost": 0.1},
    "router": {"decision_id": "d"},
}


def chat(**given: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(messages.chat_body(json.dumps(ASKED | given).encode()))
    return made


def test_a_request_becomes_a_chat() -> None:
    made = chat(
        system="Be short.",
        temperature=0.5,
        stop_sequences=["x"],
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "add"},
        router={"lambda": 0.3},
    )
    assert made["messages"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    assert (made["model"], made["max_tokens"], made["temperature"], made["stop"]) == ("auto", 100, 0.5, ["x"])
    assert made["tools"][0]["function"]["parameters"] == TOOL["input_schema"]
    assert made["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert made["router"] == {"lambda": 0.3}


def test_a_structured_answer_and_tool_results_are_translated() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "number"}}}
    made = chat(
        output_config={"format": {"type": "json_schema", "schema": schema}},
        messages=[
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "2"}]},
        ],
    )
    assert made["response_format"]["json_schema"]["schema"] == schema
    called, result = made["messages"][1:]
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert (result["role"], result["tool_call_id"], result["content"]) == ("tool", "t", "2")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "body: no JSON"),
        (b"[]", "body: got list, expected a JSON object"),
        (b'{"model": "auto", "messages": []}', "max_tokens: Field required"),
        (json.dumps(ASKED | {"colour": 1}).encode(), "colour: Extra inputs are not permitted"),
        (json.dumps(ASKED | {"messages": [{"role": "user", "content": [5]}]}).encode(), "messages: cannot be"),
    ],
)
def test_an_invalid_request_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(InputError, match=f"^{says}"):
        messages.chat_body(body)


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "INSTALLED", False)
    with pytest.raises(InputError, match=r"any-llm-sdk on the server; pip install 'prefill-router\[providers\]'"):
        messages.chat_body(json.dumps(ASKED).encode())


def test_an_answer_becomes_a_message() -> None:
    call = {"id": "t", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    own = ANSWER["choices"][0]["message"] | {"reasoning": "why", "tool_calls": [call]}
    answer = ANSWER | {"choices": [{"index": 0, "finish_reason": "tool_calls", "message": own}]}
    found = json.loads(messages.message_of(json.dumps(answer).encode()))
    message = TypeAdapter(Message).validate_python(found)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert (message.content[1].text, message.content[2].input) == ("So.", {"a": 1})
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("tool_use", 10, 3)
    assert (found["model"], found["router"]) == ("cheap", {"decision_id": "d"})
    with pytest.raises(InputError, match="the answer is no chat completion"):
        messages.message_of(b'{"object": "list"}')


def streamed(*chunks: Any, done: bool = True) -> list[dict[str, Any]]:
    """The events of a streamed chat, cut at odd places, with a comment in between."""
    text = ": wait\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" * done)
    raw = text.encode()

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(raw), 7):
            yield raw[start : start + 7]

    async def collect() -> bytes:
        return b"".join([event async for event in messages.events_of(parts())])

    events = asyncio.run(collect()).decode().split("\n\n")[:-1]
    found = [json.loads(event.partition("data: ")[2]) for event in events]
    assert [event.partition("\n")[0] for event in events] == [f"event: {one['type']}" for one in found]
    return found


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    common = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "cheap"}
    return {**common, "choices": [choice], **more}


def test_a_streamed_chat_becomes_the_events_of_a_message() -> None:
    call = {"index": 0, "id": "t", "type": "function", "function": {"name": "add", "arguments": '{"a"'}}
    more = {"index": 0, "function": {"arguments": ": 1}"}}
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    events = streamed(
        chunk({"role": "assistant", "reasoning_content": "hm"}),
        chunk({"content": "So"}),
        chunk({"content": "."}),
        chunk({"tool_calls": [call]}),
        chunk({"tool_calls": [more]}),
        chunk({}, "tool_calls", usage=usage, router={"decision_id": "d"}),
    )
    assert [one["type"] for one in events] == [
        "ping",
        "message_start",
        *("content_block_start", "content_block_delta", "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),
        "message_delta",
        "message_stop",
    ]
    deltas = [one["delta"] for one in events if one["type"] == "content_block_delta"]
    assert "".join(one.get("text", "") for one in deltas) == "So."
    assert json.loads("".join(one.get("partial_json", "") for one in deltas)) == {"a": 1}
    last = events[-2]
    assert (last["delta"]["stop_reason"], last["usage"]["output_tokens"]) == ("tool_use", 3)
    assert last["router"] == {"decision_id": "d"}


def test_a_broken_stream_ends_with_an_error_event() -> None:
    broken = chunk({}, "error", error={"message": "cheap broke"})
    assert streamed(chunk({"content": "So"}, error=None))[-1]["type"] == "message_stop"
    events = streamed(chunk({"content": "So"}), broken)
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "cheap broke"}}
    assert "message_stop" not in [one["type"] for one in events]
    assert "no chat completion" in streamed({"choices": 1})[-1]["error"]["message"]
    assert streamed()[-1]["error"]["message"] == "the answer has no chunk"


def test_a_stream_is_read_to_its_end() -> None:
    """The chat notes how its answer ended when its stream ends."""
    ended: list[str] = []

    async def chunks(last: bytes) -> AsyncIterator[bytes]:
        try:
            yield f"data: {json.dumps(chunk({'content': 'So'}))}\n\n".encode()
            yield last
            ended.append("end")
        finally:
            ended.append("closed")

    async def collect(last: bytes) -> None:
        async for _ in messages.events_of(chunks(last)):
            pass

    asyncio.run(collect(b"data: [DONE]\n\n"))
    asyncio.run(collect(b'data: {"error": {"message": "x"}}\n\n'))
    assert ended == ["end", "closed"] * 2


@pytest.mark.parametrize(
    "delta",
    [
        {"role": "", "content": "So"},
        {"content": [{"type": "text", "text": "So"}]},
        {"content": "So", "reasoning": {"content": "why"}},
        {
            "content": "So",
            "tool_calls": [{"id": "t", "type": "function", "function": {"name": "a", "arguments": "{}"}}],
        },
    ],
)
def test_servers_that_leave_fields_out_are_understood(delta: dict[str, Any]) -> None:
    sparse = chunk(delta, usage={"cost": 0.1, "prompt_tokens": 1})
    del sparse["created"], sparse["id"]
    events = streamed(sparse, chunk({}, "stop"))
    assert events[-1]["type"] == "message_stop"
    assert "So" in [one["delta"].get("text") for one in events if one["type"] == "content_block_delta"]
    message = {name: value for name, value in delta.items() if value} | {"role": "assistant"}
    answer = ANSWER | {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"cost": 0.1}}
    del answer["created"]
    assert "So" in [one.get("text") for one in json.loads(messages.message_of(json.dumps(answer).encode()))["content"]]


def test_deep_nesting_is_an_error_of_the_answer() -> None:
    with pytest.raises(InputError, match="no chat completion"):
        messages.message_of(b"[" * 100_000)


def test_tokens_are_estimated_from_the_chat() -> None:
    def estimate(**given: Any) -> int:
        return messages.estimated_tokens(json.dumps({**ASKED, **given}).encode())

    short = estimate()
    assert 5 < short < 20
    assert estimate(messages=[{"role": "user", "content": "x" * 4000}]) == pytest.approx(1000, abs=20)
    assert estimate(tools=[TOOL]) > short
    source = {"type": "base64", "media_type": "image/png", "data": "A" * 40_000}
    assert estimate(messages=[{"role": "user", "content": [{"type": "image", "source": source}]}]) < 100
    without = {name: value for name, value in ASKED.items() if name != "max_tokens"}
    assert messages.estimated_tokens(json.dumps(without).encode()) == short
