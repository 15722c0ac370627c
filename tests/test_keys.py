"""API keys: which headers have one, the command that makes one, and their limits."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from prefill_router.errors import InputError
from prefill_router.pool import TargetModel
from serve import access, answers
from serve.access import Keys, ask_store
from serve.answers import CLIENT_LEFT, Note, charged_usd
from serve.config import GatewayConfig
from serve.http import EXCEPTION_HANDLERS, ApiError
from serve.keys import ApiKey, digest_of, key_name, make
from serve.limits import DAY_S, Limits, Verdict, spent_today
from serve.schemas import ErrorDetail
from serve.sessions import Sessions, SessionsConfig
from serve.upstream import BrokenAnswer

KEYS = {"first": ApiKey(digest=digest_of("one")), "second": ApiKey(digest=digest_of("zwei-\u00e9"))}
MIDNIGHT = 20_000.0 * DAY_S
MODEL = TargetModel(name="m", input_usd_per_mtok=1.0, output_usd_per_mtok=2.0)


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": "Bearer one"}, "first"),
        ({"authorization": "bearer  zwei-\u00e9 "}, "second"),
        ({"x-api-key": "one"}, "first"),
        ({"authorization": "Basic x", "x-api-key": "one"}, "first"),
        ({"authorization": "Bearer two", "x-api-key": "one"}, None),
        ({"authorization": f"Bearer {digest_of('one')}"}, None),
        ({"authorization": "Bearer"}, None),
        ({"authorization": "one"}, None),
        ({}, None),
    ],
)
def test_a_request_is_known_by_its_key(headers: dict[str, str], name: str | None) -> None:
    assert key_name(KEYS, headers) == name


def test_the_command_makes_a_key_and_its_line_of_the_configuration() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "serve.keys", "team-a"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    match = re.fullmatch(r"key, shown only now: (\S+)\ngateway.keys: +team-a: ([0-9a-f]{64})\n", made)
    assert match is not None
    assert key_name(GatewayConfig(keys={"team-a": match[2]}).keys, {"x-api-key": match[1]}) == "team-a"
    assert make("team-a") != make("team-a")
    with pytest.raises(InputError, match="allowed are letters"):
        make("a b")


def test_a_key_in_place_of_its_digest_is_refused() -> None:
    with pytest.raises(ValidationError, match="String should match pattern"):
        GatewayConfig(keys={"team-a": "pr-secret"})


def test_a_digest_alone_is_a_key_without_limits() -> None:
    config = GatewayConfig(keys={"a": digest_of("one"), "b": {"digest": digest_of("two"), "usd_per_day": 2}})
    assert config.keys["a"] == ApiKey(digest=digest_of("one"), requests_per_minute=None, usd_per_day=None)
    assert (config.keys["b"].requests_per_minute, config.keys["b"].usd_per_day) == (None, 2.0)
    assert GatewayConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    "limits", [{"requests_per_minute": 0}, {"usd_per_day": 0}, {"usd_per_day": float("inf")}, {"usd_per_month": 1}]
)
def test_limits_out_of_bounds_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(limits))):
        ApiKey(digest=digest_of("one"), **limits)


class Clock:
    """Stands in for `time.time`."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(MIDNIGHT + 1000.0)
    monkeypatch.setattr(time, "time", clock)
    return clock


def test_a_rate_allows_its_requests_in_any_minute(clock: Clock) -> None:
    limits = Limits()
    assert limits.admit("a", 2, None) == Verdict(remaining=1)
    clock.now += 40
    assert limits.admit("a", 2, None) == Verdict(remaining=0)
    clock.now += 15
    refused = limits.admit("a", 2, None)
    assert (refused.refused, refused.remaining) == ("rate", 0)
    assert limits.admit("b", 2, None) == Verdict(remaining=1)  # another key
    clock.now += refused.retry_after_s - 2
    assert limits.admit("a", 2, None).refused == "rate"
    clock.now += 2
    assert limits.admit("a", 2, None) == Verdict(remaining=0)  # the request of second 40 still counts
    assert limits.admit("a", 2, None).refused == "rate"


def test_a_budget_ends_at_its_sum_and_begins_anew_at_midnight_utc(clock: Clock) -> None:
    limits = Limits()
    limits.spend("a", 0.75, clock.now)
    assert limits.admit("a", None, 1.0) == Verdict()
    limits.spend("a", 0.25, clock.now)
    refused = limits.admit("a", 5, 1.0)
    assert refused.refused == "budget"
    assert DAY_S - 1000 <= refused.retry_after_s <= DAY_S - 999
    assert limits.admit("a", 5, None) == Verdict(remaining=4)  # the refused request did not count
    assert limits.admit("a", None, 2.0) == limits.admit("b", None, 1.0) == Verdict()
    clock.now += refused.retry_after_s
    assert limits.admit("a", None, 1.0) == Verdict()
    limits.spend("a", 0.5, clock.now)
    assert limits.admit("a", None, 1.0) == Verdict()
    limits.spend("a", 0.5, clock.now)
    assert limits.admit("a", None, 1.0).refused == "budget"


