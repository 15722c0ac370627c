"""The client of benchmarks.rollout, its server that fails, and what it counts.

In: a URL, a duration, and how often answers of a checkpoint are right. Out: one `Chat` per chat.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

RIGHT = 0.7  # probability that an answer is rated right


@dataclass(frozen=True)
class Chat:
    """One chat: its end (Unix, s), the checkpoint that decided, and the error; None: answered with its own prompt."""

    ended: float
    checkpoint: str | None
    error: str | None


def send(url: str, connections: int, stop: Path, right: Mapping[str, float]) -> list[Chat]:
    """Sends chats until the file `stop` exists, each with another prompt, and rates every answer.

    `right`: probability that an answer is rated right, by checkpoint; RIGHT for others.
    """
    chats: list[Chat] = []

    async def connection(client: aiohttp.ClientSession, own: int) -> None:
        draw, number = random.Random(own), 0
        while not stop.exists():
            number += 1
            chat, decision = await _ask(client, url, f"What is {own} + {number}, at {time.time_ns()}?", number % 4 == 0)
            chats.append(chat)
            if decision is not None:
                score = float(draw.random() < right.get(str(chat.checkpoint), RIGHT))
                async with client.post(f"{url}/v1/feedback", json={"decision_id": decision, "score": score}) as reply:
                    await reply.read()

    async def all_connections() -> None:
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as client:
            await asyncio.gather(*(connection(client, own) for own in range(connections)))

    asyncio.run(all_connections())
    return chats


async def _ask(client: aiohttp.ClientSession, url: str, prompt: str, stream: bool) -> tuple[Chat, str | None]:
    """The chat, and the id of its decision."""
    body = {"model": "auto", "messages": [{"role": "user", "content": prompt}], "stream": stream}
    checkpoint, decision, error = None, None, None
    try:
        async with client.post(f"{url}/v1/chat/completions", json=body) as reply:
            text = (await reply.read()).decode()
            checkpoint, decision = (reply.headers.get(f"x-router-{name}") for name in ("version", "decision-id"))
            if reply.status != 200:
                error = f"status {reply.status}: {text[:200]}"
            elif _content(text, stream) != prompt:
                error = f"another answer: {text[:200]}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return Chat(time.time(), checkpoint, error), decision


def _content(text: str, stream: bool) -> str:
    if not stream:
        return str(json.loads(text)["choices"][0]["message"]["content"])
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        raise ValueError("the stream has no end")
    deltas = [choice["delta"] for event in events[:-1] for choice in json.loads(event)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def counted(chats: Sequence[Chat]) -> dict[str, Any]:
    """How many chats there were, and how many were lost, with the errors."""
    errors = Counter(chat.error for chat in chats if chat.error is not None)
    return {"chats": len(chats), "lost": errors.total(), "errors": dict(errors.most_common(5))}


def answer_with_an_error(port: int) -> None:
    """Runs a server that answers every chat with status 500."""

    async def chat(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"error": {"message": "failing"}}, status=500)

    application = web.Application()
    application.router.add_post("/v1/chat/completions", chat)
    web.run_app(application, host="127.0.0.1", port=port, print=None, access_log=None)
