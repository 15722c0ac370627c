"""Upstream servers: sends a request to the first model of a list whose server answers.

In: candidates in order and the body of a request. Out: the status, headers and bytes of an answer, and the failed
attempts before it. The next candidate is tried only before the first byte of an answer: after a broken connection, a
status of NEXT_STATUSES or from 500, or a missed deadline. Addresses and keys come from pool.yaml and the environment
only. Knows nothing of Ray and of decisions.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import aiohttp

from prefill_router.errors import InputError
from prefill_router.pool import Endpoint, Pool
from serve.breaker import Breaker, State
from serve.config import UpstreamConfig
from serve.providers import Provider, Translated

# And every status from 500. 401 and 403 concern the gateway's key, 404 its endpoint: the request is not at fault. No
# such body is passed on; those of 401 and 403 may quote the key.
NEXT_STATUSES = frozenset((401, 403, 404, 408, 409, 429))
RELAYED_HEADERS = ("content-type", "content-encoding", "retry-after", "x-request-id")
EVENT_STREAM = "text/event-stream"
MAX_COMMENTS = 65_536  # bytes of comments before the first event of a stream


Server = tuple[str, str, str]


@dataclass(frozen=True)
class Upstream:
    """The server of a model: `name` in the pool, `model` on the server, URL of its chat completions.

    With a `provider`, this client asks the server, and `url` is the provider's name and address.
    """

    name: str
    model: str
    url: str
    headers: Mapping[str, str] = field(repr=False)  # with the API key
    provider: Provider | None = field(default=None, repr=False, compare=False)
    effort: str | None = None  # reasoning effort of requests that give none

    @property
    def server(self) -> Server:
        """What has a circuit breaker of its own: a model on a server."""
        return self.name, self.model, self.url


@dataclass(frozen=True)
class Attempt:
    """A failed attempt. `reason`: `connection`, `deadline`, `open` (left alone, see breaker.py) or `status`."""

    model: str
    reason: str
    status: int | None = None
    retry_after_s: float | None = None


class NoAnswer(Exception):
    """No candidate answered. `attempts` are all attempts, in order."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        super().__init__(", ".join(f"{one.model}: {one.status or one.reason}" for one in attempts))
        self.attempts = tuple(attempts)


class BrokenAnswer(Exception):
    """An answer that broke after its first byte."""


