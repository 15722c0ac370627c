"""The checkpoints that decide: who is drawn, who watches, and the propensity of a decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_router import tiny_router

from prefill_router.decisions.log import merge
from prefill_router.errors import InputError
from prefill_router.pool import Endpoint, Pool
from serve.arms import ArmName, Arms, arms_of, check_models
from serve.config import Live, RouterAppConfig
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


def test_a_canary_decides_its_share_and_a_conversation_keeps_its_arm() -> None:
    found = arms(0.25)
    drawn = [found.drawn(str(key), ())[0].name for key in range(4000)]
    assert set(drawn) == {"live", "canary"}
    assert abs(drawn.count("canary") / 4000 - 0.25) < 0.03  # 4 standard errors
    assert [found.drawn(str(key), ())[0].name for key in range(4000)] == drawn
    assert {found.drawn(str(key), ())[1] for key in range(100)} == {0.25, 0.75}


def test_another_canary_draws_other_conversations() -> None:
    other = arms_of([("live", 0.75, checkpoint("a")), ("canary", 0.25, checkpoint("z"))], {}, {}, None)
    first, second = ({key for key in range(1000) if one.drawn(str(key), ())[0].share < 0.5} for one in (arms(), other))
    assert len(first & second) < 0.5 * len(first)


def test_without_a_canary_the_live_arm_decides_all() -> None:
    alone = arms_of([("live", 1.0, checkpoint("a"))], {}, {}, None)
    assert alone.drawn("x", ()) == (alone.live, 1.0)
    assert alone.watching(alone.live, ()) == ()


def test_the_live_arm_decides_between_models_that_the_canary_lacks() -> None:
    found = arms(0.999, ("cheap", "middle"))
    assert found.drawn("x", ["dear"]) == (found.live, 1.0)
    assert found.drawn("x", ["cheap"])[0].name == "canary"
    assert [arm.name for arm in found.watching(found.live, ["dear"])] == ["shadow"]
    assert [arm.name for arm in found.watching(found.live, ())] == ["canary", "shadow"]
    with pytest.raises(InputError, match="'dear' is not in the pool; known: cheap, middle"):
        check_models(["dear"], found.arms[1])


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
    canary = {"kind": "others", "arm": "canary", "share": 0.1, "model": "dear"}
    shadow = {"kind": "others", "arm": "shadow", "share": 0.0, "model": "cheap"}
    assert merged(own) is merged(own, shadow) is None
    assert merged(own, shadow, canary) == merged(canary, own) == 0.9
    assert merged(own, canary | {"model": "cheap"}) == 1.0
    assert merged(own, canary | {"model": None, "error": "x"}) is None
    assert merged(own | {"share": 1.0, "propensity": 1.0}, shadow) == 1.0
    assert merged({"kind": "decision", "model": "cheap"} | {"propensity": 1.0}) == 1.0  # of an earlier release


def test_checkpoints_are_moved_together() -> None:
    config = RouterAppConfig.model_validate(
        {"checkpoint": "a", "canary": {"checkpoint": "b", "share": 0.1}, "shadow": "c"}
    )
    assert config.sources == ("a", "b", "c")
    assert config.moved(str.upper).sources == ("A", "B", "C")
    assert Live(checkpoint="a").moved(str.upper) == Live(checkpoint="A")
    with pytest.raises(ValidationError, match=r"canary\.share"):
        Live.model_validate({"checkpoint": "a", "canary": {"checkpoint": "b", "share": 1}})
