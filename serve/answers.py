"""The answer of POST /v1/chat/completions: an upstream's answer with the model's name, its cost and the decision.

In: an `Answer` and a `Note`. Out: a body, or the events of a stream. Only `model`, `usage` and `router` change: in a
body, and in the first and last chunk of a stream; all other bytes are passed on as they arrive.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from prefill_router.pool import TargetModel
from serve.bodies import edited, value_of
from serve.events import DONE, EventSplitter, data_of, event_of
from serve.upstream import Answer, BrokenAnswer

_LAST = re.compile(rb'"finish_reason"\s*:\s*"|"choices"\s*:\s*\[\s*\]')  # chunks at the end of an answer
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


def cost_details(model: TargetModel, usage: Any) -> dict[str, float] | None:
    """The cost of input and output in USD from the reported token counts; None without them."""
    if not isinstance(usage, dict):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (isinstance(read, int) and isinstance(written, int) and read >= 0 and written >= 0):
        return None
    if (own := model.self_hosted) is not None:
        usd_per_s = own.gpu_usd_per_hour / 3600
        prices = usd_per_s * own.ttft_s_per_1k_tokens / 1000, usd_per_s * own.itl_s
    else:
        prices = (model.input_usd_per_mtok or 0.0) / 1e6, (model.output_usd_per_mtok or 0.0) / 1e6
    return {"input_usd": read * prices[0], "output_usd": written * prices[1]}


async def whole(answer: Answer, note: Note, finished: Finished) -> bytes:
    """The body of an answer. An error of the upstream server, and a body that is no JSON object, stay as they are.

    Closes the answer. Raises BrokenAnswer if it ends early.
    """
    usage: Any = None
    error: str | None = CLIENT_LEFT
    try:
        body = b"".join([chunk async for chunk in answer.chunks()])
        error = None if answer.status == 200 else f"status {answer.status}"
        if error is None:
            with suppress(ValueError, RecursionError):
                text = body.decode()
                usage = value_of(text, "usage")
                body = edited(text, note.changes(usage)).encode()
        return body
    except BrokenAnswer as broken:
        error = str(broken)
        raise
    finally:
        answer.close()
        finished(usage, error)


async def stream(
    answer: Answer, note: Note, wants_usage: bool, keep_alive_s: float, finished: Finished
) -> AsyncIterator[bytes]:
    """The events of an answer. The first and the last chunk have the note, the last one also the usage.

    If the client does not ask for the usage, the chunk that only reports it is dropped, and the chunk before has it. An
    answer that breaks ends with a chunk with an error and `finish_reason` "error". Closes the answer.
    """
    split, held, begun, done = EventSplitter(), list[bytes](), False, False
    usage: Any = None
    error: str | None = CLIENT_LEFT
    try:
        async for chunk in _with_pauses(answer.chunks(), keep_alive_s):
            if chunk is None:
                yield KEEP_ALIVE
                continue
            for event in split(chunk):
                data = data_of(event)
                if data == DONE:
                    done = True
                elif data is None:
                    yield event
                elif _LAST.search(data):
                    held.append(event)
                else:
                    for other in held:  # the end of one of several choices
                        yield other
                    held.clear()
                    yield event if begun else _noted(event, note)
                begun = begun or data is not None
        error = None if done or held else f"the answer of {note.model.name} ended early"
        usage, last = _ended(held, note, wants_usage)
        for event in last if error is None else [_error(note, error)]:
            yield event
        yield event_of(DONE.decode())
    except BrokenAnswer as broken:
        error = str(broken)
        yield _error(note, error)
        yield event_of(DONE.decode())
    finally:
        answer.close()
        finished(usage, error)


def _noted(event: bytes, note: Note) -> bytes:
    """The event with the model's name and the decision; unchanged if its data is no JSON object."""
    with suppress(ValueError, RecursionError):
        return event_of(edited((data_of(event) or b"").decode(), note.changes(None, with_usage=False)))
    return event


def _ended(events: list[bytes], note: Note, wants_usage: bool) -> tuple[Any, list[bytes]]:
    """The reported usage, and the last events of an answer, with usage, cost and decision in the last one."""
    texts = [(data_of(event) or b"").decode("utf-8", "replace") for event in events]
    usage, kept = None, list[str]()
    for text in texts:
        with suppress(ValueError, RecursionError):
            usage = value_of(text, "usage") or usage
            if not wants_usage and value_of(text, "choices") == []:
                continue
        kept.append(text)
    if kept:
        with suppress(ValueError, RecursionError):
            kept[-1] = edited(kept[-1], note.changes(usage))
    return usage, [event_of(text) for text in kept]


def _error(note: Note, message: str) -> bytes:
    chunk = {
        "object": "chat.completion.chunk",
        "model": note.model.name,
        "choices": [{"index": 0, "delta": {}, "finish_reason": "error"}],
        "error": {"message": message, "type": "server_error", "code": "upstream_broke"},
        "router": note.router,
    }
    return event_of(json.dumps(chunk))


async def _with_pauses(chunks: AsyncIterator[bytes], pause_s: float) -> AsyncIterator[bytes | None]:
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
