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
from dataclasses import dataclass, field
from typing import Any

from prefill_router.errors import InputError
from serve.answers import cached_tokens, token_counts
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
OPEN_TEXT = "text"  # key of the open message or reasoning; calls have their index in the chat
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


@dataclass
class _Item:
    """An item that is not complete. `pieces` are those of its last text, or of the arguments of its call."""

    output_index: int
    fields: dict[str, Any]
    pieces: list[str] = field(default_factory=list)

    @property
    def position(self) -> dict[str, Any]:
        """The fields of an event that name the item, and its last part if it has parts."""
        found = {"item_id": self.fields["id"], "output_index": self.output_index}
        return found | ({"content_index": len(self.fields["content"]) - 1} if "content" in self.fields else {})


class _Answer:
    """The response to a request so far. The methods yield the events of what they add to it.

    At most one message or reasoning is open. A tool call is open until the end of the answer, because the pieces of
    parallel calls may alternate.
    """

    def __init__(self, body: bytes) -> None:
        request = {name: value for name, value in json.loads(body).items() if value is not None}
        self._functions = functions_of(request.get("tools", ()))
        self._n_events = 0
        self._n_items = 0
        self._open: dict[Any, _Item] = {}  # items that are not complete, in the order of `output_index`
        self._complete_items: dict[int, dict[str, Any]] = {}  # by `output_index`
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
        yield from self._start()
        for choice in (chunk.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            for kind, names in TEXTS.items():
                if text := next(filter(None, (_text(delta.get(name)) for name in names)), ""):
                    yield from self._add_text(kind, text)
            for position, call in enumerate(delta.get("tool_calls") or ()):
                yield from self._add_call(call.get("index", position), call.get("id"), call.get("function") or {})
            self._finish = choice.get("finish_reason") or self._finish

    def ended(self) -> Iterator[bytes]:
        """The events of the end of an answer."""
        if not self._n_events:
            yield from self._failed("the answer has no chunk")
            return
        reason = CUT.get(self._finish)
        status = "incomplete" if reason else "completed"
        while self._open:  # an answer is cut in its last item
            yield from self._complete(next(iter(self._open)), status if len(self._open) == 1 else "completed")
        self.response |= {
            "status": status,
            "incomplete_details": {"reason": reason} if reason else None,
            "output": self._output(),
        }
        yield self._event(status, response=self.response)

    def _failed(self, message: str) -> Iterator[bytes]:
        """The end of a broken answer, whose response has the complete items."""
        yield from self._start()
        error = {"code": "server_error", "message": message}
        self.response |= {"status": "failed", "error": error, "output": self._output()}
        yield self._event("failed", response=self.response)

    def _output(self) -> list[dict[str, Any]]:
        """The complete items, in the order of `output_index`."""
        return [self._complete_items[index] for index in sorted(self._complete_items)]

    def _start(self) -> Iterator[bytes]:
        """The first events of the response, once."""
        if not self._n_events:
            yield self._event("created", response=self.response)
            yield self._event("in_progress", response=self.response)

    def _add_text(self, kind: str, text: str) -> Iterator[bytes]:
        """Adds a piece of text; `kind` is the type of its part."""
        own: dict[str, Any] = {"type": "message", "role": "assistant"}
        if kind == "reasoning_text":
            own = {"type": "reasoning", "summary": []}
        if OPEN_TEXT not in self._open or self._open[OPEN_TEXT].fields["type"] != own["type"]:
            yield from self._begin(OPEN_TEXT, own | {"content": []})
        item = self._open[OPEN_TEXT]
        parts = item.fields["content"]
        if not parts or parts[-1]["type"] != kind:
            yield from self._complete_part(item)
            parts.append({"type": kind, _field(kind): ""} | ({"annotations": []} if kind == "output_text" else {}))
            yield self._event("content_part.added", part=parts[-1], **item.position)
        item.pieces.append(text)
        yield self._event(f"{kind}.delta", delta=text, **_logprobs(kind), **item.position)

    def _add_call(self, index: Any, call_id: str | None, function: dict[str, Any]) -> Iterator[bytes]:
        """Adds a piece of a tool call: of the open one with this index, unless the id is another."""
        if index not in self._open or (call_id and call_id != self._open[index].fields["call_id"]):
            if not (name := _text(function.get("name"))):
                raise ValueError("a tool call has no name")
            namespace, tool = self._functions.get(name, (None, {"type": "function", "name": name}))
            own = {"type": "function_call", "arguments": ""}
            if tool["type"] == "custom":
                own = {"type": "custom_tool_call", "input": ""}
            own |= {"call_id": call_id or f"call_{uuid.uuid4().hex}", "name": tool["name"]}
            yield from self._begin(index, own | ({"namespace": namespace} if namespace else {}))
        item = self._open[index]
        if piece := _text(function.get("arguments")):
            item.pieces.append(piece)
            if "arguments" in item.fields:
                yield self._event("function_call_arguments.delta", delta=piece, **item.position)

    def _begin(self, key: Any, fields: dict[str, Any]) -> Iterator[bytes]:
        """Begins an item. Ends the open text, and the open call with the same index."""
        for ended in (OPEN_TEXT, key):
            if ended in self._open:
                yield from self._complete(ended, "completed")
        own = {"id": f"{PREFIXES[fields['type']]}_{uuid.uuid4().hex}", "status": "in_progress"} | fields
        self._open[key] = item = _Item(self._n_items, own)
        self._n_items += 1
        yield self._event("output_item.added", output_index=item.output_index, item=item.fields)

    def _complete(self, key: Any, status: str) -> Iterator[bytes]:
        """Ends an open item."""
        item = self._open.pop(key)
        yield from self._complete_part(item)
        text = "".join(item.pieces)
        if "arguments" in item.fields:
            item.fields["arguments"] = text
            yield self._event("function_call_arguments.done", arguments=text, **item.position)
        if "input" in item.fields:
            item.fields["input"] = text = _custom_input(text)
            yield self._event("custom_tool_call_input.delta", delta=text, **item.position)
            yield self._event("custom_tool_call_input.done", input=text, **item.position)
        item.fields["status"] = status
        self._complete_items[item.output_index] = item.fields
        yield self._event("output_item.done", output_index=item.output_index, item=item.fields)

    def _complete_part(self, item: _Item) -> Iterator[bytes]:
        """Ends the last text of a message or reasoning, if there is one."""
        if item.fields.get("content"):
            part, text = item.fields["content"][-1], "".join(item.pieces)
            kind, name, item.pieces = part["type"], _field(part["type"]), []
            part[name] = text
            yield self._event(f"{kind}.done", **{name: text}, **_logprobs(kind), **item.position)
            yield self._event("content_part.done", part=part, **item.position)

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
    details = usage.get("completion_tokens_details")
    reasoning = details.get("reasoning_tokens") if isinstance(details, dict) else None
    return {
        "input_tokens": counts[0],
        "input_tokens_details": {"cached_tokens": cached_tokens(usage, counts[0]), "cache_write_tokens": 0},
        "output_tokens": counts[1],
        "output_tokens_details": {"reasoning_tokens": reasoning if type(reasoning) is int else 0},
        "total_tokens": sum(counts),
    } | {name: usage[name] for name in ("cost", "cost_details") if name in usage}
