"""Going live by steps: the trial of a canary, the aliases that are followed, and the loop of a replica."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_router import tiny_router

from prefill_router.errors import InputError, UnavailableError
from prefill_router.pool import Endpoint, Pool
from serve import follow, targets
from serve.arms import arms_of
from serve.config import GatewayConfig
from serve.decision_log import DecisionLog, DecisionLogConfig
from serve.follow import Follower
from serve.gateway import Gateway
from serve.live import ArmName, Live, Rollout
from serve.plan import Plan
from serve.router import Checkpoint
from serve.schemas import Health, RolloutReply
from serve.sessions import session_key
from serve.targets import Target, Targets
from serve.trial import Outcome, Pair, Trial

PAIR = Pair("models:/prefill-router/1", "models:/prefill-router/2")
FOLLOWED = Live.model_validate(
    {
        "checkpoint": "models:/prefill-router@champion",
        "canary": {"checkpoint": "models:/prefill-router@candidate", "share": 0.1},
        "shadow": "models:/prefill-router@shadow",
        "follow_s": 1e-6,
    }
)


def outcomes(canary: bool, count: int, bad: int, band: str = "errors", share: float = 0.1) -> list[Outcome]:
    """Outcomes of new conversations, of which `bad` have the loss 1."""
    start = outcomes.__dict__["next"] = outcomes.__dict__.get("next", 0) + count
    drawn = share if canary else 1 - (1 - share)  # the live arm's rounding error
    return [Outcome(str(start - i), band, canary, drawn, float(i < bad)) for i in range(count)]


def test_a_canary_outside_a_band_is_stopped_with_the_reason() -> None:
    trial = Trial(PAIR, Rollout(), (0.1,))
    assert trial.judge(outcomes(False, 500, 5)).state == "testing"
    reply = trial.judge(outcomes(True, 8, 8))
    assert (reply.state, reply.share, reply.bands["errors"].verdict) == ("stopped", 0.1, "broken")
    assert reply.reason == (
        "errors: mean 1 over 8 conversations of the canary, 0.01 over 500 of the live checkpoint, margin 0.02"
    )
    assert Trial(PAIR, Rollout(errors=None), (0.1,)).judge(outcomes(True, 500, 500)).state == "testing"


def test_turns_and_retries_of_a_conversation_count_once_per_band() -> None:
    trial, bad = Trial(PAIR, Rollout(), (0.1,)), outcomes(True, 1, 1)
    trial.judge(outcomes(False, 500, 5))
    assert trial.judge(bad * 100).state == "testing"
    reply = trial.judge([Outcome(bad[0].conversation, "no_decision", True, 0.1, 0.0)])
    assert [reply.bands[name].canary_n for name in ("errors", "no_decision", "feedback")] == [1, 1, 0]


@pytest.mark.parametrize("hold", [None, 600])
def test_a_healthy_canary_goes_through_its_shares_and_is_ready(hold: int | None) -> None:
    trial = Trial(PAIR, Rollout(errors=0.1, shares=(0.5,), hold=hold), (0.1, 0.5))
    trial.judge(outcomes(False, 1500, 15) + outcomes(True, 300, 3))
    assert (trial.share, trial.state) == (0.5 if hold is None else 0.1, "testing")
    trial.judge(outcomes(True, 300, 3))
    assert (trial.share, trial.state) == (0.5, "testing")
    reply = trial.judge(outcomes(False, 600, 6, share=0.5) + outcomes(True, 600, 6, share=0.5))
    assert (reply.state, reply.share, reply.bands["errors"].canary_n) == ("ready", 0.5, 600)
    assert trial.judge(outcomes(True, 200, 200, share=0.5)).state == "stopped"  # also a ready one
    late = Trial(PAIR, Rollout(shares=(0.5,)), (0.1, 0.5))
    assert late.judge(outcomes(True, 50, 50, share=0.3)).bands["errors"].canary_n == 0  # no share of this trial


def test_shares_grow_from_that_of_the_canary() -> None:
    given: dict[str, Any] = {"checkpoint": "a", "canary": {"checkpoint": "b", "share": 0.1}}
    for shares, says in (([0.5, 0.2], "give growing shares"), ([0.1, 0.5], "give larger shares")):
        with pytest.raises(ValidationError, match=says):
            Live.model_validate(given | {"rollout": {"shares": shares}})


@dataclass
class Registry:
    """The registry's functions that the store calls."""

    names: dict[str, int] = field(default_factory=dict)
    tags: dict[int, dict[str, str]] = field(default_factory=dict)
    fails: bool = False
    asked: int = 0
    TRIAL: tuple[str, ...] = ("candidate", "shadow")

    def aliases(self) -> dict[str, int]:
        self.asked += 1
        if self.fails:
            raise UnavailableError("tracking store: does not answer")
        return dict(self.names)

    def version_tags(self, number: int) -> dict[str, str]:
        return self.tags.get(number, {})

    def record_verdict(self, number: int, tags: dict[str, str], *_: Any) -> bool:
        self.tags[number] = tags
        return True

    def remove_alias(self, alias: str) -> int:
        return self.names.pop(alias)

    def promote(self, number: int) -> None:
        self.names["champion"] = number