def test_the_spend_of_today_is_read_from_the_decision_log(clock: Clock, tmp_path: Path) -> None:
    def answer(key: str, usd: float, at: float, kind: str = "answer") -> str:
        record = {"decision_id": "d", "kind": kind, "time": at, "cost_usd": 9.0, "key": key, "charged_usd": usd}
        return json.dumps(record) + "\n"

    free = {"decision_id": "d", "kind": "answer", "time": clock.now, "cost_usd": 9.0}
    lines = [answer("a", 0.5, MIDNIGHT - 1), answer("a", 0.25, MIDNIGHT), answer("b", 2.0, clock.now), json.dumps(free)]
    (tmp_path / "decisions-x-000000.jsonl").write_text("".join(lines) + '\n{"charged_usd": 1')
    later = [answer("a", 0.5, clock.now), answer("a", 4.0, clock.now + 1), answer("a", 4.0, clock.now, "decision")]
    (tmp_path / "decisions-y-000000.jsonl").write_text("".join(later))
    assert spent_today(tmp_path, clock.now) == {"a": 0.75, "b": 2.0}
    limits = Limits(spent_today(tmp_path, clock.now))
    assert limits.admit("a", None, 0.75).refused == "budget"
    assert spent_today(tmp_path / "none", clock.now) == {}


def test_files_of_earlier_days_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "decisions-x-000000.jsonl"
    record = {"decision_id": "d", "kind": "answer", "time": time.time(), "key": "a", "charged_usd": 1.0}
    file.write_text(json.dumps(record))
    assert spent_today(tmp_path, record["time"]) == {"a": 1.0}
    os.utime(file, (0, time.time() - DAY_S))
    assert spent_today(tmp_path, record["time"]) == {}


@pytest.mark.parametrize("logged", [True, False])
def test_a_spend_that_waited_for_the_store_counts_once(logged: bool, clock: Clock, tmp_path: Path) -> None:
    ended = clock.now
    record = {"decision_id": "d", "kind": "answer", "time": ended, "key": "a", "charged_usd": 1.0}
    (tmp_path / "decisions-x-000000.jsonl").write_text(json.dumps(record) + "\n")

    async def refused(*spent: float) -> list[str | None]:
        store = Sessions(SessionsConfig(), tmp_path if logged else None)
        verdicts = []
        for at in spent:
            await store.spend("a", 1.0, at)
            verdicts.append((await store.admit("a", None, 2.0)).refused)
        return verdicts

    clock.now += 5  # the store starts, and reads the log if there is one
    assert asyncio.run(refused(ended, clock.now + 1)) == [None, "budget"]
    assert asyncio.run(refused(clock.now + 1)) == ["budget" if logged else None]


@pytest.mark.parametrize(
    ("estimate", "status", "usage", "error", "usd"),
    [
        (0.5, 200, {"prompt_tokens": 10, "completion_tokens": 5}, None, 20e-6),
        (0.5, 200, {"prompt_tokens": 10, "completion_tokens": 5}, CLIENT_LEFT, 20e-6),
        (0.5, 200, {"prompt_tokens": 10, "completion_tokens": 5}, "the connection broke", 20e-6),
        (0.5, 200, None, None, 0.5),
        (0.5, 200, None, CLIENT_LEFT, 0.5),
        (0.5, 200, None, "the connection broke", 0.0),
        (0.5, 400, None, "status 400", 0.0),
        (0.5, 400, None, CLIENT_LEFT, 0.0),
        (0.0, 200, None, None, 0.0),
        (None, 200, None, None, 3e-6 + 14e-6),
        (None, 200, None, CLIENT_LEFT, 3e-6 + 14e-6),
        (None, 200, None, "the connection broke", 0.0),
    ],
)
def test_an_answer_costs_its_tokens_or_an_estimate_and_an_error_nothing(
    estimate: float | None, status: int, usage: Any, error: str | None, usd: float
) -> None:
    found = Note(MODEL, estimate, {})
    assert charged_usd(found, status, usage, error, request_bytes=9, tokens=7) == pytest.approx(usd)


