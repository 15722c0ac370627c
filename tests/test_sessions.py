"""Sessions: the store, the key of a conversation, and the plan of a later turn."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from prefill_router.routing.router import Candidate, Decision
from serve.chat import read_chat
from serve.plan import Plan, healthy, kept
from serve.sessions import Kept, Sessions, SessionsConfig, awaits_tool, has_answer, session_key

USER: dict[str, Any] = {"role": "user", "content": "hi"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "hello"}


def test_a_session_ends_after_its_time_and_keeps_its_first_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    async def run() -> None:
        nonlocal now
        store = Sessions(SessionsConfig(ttl_s=10))
        assert await store.get("a") is None
        await store.keep("a", Kept("x", 0.9))
        now = 9.0
        await store.keep("a", Kept("x", 0.5))
        now = 18.0
        assert await store.get("a") == Kept("x", 0.9)
        await store.keep("a", Kept("y", 0.5))
        assert await store.get("a") == Kept("y", 0.5)
        now = 29.0
        assert await store.get("a") is None

    asyncio.run(run())


def test_the_least_recently_used_session_is_dropped() -> None:
    async def run() -> list[bool]:
        store = Sessions(SessionsConfig(most=2))
        for key in "abac":
            await store.keep(key, Kept("x", 0.9))
        return [await store.get(key) is None for key in "abc"]

    assert asyncio.run(run()) == [False, True, False]


def test_a_conversation_keeps_its_key_and_others_have_their_own() -> None:
    system = {"role": "system", "content": "Be brief."}
    first = session_key([system, USER], None, ())
    assert session_key([system, USER, ANSWER, {"role": "user", "content": "more"}], None, ()) == first
    others = [
        session_key([USER], None, ()),
        session_key([system, USER], None, (0.5,)),
        session_key([system, USER], "id", ()),
        session_key([system, USER], "other", ()),
    ]
    assert len({first, *others}) == 5
    assert session_key([USER], "id", ()) == session_key([ANSWER], "id", ())
    assert "secret" not in session_key([], "secret", ())


@pytest.mark.parametrize(
    ("messages", "answered", "tool"),
    [
        ([USER], False, False),
        ([USER, ANSWER, USER], True, False),
        ([USER, ANSWER, {"role": "tool", "content": "3"}], True, True),
        ([USER, ANSWER, {"role": "tool", "content": "3"}, USER], True, True),
        ([USER, ANSWER, {"role": "tool", "content": "3"}, ANSWER, USER], True, False),
        (["odd", 3], False, False),
        ([], False, False),
    ],
)
def test_turns_are_recognised(messages: list[Any], answered: bool, tool: bool) -> None:
    assert (has_answer(messages), awaits_tool(messages)) == (answered, tool)


def plan(**confidences: float) -> Plan:
    candidates = tuple(Candidate(name, value, 0.0, 0.0, value, 0.0) for name, value in confidences.items())
    return Plan("auto", tuple(confidences), "score", Decision(candidates[0].model, 0.0, candidates))


def test_a_later_turn_stays_with_its_model_unless_the_confidence_has_fallen() -> None:
    turn = plan(a=0.9, b=0.7, c=0.6)
    assert kept(turn, None, 0.1, False) is turn
    stays = kept(turn, Kept("b", 0.75), 0.1, False)
    assert (stays.order, stays.reason) == (("b", "a", "c"), "session")
    assert kept(turn, Kept("b", 0.81), 0.1, False) is turn
    assert kept(turn, Kept("gone", 0.5), 0.1, False) is turn
    assert kept(turn, Kept("a", 0.9), 0.1, False) is turn  # chosen anyway


def test_a_model_that_called_a_tool_answers_alone() -> None:
    turn = kept(plan(a=0.9, b=0.1), Kept("b", 0.9), 0.1, True)
    assert (turn.order, turn.reason) == (("b",), "session")


def test_the_session_comes_from_the_body_or_a_header() -> None:
    body = b'{"model": "auto", "messages": [1], "router": {"session_id": "a"}}'
    assert read_chat(body).options({"x-session-id": "b"}).session_id == "a"
    plain = read_chat(b'{"model": "m", "messages": [1]}')
    assert plain.options({"x-litellm-session-id": "c", "x-session-id": "b"}).session_id == "c"
    assert plain.options({"x-router-session-id": "d", "x-session-id": "b"}).session_id == "d"


def test_a_model_that_is_left_alone_comes_last() -> None:
    plan = Plan("auto", ("a", "b", "c"), "score")
    moved = healthy(plan, {"a"})
    assert (moved.order, moved.reason) == (("b", "c", "a"), "health")
    assert healthy(plan, {"b"}) is plan  # the first one may be asked
    assert healthy(plan, {"a", "b", "c"}) is plan  # nobody may: the request waits
