"""Server-sent events as bytes: splitting a stream into events, and reading and replacing the data of one event.

In: chunks of bytes with arbitrary boundaries. Out: complete events, each with its blank line. Independent of HTTP.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE = re.compile(rb"\r\n|\n|\r")
DONE = b"[DONE]"  # data of the last event of an answer in OpenAI's format


class EventSplitter:
    """Splits a stream of bytes into events. `rest` is the incomplete event at the end of the stream."""

    def __init__(self) -> None:
        self._rest, self._searched = bytearray(), 0

    def __call__(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes."""
        self._rest += chunk
        events, start = [], 0
        for match in _END.finditer(self._rest, self._searched):
            events.append(bytes(self._rest[start : match.end()]))
            start = match.end()
        del self._rest[:start]
        self._searched = max(len(self._rest) - 3, 0)  # a blank line may be cut
        return events

    @property
    def rest(self) -> bytes:
        return bytes(self._rest)


def data_of(event: bytes) -> bytes | None:
    """The data of an event, its lines joined by line feeds; None for an event without data, such as a comment."""
    lines = [line[5:].removeprefix(b" ") for line in _LINE.split(event) if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


async def closable(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The same chunks. Closing this generator also closes `chunks`, if `chunks` has `aclose`."""
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


def event_of(text: str) -> bytes:
    """An event with this data."""
    return "".join(f"data: {line}\n" for line in text.split("\n")).encode() + b"\n"