async def settled(store: Targets, live: Live, known: Target | None = None, sent: Sequence[Any] = ()) -> Target:
    """The target after the registry has been read; no read is under way then."""

    async def no_read() -> None:
        course = store._courses.get(live)
        if course is not None and course._reading is not None:
            await asyncio.wait([course._reading])

    await no_read()
    await store.target(live, known, sent)
    await no_read()
    found = await store.target(live, known)
    await no_read()
    return found


def places(target: Target) -> tuple[str, ...]:
    return tuple(place.removeprefix("models:/prefill-router/") for place in target.live.sources)


def test_aliases_are_followed_and_missing_ones_of_a_trial_are_no_arm() -> None:
    async def run() -> None:
        registry = Registry({"champion": 1})
        store = Targets(registry)
        assert places(await store.target(FOLLOWED, None)) == ("1",)
        registry.names |= {"candidate": 2, "shadow": 3}
        assert places(await settled(store, FOLLOWED)) == ("1", "2", "3")
        registry.names |= {"champion": 2, "previous": 1}  # promoted: the candidate is the live checkpoint now
        assert places(await settled(store, FOLLOWED)) == ("2", "3")
        del registry.names["champion"]
        assert places(await settled(store, FOLLOWED))[0] == "2"  # what is served stays
        off = FOLLOWED.model_copy(update={"follow_s": None})
        assert (await store.target(off, None)).live.checkpoint == FOLLOWED.checkpoint
        with pytest.raises(InputError, match="has no version with the alias 'champion'; set `champion` with jobs"):
            await Targets(Registry()).target(FOLLOWED, None)

    asyncio.run(run())


def test_one_look_at_the_registry_serves_all_replicas() -> None:
    async def run() -> int:
        registry = Registry({"champion": 1})
        store, slow = Targets(registry), FOLLOWED.model_copy(update={"follow_s": 100.0})
        found = await asyncio.gather(*(store.target(slow, None) for _ in range(50)))
        assert {places(one) for one in found} == {("1",)}
        return registry.asked

    assert asyncio.run(run()) == 1


def test_an_unreachable_registry_changes_nothing_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        registry = Registry({"champion": 1, "candidate": 2})
        store = Targets(registry)
        before = await settled(store, FOLLOWED)
        registry.fails = True
        for _ in range(3):
            assert await settled(store, FOLLOWED) == before
        assert [record.message for record in caplog.records] == [
            "what is served does not change, the registry fails: tracking store: does not answer"
        ]
        restarted = Targets(registry)  # a store that knows nothing learns from the replicas
        assert await settled(restarted, FOLLOWED, before) == before
        with pytest.raises(UnavailableError):
            await Targets(registry).target(FOLLOWED, None)

    asyncio.run(run())


def failing() -> list[tuple[Pair, Outcome]]:
    return [(PAIR, one) for one in outcomes(False, 500, 5) + outcomes(True, 8, 8)]


