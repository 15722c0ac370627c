"""A server that speaks Anthropic's Messages API and can be told to fail, in a thread of the test process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from stub_upstream import running

USAGE = {"input_tokens": 10, "output_tokens": 3}


@dataclass
class AnthropicStub:
    """The server. `script`: what it does with the next requests, then `ok`; `seen`: bodies and headers received.

    Steps: `ok`; a status such as `429`, with `retry-after:S` after a colon; `call`, a call of the first tool;
    `overloaded`, an error as the first event of a stream; `break` after the first text; `slow`, 30 s after it.
    """

    url: str = ""
    script: list[str] = field(default_factory=list)
    seen: list[tuple[dict[str, Any], dict[str, str]]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # requests whose client left

    async def answer(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.seen.append((asked, dict(request.headers)))
        step, _, option = (self.script.pop(0) if self.script else "ok").partition(":")
        if step.isdigit():
            error = {"type": "error", "error": {"type": "invalid_request_error", "message": f"status {step}"}}
            headers = {"Retry-After": option} if option else {}
            return web.json_response(error, status=int(step), headers=headers)
        block: dict[str, Any] = {"type": "text", "text": "one two"}
        if step == "call":
            block = {"type": "tool_use", "id": "call-1", "name": asked["tools"][0]["name"], "input": {"a": 1}}
        message = {"id": "msg-1", "type": "message", "role": "assistant", "model": asked["model"], "usage": USAGE}
        end = {"stop_reason": "tool_use" if step == "call" else "end_turn", "stop_sequence": None}
        if not asked.get("stream"):
            return web.json_response(message | end | {"content": [block]})
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        try:
            for event in self._events(step, message, block, end):
                await reply.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
                if event["type"] == "content_block_delta" and step == "slow":
                    await asyncio.sleep(30)
                if event["type"] == "content_block_delta" and step == "break":
                    assert request.transport is not None
                    request.transport.abort()
                    return reply
        except (asyncio.CancelledError, ConnectionResetError):
            self.left.append(step)
            raise
        return reply

    def _events(
        self, step: str, message: dict[str, Any], block: dict[str, Any], end: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        if step == "overloaded":
            yield {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
            return
        begun = {"content": [], "stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": message | begun}
        empty = block | ({"input": {}} if step == "call" else {"text": ""})
        yield {"type": "content_block_start", "index": 0, "content_block": empty}
        pieces: list[dict[str, Any]] = [{"type": "text_delta", "text": word} for word in ("one", " two")]
        if step == "call":
            pieces = [{"type": "input_json_delta", "partial_json": piece} for piece in ('{"a"', ": 1}")]
        for piece in pieces:
            yield {"type": "content_block_delta", "index": 0, "delta": piece}
        yield {"type": "content_block_stop", "index": 0}
        yield {"type": "message_delta", "delta": end, "usage": {"output_tokens": 3}}
        yield {"type": "message_stop"}


@contextmanager
def stub_anthropic() -> Iterator[AnthropicStub]:
    """A running stub; `url` is its base URL."""
    stub, app = AnthropicStub(), web.Application()
    app.router.add_post("/v1/messages", stub.answer)
    with running(app) as address:
        stub.url = address.rstrip("/")
        yield stub
