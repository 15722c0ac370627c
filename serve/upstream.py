"""Upstream servers: sends a request to the first server of a list that answers.

In: candidates in order and the body of a request. Out: the status, headers and bytes of an answer, and the failed
attempts before it. The next candidate is tried only before the first byte of an answer: after a broken connection, the
status 408, 409, 429 or 5xx, or a missed deadline. Addresses and keys come from pool.yaml and the environment only.
Knows nothing of Ray and of decisions.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import aiohttp

from prefill_router.pool import Pool
from serve.breaker import Breaker
from serve.config import UpstreamConfig

NEXT_STATUSES = frozenset((408, 409, 429))  # and all from 500
RELAYED_HEADERS = ("content-type", "x-request-id")


@dataclass(frozen=True)
class Upstream:
    """The server of a model: `name` in the pool, `model` on the server, URL of its chat completions."""

    name: str
    model: str
    url: str
    headers: Mapping[str, str] = field(repr=False)  # with the API key


@dataclass(frozen=True)
class Attempt:
    """A failed attempt. `reason`: `connection`, `deadline`, `open` (left alone by its breaker) or `status`."""

    model: str
    reason: str
    status: int | None = None
    retry_after_s: float | None = None


class NoAnswer(Exception):
    """No candidate answered. `attempts` are all attempts, in order."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        super().__init__(", ".join(f"{one.model}: {one.status or one.reason}" for one in attempts))
        self.attempts = tuple(attempts)


@dataclass
class Answer:
    """The answer of an upstream server whose first bytes have arrived. `close` it, also after an error."""

    upstream: Upstream
    status: int
    headers: Mapping[str, str]
    attempts: tuple[Attempt, ...]
    _response: aiohttp.ClientResponse = field(repr=False)
    _first: bytes = field(repr=False)
    _idle_s: float = field(repr=False)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes of the body as they arrive. Raises BrokenAnswer if the answer ends early or stalls."""
        chunk = self._first
        try:
            while chunk:
                yield chunk
                async with asyncio.timeout(self._idle_s):
                    chunk = await self._response.content.readany()
        except TimeoutError:
            raise BrokenAnswer(f"no data from {self.upstream.name} for {self._idle_s:g} s") from None
        except aiohttp.ClientError as error:
            raise BrokenAnswer(f"the connection to {self.upstream.name} broke ({type(error).__name__})") from None

    def close(self) -> None:
        """Ends the request. A server that still generates notices the closed connection."""
        self._response.close()


class BrokenAnswer(Exception):
    """An answer that broke after its first byte."""


class Upstreams:
    """The upstream servers of one gateway, with their circuit breakers. For one event loop."""

    def __init__(self, config: UpstreamConfig) -> None:
        self._config = config
        self._breakers: dict[str, Breaker] = {}
        self._client: aiohttp.ClientSession | None = None

    async def ask(self, candidates: Sequence[Upstream], body_for: Callable[[Upstream], bytes], stream: bool) -> Answer:
        """The first answer of the candidates, whatever its status, if that does not call for the next candidate.

        If every candidate is left alone by its breaker, waits for the first of them, at most `max_wait_s` seconds.
        Raises NoAnswer if no candidate answers.
        """
        attempts: list[Attempt] = []
        waits = {one.url: self._breaker(one).wait(time.monotonic()) for one in candidates}
        soonest = min(waits.values())
        if 0 < soonest <= self._config.max_wait_s:
            await asyncio.sleep(soonest)
        for upstream in candidates:
            wait = self._breaker(upstream).wait(time.monotonic())
            if wait > 0:
                attempts.append(Attempt(upstream.name, "open", retry_after_s=wait))
                continue
            found = await self._try(upstream, body_for(upstream), stream, tuple(attempts))
            if isinstance(found, Answer):
                return found
            attempts.append(found)
        raise NoAnswer(attempts)

    def health(self, upstreams: Sequence[Upstream]) -> dict[str, float]:
        """Seconds until each model's server may be asked again; 0: now."""
        return {one.name: self._breaker(one).wait(time.monotonic()) for one in upstreams}

    async def close(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            await self._client.close()

    async def _try(
        self, upstream: Upstream, body: bytes, stream: bool, attempts: tuple[Attempt, ...]
    ) -> Answer | Attempt:
        breaker, response = self._breaker(upstream), None
        deadline = self._config.first_byte_s if stream else self._config.answer_s
        breaker.sent()
        try:
            async with asyncio.timeout(deadline):
                response = await self._session().post(
                    upstream.url, data=body, headers=upstream.headers, allow_redirects=False
                )
                status = response.status
                if status in NEXT_STATUSES or status >= 500:
                    retry_after = _retry_after(response.headers.get("Retry-After"))
                    breaker.failed(time.monotonic(), retry_after)
                    response.close()
                    return Attempt(upstream.name, "status", status, retry_after)
                first = await response.content.readany()
        except TimeoutError:
            failure = Attempt(upstream.name, "deadline")
        except aiohttp.ClientError:
            failure = Attempt(upstream.name, "connection")
        except asyncio.CancelledError:
            breaker.abandoned()
            if response is not None:
                response.close()
            raise
        else:
            if first:
                breaker.succeeded(time.monotonic())
                headers = {name: response.headers[name] for name in RELAYED_HEADERS if name in response.headers}
                return Answer(upstream, status, headers, attempts, response, first, self._config.idle_s)
            failure = Attempt(upstream.name, "connection", status)  # an answer without a body
        breaker.failed(time.monotonic())
        if response is not None:
            response.close()
        return failure

    def _breaker(self, upstream: Upstream) -> Breaker:
        return self._breakers.setdefault(upstream.url, Breaker(self._config.breaker))

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # the gateway's queue limits the requests
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._config.connect_s),
                auto_decompress=False,
            )
        return self._client


def upstreams_of(pool: Pool, environment: Mapping[str, str]) -> tuple[dict[str, Upstream], dict[str, str]]:
    """The upstream server of each model, and the reason for each model that has none."""
    found: dict[str, Upstream] = {}
    missing: dict[str, str] = {}
    for model in pool.models:
        endpoint = model.endpoint
        if endpoint is None:
            missing[model.name] = "has no endpoint in pool.yaml"
            continue
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if endpoint.api_key_env is not None:
            key = environment.get(endpoint.api_key_env, "")
            if not key:
                missing[model.name] = f"needs the environment variable {endpoint.api_key_env}, which is not set"
                continue
            headers["Authorization"] = f"Bearer {key}"
        url = f"{endpoint.base_url.rstrip('/')}/chat/completions"
        found[model.name] = Upstream(model.name, endpoint.model or model.name, url, headers)
    return found, missing


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date; None without a valid one."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0) if float(value) < float("inf") else None
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max((date - datetime.now(UTC)).total_seconds(), 0.0)
