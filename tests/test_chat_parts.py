"""Chat completions without Ray: edits of bodies, events, the circuit breaker, upstream servers, and answers."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.datastructures import Headers
from stub_upstream import USAGE, Stub, stub_upstream

from prefill_router.errors import InputError
from prefill_router.pool import Endpoint, Pool, SelfHostedCost, TargetModel
from serve import answers
from serve.answers import KEEP_ALIVE, Note, cost_details
from serve.bodies import REMOVED, edited, value_of
from serve.breaker import Breaker, BreakerConfig
from serve.chat import read_chat, upstream_body
from serve.config import UpstreamConfig
from serve.events import EventSplitter, data_of
from serve.upstream import BrokenAnswer, NoAnswer, Upstream, Upstreams, upstreams_of

FAST = UpstreamConfig(connect_s=10, first_byte_s=2, answer_s=2, idle_s=2, max_wait_s=0.5)
MODEL = TargetModel(name="a", input_usd_per_mtok=1.0, output_usd_per_mtok=10.0)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_upstream() as running:
        yield running


@pytest.fixture
def other() -> Iterator[Stub]:
    with stub_upstream() as running:
        yield running


def ignored(usage: Any, error: str | None) -> None:
    """Takes the end of an answer."""


def servers(*stubs: Stub) -> list[Upstream]:
    return [
        Upstream(name, f"{name}-large", f"{stub.url}/chat/completions", {"Content-Type": "application/json"})
        for name, stub in zip("abc", stubs, strict=False)
    ]


def body_of(stream: bool = False, **fields: Any) -> bytes:
    return json.dumps(
        {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields}
    ).encode()


async def ask(upstreams: Upstreams, order: list[Upstream], stream: bool = False, most: int = 3, **fields: Any) -> Any:
    body = body_of(stream, **fields)
    request = read_chat(body)
    return await upstreams.ask(order, lambda one: upstream_body(body.decode(), one.model, request), stream, most)


# Bodies


@given(st.dictionaries(st.text(), VALUES, max_size=5), st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3))
def test_an_edited_object_has_the_changes_and_all_other_fields(value: dict[str, Any], changes: dict[str, Any]) -> None:
    text = json.dumps(value, indent=1)
    assert json.loads(edited(text, changes)) == value | changes
    removed = json.loads(edited(text, dict.fromkeys(changes, REMOVED)))
    assert removed == {name: field for name, field in value.items() if name not in changes}
    assert edited(text, {}) == text


def test_other_characters_of_an_edited_object_stay() -> None:
    text = ' {"n" : 1.50, "s":"\\u00e9\\/", "model": "auto" , "big":12345678901234567890123, "n":2}\n'
    assert edited(text, {"model": "x", "router": {"é": 1}, "big": REMOVED}) == (
        ' {"n" : 1.50, "s":"\\u00e9\\/", "model": "x" , "n":2,"router":{"\\u00e9": 1}}\n'
    )
    assert value_of(text, "n") == 2
    assert value_of(text, "none") is None
    assert edited("{ }", {}) == "{ }"
    assert edited("{ }", {"a": 1}) == '{"a":1}'
    assert edited('{"a":1}', {"a": REMOVED}) == "{}"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a"}', '{"a":1,}', '{"a":1} x', "{1:2}", '{"a":1 "b":2}', "{a:1}"])
def test_text_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="line 1"):
        edited(text, {"a": 1})


# Events


@given(st.lists(st.integers(1, 7), max_size=60), st.sampled_from(["\n", "\r\n"]))
def test_events_do_not_depend_on_the_boundaries_of_chunks(cuts: list[int], line: str) -> None:
    events = [f"data: {{}}{line}{line}", f": comment{line}{line}", f"event: x{line}data:a{line}data: b{line}{line}"]
    stream, split, found = "".join(events).encode(), EventSplitter(), list[bytes]()
    for size in [*cuts, len(stream)]:
        found += split(stream[:size])
        stream = stream[size:]
    assert [event.decode() for event in found] == events
    assert [data_of(event) for event in found] == [b"{}", None, b"a\nb"]
    assert split(b"data: cut") == []
    assert split.rest == b"data: cut"


# The breaker


def test_a_breaker_opens_after_failures_and_lets_one_test_request_through() -> None:
    breaker = Breaker(BreakerConfig(failures=3, failure_share=0.5, open_s=10, window_s=30))
    assert breaker.sent() is False
    for _ in range(2):
        breaker.failed(0.0, test=False)
    assert breaker.wait(0.0) == 0
    breaker.failed(1.0, test=False)
    assert breaker.wait(1.0) == 10
    assert breaker.wait(11.0) == 0
    assert breaker.sent() is True
    assert breaker.wait(11.0) == math.inf  # until the test request has ended
    breaker.failed(12.0, test=True)
    assert breaker.wait(12.0) == 10
    assert breaker.sent() is True
    breaker.succeeded(23.0, test=True)
    assert breaker.wait(23.0) == 0
    breaker.failed(24.0, test=False)
    assert breaker.wait(24.0) == 0  # earlier failures do not count after a success


def test_requests_from_before_do_not_end_the_test_request() -> None:
    breaker = Breaker(BreakerConfig(failures=1, open_s=10))
    old = [breaker.sent() for _ in range(3)]
    breaker.failed(0.0, old.pop())
    assert breaker.sent() is True
    breaker.succeeded(11.0, old.pop())
    breaker.abandoned(old.pop())
    assert breaker.wait(11.0) == math.inf
    breaker.abandoned(test=True)  # the client of the test request left
    assert breaker.wait(11.0) == 0
    assert breaker.sent() is True


def test_a_breaker_forgets_old_failures_and_follows_retry_after_up_to_the_maximum() -> None:
    breaker = Breaker(BreakerConfig(failures=2, window_s=30, open_s=10, max_retry_after_s=60))
    breaker.failed(0.0, test=False)
    breaker.failed(31.0, test=False, retry_after_s=7)
    assert breaker.wait(31.0) == 7
    assert breaker.sent() is False  # several requests may follow a Retry-After
    breaker.failed(40.0, test=False, retry_after_s=0)
    assert breaker.wait(40.0) == 10
    breaker.failed(100.0, test=False, retry_after_s=1e9)
    assert breaker.wait(100.0) == 60


# Requests


def test_options_come_from_the_model_name_the_body_and_the_headers() -> None:
    request = read_chat(body_of(model="auto:0.35", router={"fallbacks": 1}))
    options = request.options({"X-Router-Models": "a, b", "x-router-debug": "1", "accept": "x"})
    assert (options.lam, options.models, options.explain, options.fallbacks) == (0.35, ["a", "b"], True, 1)
    assert request.asked is None
    assert read_chat(body_of(model="automatic")).asked == "automatic"


@pytest.mark.parametrize(
    ("model", "router", "headers", "reason"),
    [
        ("auto:2", {}, {}, "model: got '2', allowed is a lambda"),
        ("auto:", {}, {}, "model: got ''"),
        ("auto:nan", {}, {}, "model: got 'nan'"),
        ("auto", {}, {"x-router-lambda": "x"}, "x-router-lambda: got 'x'"),
        ("auto", {}, {"x-router-debug": "yes"}, "x-router-debug: got 'yes', allowed are 0 and 1"),
        ("auto", {}, {"x-router-mode": "1"}, "headers: x-router-mode is unknown; known are x-router-lambda"),
        ("auto:0.3", {"lambda": 0.4}, {}, "model: got lambda 0.3, but another part of the request has 0.4"),
        ("cheap", {"lambda": 0.4}, {}, "lambda: got an option of the decision with model 'cheap'"),
        ("cheap", {}, {"x-router-off": "1"}, "off: got an option of the decision with model 'cheap'"),
        ("auto:0.3", {"off": True}, {}, "off: got it with lambda"),
    ],
)
def test_unknown_options_and_contradictions_are_refused(
    model: str, router: dict[str, Any], headers: dict[str, str], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        read_chat(body_of(model=model, router=router)).options(headers)


def test_a_header_that_is_sent_twice_with_different_values_is_refused() -> None:
    headers = Headers(raw=[(b"x-router-lambda", b"0.1"), (b"x-router-lambda", b"0.9")])
    with pytest.raises(InputError, match=r"x-router-lambda: got '0\.9' and another value"):
        read_chat(body_of()).options(headers)


def test_options_that_are_switched_off_are_no_options() -> None:
    read_chat(body_of(model="cheap", router={"lambda": None, "explain": False})).options({"x-router-off": "0"})


@pytest.mark.parametrize("field", [{"router": {"lamda": 1}}, {"messages": []}, {"stream": "yes"}, {"model": ""}])
def test_invalid_fields_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read_chat(body_of(**field))


def test_a_body_for_the_server_differs_in_the_model_and_in_nothing_that_was_sent() -> None:
    text = (
        '{"model":"auto","messages":[{"role":"user","content":"\\u00e9"}],"seed": 1.0,'
        '"router":{"lambda":0.5},"x":[1, 2]}'
    )
    sent = upstream_body(text, "gpt", read_chat(text.encode()))
    assert sent.decode() == text.replace('"auto"', '"gpt"').replace('"router":{"lambda":0.5},', "")
    streaming = text.replace('"seed"', '"stream":true,"stream_options":{"x":1},"seed"')
    sent = upstream_body(streaming, "gpt", read_chat(streaming.encode()))
    assert json.loads(sent)["stream_options"] == {"x": 1, "include_usage": True}


def test_the_effort_of_an_endpoint_is_asked_for_unless_the_request_has_one() -> None:
    pool = Pool(
        models=(
            TargetModel(
                name="o@low",
                input_usd_per_mtok=1.0,
                output_usd_per_mtok=1.0,
                endpoint=Endpoint(base_url="http://x/v1", model="o", reasoning_effort="low"),
            ),
        )
    )
    (one,) = upstreams_of(pool, {}, {})[0].values()
    for fields, effort in (({}, "low"), ({"reasoning_effort": "high"}, "high")):
        text = body_of(**fields).decode()
        sent = json.loads(upstream_body(text, one.model, read_chat(text.encode()), one.effort))
        assert (sent["model"], sent["reasoning_effort"]) == ("o", effort)


# Upstream servers


def test_a_server_has_its_name_address_and_key_from_the_pool_and_the_environment() -> None:
    def model(name: str, **endpoint: Any) -> TargetModel:
        own = Endpoint(**endpoint) if endpoint else None
        return TargetModel(name=name, input_usd_per_mtok=1, output_usd_per_mtok=1, endpoint=own)

    pool = Pool(
        models=(
            model("a", base_url="http://x/v1/", model="big", api_key_env="KEY"),
            model("b", base_url="http://x/v1", api_key_env="OTHER"),
            model("c"),
            model("d", base_url="http://x/v1", api_key_env="ODD"),
        )
    )
    found, missing = upstreams_of(pool, {"KEY": "secret\n", "ODD": "a\nb"}, {})
    assert (found["a"].url, found["a"].model) == ("http://x/v1/chat/completions", "big")
    assert found["a"].headers["Authorization"] == "Bearer secret"
    assert "secret" not in repr(found)
    assert missing == {
        "b": "needs the environment variable OTHER, which is not set",
        "c": "has no endpoint in gateway.endpoints or pool.yaml",
        "d": "needs the environment variable ODD, which has characters that no header can have",
    }
    moved = {"a": Endpoint(base_url="http://y/v1"), "c": Endpoint(base_url="http://z", model="small")}
    found, missing = upstreams_of(pool, {}, moved)
    assert {name: (one.url, one.model, "Authorization" in one.headers) for name, one in found.items()} == {
        "a": ("http://y/v1/chat/completions", "a", False),
        "c": ("http://z/chat/completions", "small", False),
    }
    assert set(missing) == {"b", "d"}


@pytest.mark.parametrize(
    ("step", "reason", "status"),
    [
        ("401", "status", 401),
        ("404", "status", 404),
        ("408", "status", 408),
        ("409", "status", 409),
        ("429", "status", 429),
        ("500", "status", 500),
        ("503", "status", 503),
        ("reset", "connection", None),
        ("empty", "connection", 200),
        ("hang", "deadline", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_next_model_answers_if_the_first_one_fails(
    stub: Stub, other: Stub, step: str, reason: str, status: int | None, stream: bool
) -> None:
    stub.script = [step]

    async def run() -> tuple[Any, bytes]:
        answer = await ask(Upstreams(FAST), servers(stub, other), stream)
        return answer, b"".join([chunk async for chunk in answer.chunks()])

    answer, body = asyncio.run(run())
    assert (answer.upstream.name, answer.status) == ("b", 200)
    assert [(one.model, one.reason, one.status) for one in answer.attempts] == [("a", reason, status)]
    assert b"one" in body if stream else json.loads(body)["model"] == "b-large-2026"
    assert json.loads(other.seen[0][0])["model"] == "b-large"


def test_the_resolution_of_a_name_counts_as_connecting(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(aiohttp.resolver.DefaultResolver, "resolve", hang)
    named = Upstream("a", "a", "http://name.invalid/v1/chat/completions", {})
    config = FAST.model_copy(update={"connect_s": 0.1, "answer_s": 30})
    answer = asyncio.run(ask(Upstreams(config), [named, *servers(stub)[:1]]))
    assert [(one.model, one.reason) for one in answer.attempts] == [("a", "connection")]


def test_an_error_of_the_request_is_the_answer(stub: Stub, other: Stub) -> None:
    stub.script = ["400"]

    async def run() -> tuple[Any, bytes]:
        answer = await ask(Upstreams(FAST), servers(stub, other))
        return answer, await answers.whole(answer, Note(MODEL, None, {}), ignored)

    answer, body = asyncio.run(run())
    assert (answer.status, body) == (400, b'{"error": {"message": "status 400"}}')
    assert not other.seen


def test_no_server_is_asked_before_its_retry_after(stub: Stub, other: Stub) -> None:
    stub.script, other.script = ["429:30"], ["429:0.2", "ok"]

    async def run() -> Any:
        upstreams = Upstreams(FAST)
        with pytest.raises(NoAnswer, match="a: 429, b: 429"):
            await ask(upstreams, servers(stub, other))
        return await ask(upstreams, servers(stub, other))  # waits for b

    answer = asyncio.run(run())
    assert answer.upstream.name == "b"
    assert len(stub.seen) == 1


def test_models_of_one_server_have_breakers_of_their_own(stub: Stub) -> None:
    stub.script = ["429:30", "ok"]
    answer = asyncio.run(ask(Upstreams(FAST), servers(stub, stub)))
    assert (answer.upstream.name, len(stub.seen)) == ("b", 2)


def test_requests_that_wait_for_a_server_are_all_answered(stub: Stub) -> None:
    stub.script = ["500", "ok"]
    config = FAST.model_copy(update={"max_wait_s": 5.0, "breaker": BreakerConfig(failures=1, open_s=0.2)})

    async def run() -> list[Any]:
        upstreams = Upstreams(config)
        with pytest.raises(NoAnswer, match="a: 500"):
            await ask(upstreams, servers(stub))
        return await asyncio.gather(*(ask(upstreams, servers(stub)) for _ in range(5)))

    assert [answer.status for answer in asyncio.run(run())] == [200] * 5


def test_models_that_are_left_alone_do_not_count_as_asked(stub: Stub, other: Stub) -> None:
    stub.script = ["429:30"]

    async def run() -> tuple[Any, Any]:
        upstreams = Upstreams(FAST)
        first = await ask(upstreams, servers(stub, other), most=2)
        return first, await ask(upstreams, servers(stub, other), most=1)

    assert [answer.upstream.name for answer in asyncio.run(run())] == ["b", "b"]
    stub.script = ["500"]
    with pytest.raises(NoAnswer, match=r"^a: 500$"):
        asyncio.run(ask(Upstreams(FAST), servers(stub, other), most=1))


def test_a_client_that_leaves_ends_the_request_to_the_server(stub: Stub) -> None:
    stub.script = ["hang"]

    async def run() -> None:
        asking = asyncio.ensure_future(ask(Upstreams(UpstreamConfig()), servers(stub)))
        while not stub.seen:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        for _ in range(100):
            if stub.left:
                return
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert stub.left == ["hang"]


# Answers


def test_a_body_has_the_model_the_cost_and_the_decision_and_keeps_the_rest(stub: Stub) -> None:
    async def run() -> bytes:
        return await answers.whole(
            await ask(Upstreams(FAST), servers(stub)), Note(MODEL, 1.0, {"reason": "score"}), ignored
        )

    text = asyncio.run(run()).decode()
    assert '"x": 1.50' in text
    assert "Gr\\u00fc\\u00dfe" in text
    body = json.loads(text)
    assert body["model"] == "a"
    assert body["router"] == {"reason": "score", "cost_usd": pytest.approx(4e-5)}
    assert body["usage"] == USAGE | {
        "cost": pytest.approx(4e-5),
        "cost_details": {"input_usd": pytest.approx(1e-5), "output_usd": pytest.approx(3e-5)},
    }


def test_the_cost_of_a_self_hosted_model_is_that_of_its_time() -> None:
    own = SelfHostedCost(gpu_usd_per_hour=3600, ttft_s_per_1k_tokens=0.5, itl_s=0.01)
    assert cost_details(TargetModel(name="a", self_hosted=own), USAGE) == {
        "input_usd": pytest.approx(0.005),
        "output_usd": pytest.approx(0.03),
    }
    assert cost_details(MODEL, {"prompt_tokens": 1}) is None


def cached(tokens: Any) -> dict[str, Any]:
    return USAGE | {"prompt_tokens_details": {"cached_tokens": tokens}}


def test_cached_input_has_its_own_price_and_entry() -> None:
    model = MODEL.model_copy(update={"cached_input_usd_per_mtok": 0.25})
    usage = Note(model, 1.0, {}).changes(cached(8))["usage"]
    details = usage["cost_details"]
    assert details == {
        "input_usd": pytest.approx(2e-6),
        "cached_input_usd": pytest.approx(2e-6),
        "output_usd": pytest.approx(3e-5),
    }
    assert usage["cost"] == pytest.approx(3.4e-5)
    assert cost_details(model, cached(10)) == details | {"input_usd": 0, "cached_input_usd": pytest.approx(2.5e-6)}


@pytest.mark.parametrize("tokens", [0, None, -1, 11, 1.5, True, "8"])
def test_cached_tokens_that_are_no_part_of_the_input_cost_as_input(tokens: Any) -> None:
    model = MODEL.model_copy(update={"cached_input_usd_per_mtok": 0.25})
    assert cost_details(model, cached(tokens)) == cost_details(MODEL, USAGE)
    assert cost_details(model, USAGE | {"prompt_tokens_details": tokens}) == cost_details(MODEL, USAGE)


def test_cached_input_without_a_price_of_its_own_costs_as_input() -> None:
    own = SelfHostedCost(gpu_usd_per_hour=3600, ttft_s_per_1k_tokens=0.5, itl_s=0.01)
    hosted = TargetModel(name="a", self_hosted=own, cached_input_usd_per_mtok=0.25)
    for model in (MODEL, hosted):
        assert cost_details(model, cached(8)) == cost_details(model, USAGE)


async def events_of(
    stub: Stub, wants_usage: bool = False, keep_alive_s: float = 15, finished: Any = ignored, **fields: Any
) -> list[bytes]:
    usage = {"stream_options": {"include_usage": True}} if wants_usage else {}
    answer = await ask(Upstreams(FAST), servers(stub), stream=True, **usage, **fields)
    note = Note(MODEL, 1.0, {"reason": "score"})
    return [event async for event in answers.stream(answer, note, wants_usage, keep_alive_s, finished)]


def chunks_of(events: list[bytes]) -> list[dict[str, Any]]:
    assert data_of(events[-1]) == b"[DONE]"
    return [json.loads(data_of(event) or b"") for event in events[:-1]]


def test_the_first_and_the_last_chunk_of_a_stream_have_the_decision(stub: Stub) -> None:
    chunks = chunks_of(asyncio.run(events_of(stub)))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["one", "two", "three", None]
    assert ["router" in chunk for chunk in chunks] == [True, False, False, True]
    assert chunks[0]["model"] == chunks[-1]["model"] == "a"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert chunks[-1]["usage"]["cost"] == chunks[-1]["router"]["cost_usd"] == pytest.approx(4e-5)


def test_a_client_that_asks_for_the_usage_gets_its_chunk(stub: Stub) -> None:
    chunks = chunks_of(asyncio.run(events_of(stub, wants_usage=True)))
    assert len(chunks) == 5
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["cost"] == pytest.approx(4e-5)
    assert "router" in chunks[-1]
    assert "usage" not in chunks[-2]


def events_of_text(*data: str, done: bool = True, wants_usage: bool = False) -> tuple[list[bytes], list[Any]]:
    """The events of a stream with these data, and its reported end."""
    sent = "".join(f"data: {one}\n\n" for one in data) + ("data: [DONE]\n\n" if done else "")

    class Fixed:
        upstream = Upstream("a", "a", "", {})
        closed = False

        def close(self) -> None:
            self.closed = True

        async def chunks(self) -> Any:
            yield sent.encode()
            if done:
                raise BrokenAnswer("broke after the end")

    async def run() -> list[bytes]:
        note = Note(MODEL, 1.0, {"reason": "score"})
        found = answers.stream(fixed, note, wants_usage, 15, lambda *end: ends.append(end))  # type: ignore[arg-type]
        return [event async for event in found]

    fixed, ends = Fixed(), list[Any]()
    events = asyncio.run(run())
    assert fixed.closed
    return events, ends


def chunk_of(text: str | None, finish: str | None = None, index: int = 0, **fields: Any) -> str:
    choice = {"index": index, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice], **fields})


def test_nothing_after_done_counts() -> None:
    events, ends = events_of_text(chunk_of("x"), chunk_of(None, "stop", usage=USAGE))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks_of(events)] == [None, "stop"]
    assert ends == [(USAGE, None)]


def test_chunks_with_an_empty_finish_reason_are_not_held() -> None:
    events, _ = events_of_text(*(chunk_of(word, "") for word in "abc"), chunk_of(None, "stop"))
    chunks = chunks_of(events)
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["a", "b", "c", None]
    assert ["router" in chunk for chunk in chunks] == [True, False, False, True]
    assert ["usage" in chunk for chunk in chunks] == [False, False, False, True]


def test_a_first_chunk_without_choices_has_the_decision() -> None:
    events, _ = events_of_text('{"choices": [], "filter": 1}', chunk_of("x"), chunk_of(None, "stop"))
    assert ["router" in chunk for chunk in chunks_of(events)] == [True, False, True]


@pytest.mark.parametrize(
    ("data", "done", "says"),
    [
        ((chunk_of("x"), '{"error": {"message": "overloaded"}}'), True, 'a reported an error: {"error": {"message"'),
        (('{"choices": [], "filter": 1}',), False, "the answer of a ended early"),
        ((chunk_of("x"),), False, "the answer of a ended early"),
    ],
)
def test_an_error_in_a_stream_and_an_early_end_are_errors(data: tuple[str, ...], done: bool, says: str) -> None:
    events, ends = events_of_text(*data, done=done)
    last = chunks_of(events)[-1]
    assert last["choices"][0]["finish_reason"] == "error"
    assert last["error"]["message"].startswith(says)
    assert ends[0][1].startswith(says)


def test_an_answer_without_done_is_complete_if_its_choice_has_ended() -> None:
    events, ends = events_of_text(chunk_of("x"), chunk_of(None, "stop"), done=False)
    assert chunks_of(events)[-1]["choices"][0]["finish_reason"] == "stop"
    assert ends == [(None, None)]


def test_data_of_several_lines_stay_one_event() -> None:
    events, _ = events_of_text('{"choices": [{"index": 0,\ndata: "delta": {}, "finish_reason": "stop"}]}')
    assert chunks_of(events)[0]["usage"]["cost_details"] == {"estimated": True}


@pytest.mark.parametrize("count", [True, -1, 1.5, 2**60, 10**400, None])
def test_token_counts_that_are_no_counts_are_not_priced(count: Any) -> None:
    assert cost_details(MODEL, {"prompt_tokens": count, "completion_tokens": 1}) is None


def test_several_choices_arrive_while_one_has_ended(stub: Stub) -> None:
    chunks = chunks_of(asyncio.run(events_of(stub, n=2)))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0] * 4 + [1] * 4
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][3] == "stop"


@pytest.mark.parametrize(
    ("step", "message"),
    [("break", "the connection to a broke"), ("silent", "the answer of a stalled or took too long")],
)
def test_a_stream_that_breaks_ends_with_an_error(stub: Stub, step: str, message: str) -> None:
    stub.script = [step]
    chunks = chunks_of(asyncio.run(events_of(stub)))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["one", "two", None]
    assert chunks[-1]["choices"][0]["finish_reason"] == "error"
    assert chunks[-1]["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("step", "usage", "error"), [("ok", USAGE, None), ("break", None, "the connection to a broke (ClientPayloadError)")]
)
def test_the_end_of_a_stream_is_reported_once(stub: Stub, step: str, usage: Any, error: str | None) -> None:
    ends: list[Any] = []
    stub.script = [step]
    asyncio.run(events_of(stub, finished=lambda *end: ends.append(end)))
    assert ends == [(usage, error)]


def test_a_client_that_leaves_a_stream_is_reported(stub: Stub) -> None:
    ends: list[Any] = []

    async def run() -> None:
        answer = await ask(Upstreams(FAST), servers(stub), stream=True)
        events = answers.stream(answer, Note(MODEL, 1.0, {}), False, 15, lambda *end: ends.append(end))
        await anext(events)
        await events.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())
    assert ends == [(None, "the client left")]


def test_a_body_that_breaks_is_an_error(stub: Stub) -> None:
    class Broken:
        status = 200
        headers: dict[str, str] = {}
        closed = False

        def close(self) -> None:
            self.closed = True

        async def chunks(self) -> Any:
            yield b'{"id"'
            raise BrokenAnswer("broke")

    broken, ends = Broken(), list[Any]()
    with pytest.raises(BrokenAnswer):
        asyncio.run(answers.whole(broken, Note(MODEL, None, {}), lambda *end: ends.append(end)))  # type: ignore[arg-type]
    assert (broken.closed, ends) == (True, [(None, "broke")])


def test_a_slow_stream_has_comments(stub: Stub) -> None:
    stub.script = ["slow"]
    events = asyncio.run(events_of(stub, keep_alive_s=0.1))
    assert events.count(KEEP_ALIVE) >= 3
    assert len(chunks_of([event for event in events if event != KEEP_ALIVE])) == 4
