"""OpenAI's Responses API: translation of requests, answers and streams, without a server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter, ValidationError

from prefill_router.errors import InputError
from serve import response_events, responses
from serve.chat import RouterOptions, read_chat
from serve.schemas import rejected_chat

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ASKED: dict[str, Any] = {"model": "auto", "input": "Why?"}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "number"}}}
ADD = {"type": "function", "name": "add", "description": "adds", "parameters": PARAMETERS, "strict": True}
PATCH = {
    "type": "custom",
    "name": "patch",
    "description": "Edits.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"},
}
SPACE = {"type": "namespace", "name": "team", "description": "agents", "tools": [ADD | {"name": "spawn"}]}
TOOLS = [ADD, PATCH, SPACE, {"type": "web_search", "external_web_access": False}]
USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 3,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
    "cost": 0.1,
}


def chat(**given: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(responses.chat_body(json.dumps(ASKED | given).encode()))
    return made


def function(name: str, arguments: str, call_id: str = "c") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_request_becomes_a_chat() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "number"}}}
    made = chat(
        instructions="Be short.",
        max_output_tokens=100,
        temperature=0.5,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}, "verbosity": "low"},
        router={"lambda": 0.3},
        stream=True,
        user="me",
        top_p=None,
    )
    assert made == {
        "model": "auto",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}],
        "max_completion_tokens": 100,
        "temperature": 0.5,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        "verbosity": "low",
        "router": {"lambda": 0.3},
        "stream": True,
        "user": "me",
    }
    assert chat(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}


def test_what_a_chat_does_not_have_is_not_sent() -> None:
    without = dict.fromkeys(responses.NO_EFFECT, "x") | {"background": False, "previous_response_id": None}
    assert chat(**without, text={"format": {"type": "text"}}, tool_choice="auto", parallel_tool_calls=True) == chat()


def test_the_items_of_a_tool_loop_become_messages() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"}
    made = chat(
        instructions="Be short.",
        input=[
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Use tools."}]},
            {"role": "user", "content": [{"type": "input_text", "text": "Add."}, image]},
            {"type": "reasoning", "summary": [], "encrypted_content": "x"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I add."}]},
            {"type": "function_call", "call_id": "1", "name": "add", "arguments": '{"a": 1}'},
            {"type": "function_call", "call_id": "2", "name": "spawn", "namespace": "team", "arguments": "{}"},
            {"type": "custom_tool_call", "call_id": "3", "name": "patch", "input": "+x"},
            {"type": "function_call_output", "call_id": "1", "output": "2"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "ok"}]},
            {"type": "custom_tool_call_output", "call_id": "3", "output": "done"},
            {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": "Why?"},
            {"role": "user", "content": "Really?"},
        ],
    )
    assert made["messages"] == [
        {"role": "system", "content": "Be short.\nUse tools."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Add."},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
            ],
        },
        {
            "role": "assistant",
            "content": "I add.",
            "tool_calls": [
                function("add", '{"a": 1}', "1"),
                function("team__spawn", "{}", "2"),
                function("patch", '{"input": "+x"}', "3"),
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "tool", "tool_call_id": "2", "content": "ok"},
        {"role": "tool", "tool_call_id": "3", "content": "done"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
        {"role": "user", "content": "Really?"},
    ]
    alone = chat(input=[{"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"}])["messages"]
    assert alone == [{"role": "assistant", "content": None, "tool_calls": [function("add", "{}", "1")]}]


def test_tools_become_functions() -> None:
    made = chat(tools=TOOLS, tool_choice={"type": "custom", "name": "patch"}, parallel_tool_calls=False)
    add, patch, spawn = (tool["function"] for tool in made["tools"])
    assert add == {name: ADD[name] for name in ("name", "description", "parameters", "strict")}
    assert (patch["name"], patch["description"]) == ("patch", "Edits.\nThe input has this grammar:\nstart: x")
    assert patch["parameters"]["properties"] == {"input": {"type": "string"}}
    assert (spawn["name"], spawn["parameters"]) == ("team__spawn", PARAMETERS)
    assert made["tool_choice"] == {"type": "function", "function": {"name": "patch"}}
    assert made["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: got 'resp_1'.*the whole conversation in `input`"),
        ({"conversation": {"id": "c"}}, "conversation: .*the whole conversation in `input`"),
        ({"background": True}, "background: got True"),
        ({"prompt": {"id": "p"}}, "prompt: .*send the text in `instructions`"),
        ({"messages": [{"role": "user"}]}, "messages: got .*send `input`"),
        ({"max_completion_tokens": 5}, "max_completion_tokens: got 5, .*send `max_output_tokens`"),
        ({"response_format": {"type": "text"}}, "response_format: got .*send `text.format`"),
        ({"n": 2}, "n: got 2, but a response has one answer; leave it out"),
        ({"input": None}, "input: got None, expected a string or a list"),
        ({"input": [5]}, "input.0: got 5; allowed are a message"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "input.0: got an item_reference, but the server stores"),
        ({"input": [{"type": "function_call", "name": "add"}]}, "input.0: got {'type': 'function_call'.*call_id, name"),
        ({"input": [{"role": "user", "content": 5}]}, "input.0: got "),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input.0.content.0: got {'type': 'input_file'",
        ),
        ({"tools": [ADD, {"type": "file_search"}]}, "tools.1: got 'file_search'"),
        ({"tools": [SPACE | {"tools": [{"type": "mcp"}]}]}, "tools.0.tools.0: got 'mcp'"),
        ({"tools": [{"type": "tool_search"}, {"type": "tool_search"}]}, "tools: got only tool_search, and no function"),
        ({"tools": [SPACE | {"tools": []}, {"type": "web_search"}]}, "tools: got only namespace, web_search, and no"),
        ({"tools": {"type": "function"}}, "tools: got {'type': 'function'}, expected list"),
        ({"tools": [ADD], "tool_choice": {"type": "web_search"}}, "tool_choice: got {'type': 'web_search'}"),
        ({"text": "plain"}, "text: got 'plain', expected dict"),
    ],
)
def test_an_invalid_request_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=f"^{says}"):
        chat(**given)


@pytest.mark.parametrize(
    ("given", "param", "says"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens: Input should be greater"),
        ({"input": []}, "input", "input: List should have at least 1 item"),
        ({"text": {"format": {"type": "x"}}}, "text.format.type", "text.format.type: Input should be 'text'"),
        ({"text": {"format": "messages: x"}}, "text.format", r"text.format: .*\(got 'messages: x'\)$"),
        (
            {"text": {"format": {"type": "x"}}, "max_output_tokens": 0},
            "text.format.type",
            r"text.format.type: .*\(got 'x'\); max_output_tokens: Input should be greater",
        ),
        ({"model": ""}, "model", "model: String should have at least 1 character"),
        ({"input": " "}, "input", "input: got no text"),
    ],
)
def test_errors_of_the_chat_name_fields_of_the_request(given: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises((ValidationError, InputError)) as refused:
        _ = read_chat(json.dumps(chat(**given)).encode()).query(RouterOptions(), ["cheap"]).text
    found = responses.error_of(rejected_chat(refused.value))
    assert found.param == param
    assert re.match(says, found.message)


def test_a_response_may_ask_for_one_answer() -> None:
    assert chat(n=1)["n"] == 1


def test_a_body_that_is_no_object_is_refused() -> None:
    with pytest.raises(InputError, match=r"^body: got list, expected a JSON object"):
        responses.chat_body(b"[]")


def answered(message: dict[str, Any], finish: str = "stop", **asked: Any) -> dict[str, Any]:
    """The response to a complete answer."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant"} | message}
    answer = {"id": "c", "model": "cheap", "choices": [choice], "usage": USAGE, "router": {"decision_id": "d"}}
    found = response_events.response_of(json.dumps(answer).encode(), json.dumps(ASKED | asked).encode())
    made: dict[str, Any] = json.loads(found)
    Response.model_validate(made)
    return made