class Relayed:
    """An answer of a server that consists of `chunks`, and breaks after them if `breaks`."""

    def __init__(self, *chunks: bytes, breaks: bool = False, **headers: str) -> None:
        self.status, self.headers, self.upstream = 200, headers, SimpleNamespace(name="m")
        self.output_tokens = 0
        self._chunks, self._breaks = chunks, breaks

    async def chunks(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk
        if self._breaks:
            raise BrokenAnswer("the connection broke")

    def close(self) -> None:
        pass


def charge(given: Any, stream: bool = False, estimate: float | None = 0.5, leaves_after: int | None = None) -> float:
    """The charge of an answer in USD to a request of 8 bytes, whose client leaves after some events of the stream."""
    found, charged = Note(MODEL, estimate, {}), list[float]()

    def finished(usage: Any, error: str | None) -> None:
        charged.append(charged_usd(found, given.status, usage, error, 8, given.output_tokens))

    async def read() -> None:
        if not stream:
            with suppress(BrokenAnswer):
                await answers.whole(given, found, finished)
            return
        async with aclosing(answers.stream(given, found, False, 15, finished)) as events:
            read = 0
            async for _ in events:
                read += 1
                if read == leaves_after:
                    break

    asyncio.run(read())
    (usd,) = charged
    return usd


TEXT = b'{"choices": [{"message": {"content": "four"}}]}'
CHUNK = b'data: {"choices": [{"delta": {"content": "four"}, "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("given", "usd"),
    [
        (Relayed(TEXT), 0.5),
        (Relayed(TEXT[:9], breaks=True), 0.0),
        (Relayed(b"no JSON"), 0.0),
        (Relayed(b'{"choices": []}'), 0.0),
        (Relayed(b'{"error": {"message": "overloaded"}}'), 0.0),
    ],
)
def test_an_answer_that_breaks_or_has_no_choices_costs_nothing(given: Relayed, usd: float) -> None:
    assert charge(given) == usd


@pytest.mark.parametrize("leaves_after", [None, 1])
def test_a_stream_that_begins_with_an_error_costs_nothing(leaves_after: int | None) -> None:
    error = b'data: {"error": {"message": "overloaded"}}\n\n'
    assert charge(Relayed(error), stream=True, leaves_after=leaves_after) == 0.0


def test_an_answer_without_an_estimate_costs_what_was_asked_and_read() -> None:
    read = Relayed(CHUNK, b": a comment\n\n", CHUNK, CHUNK)
    assert charge(read, stream=True, estimate=None, leaves_after=3) == pytest.approx(2e-6 + 2 * 2e-6)
    assert charge(Relayed(TEXT), estimate=None) == pytest.approx(2e-6 + len(TEXT) // 4 * 2e-6)


class Store:
    """The deployment `Sessions` with the method `admit`: `answer` may be an exception, or None for no answer."""

    def __init__(self, answer: Verdict | Exception | None) -> None:
        self.asked: list[tuple[str, int | None, float | None]] = []
        self.admit = SimpleNamespace(remote=self._admit)
        self._answer = answer

    async def _admit(self, key: str, requests_per_minute: int | None, usd_per_day: float | None) -> Verdict:
        self.asked.append((key, requests_per_minute, usd_per_day))
        if self._answer is None:
            await asyncio.sleep(60)
        if isinstance(self._answer, Verdict):
            return self._answer
        raise self._answer or AssertionError


def test_only_requests_with_a_limit_ask_the_store() -> None:
    refused = Verdict("budget", 5)
    store: Any = Store(refused)
    rated = ApiKey(digest=digest_of("one"), requests_per_minute=3)
    spending = ApiKey(digest=digest_of("one"), usd_per_day=2.0)
    both = ApiKey(digest=digest_of("one"), requests_per_minute=3, usd_per_day=2.0)
    chat = "/v1/chat/completions"
    for key, path in ((KEYS["first"], chat), (spending, "/v1/route")):
        assert asyncio.run(ask_store(store, "a", key, path)) == Verdict()
    assert store.asked == []
    for key, path in ((rated, "/v1/route"), (spending, chat), (both, chat), (both, "/v1/route")):
        assert asyncio.run(ask_store(store, "a", key, path)) == refused
    assert store.asked == [("a", 3, None), ("a", None, 2.0), ("a", 3, 2.0), ("a", 3, None)]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        RuntimeError("the store has stopped"),
        DeploymentUnavailableError(DeploymentID("Sessions")),
        BackPressureError(1, 1),
    ],
)
def test_without_the_store_limits_do_not_apply(
    answer: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "STORE_S", 0.01)
    monkeypatch.setattr(access.logger, "propagate", True)
    store: Any = Store(answer)
    key = ApiKey(digest=digest_of("one"), requests_per_minute=3)
    assert asyncio.run(ask_store(store, "team-a", key, "/v1/route")) == Verdict()
    assert "no limits for a request of key team-a" in caplog.text


