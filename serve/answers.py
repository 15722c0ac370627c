"""The answer of POST /v1/chat/completions: an upstream's answer with the model's name, its cost and the decision.

In: an `Answer` and a `Note`. Out: a body, or the events of a stream. Only `model`, `usage` and `router` change: in a
body, and in the first and last chunk of a stream; all other bytes are passed on as they arrive.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from prefill_router.pool import TargetModel
from serve.bodies import edited, value_of
from serve.events import DONE, EventSplitter, data_of, event_of
from serve.requests import BYTES_PER_TOKEN
from serve.upstream import Answer, BrokenAnswer

# A chunk at the end of an answer: a choice has ended, or there is no choice. Some servers send "finish_reason": "".
_ENDED = re.compile(rb'"finish_reason"\s*:\s*"[^"]')
_NO_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_ERROR = re.compile(rb'\s*\{\s*"error"\s*:\s*[^n\s]')
MAX_HELD = 1_000  # chunks at the end of an answer
MAX_BYTES = 64 * 2**20  # of an answer that is no stream, and of one event
CLIENT_LEFT = "the client left"
KEEP_ALIVE = b": keep-alive\n\n"
Finished = Callable[[Any, str | None], None]  # called once at the end, with the reported usage and the error


@dataclass(frozen=True)
class Note:
    """What the gateway adds to an answer.

    `model`: who answers; `estimated_usd`: the cost before the answer, None if it is unknown; `router`: the decision.
    """

    model: TargetModel
    estimated_usd: float | None
    router: dict[str, Any]

    def priced(self, usage: Any) -> Note:
        """The note with the cost of the reported usage in place of the estimate."""
        cost = cost_details(self.model, usage)
        usd = self.estimated_usd if cost is None else sum(cost.values())
        return replace(self, estimated_usd=usd, router=self.router | {"cost_usd": usd})

    def changes(self, usage: Any, with_usage: bool = True) -> dict[str, Any]:
        """The changes of a body or chunk. `usage` is what the upstream server reported, None if it reported none."""
        note = self.priced(usage)
        changes: dict[str, Any] = {"model": self.model.name}
        if with_usage:
            cost = cost_details(self.model, usage)
            details = {"estimated": True} if cost is None else cost
            own = usage if isinstance(usage, dict) else {}
            changes["usage"] = own | {"cost": note.estimated_usd, "cost_details": details}
        return changes | {"router": note.router}


def token_counts(usage: Any) -> tuple[int, int] | None:
    """Input and output tokens of a reported usage; None unless both are valid."""
    if not isinstance(usage, dict):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(read) is int and type(written) is int and 0 <= read < 2**53 and 0 <= written < 2**53:
        return read, written
    return None


def cached_tokens(usage: dict[str, Any], read: int) -> int:
    """The input tokens of a reported usage that came from a prompt cache; 0 unless they are a part of all `read`."""
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if type(cached) is int and 0 <= cached <= read else 0


def cost_details(model: TargetModel, usage: Any) -> dict[str, float] | None:
    """The cost of input and output in USD from the reported token counts; None without them.

    Cached input is an entry of its own if its price is known and the usage reports it; `input_usd` is that of the rest.
    """
    counts = token_counts(usage)
    if counts is None:
        return None
    if (own := model.self_hosted) is not None:
        usd_per_s = own.gpu_usd_per_hour / 3600
        prices = usd_per_s * own.ttft_s_per_1k_tokens / 1000, usd_per_s * own.itl_s
    else:
        prices = (model.input_usd_per_mtok or 0.0) / 1e6, (model.output_usd_per_mtok or 0.0) / 1e6
    cached_price = None if own is not None else model.cached_input_usd_per_mtok
    cached = 0 if cached_price is None else cached_tokens(usage, counts[0])
    cost = {"input_usd": (counts[0] - cached) * prices[0], "output_usd": counts[1] * prices[1]}
    return cost | {"cached_input_usd": cached * (cached_price or 0.0) / 1e6} if cached else cost


def charged_usd(note: Note, status: int, usage: Any, error: str | None, request_bytes: int, tokens: int) -> float:
    """The cost of an answer in USD that counts for the budget of an API key.

    It is that of the reported usage. Without a usage it is 0 for an error of the server, else the estimate of the
    decision. Without a decision it is the cost of an input token per BYTES_PER_TOKEN bytes of the request, and of
    `tokens` output tokens.
    """
    cost = cost_details(note.model, usage)
    if cost is None:
        if status != 200 or error not in (None, CLIENT_LEFT):
            return 0.0
        if note.estimated_usd is not None:
            return note.estimated_usd
        estimated = {"prompt_tokens": -(-request_bytes // BYTES_PER_TOKEN), "completion_tokens": tokens}
        cost = cost_details(note.model, estimated)
    return sum((cost or {}).values())


async def whole(answer: Answer, note: Note, finished: Finished) -> bytes:
    """The body of an answer. An error of the server, a compressed body and one that is no JSON object stay as they are.

    A body without choices is reported as an error. Sets `answer.output_tokens` to a token per BYTES_PER_TOKEN bytes of
    the body. Closes the answer. Raises BrokenAnswer if it ends early or is larger than MAX_BYTES.
    """
    usage: Any = None
    error: str | None = CLIENT_LEFT
    body = bytearray()
    try:
        async for chunk in answer.chunks():
            body += chunk
            if len(body) > MAX_BYTES:
                raise BrokenAnswer(f"the answer of {note.model.name} is larger than {MAX_BYTES} bytes")
        error = None if answer.status == 200 else f"status {answer.status}"
        if error is None and "content-encoding" not in answer.headers:
            error = f"the answer of {note.model.name} has no choices"
            with suppress(ValueError, RecursionError):
                text = body.decode()
                usage = value_of(text, "usage")
                error = None if value_of(text, "choices") else error
                return edited(text, note.changes(usage)).encode()
        return bytes(body)
    except BrokenAnswer as broken:
        error = str(broken)
        raise
    finally:
        answer.output_tokens = len(body) // BYTES_PER_TOKEN
        answer.close()
        finished(usage, error)


async def stream(
    answer: Answer, note: Note, wants_usage: bool, keep_alive_s: float, finished: Finished
) -> AsyncGenerator[bytes, None]:
    """The events of an answer. The first and the last chunk have the note, the last one also the usage.

    If the client does not ask for the usage, the chunk that only reports it is dropped, and the chunk before has it. An
    answer that breaks, or has an error in place of a chunk, ends with a chunk with an error and `finish_reason`
    "error". Counts every chunk as a token in `answer.output_tokens`. Closes the answer.
    """
    held: list[bytes] = []  # possibly the last chunks
    usage: Any = None
    error: str | None = CLIENT_LEFT
    reported: str | None = None
    begun = False
    answer.output_tokens = 0
    try:
        try:
            async with aclosing(_events(answer, keep_alive_s)) as events:
                async for event in events:
                    data = data_of(event)
                    if data == DONE:
                        break
                    if data is not None and _ERROR.match(data):
                        reported = f"{note.model.name} reported an error: {data[:300].decode('utf-8', 'replace')}"
                        break
                    answer.output_tokens += data is not None
                    if data is not None and len(held) < MAX_HELD and (_ENDED.search(data) or _NO_CHOICE.search(data)):
                        held.append(event)
                        continue
                    ready = [*held, event] if data is not None else [event]
                    if data is not None:  # the held chunks end one of several choices, or begin the answer
                        held.clear()
                    for one in ready:
                        changed = one if begun or data is None else _noted(one, note)
                        begun = begun or changed is not one
                        yield changed
                else:
                    if not any(_ENDED.search(event) for event in held):
                        reported = f"the answer of {note.model.name} ended early"
        except BrokenAnswer as broken:
            reported = str(broken)
        error = CLIENT_LEFT if reported is None else reported  # the client may leave before it has the end
        usage, last = _ended(held, note, wants_usage, reported is None)
        for event in last:
            yield event
        if reported is not None:
            yield _error(note, reported)
        yield event_of(DONE.decode())
        error = reported
    finally:
        answer.close()
        finished(usage, error)


async def _events(answer: Answer, keep_alive_s: float) -> AsyncGenerator[bytes, None]:
    """The events of an answer, and KEEP_ALIVE after every `keep_alive_s` seconds without one.

    Raises BrokenAnswer also for an event larger than MAX_BYTES.
    """
    split = EventSplitter()
    async with aclosing(_with_pauses(answer.chunks(), keep_alive_s)) as chunks:
        async for chunk in chunks:
            if chunk is None:
                yield KEEP_ALIVE
                continue
            for event in split(chunk):
                yield event
            if len(split.rest) > MAX_BYTES:
                raise BrokenAnswer(f"an event of {answer.upstream.name} is larger than {MAX_BYTES} bytes")


def _noted(event: bytes, note: Note) -> bytes:
    """The event with the model's name and the decision; the same object if its data is no JSON object."""
    with suppress(ValueError, RecursionError):
        return event_of(edited((data_of(event) or b"").decode(), note.changes(None, with_usage=False)))
    return event


