"""A server that speaks OpenAI's chat completions and can be told to fail, in a thread of the test process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

USAGE = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}


@dataclass
class Stub:
    """The server. `script`: what it does with the next requests, then `ok`; `seen`: bodies and headers received.

    Steps: `ok`; a status such as `429`, with `retry-after:S` after a colon; `hang`; `reset` before the first byte;
    `empty`; `break` after two chunks; `silent` after two chunks; `slow`, one chunk per 0.2 s; `flood`, 8 MB of chunks;
    `call`, a call of the first tool.
    """

    url: str = ""
    script: list[str] = field(default_factory=list)
    seen: list[tuple[bytes, dict[str, str]]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # requests whose client left

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((body, dict(request.headers)))
        step, _, option = (self.script.pop(0) if self.script else "ok").partition(":")
        try:
            return await self._do(step, option, json.loads(body), request)
        except (asyncio.CancelledError, ConnectionResetError):
            self.left.append(step)
            raise

    async def _do(self, step: str, option: str, asked: dict[str, Any], request: web.Request) -> web.StreamResponse:
        if step.isdigit():
            headers = {"Retry-After": option} if option else {}
            return web.json_response({"error": {"message": f"status {step}"}}, status=int(step), headers=headers)
        if step == "hang":
            await asyncio.sleep(30)
        if step == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if step == "empty":
            return web.Response()
        common = {"id": "chatcmpl-1", "created": 1, "model": f"{asked['model']}-2026"}
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "Gr\u00fc\u00dfe", "reasoning": "why"}
            choices = [{"index": i, "message": message, "finish_reason": "stop"} for i in range(asked.get("n", 1))]
            text = json.dumps({**common, "object": "chat.completion", "choices": choices, "usage": USAGE, "x": 1.50})
            return web.Response(text=text.replace("1.5}", "1.50}"), content_type="application/json")
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for chunk in self._chunks(common, asked, step == "call"):
            await reply.write(f"data: {chunk}\n\n".encode())
            if step == "slow":
                await asyncio.sleep(float(option or 0.2))
            if step == "flood" and '"one"' in chunk:
                for _ in range(8_000):
                    await reply.write(f"data: {chunk.replace('one', 'o' * 1000)}\n\n".encode())
            if step in ("break", "silent") and '"two"' in chunk:
                if step == "silent":
                    await asyncio.sleep(30)
                assert request.transport is not None
                request.transport.abort()
                return reply
        await reply.write(b"data: [DONE]\n\n")
        return reply

    def _chunks(self, common: dict[str, Any], asked: dict[str, Any], call: bool) -> Iterator[str]:
        deltas: list[dict[str, Any]] = [{"content": word} for word in ("one", "two", "three")]
        if call:
            name = asked["tools"][0]["function"]["name"]
            pieces = [
                {"id": "call-1", "function": {"name": name, "arguments": '{"a"'}},
                {"function": {"arguments": ": 1}"}},
            ]
            deltas = [{"tool_calls": [{"index": 0} | piece]} for piece in pieces]
        for index in range(asked.get("n", 1)):
            for delta in deltas:
                choice = {"index": index, "delta": delta, "finish_reason": None}
                yield json.dumps({**common, "object": "chat.completion.chunk", "choices": [choice]})
            choice = {"index": index, "delta": {}, "finish_reason": "stop"}
            yield json.dumps({**common, "object": "chat.completion.chunk", "choices": [choice]})
        if (asked.get("stream_options") or {}).get("include_usage"):
            yield json.dumps({**common, "object": "chat.completion.chunk", "choices": [], "usage": USAGE})


@contextmanager
def running(app: web.Application) -> Iterator[str]:
    """Runs an application in a thread, on a free port; yields its address."""
    loop, started, stopping = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    address: list[str] = []

    async def run() -> None:
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address.append(f"http://127.0.0.1:{runner.addresses[0][1]}/")
        started.set()
        await stopping.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(10)
        loop.close()


@contextmanager
def stub_upstream() -> Iterator[Stub]:
    """A running stub; `url` is its base URL."""
    stub, app = Stub(), web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", stub.answer)
    with running(app) as address:
        stub.url = f"{address}v1"
        yield stub
