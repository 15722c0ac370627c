"""The traffic of a replica: windows, and the same figures as the metrics."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_stub import CHECKPOINT, LARGE, MIDDLE, SMALL, note_of, plan_of

from serve import telemetry
from serve.breaker import BreakerConfig
from serve.config import UpstreamConfig
from serve.decision_log import DecisionLog, DecisionLogConfig
from serve.plan import answer_record, decision_record, no_answer_record
from serve.schemas import ServerState
from serve.telemetry import Telemetry
from serve.traffic import Traffic, seen_decision, server_state
from serve.upstream import Attempt, Upstream, Upstreams


@settings(deadline=None)
@given(st.lists(st.integers(0, 2000), max_size=50).map(sorted), st.integers(0, 700))
def test_the_windows_count_the_decisions_of_their_seconds(times: list[int], later: int) -> None:
    traffic, now = Traffic(0.0), (times[-1] if times else 0) + later + 0.5
    for moment in times:
        traffic.decided("a", "score", moment + 0.25)
    reply = traffic.reply("r", now)
    ages = [int(now) - moment for moment in times]
    assert reply.requests_60_s == sum(age < 60 for age in ages)
    assert reply.requests_10_min == sum(age < 600 for age in ages)
    assert reply.requests_per_10_s == [sum(age // 10 == step for age in ages) for step in reversed(range(60))]
    assert reply.decisions == ({"a": {"score": len(times)}} if times else {})


def test_memory_does_not_grow_with_the_traffic() -> None:
    traffic = Traffic(0.0)
    for second in range(5000):
        traffic.decided("a", "score", float(second))
    assert len(traffic._seconds) == 600
    assert traffic.reply("r", 4999.5).requests_10_min == 600


def test_a_clock_that_is_set_back_stops_nothing() -> None:
    traffic = Traffic(0.0)
    for now in (1000.0, 400.0, 400.0):
        traffic.decided("a", "score", now)
    assert traffic.reply("r", 401.0).requests_10_min == 2


def test_the_status_has_the_figures_of_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, Counter[tuple[str, ...]]] = {}

    class Fake:
        def __init__(self, name: str, *_: Any) -> None:
            self.own = counted.setdefault(name, Counter())

        def inc(self, value: Any, tags: dict[str, str]) -> None:
            self.own[tuple(tags.values())] += value

        def observe(self, *_: Any) -> None:
            """Histograms are not in the status."""

    monkeypatch.setattr(telemetry, "_counter", Fake)
    monkeypatch.setattr(telemetry, "_histogram", Fake)
    noted = Telemetry()
    failed = (Attempt(SMALL, "status", 500), Attempt(MIDDLE, "deadline"))
    for lam, tokens, error in ((0.0, (10, 5), None), (1.0, (90, 80), None), (1.0, (9, 4), "broke"), (0.5, None, None)):
        plan = plan_of("What is 2 + 2?", lam)
        noted.decided(plan)
        noted.attempted(failed[:1])
        usd = None if tokens is None else sum(tokens) * 1e-6
        noted.answered(plan, note_of(plan, "d"), tokens, usd, error, 0.1, 0.2, CHECKPOINT.best_single)
    noted.decided(plan_of("Who?", 1.0))
    noted.unanswered(failed)
    reply = noted.traffic.reply("r", 0.0)
    flat = {(model, reason): n for model, reasons in reply.decisions.items() for reason, n in reasons.items()}
    assert flat == {tags[:2]: n for tags, n in counted["router_decisions"].items()}
    assert flat == {(LARGE, "score"): 1, (SMALL, "score"): 3, (MIDDLE, "score"): 1}
    flat = {(model, reason): n for model, reasons in reply.fallbacks.items() for reason, n in reasons.items()}
    assert flat == counted["router_fallbacks"] == {(SMALL, "status 500"): 5, (MIDDLE, "deadline"): 1}
    assert {(model,): n for model, n in reply.errors.items()} == counted["router_errors"]
    assert (reply.answers, reply.errors) == ({LARGE: 1, SMALL: 1, MIDDLE: 1}, {SMALL: 1, MIDDLE: 1})
    assert {(model,): usd for model, usd in reply.spent_usd.items()} == counted["router_spent_usd"]
    assert {(policy,): usd for policy, usd in reply.reference_usd.items()} == counted["router_reference_usd"]
    assert reply.reference_usd["most_expensive"] == pytest.approx(3 * 2e-3)  # three answers with tokens, by LARGE


def test_the_latest_decisions_have_their_answers_and_no_prompt() -> None:
    log, plan = DecisionLog(DecisionLogConfig(prompts=True)), plan_of("What is 2 + 2?")
    for decision_id in ("old", "waits", "failed", "answered"):
        log.note(decision_id, "decision", decision_record(plan, CHECKPOINT, "a secret") | {"time": 5.0})
    log.note("failed", "answer", no_answer_record("nobody", (), 1.5))
    usage = {"prompt_tokens": 1_000_000, "completion_tokens": 0}
    log.note("answered", "answer", answer_record(note_of(plan, "answered"), 200, usage, None, 2.5))
    answered, failed, waits = [seen_decision(one) for one in log.latest(3)]
    own = plan.candidate(LARGE)
    assert own is not None
    assert (answered.decision_id, answered.served, answered.failed) == ("answered", LARGE, False)
    assert (answered.cost_usd, answered.latency_s, answered.time) == (5.0, 2.5, 5.0)
    assert (answered.confidence, answered.estimated_usd) == (own.confidence, own.cost_usd)
    assert (failed.served, failed.failed, failed.cost_usd, failed.latency_s) == (None, True, None, 1.5)
    assert (waits.decision_id, waits.failed, waits.latency_s) == ("waits", None, None)
    assert "secret" not in answered.model_dump_json()


def test_the_state_of_a_server_is_that_of_its_breaker() -> None:
    upstreams = Upstreams(UpstreamConfig(breaker=BreakerConfig(failures=1, open_s=1e6)))
    one, other = (Upstream("a", "a", f"http://127.0.0.1:{port}/v1", {}) for port in (8, 9))
    assert server_state(*upstreams.state(one)) == ServerState(state="closed", wait_s=0.0)
    breaker = upstreams._breaker(one)
    breaker.failed(time.monotonic(), test=False)
    state = server_state(*upstreams.state(one))
    assert (state.state, upstreams.state(other)) == ("open", ("closed", 0.0))  # another server of the model
    assert state.wait_s is not None
    assert state.wait_s > 1e5
    assert upstreams.left_alone() == {one.server}
    assert breaker.sent() is True
    assert server_state(*upstreams.state(one)) == ServerState(state="testing", wait_s=None)
    breaker.succeeded(time.monotonic(), test=True)
    assert upstreams.state(one)[0] == "closed"
