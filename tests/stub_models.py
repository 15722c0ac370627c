"""A server with several models that add two numbers, rightly or wrongly, and with the faults of real servers.

    python tests/stub_models.py PORT_FILE ANSWERS_FILE [FAULTS [KIND]]

FAULTS is the share of requests that meet a fault, in equal parts: 429, 500, a dropped stream, a malformed chunk, an
answer without usage, and slow tokens; all of one KIND if it is given. Every valid answer that was sent to its end is a
line of ANSWERS_FILE: model, question, input tokens, output tokens. The model `share-0.7` is right for 70 % of the
questions.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import re
import sys
from pathlib import Path
from typing import Any, TextIO

from aiohttp import web

SUM = re.compile(r"(\d+) \+ (\d+)")
FAULTS = ("429", "500", "drop", "malformed", "no usage", "slow")
INPUT_TOKENS, OUTPUT_TOKENS = 100, 50


class Models:
    """The models of the server. `answers` receives the lines of complete answers."""

    def __init__(self, answers: TextIO, faults: float, kinds: tuple[str, ...]) -> None:
        self.answers, self.faults, self.kinds, self.random = answers, faults, kinds, random.Random(0)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        fault = self.random.choice(self.kinds) if self.random.random() < self.faults else ""
        if fault in ("429", "500"):
            return web.json_response({"error": {"message": f"status {fault}"}}, status=int(fault))
        question, pieces = asked["messages"][-1]["content"], reply(asked["model"], asked["messages"][-1]["content"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for position, piece in enumerate(pieces):
            if fault == "slow":
                await asyncio.sleep(0.1)
            if fault == "drop" and position == 2:
                assert request.transport is not None
                request.transport.abort()
                return response
            await send(response, asked["model"], {"content": piece}, None)
            if fault == "malformed" and position == 2:
                await response.write(b'data: {"choices": [{"delta": {"con\n\n')
        await send(response, asked["model"], {}, "stop")
        if fault != "no usage":
            usage = {
                "prompt_tokens": INPUT_TOKENS,
                "completion_tokens": OUTPUT_TOKENS,
                "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
            }
            await send(response, asked["model"], None, None, usage)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        if fault == "malformed":
            return response
        self.answers.write(json.dumps([asked["model"], question, INPUT_TOKENS, OUTPUT_TOKENS]) + "\n")
        self.answers.flush()
        return response


def reply(model: str, question: str) -> list[str]:
    """The pieces of the answer of a model to a question."""
    found = SUM.search(question)
    assert found is not None, question
    total = int(found[1]) + int(found[2])
    draw = int.from_bytes(hashlib.sha256(f"{model} {found[0]}".encode()).digest()[:4], "big") / 2**32
    if draw >= float(model.rpartition("-")[2]):
        total += 1
    return ["Adding ", found[1], " and ", found[2], " gives ", f"{total}.\n\n", f"Answer: {total}"]


async def send(
    response: web.StreamResponse,
    model: str,
    delta: dict[str, Any] | None,
    finish: str | None,
    usage: dict[str, int] | None = None,
) -> None:
    """Sends one chunk of a stream."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": choices}
    await response.write(f"data: {json.dumps(chunk | ({'usage': usage} if usage else {}))}\n\n".encode())


async def main(port_file: Path, answers: Path, faults: float, kinds: tuple[str, ...]) -> None:
    logging.disable(logging.CRITICAL)  # of clients that were killed
    app = web.Application()
    with answers.open("a") as file:
        app.router.add_post("/v1/chat/completions", Models(file, faults, kinds).answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port_file.with_suffix(".tmp").write_text(str(runner.addresses[0][1]))
        port_file.with_suffix(".tmp").rename(port_file)
        await asyncio.Event().wait()


if __name__ == "__main__":
    share, kinds = float((sys.argv[3:] or ["0"])[0]), tuple(sys.argv[4:]) or FAULTS
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), share, kinds))
