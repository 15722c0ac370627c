"""The value job on logs of two arms: propensities, observed checkpoints, decisions left out, and errors in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_router import MODELS, tiny_router

from jobs.value import Policy, ValueConfig, run
from prefill_router.controller import LocalRouter
from prefill_router.decisions import value
from prefill_router.decisions.log import PREFIX, read_decisions
from prefill_router.decisions.logged_policy import logged_policy
from prefill_router.decisions.off_policy import weigh
from prefill_router.decisions.replay import LoggedDecisions, Replayed, replay
from prefill_router.decisions.value import mixed_policy, router_policy
from prefill_router.errors import InputError
from prefill_router.files import read_json
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.routing.checkpoint import save_checkpoint
from prefill_router.routing.router import Router

N, SHARE, LAMBDA = 1_000, 0.25, 0.1
COST = np.array([1e-4, 1e-3, 1e-2])
Change = Callable[[int, dict[str, Any]], None]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Router, Path]:
    folder = tmp_path_factory.mktemp("live") / "checkpoint"
    return save_checkpoint(tiny_router("0" * 16), folder), folder


def records_of(router: Router, checkpoint: str, p: np.ndarray, arm: str, share: float) -> list[dict[str, Any]]:
    """The decisions of an arm with confidences `p`, as the gateway logs them."""
    choice = router.choose(p, np.tile(COST, (N, 1)), LAMBDA, np.ones((N, 3), dtype=bool), np.full(N, np.nan))
    found = []
    for row, chosen in enumerate(choice.chosen):
        order = [chosen, *(m for m in range(3) if m != chosen)]
        candidates = [
            {"model": MODELS[m], "confidence": p[row, m], "cost_usd": COST[m], "score": choice.scores[row, m]}
            for m in order
        ]
        found.append(
            {
                "model": MODELS[chosen],
                "reason": "score",
                "arm": arm,
                "share": share,
                "propensity": None if share < 1 else 1.0,
                "checkpoint": checkpoint,
                "lambda": LAMBDA,
                "novelty": None,
                "candidates": candidates,
            }
        )
    return found


def write_log(folder: Path, router: Router, change: Change | None = None, arms: int = 2, feedback: float = 0.5) -> None:
    """N decisions: the live arm is well calibrated, the canary has its confidences in the reverse order of models."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    p = np.clip(random.normal([0.5, 0.6, 0.7], 0.1, size=(N, 3)), 0.05, 0.95)
    by_arm = [records_of(router, router.id, p, "live", 1 - SHARE if arms == 2 else 1.0)]
    if arms == 2:
        by_arm.append(records_of(router, "canary", p[:, ::-1].copy(), "canary", SHARE))
    lines = []
    for n, drawn in enumerate(zip(*by_arm, strict=True)):
        records = list(drawn)
        if random.random() < SHARE:
            records.reverse()
        model = MODELS.index(records[0]["model"])
        right = float(random.random() < p[n, model])
        kinds = ["decision", *["observed"] * (len(records) - 1)]
        found = [{"kind": kind, **one} for kind, one in zip(kinds, records, strict=True)]
        found.append({"kind": "answer", "served": MODELS[model], "cost_usd": 2 * COST[model]})
        if random.random() < feedback:
            found.append({"kind": "feedback", "score": right, "time": 1.0})
        for one in found:
            if change is not None:
                change(n, one)
            lines.append(json.dumps({"decision_id": f"d{n:03d}", **one}))
    (folder / f"{PREFIX}0-000000.jsonl").write_text("\n".join(lines) + "\n")


def config_of(tmp_path: Path, live: tuple[Router, Path], **values: Any) -> ValueConfig:
    return ValueConfig(log=tmp_path / "log", checkpoint=str(live[1]), output=tmp_path / "out", **values)


def test_the_propensities_are_those_of_both_arms(tmp_path: Path, live: tuple[Router, Path]):
    write_log(tmp_path / "log", live[0])
    policy = logged_policy(read_decisions(tmp_path / "log"), live[0])
    assert policy.logged.propensities.sum(axis=1) == pytest.approx(1.0)
    assert set(np.unique(policy.logged.propensities).round(6)) == {0.0, SHARE, 1 - SHARE, 1.0}
    assert policy.logged.of_chosen(policy.logged.propensities) == pytest.approx(
        [one["decision"]["propensity"] for one in read_decisions(tmp_path / "log").values()]
    )
    # The live checkpoint has read every decision: its own records, and the observed ones where the canary decided.
    assert (policy.confidence.argmax(axis=1) == 2).mean() > 0.6
    own = router_policy(policy, live[0])
    weights = weigh(policy.logged, own, np.ones(N, dtype=bool), np.zeros(N, dtype=int))
    assert weights.supported.min() == 1
    assert 0.55 < policy.logged.of_chosen(own).mean() < 0.95