def test_a_stopped_version_leaves_the_draw_loses_its_alias_and_stays_stopped() -> None:
    async def run() -> None:
        registry = Registry({"champion": 1, "candidate": 2})
        store = Targets(registry)
        assert places(await settled(store, FOLLOWED)) == ("1", "2")
        stopped = await store.target(FOLLOWED, None, failing())
        assert places(stopped) == ("1",)  # in the reply to the report itself
        assert stopped.rollout is not None
        assert (stopped.rollout.state, stopped.rollout.canary) == ("stopped", PAIR.canary)
        again = await settled(store, FOLLOWED)
        assert registry.names == {"champion": 1}
        assert again.rollout == stopped.rollout
        assert registry.tags[2]["rollout"].startswith("stopped: errors: mean 1 over 8 conversations of the canary")
        registry.names["candidate"] = 2
        for other in (store, Targets(registry)):  # also after a restart
            later = await settled(other, FOLLOWED)
            assert places(later) == ("1",)
            assert later.rollout is not None
            assert later.rollout.state == "stopped"
        registry.tags.clear()  # the operator allows it again
        assert places(await settled(store, FOLLOWED)) == ("1", "2")

    asyncio.run(run())


def test_a_stopped_folder_stays_stopped_also_in_a_store_that_is_restarted() -> None:
    live = Live.model_validate({"checkpoint": "a", "canary": {"checkpoint": "b", "share": 0.1}, "follow_s": None})
    own = [(Pair("a", "b"), one) for _, one in failing()]

    async def run() -> None:
        store = Targets(Registry())
        assert (await store.target(live, None)).live.sources == ("a", "b")
        stopped = await store.target(live, None, own)
        assert stopped.live.sources == (await store.target(live, None)).live.sources == ("a",)
        assert (await Targets(Registry()).target(live, stopped)).live.sources == ("a",)

    asyncio.run(run())


def test_a_ready_canary_is_promoted_only_if_told_to() -> None:
    async def run(promote: bool) -> tuple[Registry, Target]:
        registry = Registry({"champion": 1, "candidate": 2})
        store, live = Targets(registry), FOLLOWED.model_copy(update={"rollout": Rollout(errors=0.1, promote=promote)})
        await settled(store, live)
        good = outcomes(False, 1500, 15) + outcomes(True, 300, 3)
        await settled(store, live, None, [(PAIR, one) for one in good])
        return registry, await settled(store, live)

    registry, target = asyncio.run(run(promote=False))
    assert registry.names == {"champion": 1, "candidate": 2}
    assert target.rollout is not None
    assert target.rollout.state == "ready"
    registry, target = asyncio.run(run(promote=True))
    assert registry.names == {"champion": 2}
    assert places(target) == ("2",)


def good() -> list[tuple[Pair, Outcome]]:
    """Outcomes after which the canary is ready with PROMOTING."""
    return [(PAIR, one) for one in outcomes(False, 1500, 15) + outcomes(True, 300, 3)]


PROMOTING = FOLLOWED.model_copy(update={"rollout": Rollout(errors=0.1, promote=True)})


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"champion": 9, "candidate": 2}, "it was compared with models:/prefill-router/1, and the champion is 9"),
        ({"champion": 1}, "the alias candidate does not name it any more"),
        ({"champion": 1, "candidate": 3}, "the alias candidate does not name it any more"),
    ],
)
def test_a_late_promotion_does_not_undo_what_the_operator_has_done_meanwhile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, names: dict[str, int], says: str
) -> None:
    monkeypatch.setattr(targets, "RECORD_S", 0.0)

    async def run() -> None:
        registry = Registry({"champion": 1, "candidate": 2})
        store = Targets(registry)
        await settled(store, PROMOTING)
        registry.fails = True
        assert (await settled(store, PROMOTING, None, good())).rollout is not None
        registry.fails, registry.names = False, dict(names)
        await settled(store, PROMOTING)
        await settled(store, PROMOTING)
        assert (registry.names, registry.tags) == (names, {})
        ends = [record.message for record in caplog.records if "does not become" in record.message]
        assert ends == [f"canary {PAIR.canary} is ready, but does not become the champion: {says}"]

    asyncio.run(run())