CALLS = [
    function("add", '{"a": 1}', "1"),
    function("team__spawn", "{}", "2"),
    function("patch", '{"input": "+x"}', "3"),
    function("patch", "+y", "4"),
    function("own", "{}", ""),
]


def test_an_answer_becomes_a_response() -> None:
    own = {"content": "So.", "reasoning": "why", "reasoning_content": "why", "refusal": "No.", "tool_calls": CALLS}
    asked = {"instructions": "Be short.", "metadata": {"a": "b"}, "store": True, "temperature": 0.5, "tools": TOOLS}
    found = answered(own, "tool_calls", **asked)
    reasoning, message, add, spawn, patch, raw, unknown = found["output"]
    assert (reasoning["type"], reasoning["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "why"}])
    assert [part.get("text", part.get("refusal")) for part in message["content"]] == ["So.", "No."]
    assert (add["type"], add["name"], add["call_id"], add["arguments"]) == ("function_call", "add", "1", '{"a": 1}')
    assert (spawn["type"], spawn["name"], spawn["namespace"]) == ("function_call", "spawn", "team")
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "patch", "+x")
    assert (raw["input"], unknown["name"], unknown["call_id"][:5]) == ("+y", "own", "call_")
    assert {item["status"] for item in found["output"]} == {"completed"}
    assert (found["status"], found["model"], found["store"]) == ("completed", "cheap", False)
    assert (found["instructions"], found["metadata"], found["temperature"]) == ("Be short.", {"a": "b"}, 0.5)
    assert (found["tools"], found["tool_choice"]) == (TOOLS[:3], "auto")
    assert found["router"] == {"decision_id": "d"}
    assert found["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 13,
        "cost": 0.1,
    }


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_an_answer_that_is_cut_is_incomplete(finish: str, reason: str) -> None:
    found = answered({"content": "So", "reasoning": "why"}, finish)
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": reason})
    assert [item["status"] for item in found["output"]] == ["completed", "incomplete"]
    calls = answered({"tool_calls": CALLS[:2]}, finish)["output"]
    assert [item["status"] for item in calls] == ["completed", "incomplete"]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"choices": []}', b'{"error": {"message": "x"}}', b"[" * 100_000])