def _ended(events: list[bytes], note: Note, wants_usage: bool, complete: bool) -> tuple[Any, list[bytes]]:
    """The reported usage, and the last events of an answer; if it is complete, with the note in the last chunk."""
    usage, kept = None, list[bytes]()
    last: tuple[int, str] | None = None  # position and text of the last chunk
    for event in events:
        with suppress(ValueError, RecursionError):
            text = (data_of(event) or b"").decode()
            usage = value_of(text, "usage") or usage
            if not wants_usage and value_of(text, "choices") == []:
                continue
            last = len(kept), text
        kept.append(event)
    if complete and last is not None:
        kept[last[0]] = event_of(edited(last[1], note.changes(usage)))
    return usage, kept


def _error(note: Note, message: str) -> bytes:
    chunk = {
        "object": "chat.completion.chunk",
        "model": note.model.name,
        "choices": [{"index": 0, "delta": {}, "finish_reason": "error"}],
        "error": {"message": message, "type": "server_error", "code": "upstream_broke"},
        "router": note.router,
    }
    return event_of(json.dumps(chunk))


async def _with_pauses(chunks: AsyncIterator[bytes], pause_s: float) -> AsyncGenerator[bytes | None, None]:
    """The chunks, and None after every `pause_s` seconds without one."""
    following = asyncio.ensure_future(anext(chunks))
    try:
        while True:
            await asyncio.wait({following}, timeout=pause_s)
            if not following.done():
                yield None
                continue
            try:
                chunk = following.result()
            except StopAsyncIteration:
                return
            following = asyncio.ensure_future(anext(chunks))
            yield chunk
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError, StopAsyncIteration, BrokenAnswer):
            await following