def test_a_version_that_was_promoted_and_undone_is_not_promoted_again(caplog: pytest.LogCaptureFixture) -> None:
    assert PROMOTING.canary is not None
    pinned = PROMOTING.model_copy(
        update={"canary": PROMOTING.canary.model_copy(update={"checkpoint": "models:/prefill-router/2"})}
    )

    async def run() -> None:
        registry = Registry({"champion": 1})
        for champion in (2, 1):  # the second store is a restarted one
            store = Targets(registry)
            assert places(await settled(store, pinned)) == ("1", "2")
            await settled(store, pinned, None, good())
            await settled(store, pinned)
            assert (registry.names["champion"], registry.tags[2]) == (champion, {"rollout": "ready"})
            registry.names["champion"] = 1  # the operator's undo
        assert "it has the tag rollout of an earlier trial already" in caplog.text

    asyncio.run(run())


def test_a_pinned_canary_that_was_stopped_is_read_from_the_registry_without_following() -> None:
    live = Live.model_validate(
        {"checkpoint": PAIR.live, "canary": {"checkpoint": PAIR.canary, "share": 0.1}, "follow_s": 0}
    )

    async def run() -> None:
        registry = Registry(tags={2: {"rollout": "stopped: errors"}})
        assert places(await Targets(registry).target(live, None)) == ("1",)

    asyncio.run(run())


def test_a_configuration_that_comes_back_is_read_and_compared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = FOLLOWED.model_copy(update={"follow_s": 100.0})

    async def run() -> None:
        registry = Registry({"champion": 1, "candidate": 2})
        store = Targets(registry)
        first = await store.target(slow, None, [(PAIR, one) for one in outcomes(True, 5, 0)])
        registry.names["champion"] = 4
        again = await store.target(slow, None)  # a further replica of a configuration in use
        assert places(again) == places(first) == ("1", "2")
        assert again.rollout is not None
        assert again.rollout.bands["errors"].canary_n == 5
        monkeypatch.setattr(targets, "IDLE_S", -1.0)
        assert places(await store.target(slow, again)) == ("1", "2")  # a replica that used it all the time
        assert places(await store.target(slow, None)) == ("4", "2")
        registry.names["champion"] = 1
        back = await store.target(slow, None)
        assert back.rollout is not None
        assert (places(back), back.rollout.bands["errors"].canary_n) == (("1", "2"), 0)

    asyncio.run(run())


def test_a_first_look_that_failed_is_repeated_at_the_next_question() -> None:
    async def run() -> None:
        registry = Registry({"champion": 1}, fails=True)
        store, slow = Targets(registry), FOLLOWED.model_copy(update={"follow_s": 100.0})
        with pytest.raises(UnavailableError):
            await store.target(slow, None)
        registry.fails = False
        assert places(await store.target(slow, None)) == ("1",)

    asyncio.run(run())


def test_a_replica_applies_changes_reports_outcomes_and_outlives_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "EVERY_S", 0.001)
    live = Live(checkpoint="models:/prefill-router@champion")
    applied: list[str] = []
    sent: list[Outcome] = []
    replies: list[Any] = ["1", "1", "2", RuntimeError("no store"), "2", "3"]

    async def target(_: Live, __: Target | None, given: Sequence[tuple[Pair, Outcome]]) -> Target:
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if isinstance(reply, Exception):
            raise reply
        sent.extend(one for _, one in given)
        return Target(live.model_copy(update={"checkpoint": reply}))

    async def apply(found: Target) -> str | None:
        applied.append(found.live.checkpoint)
        return "broken" if found.live.checkpoint == "2" else None

    async def run() -> None:
        follower = Follower(SimpleNamespace(target=SimpleNamespace(remote=target)), apply)
        follower.report(PAIR, outcomes(True, 1, 0)[0])  # nothing is followed yet
        await follower.start(live)
        known = outcomes(True, 3, 0)
        for one in known:
            follower.report(PAIR, one)
        await asyncio.sleep(0.1)
        follower.stop()
        assert sent == known
        assert applied == ["1", "2", "3"]

    asyncio.run(run())