def test_each_decision_is_replayed_once_at_its_own_lambda(
    tmp_path: Path, live: tuple[Router, Path], monkeypatch: pytest.MonkeyPatch
):
    def spread(n: int, one: dict[str, Any]) -> None:
        if "lambda" in one:
            one["lambda"] = (n % 50) / 50

    write_log(tmp_path / "log", live[0], spread)
    policy = logged_policy(read_decisions(tmp_path / "log"), live[0])
    replayed: list[int] = []

    def counting(logged: LoggedDecisions, *more: Any) -> list[Replayed]:
        replayed.append(len(logged.ids))
        return replay(logged, *more)

    monkeypatch.setattr(value, "replay", counting)
    found = router_policy(policy, live[0])
    assert (len(replayed), sum(replayed)) == (len(np.unique(policy.read.lam)), len(policy.read.ids))
    for lam in (0.0, 0.5):
        rows = policy.read.lam == lam
        assert rows.any()
        assert np.array_equal(found[rows], router_policy(policy, live[0], lam)[rows])


def test_an_observed_checkpoint_is_evaluated_without_reading_prompts(tmp_path: Path, live: tuple[Router, Path]):
    write_log(tmp_path / "log", live[0])
    log = read_decisions(tmp_path / "log")
    policy = logged_policy(log, replace(live[0], id="canary"))
    choices = router_policy(policy, replace(live[0], id="canary"))
    wanted = [
        next(one["model"] for one in (entry["decision"], *entry["observed"]) if one["checkpoint"] == "canary")
        for entry in log.values()
    ]
    assert [MODELS[place] for place in choices.argmax(axis=1)] == wanted


def test_the_job_writes_values_near_the_truth(
    tmp_path: Path, live: tuple[Router, Path], capsys: pytest.CaptureFixture[str]
):
    write_log(tmp_path / "log", live[0])
    policies = (Policy(), Policy(mix={"cheap": 1.0}), Policy(lam=1.0, name="cheapest"))
    said = run(config_of(tmp_path, live, lambdas=(0.0,), policies=policies, utility_lambda=0.5))
    assert said.startswith("1,000 decisions, ")
    assert "not fully supported" in said
    found = read_json(tmp_path / "out" / "value.json")
    rows = {one["policy"]: one for one in found["policies"]}
    assert list(rows) == ["logging policy", "lambda 0", "logged lambdas", "always cheap", "cheapest"]
    live_row = rows["logged lambdas"]
    assert live_row["supported"] == 1
    assert live_row["score"]["dr"]["lower"] < 0.7 < live_row["score"]["dr"]["upper"]
    assert abs(rows["always cheap"]["score"]["dr"]["estimate"] - 0.5) < 0.1
    assert 0 < rows["always cheap"]["supported"] < 1
    assert rows["always cheap"]["difference"]["score"]["snips"]["estimate"] is None
    assert rows["always cheap"]["cost_usd"]["dr"]["estimate"] == pytest.approx(2e-4, rel=0.2)
    utility = 0.5 * rows["cheapest"]["score"]["dr"]["estimate"]
    assert rows["cheapest"]["utility"]["dr"]["estimate"] == pytest.approx(utility, abs=0.02)
    assert found["policies"][0]["changed"] == pytest.approx(0.2, abs=0.2)
    printed = capsys.readouterr().out
    assert f"{live_row['score']['dr']['estimate']:.3f}" in printed
    assert "does not name conversations" in printed
    page = (tmp_path / "out" / "value.html").read_text()
    assert "<svg" in page
    assert "always cheap" in page