class Gateway:
    """What the middleware uses of the gateway."""

    def __init__(self, verdict: Verdict) -> None:
        limits = {"requests_per_minute": 3, "usd_per_day": 2.0}
        self.keys = GatewayConfig(keys={"team-a": {"digest": digest_of("one"), **limits}}).keys
        self.verdict, self.asked = verdict, list[tuple[str, str]]()

    async def check_limits(self, key: str, path: str) -> Verdict:
        self.asked.append((key, path))
        return self.verdict


def replies(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, *requests: tuple[str, str], prefix: str = "", key: str = "one"
) -> list[httpx.Response]:
    """The replies of an application behind the middleware to requests, each a method and a path under `prefix`."""

    def reply(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.state.key)

    monkeypatch.setattr(ray_serve, "get_replica_context", lambda: SimpleNamespace(servable_object=gateway))
    app = Starlette(routes=[Route("/{path:path}", reply, methods=["GET", "POST"])])
    app.add_middleware(Keys)

    async def ask() -> list[httpx.Response]:
        headers, transport = {"Authorization": f"Bearer {key}"}, httpx.ASGITransport(app, root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            return [await client.request(method, prefix + path) for method, path in requests]

    return asyncio.run(ask())


def test_limits_apply_to_requests_that_use_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/route"]
    free = [("POST", "/v1/feedback"), ("POST", "/v1/messages/count_tokens"), ("GET", "/v1/models")]
    free += [("GET", "/v1/decisions/d"), ("GET", "/v1/chat/completions")]
    gateway = Gateway(Verdict("rate", 5, 0))
    found = replies(gateway, monkeypatch, *(("POST", path) for path in limited), *free)
    assert gateway.asked == [("team-a", path) for path in limited]
    assert [one.status_code for one in found] == [429] * len(limited) + [200] * len(free)


def test_keys_and_limits_apply_under_a_route_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, paths = Gateway(Verdict("rate", 5, 0)), [("POST", "/v1/chat/completions"), ("POST", "/v1/messages")]
    for key, status in (("one", 429), ("two", 401)):
        chat, message = replies(gateway, monkeypatch, *paths, prefix="/router", key=key)
        assert (chat.status_code, message.status_code) == (status, status)
        assert ("type" in chat.json(), message.json()["type"]) == (False, "error")
    assert gateway.asked == [("team-a", path) for _, path in paths]


def test_errors_under_a_route_prefix_have_the_format_of_their_path() -> None:
    def fails(request: Request) -> PlainTextResponse:
        raise ApiError(400, ErrorDetail(message="m", type="invalid_request_error"))

    routes = [Route(path, fails) for path in ("/v1/messages", "/v1/route")]
    app = Starlette(routes=routes, exception_handlers=EXCEPTION_HANDLERS)
    client = TestClient(app, root_path="/router")
    for status, end in ((400, ""), (404, "/x")):
        message, route = (client.get(f"/router/v1/{path}{end}") for path in ("messages", "route"))
        assert (message.status_code, message.json()["type"]) == (status, "error")
        assert (route.status_code, route.json().keys()) == (status, {"error"})
    assert "POST /v1/messages/count_tokens" in message.json()["error"]["message"]


def test_a_reply_has_the_rest_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    (reply,) = replies(Gateway(Verdict(remaining=2)), monkeypatch, ("POST", "/v1/route"))
    names = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests")
    assert (reply.status_code, reply.text, [reply.headers[name] for name in names]) == (200, "team-a", ["3", "2"])
    (reply,) = replies(Gateway(Verdict()), monkeypatch, ("POST", "/v1/route"))
    assert not set(names) & set(reply.headers)


@pytest.mark.parametrize(
    ("verdict", "kind", "code", "says"),
    [
        (Verdict("rate", 5, 0), "requests", "rate_limited", "requests_per_minute: .*team-a.* 3 requests.* 5 s"),
        (Verdict("budget", 7), "insufficient_quota", "budget_exhausted", "usd_per_day: .*team-a.* 2 USD.* 7 s"),
    ],
)
def test_a_refusal_has_the_format_of_its_path(
    verdict: Verdict, kind: str, code: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, message = replies(Gateway(verdict), monkeypatch, ("POST", "/v1/chat/completions"), ("POST", "/v1/messages"))
    assert (chat.status_code, message.status_code) == (429, 429)
    assert chat.headers["retry-after"] == message.headers["retry-after"] == str(verdict.retry_after_s)
    error = chat.json()["error"]
    assert (error["type"], error["code"]) == (kind, code)
    assert re.match(says, error["message"])
    anthropic = {"type": "error", "error": {"type": "rate_limit_error", "message": error["message"]}}
    assert message.json() == anthropic