def test_what_is_no_chat_completion_is_refused(body: bytes) -> None:
    with pytest.raises(InputError, match="the answer is no chat completion"):
        response_events.response_of(body, json.dumps(ASKED).encode())


def streamed(*chunks: Any, done: bool = True, **asked: Any) -> list[dict[str, Any]]:
    """The events of a streamed chat, cut at odd places, with a comment in between."""
    text = ": wait\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" * done)
    raw = text.encode()

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(raw), 7):
            yield raw[start : start + 7]

    async def collect() -> bytes:
        return b"".join([one async for one in response_events.events_of(parts(), json.dumps(ASKED | asked).encode())])

    comment, *events = asyncio.run(collect()).decode().split("\n\n")[:-1]
    assert comment == ": wait"
    found = [json.loads(event.partition("data: ")[2]) for event in events]
    assert [event.partition("\n")[0] for event in events] == [f"event: {one['type']}" for one in found]
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    for one in found:
        EVENT.validate_python(one)
    return found


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "model": "cheap", "choices": [choice], **more}


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [one["type"].removeprefix("response.") for one in events]


def test_a_streamed_chat_becomes_the_events_of_a_response() -> None:
    events = streamed(
        chunk({"role": "assistant", "content": "", "reasoning": "hm"}, router={"decision_id": "d"}),
        chunk({"content": "So"}),
        chunk({"content": "."}),
        chunk({"refusal": "No."}),
        chunk({"tool_calls": [{"index": 0} | function("team__spawn", '{"a"', "1")]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}),
        chunk({"tool_calls": [{"index": 1} | function("patch", '{"input": "+', "2")]}),
        chunk({"tool_calls": [{"index": 1, "function": {"arguments": 'x"}'}}]}),
        chunk({}, "tool_calls"),
        {"model": "cheap", "choices": [], "usage": USAGE, "router": {"decision_id": "d", "cost_usd": 0.1}},
        tools=TOOLS,
    )
    assert kinds(events) == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "content_part.added", "refusal.delta", "refusal.done", "content_part.done"),
        "output_item.done",
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta", "output_item.added"),
        *("function_call_arguments.done", "output_item.done"),
        *("custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done"),
        "completed",
    ]
    created, last = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["router"]) == ("in_progress", [], {"decision_id": "d"})
    assert last["output"] == [one["item"] for one in events if one["type"] == "response.output_item.done"]
    reasoning, message, spawn, patch = last["output"]
    assert reasoning["content"][0]["text"] == "hm"
    assert [part.get("text", part.get("refusal")) for part in message["content"]] == ["So.", "No."]
    assert (spawn["namespace"], spawn["name"], spawn["arguments"]) == ("team", "spawn", '{"a": 1}')
    assert (patch["call_id"], patch["input"]) == ("2", "+x")
    assert [one["output_index"] for one in events if "item" in one] == [0, 0, 1, 1, 2, 3, 2, 3]
    assert [one["content_index"] for one in events if "part" in one] == [0, 0, 0, 0, 1, 1]
    for one in events:
        if "item_id" in one:
            assert one["item_id"] == last["output"][one["output_index"]]["id"]
    assert (last["id"], last["usage"]["output_tokens"]) == (created["id"], 3)
    assert last["router"] == {"decision_id": "d", "cost_usd": 0.1}


