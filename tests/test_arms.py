"""The checkpoints that decide: who is drawn, who observes, and the propensity of a decision."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_router import tiny_router

from prefill_router.decisions.log import merge
from prefill_router.errors import InputError
from prefill_router.pool import Endpoint, Pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.router import Candidate, Decision
from serve.arms import Arm, ArmName, Arms, arms_of, check_models
from serve.config import RouterAppConfig
from serve.decider import Decider, Made
from serve.decision_log import DecisionLog, DecisionLogConfig
from serve.live import Live
from serve.plan import Plan, Query, decision_record
from serve.router import Checkpoint

URL = "http://127.0.0.1:9/v1"
ALL = {name: Endpoint(base_url=URL) for name in ("cheap", "middle", "dear")}


def checkpoint(name: str, models: Sequence[str] = ("cheap", "middle", "dear")) -> Checkpoint:
    pool = tiny_router("0" * 16).pool
    return Checkpoint(name, f"runs/{name}", Pool(models=tuple(one for one in pool.models if one.name in models)), {})


def arms(share: float = 0.25, canary_models: Sequence[str] = ("cheap", "middle", "dear")) -> Arms:
    given: list[tuple[ArmName, float, Checkpoint]] = [
        ("live", 1 - share, checkpoint("a")),
        ("canary", share, checkpoint("b", canary_models)),
        ("shadow", 0.0, checkpoint("c")),
    ]
    return arms_of(given, {}, ALL if "dear" in canary_models else {}, None)


def drawn(found: Arms, key: int) -> Arm:
    arm, share = found.drawn(lambda: str(key), (), asks=False)
    assert share == arm.share
    return arm


def test_a_canary_decides_its_share_and_a_conversation_keeps_its_arm() -> None:
    found = arms(0.25)
    names = [drawn(found, key).name for key in range(4000)]
    assert set(names) == {"live", "canary"}
    assert abs(names.count("canary") / 4000 - 0.25) < 0.03  # 4 standard errors
    assert [drawn(found, key).name for key in range(4000)] == names
    assert {drawn(found, key).share for key in range(100)} == {0.25, 0.75}


def test_another_canary_draws_other_conversations() -> None:
    other = arms_of([("live", 0.75, checkpoint("a")), ("canary", 0.25, checkpoint("z"))], {}, {}, None)
    first, second = ({key for key in range(1000) if drawn(one, key).share < 0.5} for one in (arms(), other))
    assert len(first & second) < 0.5 * len(first)


def test_without_a_canary_the_live_arm_decides_all() -> None:
    alone = arms_of([("live", 1.0, checkpoint("a"))], {}, {}, None)
    assert alone.drawn(lambda: "x", (), asks=True) == (alone.live, 1.0)
    assert alone.observing(alone.live, (), asks=True) == ()


def test_the_live_arm_decides_between_models_that_the_canary_lacks() -> None:
    found = arms(0.999, ("cheap", "middle"))
    assert found.drawn(lambda: "x", ["dear"], asks=False) == (found.live, 1.0)
    assert found.drawn(lambda: "x", ["cheap"], asks=False)[0].name == "canary"
    assert [arm.name for arm in found.observing(found.live, ["dear"], asks=False)] == ["shadow"]
    assert [arm.name for arm in found.observing(found.live, (), asks=False)] == ["canary", "shadow"]
    with pytest.raises(InputError, match="'dear' is not in the pool; known: cheap, middle"):
        check_models(["dear"], found.arms[1])


def test_the_live_arm_answers_if_the_canary_has_no_server() -> None:
    given: list[tuple[ArmName, float, Checkpoint]] = [
        ("live", 0.001, checkpoint("a")),
        ("canary", 0.999, checkpoint("b")),
    ]
    found = arms_of(given, {}, {"cheap": ALL["cheap"]}, None)
    assert found.drawn(lambda: "x", (), asks=True)[0].name == "canary"
    assert found.drawn(lambda: "x", ["cheap", "dear"], asks=True)[0].name == "canary"
    assert found.drawn(lambda: "x", ["dear"], asks=True) == (found.live, 1.0)
    assert found.drawn(lambda: "x", ["dear"], asks=False)[0].name == "canary"  # /v1/route asks no server
    assert found.observing(found.live, ["dear"], asks=True) == ()


def test_the_servers_of_the_live_arm_follow_the_first_of_the_canary() -> None:
    order = ("cheap", "middle", "dear")
    found = arms()
    live, canary = found.live, found.arms[1]
    assert found.candidates(canary, order, 2) == ([canary.servers[name] for name in order], 2)  # the same servers
    others = {name: replace(one, url="http://127.0.0.1:10/v1") for name, one in canary.servers.items()}
    canary = replace(canary, servers=others)
    assert found.candidates(live, order, 2) == ([live.servers[name] for name in order], 2)
    asked, most = found.candidates(canary, order, 2)
    assert asked == [others["cheap"], others["middle"], *(live.servers[name] for name in order)]
    assert most == 4


def test_endpoints_and_the_default_model_must_be_in_the_pools() -> None:
    given: list[tuple[ArmName, float, Checkpoint]] = [
        ("live", 0.9, checkpoint("a", ["cheap"])),
        ("canary", 0.1, checkpoint("b", ["middle"])),
    ]
    both = {name: ALL[name] for name in ("cheap", "middle")}
    assert list(arms_of(given, {}, both, None).live.servers) == ["cheap"]
    with pytest.raises(InputError, match=r"^gateway\.endpoints: 'dear' is not in the pool; known: cheap, middle$"):
        arms_of(given, {}, ALL, None)
    with pytest.raises(InputError, match=r"^gateway\.default_model: 'cheap' is not in the pool of runs/b; name"):
        arms_of(given, {}, both, "cheap")
    with pytest.raises(InputError, match=r"^gateway\.default_model: 'cheap' has no endpoint"):
        arms_of(given[:1], {}, {}, "cheap")


def merged(*records: dict[str, Any]) -> Any:
    decision: dict[str, Any] = {}
    for record in records:
        merge(decision, {"decision_id": "x", **record})
    return decision["decision"]["propensity"]


def test_the_propensity_is_the_share_of_all_arms_that_choose_the_model() -> None:
    own = {"kind": "decision", "arm": "live", "share": 0.9, "model": "cheap", "propensity": None}
    canary = {"kind": "observed", "arm": "canary", "share": 0.1, "model": "dear"}
    shadow = {"kind": "observed", "arm": "shadow", "share": 0.0, "model": "cheap"}
    assert merged(own) is merged(own, shadow) is None
    assert merged(own, shadow, canary) == merged(canary, own) == 0.9
    assert merged(own, canary | {"model": "cheap"}) == 1.0
    assert merged(own, canary | {"model": None, "error": "x"}) is None
    assert merged(own | {"share": None}, canary) is None  # the arm that was drawn did not decide
    assert merged(own | {"share": 1.0, "propensity": 1.0}, shadow) == 1.0
    assert merged({"kind": "decision", "model": "cheap"} | {"propensity": 1.0}) == 1.0  # of an earlier release


class Graph:
    """Handles of an encoder and a router. The encoder fails for `failing`; `encoded` are the calls."""

    def __init__(self, failing: str = "") -> None:
        self.encoded: list[str] = []
        self.failing = failing
        self.encode, self.decide = SimpleNamespace(remote=self._encode), SimpleNamespace(remote=self._decide)

    async def _encode(self, _: str, fingerprint: str, __: EncoderConfig) -> bytes:
        self.encoded.append(fingerprint)
        if fingerprint == self.failing:
            raise RuntimeError("no encoder")
        return fingerprint.encode()

    async def _decide(self, checkpoint_id: str, where: str, rows: Any, *_: Any) -> Decision:
        model = {"a": "cheap", "b": "dear", "c": "cheap"}[checkpoint_id]
        assert (where, list(rows)) == (f"runs/{checkpoint_id}", ["1" if checkpoint_id == "a" else "2"])
        return Decision(model, 0.0, (Candidate(model, 0.9, 0.0, 0.1, 0.9, 10.0),))


@pytest.mark.parametrize("failing", ["", "2"])
def test_the_live_arm_decides_for_a_canary_that_does_not_and_observed_decisions_are_logged(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    encoders = {"a": {"1": EncoderConfig()}, "b": {"2": EncoderConfig()}, "c": {"2": EncoderConfig()}}
    own = [replace(arm.checkpoint, encoders=encoders[arm.checkpoint.id]) for arm in arms().arms]
    found = Arms(tuple(replace(arm, checkpoint=one) for arm, one in zip(arms().arms, own, strict=True)))
    graph, log, counted = Graph(failing), DecisionLog(DecisionLogConfig()), []
    telemetry: Any = SimpleNamespace(observed=lambda *found: counted.append(found))
    handles: Any = graph
    decider = Decider(handles, handles, 5.0, log, telemetry)
    query = Query("What?", Requirements(), None)

    async def plan_by(arm: Arm) -> Plan:
        decision, _ = await decider.decide(arm.checkpoint, query, 0.0)
        return Plan("auto", (decision.model,), "score", decision)

    async def run() -> Made:
        canary = found.arms[1]
        made = await decider.decide_by(found, (canary, canary.share), lambda _: query, 0.0)
        plan = replace(await plan_by(made.arm), arm=made.arm.name, share=made.share)
        log.note("x", "decision", decision_record(plan, made.arm.checkpoint, None))
        decider.observe(found.observing(made.arm, (), asks=False), "x", plan, plan_by)
        await asyncio.gather(*decider._observed)
        monkeypatch.setattr("serve.decider.MAX_OBSERVED", 0)
        decider.observe(found.arms[2:], "x", plan, plan_by)
        return made

    made, logged = asyncio.run(run()), log.recent("x")
    assert logged is not None
    observed = {one["arm"]: (one["model"], one["share"]) for one in logged["observed"]}
    if failing:
        assert (made.arm.name, made.share, logged["decision"]["propensity"]) == ("live", None, None)
        assert observed == {"canary": (None, 0.25), "shadow": (None, 0.0)}
        assert counted == [("canary", "failed"), ("shadow", "failed"), ("shadow", "left_out")]
        return
    assert (made.arm.name, made.share, logged["decision"]["propensity"]) == ("canary", 0.25, 0.25)
    assert observed == {"live": ("cheap", 0.75), "shadow": ("cheap", 0.0)}
    assert counted == [("live", "other"), ("shadow", "other"), ("shadow", "left_out")]
    assert sorted(graph.encoded) == ["1", "2"]  # the shadow's encoder is that of the canary


def test_checkpoints_are_moved_together() -> None:
    config = RouterAppConfig.model_validate(
        {"checkpoint": "a", "canary": {"checkpoint": "b", "share": 0.1}, "shadow": "c"}
    )
    assert config.sources == ("a", "b", "c")
    assert config.moved(str.upper).sources == ("A", "B", "C")
    assert Live(checkpoint="a").moved(str.upper) == Live(checkpoint="A")
    with pytest.raises(ValidationError, match=r"canary\.share"):
        Live.model_validate({"checkpoint": "a", "canary": {"checkpoint": "b", "share": 1}})