@dataclass
class Answer:
    """The answer of a server whose first bytes have arrived. `close` it, also after an error."""

    upstream: Upstream
    status: int
    headers: Mapping[str, str]
    attempts: tuple[Attempt, ...]
    _response: aiohttp.ClientResponse | Translated = field(repr=False)
    _first: bytes = field(repr=False)
    _idle_s: float = field(repr=False)
    _ends_at: float = field(repr=False)  # monotonic time
    output_tokens: int = 0  # estimated tokens of what has been read

    @property
    def is_stream(self) -> bool:
        """Whether the answer consists of server-sent events."""
        return self.status == 200 and self.headers.get("content-type", "").startswith(EVENT_STREAM)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes of the body as they arrive. Raises BrokenAnswer if it ends early, stalls or takes too long."""
        chunk, name = self._first, self.upstream.name
        try:
            while chunk:
                yield chunk
                async with asyncio.timeout(min(self._idle_s, max(self._ends_at - time.monotonic(), 0))):
                    chunk = await self._response.content.readany()
        except TimeoutError:
            raise BrokenAnswer(f"the answer of {name} stalled or took too long") from None
        except aiohttp.ClientError as error:
            raise BrokenAnswer(f"the connection to {name} broke ({type(error).__name__})") from None

    def close(self) -> None:
        """Ends the request. A server that still generates notices the closed connection."""
        self._response.close()


class Upstreams:
    """The servers of one gateway, with a circuit breaker for each model. For one event loop."""

    def __init__(self, config: UpstreamConfig) -> None:
        self._config = config
        self._breakers: dict[Server, Breaker] = {}
        self._client: aiohttp.ClientSession | None = None
        self._changed = asyncio.Event()  # set and replaced when a request has ended

    async def ask(
        self, candidates: Sequence[Upstream], body_for: Callable[[Upstream], bytes], stream: bool, most: int
    ) -> Answer:
        """The first answer of the candidates, whatever its status, if that does not call for the next candidate.

        At most `most` candidates are asked, each once. If the others are left alone by their breakers, waits for the
        first of them, at most `max_wait_s` seconds in all. Raises NoAnswer if no candidate answers.
        """
        attempts: list[Attempt] = []
        left, deadline = list(candidates), time.monotonic() + self._config.max_wait_s
        while left and most > 0:
            waits = [self._breaker(one).wait(time.monotonic()) for one in left]
            if 0.0 in waits:
                upstream = left.pop(waits.index(0.0))
                found = await self._try(upstream, body_for(upstream), stream, tuple(attempts))
                if isinstance(found, Answer):
                    return found
                attempts.append(found)
                most -= 1
                continue
            remaining = deadline - time.monotonic()
            if remaining <= 0 or (remaining < min(waits) < math.inf):
                attempts += [
                    Attempt(one.name, "open", retry_after_s=None if math.isinf(wait) else wait)
                    for one, wait in zip(left, waits, strict=True)
                ]
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(remaining, *waits))
        raise NoAnswer(attempts)

    def state(self, upstream: Upstream) -> tuple[State, float]:
        """The state of the server's breaker, and the seconds until a request may be sent (`Breaker.wait`)."""
        breaker = self._breakers.get(upstream.server)
        return ("closed", 0.0) if breaker is None else (breaker.state, breaker.wait(time.monotonic()))

    def left_alone(self) -> frozenset[Server]:
        """The servers that may not be asked now."""
        now = time.monotonic()
        return frozenset(server for server, breaker in self._breakers.items() if breaker.wait(now) > 0)

    async def close(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            await self._client.close()

    async def _try(
        self, upstream: Upstream, body: bytes, stream: bool, attempts: tuple[Attempt, ...]
    ) -> Answer | Attempt:
        breaker = self._breaker(upstream)
        test = breaker.sent()
        found: Answer | Attempt | None = None
        try:
            found = await self._request(upstream, body, stream, attempts)
            return found
        finally:
            if isinstance(found, Answer):
                breaker.succeeded(time.monotonic(), test)
            elif found is not None:
                breaker.failed(time.monotonic(), test, found.retry_after_s)
            else:  # cancelled, or an error of ours
                breaker.abandoned(test)
            self._changed.set()
            self._changed = asyncio.Event()

    async def _request(
        self, upstream: Upstream, body: bytes, stream: bool, attempts: tuple[Attempt, ...]
    ) -> Answer | Attempt:
        response: aiohttp.ClientResponse | Translated | None = None
        kept = False
        limit_s = self._config.first_byte_s if stream else self._config.answer_s
        started = time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                if upstream.provider is not None:
                    response = await upstream.provider.ask(body, self._config.answer_s)
                else:
                    response = await self._session().post(
                        upstream.url, data=body, headers=upstream.headers, allow_redirects=False
                    )
                status = response.status
                if status in NEXT_STATUSES or status >= 500:
                    return Attempt(upstream.name, "status", status, _retry_after(response.headers.get("Retry-After")))
                first = await response.content.readany()
                if status == 200 and response.content_type == EVENT_STREAM:
                    # a comment is no answer
                    while first and b"data:" not in first and len(first) < MAX_COMMENTS:
                        first = first + more if (more := await response.content.readany()) else b""
            if status == 200 and not first:  # ended without an answer
                return Attempt(upstream.name, "connection", status)
            kept = True
            ends_at = math.inf if stream else started + limit_s
            return Answer(
                upstream, status, _relayed(response.headers), attempts, response, first, self._config.idle_s, ends_at
            )
        except aiohttp.ConnectionTimeoutError:
            return Attempt(upstream.name, "connection")
        except TimeoutError:
            return Attempt(upstream.name, "deadline")
        except aiohttp.ClientError:
            return Attempt(upstream.name, "connection")
        finally:
            if response is not None and not kept:
                response.close()

    def _breaker(self, upstream: Upstream) -> Breaker:
        return self._breakers.setdefault(upstream.server, Breaker(self._config.breaker))

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # the gateway's queue limits the requests
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, connect=self._config.connect_s),
                auto_decompress=False,
            )
        return self._client


def upstreams_of(
    pool: Pool, environment: Mapping[str, str], endpoints: Mapping[str, Endpoint]
) -> tuple[dict[str, Upstream], dict[str, str]]:
    """The server of each model, and the reason for each model that has none.

    `endpoints` replaces endpoints of the pool by model.
    """
    found: dict[str, Upstream] = {}
    missing: dict[str, str] = {}
    for model in pool.models:
        endpoint = endpoints.get(model.name, model.endpoint)
        if endpoint is None:
            missing[model.name] = "has no endpoint in gateway.endpoints or pool.yaml"
            continue
        headers, key = {"Content-Type": "application/json", "Accept-Encoding": "identity"}, None
        if (variable := endpoint.api_key_env) is not None:
            key = environment.get(variable, "").strip()
            if not key or not key.isascii() or not key.isprintable():
                state = "is not set" if not key else "has characters that no header can have"
                missing[model.name] = f"needs the environment variable {variable}, which {state}"
                continue
            headers["Authorization"] = f"Bearer {key}"
        effort = endpoint.reasoning_effort
        name, base_url = endpoint.model or model.name, (endpoint.base_url or "").rstrip("/")
        if endpoint.provider is None:
            found[model.name] = Upstream(model.name, name, f"{base_url}/chat/completions", headers, effort=effort)
            continue
        try:
            provider = Provider(endpoint.provider, base_url or None, key)
        except InputError as error:
            missing[model.name] = str(error)
        else:
            found[model.name] = Upstream(model.name, name, f"{endpoint.provider} {base_url}", {}, provider, effort)
    return found, missing


def _relayed(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of an answer that the client gets."""
    found = {name: headers[name] for name in RELAYED_HEADERS if name in headers}
    return {name: value for name, value in found.items() if value.isascii() and value.isprintable()}


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date; None without a valid one."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0) if float(value) < math.inf else None
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max((date - datetime.now(UTC)).total_seconds(), 0.0)
