"""OpenAI's Responses API: the answer of a chat becomes a response. `serve/responses.py` makes the request a chat.

In: the reply of the chat, and the body of the request, which `chat_body` has accepted. Out: a response, or the events
of its stream. A complete answer is translated as a stream of one chunk.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from prefill_router.errors import InputError
from serve.answers import token_counts
from serve.events import DONE, EventSplitter, closable, data_of
from serve.messages import UNREADABLE, error_message
from serve.responses import LEFT_OUT, functions_of

ECHOED: dict[str, Any] = {  # fields of a response that repeat the request, with their defaults
    **dict.fromkeys(("instructions", "max_output_tokens", "temperature", "top_p", "user")),
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": {},
    "tool_choice": "auto",
    "truncation": "disabled",
}
CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}  # why an answer is incomplete
TEXTS = {"reasoning_text": ("reasoning_content", "reasoning"), "output_text": ("content",), "refusal": ("refusal",)}
PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc", "custom_tool_call": "ctc"}
logger = logging.getLogger("ray.serve")


def response_of(body: bytes, request: bytes) -> bytes:
    """The response of a complete answer, with its `router`. Raises InputError if it is no chat completion."""
    answer = _Answer(request)
    try:
        given = json.loads(body)
        choice = given["choices"][0]
        for _ in (*answer.added(given | {"choices": [choice | {"delta": choice["message"]}]}), *answer.ended()):
            pass
    except UNREADABLE as error:
        raise InputError(f"the answer is no chat completion ({' '.join(str(error).split())[:300]})") from None
    return json.dumps(answer.response).encode()


async def events_of(chunks: AsyncIterator[bytes], request: bytes) -> AsyncGenerator[bytes, None]:
    """The events of a response from those of a streamed chat, which are read to their end.

    A broken answer, and a chunk that cannot be translated, end the response with `response.failed`. Closes `chunks`.
    """
    answer, split = _Answer(request), EventSplitter()
    async with aclosing(closable(chunks)) as received:
        async for part in received:
            for event in split(part):
                data = data_of(event)
                if data is None:  # a comment
                    yield event
                elif answer.response["status"] == "in_progress":
                    for one in answer.events(data):
                        yield one


class _Answer:
    """The response to a request so far. The methods yield the events of what they add to it."""

    def __init__(self, body: bytes) -> None:
        request = {name: value for name, value in json.loads(body).items() if value is not None}
        self._functions = functions_of(request.get("tools", ()))
        self._n_events = 0
        self._item: dict[str, Any] = {}  # the item that is not complete; empty if there is none
        self._index: Any = None  # of its call in the chat
        self._pieces: list[str] = []  # of its last text
        self._finish = ""
        self.response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            **dict.fromkeys(("error", "incomplete_details", "previous_response_id", "usage")),
            "model": request.get("model"),
            "output": [],
            "store": False,
            "text": {"format": {"type": "text"}} | request.get("text", {}),
            "tools": [tool for tool in request.get("tools", ()) if tool["type"] not in LEFT_OUT],
            **{name: request.get(name, default) for name, default in ECHOED.items()},
        }

    def events(self, data: bytes) -> Iterator[bytes]:
        """The events of a chunk, or of the end of the stream."""
        try:
            if data == DONE:
                yield from self.ended()
                return
            chunk = json.loads(data)
            if chunk.get("error") is not None:
                yield from self._failed(error_message(data))
            else:
                yield from self.added(chunk)
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:300]
            logger.error("a chunk of an answer cannot be translated to a response: %s", reason)
            yield from self._failed(f"a chunk of the answer is no chat completion ({reason})")

    def added(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """The events of a chunk. Raises one of UNREADABLE for a chunk that is none."""
        self.response |= {name: chunk[name] for name in ("model", "router") if name in chunk}
        self.response["usage"] = _usage(chunk.get("usage")) or self.response["usage"]
        yield from self._begun()
        for choice in (chunk.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            for kind, names in TEXTS.items():
                if text := next(filter(None, (_text(delta.get(name)) for name in names)), ""):
                    yield from self._said(kind, text)
            for position, call in enumerate(delta.get("tool_calls") or ()):
                yield from self._called(call.get("index", position), call.get("id"), call["function"])
            self._finish = choice.get("finish_reason") or self._finish

    def ended(self) -> Iterator[bytes]:
        """The events of the end of an answer."""
        if not self._n_events:
            yield from self._failed("the answer has no chunk")
            return
        reason = CUT.get(self._finish)
        status = "incomplete" if reason else "completed"
        yield from self._complete(status)
        self.response |= {"status": status, "incomplete_details": {"reason": reason} if reason else None}
        yield self._event(status, response=self.response)

    def _failed(self, message: str) -> Iterator[bytes]:
        """The end of a broken answer, whose response has the complete items."""
        yield from self._begun()
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        yield self._event("failed", response=self.response)

    def _begun(self) -> Iterator[bytes]:
        if not self._n_events:
            yield self._event("created", response=self.response)
            yield self._event("in_progress", response=self.response)

    def _said(self, kind: str, text: str) -> Iterator[bytes]:
        """A piece of text; `kind` is the type of its part."""
        own: dict[str, Any] = {"type": "message", "role": "assistant"}
        if kind == "reasoning_text":
            own = {"type": "reasoning", "summary": []}
        if self._item.get("type") != own["type"]:
            yield from self._begin(own | {"content": []})
        parts = self._item["content"]
        if not parts or parts[-1]["type"] != kind:
            yield from self._complete_part()
            parts.append({"type": kind, _field(kind): ""} | ({"annotations": []} if kind == "output_text" else {}))
            yield self._event("content_part.added", part=parts[-1], **self._place())
        self._pieces.append(text)
        yield self._event(f"{kind}.delta", delta=text, **_logprobs(kind), **self._place())

    def _called(self, index: Any, call_id: str | None, function: dict[str, Any]) -> Iterator[bytes]:
        """A piece of a tool call: of the last one, unless its index or id is new."""
        last = self._item.get("call_id")
        if last is None or index != self._index or (call_id or last) != last:
            if not (name := _text(function.get("name"))):
                raise ValueError("a tool call has no name")
            namespace, tool = self._functions.get(name, (None, {"type": "function", "name": name}))
            own = {"type": "function_call", "arguments": ""}
            if tool["type"] == "custom":
                own = {"type": "custom_tool_call", "input": ""}
            own |= {"call_id": call_id or f"call_{uuid.uuid4().hex}", "name": tool["name"]}
            yield from self._begin(own | ({"namespace": namespace} if namespace else {}))
            self._index = index
        if piece := _text(function.get("arguments")):
            self._pieces.append(piece)
            if "arguments" in self._item:
                yield self._event("function_call_arguments.delta", delta=piece, **self._place())

    def _begin(self, item: dict[str, Any]) -> Iterator[bytes]:
        yield from self._complete("completed")
        self._item = {"id": f"{PREFIXES[item['type']]}_{uuid.uuid4().hex}", "status": "in_progress"} | item
        yield self._event("output_item.added", output_index=len(self.response["output"]), item=self._item)

    def _complete(self, status: str) -> Iterator[bytes]:
        """Ends the item, if there is one."""
        if not self._item:
            return
        yield from self._complete_part()
        text, self._pieces = "".join(self._pieces), []
        if "arguments" in self._item:
            self._item["arguments"] = text
            yield self._event("function_call_arguments.done", arguments=text, **self._place())
        if "input" in self._item:
            self._item["input"] = text = _custom_input(text)
            yield self._event("custom_tool_call_input.delta", delta=text, **self._place())
            yield self._event("custom_tool_call_input.done", input=text, **self._place())
        index, item, self._item = len(self.response["output"]), self._item | {"status": status}, {}
        self.response["output"].append(item)
        yield self._event("output_item.done", output_index=index, item=item)

    def _complete_part(self) -> Iterator[bytes]:
        """Ends the last text of a message or reasoning, if there is one."""
        if self._item.get("content"):
            part, text = self._item["content"][-1], "".join(self._pieces)
            kind, field, self._pieces = part["type"], _field(part["type"]), []
            part[field] = text
            yield self._event(f"{kind}.done", **{field: text}, **_logprobs(kind), **self._place())
            yield self._event("content_part.done", part=part, **self._place())

    def _place(self) -> dict[str, Any]:
        place = {"item_id": self._item["id"], "output_index": len(self.response["output"])}
        return place | ({"content_index": len(self._item["content"]) - 1} if "content" in self._item else {})

    def _event(self, kind: str, **data: Any) -> bytes:
        event = {"type": f"response.{kind}", "sequence_number": self._n_events} | data
        self._n_events += 1
        return f"event: response.{kind}\ndata: {json.dumps(event)}\n\n".encode()


def _field(kind: str) -> str:
    return "refusal" if kind == "refusal" else "text"


def _logprobs(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "output_text" else {}


def _text(value: Any) -> str:
    """The text of a field of an answer, which some servers send in parts or in an object. Raises TypeError."""
    match value:
        case None | str():
            return value or ""
        case list():
            return "".join(map(_text, value))
        case dict():
            return _text(value.get("text") or value.get("content"))
    raise TypeError(f"got {type(value).__name__}, expected text")


def _custom_input(arguments: str) -> str:
    """The text of a custom tool's call; all arguments if the model did not name it."""
    try:
        return _text(json.loads(arguments)["input"])
    except UNREADABLE:
        return arguments


def _usage(usage: Any) -> dict[str, Any] | None:
    counts = token_counts(usage)
    if counts is None:
        return None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": counts[0],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": counts[1],
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": sum(counts),
    } | {name: usage[name] for name in ("cost", "cost_details") if name in usage}
