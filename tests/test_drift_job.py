"""The drift job on synthetic logs: what it finds, what it says with too little traffic, its files and its page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_router import MODELS, tiny_router

from jobs.drift import DriftConfig, run
from prefill_router.decisions.log import PREFIX, read_decisions
from prefill_router.drift.alerts import alerts, verdict
from prefill_router.drift.calibration import calibrations
from prefill_router.drift.check import Settings, check_drift
from prefill_router.drift.energy import energy_test
from prefill_router.drift.features import feature_test
from prefill_router.drift.traffic import read_traffic, reference_confidences
from prefill_router.errors import InputError
from prefill_router.files import read_json
from prefill_router.metrics.predictions import Predictions, RouterPredictions, write_predictions
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.reports.drift_page import figures, render
from prefill_router.routing.checkpoint import save_checkpoint
from prefill_router.routing.router import Router
from prefill_router.signals.novelty import Novelty, Spread

N, START, STEP = 1_200, 1.8e9, 60.0  # decisions, Unix time of the first, seconds between two
Novel = Callable[[int, np.random.Generator], float]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Router:
    """A router with 3,000 held-out distances, saved to the folder `checkpoint`."""
    novelty = Novelty((Spread(np.ones(4), 1.0),), np.linspace(0, 1, 3_000, dtype=np.float32))
    folder = tmp_path_factory.mktemp("drift") / "checkpoint"
    return save_checkpoint(replace(tiny_router("f" * 16), novelty=novelty), folder)


@pytest.fixture(scope="module")
def checkpoint(router: Router, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(next(tmp_path_factory.getbasetemp().glob("drift*/checkpoint")))


def confidences(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.beta([6, 5, 4], [2, 3, 3], size=(n, 3))


def evaluation(folder: Path) -> Path:
    """An evaluation with confidences like those of the logs."""
    p = confidences(np.random.default_rng(5), 600)
    ids, nothing = np.array([f"q{n}" for n in range(600)], dtype=object), np.zeros(p.shape)
    routers = {"prefill": RouterPredictions(p, 0.0)}
    write_predictions(
        Predictions(ids, ids, ids, MODELS, nothing, nothing, nothing, routers), folder / "predictions.parquet"
    )
    return folder


def records(router: Router, n: int = N, novelty: Novel | None = None, fall: float = 0.0, **fields: Any) -> list[Any]:
    """Records of `n` decisions with calibrated feedback. From the middle on, `fall` lowers the share of right answers
    of MODELS[0]; `novelty` gives that of each decision, uniform if None."""
    rng, found = np.random.default_rng(1), []
    p = confidences(rng, n)
    for number in range(n):
        order = np.argsort(-p[number]).tolist()
        time, name = START + STEP * number, f"d{number:05d}"
        score = {"uncertainty": 0.1, "cost_usd": 0.1, "score": 0.5, "expected_output_tokens": 9.0}
        decision = {
            "model": MODELS[order[0]],
            "propensity": 1.0,
            "checkpoint": router.id,
            "key": f"team-{number % 2}",
            "lambda": 0.0,
            "novelty": float(rng.random()) if novelty is None else novelty(number, rng),
            "candidates": [{"model": MODELS[at], "confidence": float(p[number, at])} | score for at in order],
        }
        right = p[number, order[0]] - (fall if number >= n // 2 and order[0] == 0 else 0)
        found += [
            {"decision_id": name, "kind": "decision", "time": time} | decision | fields,
            {"decision_id": name, "kind": "answer", "time": time + 1, "served": MODELS[order[0]]},
            {"decision_id": name, "kind": "feedback", "time": time + 2, "score": float(rng.random() < right)},
        ]
    return found


def write(folder: Path, lines: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{PREFIX}a-000000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def later_novel(number: int, rng: np.random.Generator) -> float:
    return float(rng.random() if number < N // 2 else rng.beta(6, 1))


def test_still_traffic_gives_no_alert_and_says_why_not_to_train_again(tmp_path: Path, router: Router, checkpoint: str):
    log = write(tmp_path / "log", records(router) + records(router, 3, checkpoint="another"))
    config = DriftConfig(
        log=log, checkpoint=checkpoint, output=tmp_path / "out", evaluation=evaluation(tmp_path), fail_on_alert=True
    )
    said = run(config)
    assert said == (
        "train again: no, because nothing was found in 1,197 decisions and 1,197 feedbacks (not tested: features)"
    )
    found = read_json(tmp_path / "out" / "drift.json")
    assert (found["decisions"], found["other_checkpoints"]) == (1_197, 3)
    assert (found["provenance"]["log"], found["provenance"]["activations"]) == (str(log), "")
    assert read_json(tmp_path / "out" / "alerts.json") == {
        "checkpoint": router.id,
        "train_again": False,
        "because": said.removeprefix("train again: no, because "),
        "alerts": [],
    }


def test_novel_traffic_and_low_feedback_are_alarms_since_the_time_of_the_change(
    tmp_path: Path, router: Router, checkpoint: str, capsys: pytest.CaptureFixture[str]
):
    log = write(tmp_path / "log", records(router, novelty=later_novel, fall=0.4))
    config = DriftConfig(
        log=log,
        checkpoint=checkpoint,
        output=tmp_path / "out",
        evaluation=evaluation(tmp_path),
        recent=400,
        fail_on_alert=True,
    )
    with pytest.raises(SystemExit) as ended:
        run(config)
    assert ended.value.code == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("drift: train again: yes, because queries are more novel than the reference since about")
    found = {alert["name"]: alert for alert in read_json(tmp_path / "out" / "alerts.json")["alerts"]}
    assert set(found) == {"novelty", "novelty_psi", "calibration_low/cheap"}
    assert {alert["severity"] for alert in found.values()} == {"alarm"}
    assert found["novelty"]["since"] == "2027-01-15T18:00:00+00:00"  # START + 600 minutes
    assert all(alert["value"] >= alert["bound"] for alert in found.values())
    assert all(alert["what_to_do"] for alert in found.values())


def test_the_alarms_read_all_decisions_and_the_other_tests_recent_ones(router: Router):
    def early(number: int, rng: np.random.Generator) -> float:
        return float(rng.beta(6, 1) if number < 300 else rng.random())

    traffic = read_traffic(of_records(records(router, novelty=early)), MODELS, router.id)
    drift = check_drift(traffic, Settings(recent=600), 3_000)
    (alert,) = alerts(drift)
    assert (alert.name, alert.severity) == ("novelty", "warning")
    assert verdict(drift, [alert]).because.startswith("a warning but no alarm in 1,200 decisions")


@pytest.mark.parametrize(
    ("first", "last", "state"),
    [
        (1_180, 1_200, "for 100 decisions so far"),  # too few for an index
        (900, 1_200, "with a stability index of"),  # most of the 2,000 recent decisions are before it
        (300, 500, "a little, or not any more"),  # over since 700 decisions
    ],
)
def test_the_novelty_alarm_is_confirmed_by_the_last_decisions_since_the_shift(
    router: Router, first: int, last: int, state: str
):
    def shifted(number: int, rng: np.random.Generator) -> float:
        return float(rng.beta(50, 1) if first <= number < last else rng.random())

    traffic = read_traffic(of_records(records(router, novelty=shifted)), MODELS, router.id)
    drift = check_drift(traffic, Settings(), 3_000)
    alert = next(one for one in alerts(drift) if one.name == "novelty")
    assert state in alert.text
    assert (alert.severity == "alarm") == (last == N)
    assert drift.novelty is not None
    assert drift.novelty.since_alarm is not None
    assert drift.novelty.since_alarm.live == {1_180: 100, 900: 300, 300: 500}[first]
    page = render(drift, alerts(drift), verdict(drift, alerts(drift)), {})
    assert f"Stability index of the last {drift.novelty.since_alarm.live} decisions, all since" in page
    assert figures(drift)["novelty"]["since_alarm"]["live"] == drift.novelty.since_alarm.live


def test_earlier_traffic_can_be_the_reference(router: Router):
    """Traffic that never was like the training, and does not change."""
    traffic = read_traffic(of_records(records(router, novelty=lambda n, rng: float(rng.beta(6, 1)))), MODELS, router.id)
    (first, *_) = alerts(check_drift(traffic, Settings(), 3_000))
    assert (first.name, first.severity) == ("novelty", "alarm")
    assert alerts(check_drift(traffic, Settings(baseline=400), 3_000)) == []


@pytest.mark.parametrize(("n", "baseline"), [(150, 0), (450, 300)])
def test_little_traffic_is_not_tested(router: Router, n: int, baseline: int):
    traffic = read_traffic(of_records(records(router, n, fall=0.5)), MODELS, router.id)
    drift = check_drift(traffic, Settings(baseline=baseline), 3_000, confidences(np.random.default_rng(0), 500))
    assert drift.novelty is None
    assert drift.confidences == ()
    assert str(verdict(drift, [])) == "train again: no, because 150 decisions are too few to say (200 are needed)"
    assert "150 decisions" in drift.untested["novelty"]
    render(drift, [], verdict(drift, []), {"domain": "key"})


def test_changed_confidences_are_a_warning(router: Router):
    traffic = read_traffic(of_records(records(router)), MODELS, router.id)
    drift = check_drift(traffic, Settings(), 3_000, confidences(np.random.default_rng(0), 900)[:, [2, 1, 0]])
    assert {(alert.name, alert.severity) for alert in alerts(drift)} == {
        ("confidence_psi/cheap", "warning"),
        ("confidence_psi/dear", "warning"),
    }


def of_records(lines: list[Any]) -> dict[str, Any]:
    """As read_decisions, without a file."""
    log: dict[str, Any] = {}
    for line in lines:
        own = {name: value for name, value in line.items() if name not in ("decision_id", "kind")}
        one = log.setdefault(line["decision_id"], {})
        one[line["kind"]] = [own] if line["kind"] == "feedback" else own
    return log


def test_feedback_is_of_the_model_that_answered_in_the_order_in_which_it_came(tmp_path: Path, router: Router):
    lines = records(router, 4)
    lines[1]["served"] = MODELS[2]  # a fallback
    lines[4]["served"] = None  # nobody answered
    lines.append({"decision_id": "d00002", "kind": "feedback", "time": 2e9, "score": 0.7})
    traffic = read_traffic(read_decisions(write(tmp_path, lines)), MODELS, router.id)
    feedback = traffic.feedback
    assert feedback.decision.tolist() == [0, 3, 2]
    assert MODELS[feedback.model[0]] == MODELS[2]
    assert feedback.confidence[0] == traffic.decisions.p[0, 2]
    assert feedback.score[2] == 0.7
    assert feedback.domain == ("team-0", "team-1", "team-0")
    assert np.isnan(feedback.propensity).tolist() == [lines[0]["model"] != MODELS[2], False, False]
    strict = read_traffic(read_decisions(tmp_path), MODELS, router.id, "requested", 0.8).feedback
    assert strict.score[2] == 0
    assert set(strict.domain) == {"unknown"}


def test_feedback_on_a_decision_without_a_chat_is_of_the_chosen_model(tmp_path: Path, router: Router):
    lines = [line for line in records(router, 3) if line["kind"] != "answer"]
    decisions = [line for line in lines if line["kind"] == "decision"]
    for line, conversation in zip(decisions, ("d00000", "0" * 64, None), strict=True):  # /v1/route, a chat, an old log
        line["conversation"] = conversation
    feedback = read_traffic(read_decisions(write(tmp_path, lines)), MODELS, router.id).feedback
    assert feedback.decision.tolist() == [0]
    assert MODELS[feedback.model[0]] == decisions[0]["model"]


def test_calibration_is_given_per_model_and_per_domain_by_hand(router: Router):
    log = of_records(records(router))
    for n, one in enumerate(log.values()):
        one["decision"]["propensity"] = 0.25 if n % 3 else 1.0
    feedback = read_traffic(log, MODELS, router.id).feedback
    found = {(one.model, one.domain): one for one in calibrations(feedback, MODELS)}
    assert {domain for _, domain in found} == {None, "team-0", "team-1"}
    own = (feedback.model == 0) & (np.array(feedback.domain) == "team-1")
    one, p, score = found["cheap", "team-1"], feedback.confidence[own], feedback.score[own]
    assert one.feedback == own.sum()
    assert one.gap.estimate == pytest.approx((score - p).mean())
    assert one.brier.estimate == pytest.approx(np.square(score - p).mean())
    weights = 1 / feedback.propensity[own]
    assert one.weighted_gap is not None
    assert one.weighted_gap.estimate == pytest.approx(np.average(score - p, weights=weights))
    assert one.gap.lower is not None
    assert one.gap.lower < one.gap.estimate < one.gap.upper
    bins = np.minimum((p * 15).astype(int), 14)
    ece = sum(abs((score - p)[bins == b].sum()) for b in range(15)) / len(p)
    assert one.ece.estimate == pytest.approx(ece)


def test_a_page_with_every_section_is_self_contained(router: Router):
    rng = np.random.default_rng(2)
    test = energy_test(rng.normal(size=(60, 4)), rng.normal(1, 1, size=(50, 4)))
    traffic = read_traffic(of_records(records(router, novelty=later_novel, fall=0.4)), MODELS, router.id)
    drift = check_drift(traffic, Settings(), 3_000, confidences(rng, 500), test)
    found = alerts(drift)
    assert ("features", "warning") in {(alert.name, alert.severity) for alert in found}
    page = render(drift, found, verdict(drift, found), {"domain": "key", "log": "<b>"})
    assert page.count("<svg") == 14
    assert "Not tested" not in page
    assert "&lt;b&gt;" in page
    assert not re.search(r'(?:src|href)="(?!#)', page)


def test_the_features_of_like_prompts_do_not_differ_and_those_of_others_do(minilm: str):
    encoder = TransformersEncoder(EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))
    router, n = tiny_router(encoder.info.fingerprint), 50
    numbers = np.random.default_rng(3).permutation(2 * n)
    sums = [f"What is {number} times {number + 3}?" for number in numbers]
    songs = [f"Sing me song number {number} about the rain in spring." for number in range(n)]
    log = of_records(records(replace(router, id="x"), 2 * n))

    def test_of(prompts: list[str]) -> Any:
        for one, prompt in zip(log.values(), prompts, strict=True):
            one["decision"]["prompt"] = prompt
        return feature_test(read_traffic(log, MODELS, "x"), router, [], None, n=n, recent=n, baseline=n)

    changed, still = test_of([*sums[:n], *songs]), test_of(sums)
    assert changed.p_value < 0.01 < still.p_value
    assert still.coefficient < 0.1 < changed.coefficient


def test_features_without_prompts_or_reference_are_not_tested(router: Router):
    log = of_records(records(router, 60))
    assert "0 recent prompts" in str(feature_test(read_traffic(log, MODELS, router.id), router, [], None, 50, 60))
    for one in log.values():
        one["decision"]["prompt"] = "What?"
    traffic = read_traffic(log, MODELS, router.id)
    assert "test queries of an evaluation" in str(feature_test(traffic, router, [], None, 50, 60))


def test_an_evaluation_of_other_models_and_a_baseline_without_rest_are_refused(
    tmp_path: Path, router: Router, checkpoint: str
):
    p = np.full((3, 2), 0.5)
    ids = np.array(["a", "b", "c"], dtype=object)
    zeros = np.zeros(p.shape)
    predictions = Predictions(
        ids, ids, ids, ("cheap", "x"), zeros, zeros, zeros, {"prefill": RouterPredictions(p, 0.0)}
    )
    with pytest.raises(InputError, match="give the evaluation of the checkpoint"):
        reference_confidences(predictions, MODELS)
    log = write(tmp_path / "log", records(router, 20))
    config = DriftConfig(log=log, checkpoint=checkpoint, output=tmp_path / "out", baseline=20)
    with pytest.raises(InputError, match="baseline: got 20 of 20 decisions"):
        run(config)


def test_the_command_ends_with_the_verdict_and_exit_code_0(tmp_path: Path, router: Router, checkpoint: str):
    log = write(tmp_path / "log", records(router, 30))
    command = [sys.executable, "-m", "jobs.drift", "--log", str(log), "--checkpoint", checkpoint]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stderr) == (0, "")
    last = done.stdout.splitlines()[-1]
    assert last == "drift: train again: no, because 30 decisions are too few to say (200 are needed)"


def test_the_novelty_of_test_queries_can_be_the_reference(router: Router):
    """Unseen queries are closer to the training than held-out training queries, which hides a shift for longer."""
    usual = np.random.default_rng(4).beta(2, 2.5, 800)

    def shifted(number: int, rng: np.random.Generator) -> float:
        return float(rng.beta(2, 2.5) if number < N // 2 else rng.beta(2.5, 2))

    traffic = read_traffic(of_records(records(router, novelty=shifted)), MODELS, router.id)
    found = check_drift(traffic, Settings(recent=200), usual).novelty
    assert found is not None
    assert found.alarm.alarm_at is not None
    assert found.alarm.alarm_at > N // 2
    assert found.recent.reference == 800
    hidden = check_drift(traffic, Settings(), 3_000).novelty
    assert hidden is not None
    assert hidden.alarm.alarm_at is None or hidden.alarm.alarm_at > found.alarm.alarm_at