def test_the_first_configuration_needs_the_store_and_a_later_one_does_not() -> None:
    async def target(*_: Any) -> Target:
        raise InputError("no such alias")

    async def apply(_: Target) -> None:
        return None

    async def run() -> None:
        follower = Follower(SimpleNamespace(target=SimpleNamespace(remote=target)), apply)
        with pytest.raises(InputError, match="no such alias"):
            await follower.start(FOLLOWED)
        await follower.start(Live(checkpoint="a"))
        await follower.start(FOLLOWED)
        follower.stop()
        assert follower.target == Target(Live(checkpoint="a"))

    asyncio.run(run())


def test_the_record_of_a_stop_is_repeated_until_the_registry_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "RECORD_S", 0.0)

    async def run() -> None:
        registry = Registry({"champion": 1, "candidate": 2})
        store, slow = Targets(registry), FOLLOWED.model_copy(update={"follow_s": 100.0})
        await store.target(slow, None)
        record, registry.record_verdict = registry.record_verdict, lambda *_: 1 / 0  # type: ignore
        assert places(await settled(store, slow, None, failing())) == ("1",)
        assert registry.tags == {}
        registry.record_verdict = record  # type: ignore[method-assign]
        await settled(store, slow)
        assert list(registry.tags) == [2]

    asyncio.run(run())


class Counted:
    """The parts of a gateway replica that a swap calls. `described`: the places that were loaded and probed."""

    def __init__(self) -> None:
        self.described: list[str] = []
        self.bands: list[str] = []

    async def describe(self, place: str) -> Checkpoint:
        self.described.append(place)
        if place == "broken":
            raise InputError("checkpoint: corrupt")
        models = tiny_router("0" * 16).pool.models
        pool = Pool(models=models[1:] if place == "without cheap" else models)
        return Checkpoint(f"id of {place}", place, pool, {}, place=place)

    def stopped(self, band: str) -> None:
        self.bands.append(band)


def replica(parts: Counted, *arms: tuple[ArmName, float, str]) -> Any:
    """A gateway replica that serves these arms."""
    found = [(name, share, asyncio.run(parts.describe(place))) for name, share, place in arms]
    gateway: Any = SimpleNamespace(_decider=parts, _telemetry=parts, _config=GatewayConfig(), _refused=None)
    gateway._serving = arms_of(found, {}, {}, None)
    gateway._arms, gateway._go_live = lambda: gateway._serving, partial(Gateway._go_live, gateway)
    parts.described.clear()
    return gateway


def served(gateway: Any, target: Target) -> tuple[list[tuple[str, float, str]], str | None]:
    """The arms after a target, and why it was refused."""
    refused = asyncio.run(Gateway._follow(gateway, target))
    return [(arm.name, arm.share, arm.checkpoint.place) for arm in gateway._serving.arms], refused


def live(checkpoint: str, canary: str | None = None, share: float = 0.1, shadow: str | None = None) -> Live:
    arm = None if canary is None else {"checkpoint": canary, "share": share}
    return Live.model_validate({"checkpoint": checkpoint, "canary": arm, "shadow": shadow})


def test_a_stop_and_another_share_need_neither_encoder_nor_router() -> None:
    parts = Counted()
    gateway = replica(parts, ("live", 0.9, "a"), ("canary", 0.1, "b"), ("shadow", 0.0, "c"))
    more = served(gateway, Target(live("a", "b", 0.5, "c")))
    assert more == ([("live", 0.5, "a"), ("canary", 0.5, "b"), ("shadow", 0.0, "c")], None)
    end = RolloutReply(state="stopped", canary="b", share=0.5, reason="feedback: mean 1 over 8")
    assert served(gateway, Target(live("a", shadow="c"), end))[0] == [("live", 1.0, "a"), ("shadow", 0.0, "c")]
    assert served(gateway, Target(live("b", shadow="c"), end))[0] == [("live", 1.0, "b"), ("shadow", 0.0, "c")]
    assert (parts.described, parts.bands) == (["b"], ["feedback"])