def test_a_stream_and_a_complete_answer_give_the_same_items() -> None:
    own: dict[str, Any] = {"content": "So.", "reasoning": "why", "tool_calls": CALLS}

    def items(response: dict[str, Any]) -> list[dict[str, Any]]:
        return [{name: item[name] for name in item if name not in ("id", "call_id")} for item in response["output"]]

    calls = [{"index": index} | call for index, call in enumerate(CALLS)]
    last = streamed(chunk(own | {"tool_calls": calls}), chunk({}, "stop"), tools=TOOLS)[-1]["response"]
    assert items(last) == items(answered(own, tools=TOOLS))


def test_calls_without_an_index_of_their_own_are_separate() -> None:
    calls = [{"index": 0} | function("add", "{}", call_id) for call_id in ("1", "2")]
    last = streamed(*(chunk({"tool_calls": [call]}) for call in calls), chunk({}, "tool_calls"))[-1]["response"]
    assert [item["call_id"] for item in last["output"]] == ["1", "2"]


def piece(index: int, arguments: str) -> dict[str, Any]:
    """A later chunk of a tool call."""
    return chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})


def test_pieces_of_parallel_calls_may_alternate() -> None:
    events = streamed(
        chunk({"content": "So."}),
        chunk({"tool_calls": [{"index": 0} | function("add", '{"a"', "1")]}),
        chunk({"tool_calls": [{"index": 1} | function("patch", '{"input"', "2")]}),
        piece(0, ": 1"),
        chunk({"content": "Also."}),
        piece(1, ': "+x"}'),
        piece(0, "}"),
        chunk({}, "tool_calls"),
        tools=TOOLS,
    )
    last = events[-1]["response"]
    message, add, patch, also = last["output"]
    assert (message["content"][0]["text"], also["content"][0]["text"]) == ("So.", "Also.")
    assert (add["call_id"], add["arguments"], patch["call_id"], patch["input"]) == ("1", '{"a": 1}', "2", "+x")
    done = [one for one in events if one["type"] == "response.output_item.done"]
    assert [(one["output_index"], one["item"]) for one in done] == list(enumerate(last["output"]))
    deltas = [one["output_index"] for one in events if one["type"].endswith(".delta")]
    assert deltas == [0, 1, 1, 3, 1, 2]
    for one in events:
        if "item_id" in one:
            assert one["item_id"] == last["output"][one["output_index"]]["id"]


def test_the_openai_client_reads_calls_that_alternate() -> None:
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    calls = [chunk({"tool_calls": [{"index": index} | function("add", '{"a"', str(index))]}) for index in (0, 1)]
    seen: list[Any] = []
    for one in streamed(*calls, piece(0, ": 1}"), piece(1, ": 2}"), chunk({}, "tool_calls")):
        seen += state.handle_event(EVENT.validate_python(one))
    snapshots = [(one.output_index, one.snapshot) for one in seen if hasattr(one, "snapshot")]
    assert snapshots == [(0, '{"a"'), (1, '{"a"'), (0, '{"a": 1}'), (1, '{"a": 2}')]
    assert [item.arguments for item in seen[-1].response.output] == ['{"a": 1}', '{"a": 2}']


