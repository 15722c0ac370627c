"""Servers with another API than OpenAI's: a chat becomes a request of the provider, and its answer one of OpenAI's API.

In: a provider of any-llm-sdk (the extra `providers`), its address and key, and the body of a chat. Out: a `Translated`,
with those attributes of an aiohttp response that upstream.py reads. any-llm-sdk calls the client library of the
provider, which must be installed. Retries and fallbacks are those of the gateway.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any, cast

import aiohttp
from pydantic import BaseModel, ValidationError

from prefill_router.errors import InputError
from serve.events import DONE, event_of

try:
    from any_llm import AnyLLM
    from any_llm.exceptions import AnyLLMError, RateLimitError

    INSTALLED = True
except ImportError:
    INSTALLED = False

INSTALL = "pip install 'prefill-router[providers]'"
OTHER_PARAMETERS = (
    "self",
    "model",
    "messages",
    "stream",
    "timeout",
    "session_label",
    "kwargs",
)  # parameters of any-llm-sdk


class Provider:
    """The client of a provider. Raises InputError if any-llm-sdk, the provider, its library or its key is missing."""

    def __init__(self, name: str, base_url: str | None, api_key: str | None) -> None:
        if not INSTALLED:
            raise InputError(f"has the provider {name!r}, which needs any-llm-sdk; {INSTALL}")
        self.name = name
        settings: dict[str, Any] = {"api_key": api_key, "api_base": base_url, "unified_exceptions": True}
        try:
            known = AnyLLM.get_provider_class(name)
            if known.MAX_RETRIES_SUPPORT != "unsupported":
                settings["max_retries"] = 0
            self._client = AnyLLM.create(name, **settings)
        except Exception as error:  # of any type: the library of a provider raises errors of its own
            raise InputError(f"has the provider {name!r}, which cannot be used: {error}") from error
        parameters = inspect.signature(AnyLLM.acompletion).parameters
        self._fields = frozenset(parameters).difference(OTHER_PARAMETERS)

    async def ask(self, body: bytes, timeout_s: float) -> Translated:
        """The answer to a chat; that of a stream when its first chunk has arrived.

        Raises aiohttp.ClientConnectionError if the provider does not answer.
        """
        asked = json.loads(body)
        stream = bool(asked.pop("stream", None))
        model, messages = asked.pop("model"), asked.pop("messages")
        given = {name: value for name, value in asked.items() if value is not None and name != "user"}
        if "max_completion_tokens" in given:  # OpenAI's new name; other providers have the old one
            given.setdefault("max_tokens", given.pop("max_completion_tokens"))
            given.pop("max_completion_tokens", None)
        if unknown := sorted(given.keys() - self._fields):
            return _refused(
                400, f"{unknown[0]}: this field is not translated for {self.name}; leave it out", unknown[0]
            )
        if self._client.TIMEOUT_SUPPORT != "unsupported":
            given["timeout"] = timeout_s
        try:
            answer = await self._client.acompletion(model, messages, stream=stream, **given)
            if not stream:
                return Translated(200, "application/json", _one(cast(BaseModel, answer).model_dump_json().encode()))
            chunks = cast(AsyncGenerator[BaseModel, None], answer)
            first = await anext(chunks, None)
        except ValidationError as error:
            field, message = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
            return _refused(400, f"{field}: {message}", field)
        except AnyLLMError as error:
            return _failed(error)
        return Translated(200, "text/event-stream", _events(first, chunks))


class Translated:
    """An answer in OpenAI's format, with those attributes of an aiohttp response that upstream.py reads."""

    def __init__(
        self,
        status: int,
        content_type: str,
        parts: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.content_type, self._parts = status, content_type, parts
        self.headers = {"content-type": content_type, **(headers or {})}
        self._closing: asyncio.Task[None] | None = None

    @property
    def content(self) -> Translated:
        """What `readany` is called on."""
        return self

    async def readany(self) -> bytes:
        """The next part of the body; empty at its end. Raises aiohttp.ClientPayloadError if the answer breaks."""
        return await anext(self._parts, b"")

    def close(self) -> None:
        """Ends the request to the provider."""
        self._closing = self._closing or asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        with suppress(RuntimeError):  # a part is being read; whoever reads it is cancelled and ends the request
            await self._parts.aclose()


async def _one(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


async def _events(first: BaseModel | None, rest: AsyncGenerator[BaseModel, None]) -> AsyncGenerator[bytes, None]:
    """The chunks as events, with one id and time: any-llm-sdk may give every chunk its own."""
    if first is None:
        return
    common = {"id": getattr(first, "id", ""), "created": int(time.time())}
    try:
        async with aclosing(rest) as chunks:
            yield _event(first, common)
            async for chunk in chunks:
                yield _event(chunk, common)
    except Exception as error:  # noqa: BLE001  the library of a provider raises errors of its own
        raise aiohttp.ClientPayloadError(type(error).__name__) from None
    yield event_of(DONE.decode())


def _event(chunk: BaseModel, common: dict[str, Any]) -> bytes:
    return event_of(json.dumps(chunk.model_dump(mode="json", exclude_unset=True) | common))


def _failed(error: AnyLLMError) -> Translated:
    """The status and message of a refused request. Raises aiohttp.ClientConnectionError if there was no answer."""
    status = error.status_code
    if status is None:
        kinds = [kind.__name__ for kind in type(error.original_exception).__mro__]
        if any("Connect" in kind or "Timeout" in kind or "Transport" in kind for kind in kinds):
            raise aiohttp.ClientConnectionError(type(error).__name__) from None
        status = 400  # the request could not be translated: nothing was sent
    if status < 400:  # an error inside an answer, before its first chunk
        status = 502
    wait = error.retry_after if isinstance(error, RateLimitError) else None
    return _refused(status, error.message, error.param, {} if wait is None else {"Retry-After": wait})


def _refused(status: int, message: str, param: str | None, headers: Mapping[str, str] | None = None) -> Translated:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return Translated(status, "application/json", _one(json.dumps(error).encode()), headers)