def test_an_arm_whose_new_version_is_broken_keeps_its_place_or_is_left_out() -> None:
    parts = Counted()
    gateway = replica(parts, ("live", 1.0, "a"))
    reason = "broken: checkpoint: corrupt"
    assert served(gateway, Target(live("broken", "b"))) == ([("live", 0.9, "a"), ("canary", 0.1, "b")], reason)
    assert served(gateway, Target(live("b", "broken", shadow="c"))) == (
        [("live", 1.0, "b"), ("shadow", 0.0, "c")],
        reason,
    )
    assert gateway._refused == reason
    assert served(gateway, Target(live("b"))) == ([("live", 1.0, "b")], None)
    assert parts.described == ["broken", "b", "broken", "c"]
    endpoints = {"cheap": Endpoint(base_url="http://127.0.0.1:9/v1")}
    gateway._config = GatewayConfig(default_model="cheap", endpoints=endpoints)
    arms, refused = served(gateway, Target(live("c", "without cheap")))
    assert arms == [("live", 1.0, "c")]
    assert (
        refused
        == "c, without cheap: gateway.default_model: 'cheap' is not in the pool of without cheap; name another model"
    )


def test_a_refused_configuration_leaves_aliases_and_comparison_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follow, "EVERY_S", 0.001)
    gateway = replica(Counted(), ("live", 1.0, "a"))
    champions, asked = {"version": "a"}, list[Live]()
    followed = Live(checkpoint="models:/prefill-router@champion")

    async def target(configured: Live, *_: Any) -> Target:
        asked.append(configured)
        if configured != followed:
            raise UnavailableError("no store")
        return Target(live(champions["version"]))

    gateway._follower = Follower(
        SimpleNamespace(target=SimpleNamespace(remote=target)), partial(Gateway._follow, gateway)
    )
    gateway._configure = partial(Gateway._configure, gateway)

    async def run() -> None:
        await Gateway.reconfigure(gateway, followed.model_dump())
        for bad in (live("broken"), live("a", "broken"), live("models:/prefill-router@candidate")):
            await Gateway.reconfigure(gateway, bad.model_dump())
            assert gateway._refused is not None
            assert gateway._follower.target == Target(live("a"))
        asked.clear()
        champions["version"] = "b"
        await asyncio.sleep(0.1)
        gateway._follower.stop()
        assert set(asked) == {followed}
        assert gateway._serving.live.checkpoint.place == "b"

    asyncio.run(run())


@pytest.mark.parametrize("conversation", ["c" * 64, None])
def test_feedback_counts_once_for_each_conversation(conversation: str | None) -> None:
    gateway = replica(Counted(), ("live", 0.9, "a"), ("canary", 0.1, "b"))
    reported: list[Outcome] = []
    gateway._follower = SimpleNamespace(report=lambda _, outcome: reported.append(outcome))
    decision = {"arm": "canary", "share": 0.1, "checkpoint": "id of b"}
    for decision_id in ("1" * 32, "2" * 32):
        Gateway._rated(gateway, decision_id, decision | {"conversation": conversation}, 0.0)
    reply = Trial(Pair("a", "b"), Rollout(), (0.1,)).judge(reported)
    assert reply.bands["feedback"].canary_n == (1 if conversation else 2)


def test_the_log_names_the_conversation_and_no_prompt() -> None:
    gateway = replica(Counted(), ("live", 1.0, "a"))
    gateway._telemetry = SimpleNamespace(decided=lambda _: None)
    gateway._log = DecisionLog(DecisionLogConfig())
    key = session_key([{"role": "user", "content": "a secret"}], None, ())
    plan, http = Plan("cheap", ("cheap",), "requested"), SimpleNamespace(state=SimpleNamespace())
    Gateway._note_decision(gateway, http, "1" * 32, plan, gateway._serving.live.checkpoint, "a secret", key)
    logged = gateway._log.recent("1" * 32)
    assert logged["decision"]["conversation"] == key
    assert "secret" not in str(logged)


def test_health_says_what_became_of_the_canary() -> None:
    gateway = replica(Counted(), ("live", 0.9, "a"), ("canary", 0.1, "b"))
    reply = RolloutReply(state="testing", canary="b", share=0.1)
    gateway._follower = SimpleNamespace(target=Target(live("a", "b"), reply))
    assert Gateway._health(gateway) == Health(checkpoint="id of a", canary="id of b", rollout=reply)