def test_conversations_are_clusters(tmp_path: Path, live: tuple[Router, Path]):
    def name(n: int, one: dict[str, Any]) -> None:
        if one["kind"] == "decision":
            one["conversation"] = f"c{n // 4}"

    write_log(tmp_path / "log", live[0], name)
    policy = logged_policy(read_decisions(tmp_path / "log"), live[0])
    assert (policy.conversations, len(np.unique(policy.logged.clusters))) == (True, N // 4)


def test_decisions_that_are_no_draw_between_routers_are_left_out(tmp_path: Path, live: tuple[Router, Path]):
    def change(n: int, one: dict[str, Any]) -> None:
        if n < 3 and one["kind"] == "observed":
            one["reason"] = "session"  # of the arm that did not decide
        if n == 3 and one["kind"] == "decision":
            del one["candidates"]
        if n == 4 and one["kind"] == "observed":
            one |= {"model": None, "error": "no server"}
        if n == 5 and one["kind"] == "answer":
            one |= {"served": None, "cost_usd": None}

    write_log(tmp_path / "log", live[0], change)
    policy = logged_policy(read_decisions(tmp_path / "log"), live[0])
    assert policy.left_out == {"not_routed": 1, "unknown_propensity": 1, "moved": 3, "not_read": 0}
    assert len(policy.score) == N - 5
    assert (~policy.answered).sum() == 1
    assert policy.cost[~policy.answered] == 0


def test_a_mix_is_drawn_among_the_candidates(tmp_path: Path, live: tuple[Router, Path]):
    def change(n: int, one: dict[str, Any]) -> None:
        if n == 0 and "candidates" in one:
            one["candidates"] = [own for own in one["candidates"] if own["model"] != "cheap"]

    write_log(tmp_path / "log", live[0], change)
    policy = logged_policy(read_decisions(tmp_path / "log"), live[0])
    assert mixed_policy(policy, {"cheap": 1.0, "middle": 3.0})[:2].tolist() == [[0, 1, 0], [0.25, 0.75, 0]]
    assert mixed_policy(policy, {"cheap": 1.0})[0].tolist() == policy.logged.propensities[0].tolist()
    with pytest.raises(InputError, match="policies: 'gone' is not in the pool; known: cheap, middle, dear"):
        mixed_policy(policy, {"gone": 1.0})


def test_a_log_without_a_canary_says_that_nothing_else_has_support(
    tmp_path: Path, live: tuple[Router, Path], capsys: pytest.CaptureFixture[str]
):
    write_log(tmp_path / "log", live[0], arms=1)
    run(config_of(tmp_path, live, policies=(Policy(mix={"cheap": 1.0}),)))
    assert "Every logged choice had a propensity of 1" in capsys.readouterr().out


def test_logs_that_cannot_be_evaluated_are_refused_in_one_line(tmp_path: Path, live: tuple[Router, Path]):
    def without(n: int, one: dict[str, Any]) -> None:
        if one["kind"] == "observed":
            one |= {"kind": "answer", "served": "cheap"}

    write_log(tmp_path / "log", live[0], without)
    config = config_of(tmp_path, live)
    with pytest.raises(InputError, match=r"none of its 1,000 decisions .* \(1,000: the propensity is unknown\)"):
        run(config)
    write_log(tmp_path / "log", live[0], feedback=0.0)
    with pytest.raises(InputError, match="1,000 decisions with a known propensity has feedback; send it to POST"):
        run(config)
    write_log(tmp_path / "log", live[0])
    with pytest.raises(InputError, match=r"did not read them\).*decided or observed: [0-9a-f]+, canary|canary, "):
        run(config_of(tmp_path, live, made_by="gone"))
    with pytest.raises(InputError, match="policies: 2 have 1 names; give each its own name"):
        run(config_of(tmp_path, live, lambdas=(0.5,), policies=(Policy(lam=0.5),)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": {"cheap": 1.0}, "lambda": 0.1}, "mix: given with lam"),
        ({"novelty_above": 0.5}, "one is given without the other"),
        ({"mix": {"cheap": 0.0}}, "greater than 0"),
        ({"lambda": 2}, "less than or equal to 1"),
    ],
)
def test_policies_that_contradict_themselves_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Policy.model_validate(settings)


def test_another_checkpoint_reads_the_prompts_with_progress(
    tmp_path: Path,
    live: tuple[Router, Path],
    minilm: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("test_off_policy_job.N", 24)
    encoder = TransformersEncoder(EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))
    other = save_checkpoint(tiny_router(encoder.info.fingerprint, "middle"), tmp_path / "other")
    prompts = [f"What is {n} times {n + 1}?" for n in range(24)]

    def prompt(n: int, one: dict[str, Any]) -> None:
        if one["kind"] == "decision":
            one["prompt"] = prompts[n]

    write_log(tmp_path / "log", live[0], prompt, feedback=1.0)
    config = config_of(tmp_path, (other, tmp_path / "other"), policies=(Policy(lam=0.0, margin=False),))
    run(config)
    assert "prompts" in capsys.readouterr().err
    found = read_json(tmp_path / "out" / "value.json")
    asked = [one["decision"]["model"] for one in read_decisions(tmp_path / "log").values()]
    with LocalRouter(other) as local:
        wanted = [local.route(one, 0.0).model for one in prompts]
    assert found["evaluated"] == other.id
    assert found["policies"][1]["changed"] == pytest.approx(np.mean(np.array(asked) != np.array(wanted)))
    write_log(tmp_path / "log", live[0])
    with pytest.raises(InputError, match=r"the log lacks 24 of their 24 prompts; log them with gateway\.log\.prompts"):
        run(config)