def test_items_of_a_failed_response_are_in_order() -> None:
    call = chunk({"tool_calls": [{"index": 0} | function("add", "{}", "1")]})
    again = chunk({"tool_calls": [{"index": 0} | function("add", "{}", "2")]})
    failed = streamed(chunk({"content": "So"}), call, chunk({"content": "Also"}), again, {"choices": 1})[-1]["response"]
    assert failed["status"] == "failed"
    assert [item["type"] for item in failed["output"]] == ["message", "function_call", "message"]


@pytest.mark.parametrize("later", [{"index": 0}, {"index": 0, "function": None}, {"index": 0, "id": "1"}])
def test_a_later_piece_of_a_call_may_have_no_function(later: dict[str, Any]) -> None:
    first = chunk({"tool_calls": [{"index": 0} | function("add", "{}", "1")]})
    last = streamed(first, chunk({"tool_calls": [later]}), chunk({}, "tool_calls"))[-1]["response"]
    assert [(item["call_id"], item["arguments"]) for item in last["output"]] == [("1", "{}")]


@pytest.mark.parametrize("details", [[{"cached_tokens": 4}], "4", {"cached_tokens": "4", "reasoning_tokens": "2"}])
def test_token_details_that_are_no_counts_are_left_out(details: Any) -> None:
    usage = USAGE | {"prompt_tokens_details": details, "completion_tokens_details": details}
    found = streamed(chunk({"content": "So"}, "stop"), chunk({}, usage=usage))[-1]["response"]
    assert (found["status"], found["usage"]["input_tokens"]) == ("completed", 10)
    assert found["usage"]["input_tokens_details"]["cached_tokens"] == 0
    assert found["usage"]["output_tokens_details"]["reasoning_tokens"] == 0


def test_a_stream_that_is_cut_is_incomplete() -> None:
    events = streamed(chunk({"content": "So"}), chunk({}, "length", usage=USAGE), chunk({}))
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-1]["response"]["usage"]["total_tokens"] == 13
    assert events[-2]["item"]["status"] == "incomplete"


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        ([chunk({"content": "So"}), chunk({}, "error", error={"message": "cheap broke"})], "cheap broke"),
        ([chunk({"content": "So"}), {"choices": 1}], "a chunk of the answer is no chat completion"),
        ([chunk({"content": 5})], "got int, expected text"),
        ([chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]})], "a tool call has no name"),
        ([], "the answer has no chunk"),
    ],
)
def test_a_broken_stream_ends_with_a_failed_response(chunks: list[Any], says: str) -> None:
    late = [chunk({"content": "late"})] if chunks else []
    events = streamed(*chunks, *late)
    assert kinds(events)[:2] == ["created", "in_progress"]
    assert "output_item.done" not in kinds(events)
    assert (kinds(events)[-1], kinds(events).count("failed")) == ("failed", 1)
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"], failed["output"]) == ("failed", "server_error", [])
    assert says in failed["error"]["message"]


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

    async def collect(last: bytes, leave: bool = False) -> None:
        events = response_events.events_of(chunks(last), json.dumps(ASKED).encode())
        async for _ in events:
            if leave:
                await events.aclose()
                assert ended[-1] == "closed"

    for last in (b"data: [DONE]\n\n", b'data: {"error": {"message": "x"}}\n\n', b"data: {\n\n"):
        asyncio.run(collect(last))
    assert ended == ["end", "closed"] * 3
    ended.append("left")
    asyncio.run(collect(b"", leave=True))


@pytest.mark.parametrize(
    "delta",
    [
        {"role": "", "content": "So", "tool_calls": None},
        {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "So"}]},
        {"content": "So", "reasoning": {"content": "why"}},
        {"content": "So", "tool_calls": [function("a", "{}")]},
    ],
)
def test_servers_that_leave_fields_out_are_understood(delta: dict[str, Any]) -> None:
    last = streamed(chunk(delta, usage={"cost": 0.1, "prompt_tokens": 1}), {"choices": [{"finish_reason": "stop"}]})[-1]
    for response in (last["response"], answered(delta)):
        texts = [part["text"] for item in response["output"] for part in item.get("content", ())]
        assert "So" in texts
    assert (last["type"], last["response"]["usage"]) == ("response.completed", None)
