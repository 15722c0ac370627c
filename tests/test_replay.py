"""Replay of a decision log, and labels from it: the records that the gateway writes are read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_router import MODELS, tiny_router

from jobs.learn import LearnConfig
from jobs.learn import run as run_learn
from jobs.replay import ReplayConfig
from jobs.replay import run as run_replay
from prefill_router.controller import LocalRouter
from prefill_router.decisions.log import PREFIX, read_decisions
from prefill_router.decisions.replay import logged_decisions, replay, reproduced
from prefill_router.errors import InputError
from prefill_router.files import read_json
from prefill_router.outcomes.table import pivot, read_note, read_outcomes
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.policy import Margin, TrainingMeans
from prefill_router.routing.router import Router
from serve.answers import Note
from serve.chat import AUTO
from serve.decision_log import DecisionLog, DecisionLogConfig
from serve.plan import answer_record, decided, decision_record
from serve.router import Checkpoint

PROMPTS = [f"What is {n} times {n + 1}, and why does question {n} matter?" for n in range(12)]
LAMBDAS = (0.0, 0.13, 0.5)


@pytest.fixture(scope="module")
def routers(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Router, Router]:
    """Two checkpoints of the same models; the first has a margin."""
    encoder = TransformersEncoder(EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))
    margin = Margin(TrainingMeans(np.array([0.9, 0.7, 0.6]), np.array([0.0, 0.1, 0.9])), 0.9)
    folder = tmp_path_factory.mktemp("routers")
    first = replace(tiny_router(encoder.info.fingerprint, "middle"), margin=margin)
    return save_checkpoint(first, folder / "first"), save_checkpoint(
        tiny_router(encoder.info.fingerprint, "dear"), folder / "second"
    )


@pytest.fixture(scope="module")
def checkpoints(routers: tuple[Router, Router], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.getbasetemp()
    return [next(folder.glob("routers*/first")), next(folder.glob("routers*/second"))]


def write_log(folder: Path, router: Router, prompts: bool = True, feedback: bool = False) -> None:
    """The log of a server of `router` that got PROMPTS at LAMBDAS, every third request without the cheapest model."""
    log = DecisionLog(DecisionLogConfig(folder=folder, prompts=prompts))
    checkpoint = Checkpoint(router.id, "here", router.pool, dict(router.encoders))
    with LocalRouter(router) as local:
        rows = local.encode(PROMPTS)
        for n, prompt in enumerate(PROMPTS):
            own = {name: table.slice(n, 1) for name, table in rows.items()}
            models = MODELS[1:] if n % 3 == 0 else None
            (decision,) = local.decide(own, LAMBDAS[n % len(LAMBDAS)], Requirements(models=models))
            plan = decided(AUTO, decision, None)
            log.note(f"d{n:02d}", "decision", decision_record(plan, checkpoint, prompt if prompts else None))
            if feedback:
                model = next(one for one in router.pool.models if one.name == decision.model)
                note = Note(model, 0.0, {"fallbacks": []})
                usage = {"prompt_tokens": 10 + n, "completion_tokens": 5}
                log.note(f"d{n:02d}", "answer", answer_record(note, 200, usage, None, 0.5))
                log.note(f"d{n:02d}", "feedback", {"score": 0.0, "source": None})
                log.note(f"d{n:02d}", "feedback", {"score": float(n % 2), "source": None})
    log.close()


def test_the_decisions_that_were_made_are_reproduced_bit_for_bit(tmp_path: Path, routers: tuple[Router, Router]):
    router, _ = routers
    write_log(tmp_path, router)
    logged = logged_decisions(read_decisions(tmp_path), router.pool.names, router.id)
    assert logged.allowed.sum(axis=1).tolist() == [2, 3, 3] * 4
    assert reproduced(logged, router).all()
    logged.p[4, 1] -= 1e-12  # a change of the last bit alone may be rounded away in the score
    assert np.flatnonzero(~reproduced(logged, router)).tolist() == [4]


def test_another_lambda_and_no_margin_give_the_decisions_of_the_router(tmp_path: Path, routers: tuple[Router, Router]):
    router, _ = routers
    write_log(tmp_path, router)
    logged = logged_decisions(read_decisions(tmp_path), router.pool.names, router.id)
    with_margin, without = replay(logged, router, [0.3])[0], replay(logged, router, [0.3], margin=False)[0]
    assert (with_margin.chosen != without.chosen).any()
    for margin, decider in ((True, router), (False, replace(router, margin=None))):
        (found,) = replay(logged, router, [0.3], margin)
        with LocalRouter(decider) as local:
            for n, prompt in enumerate(PROMPTS):
                wanted = local.route(prompt, 0.3, models=MODELS[1:] if n % 3 == 0 else None)
                assert router.pool.names[found.chosen[n]] == wanted.model
                assert found.confidence[n] == pytest.approx(wanted.chosen.confidence, abs=1e-5)  # another batch
                assert found.cost[n] == pytest.approx(wanted.chosen.cost_usd)


def test_another_checkpoint_reads_the_prompts(tmp_path: Path, routers: tuple[Router, Router], checkpoints: list[Path]):
    first, second = routers
    write_log(tmp_path / "log", first)
    config = ReplayConfig(
        log=tmp_path / "log", checkpoint=str(checkpoints[1]), output=tmp_path / "out", made_by=first.id, lambdas=(0.0,)
    )
    assert run_replay(config).startswith(f"12 decisions of {first.id}; written to")
    rows = pq.read_table(tmp_path / "out" / "replay.parquet").to_pylist()
    with LocalRouter(second) as local:
        for n, row in enumerate(rows):
            wanted = local.route(PROMPTS[n], 0.0, models=MODELS[1:] if n % 3 == 0 else None)
            assert (row["decision_id"], row["model"]) == (f"d{n:02d}", wanted.model)
            assert row["confidence"] == pytest.approx(wanted.chosen.confidence, abs=1e-5)
    write_log(tmp_path / "silent", first, prompts=False)
    with pytest.raises(InputError, match=r"the log lacks 12 of their 12 prompts; log them with gateway\.log\.prompts"):
        run_replay(config.model_copy(update={"log": tmp_path / "silent"}))


def test_the_job_writes_what_it_prints(
    tmp_path: Path, routers: tuple[Router, Router], checkpoints: list[Path], capsys: pytest.CaptureFixture[str]
):
    router, other = routers
    write_log(tmp_path / "log", router)
    (tmp_path / "log" / f"{PREFIX}0-000000.jsonl").write_text('{"decision_id": "cut", "kind": "deci')
    config = ReplayConfig(log=tmp_path / "log", checkpoint=str(checkpoints[0]), output=tmp_path / "out")
    assert "; 12 reproduced bit for bit; written to" in run_replay(config)
    figures = read_json(tmp_path / "out" / "replay.json")
    assert (figures["decisions"], figures["reproduced"], figures["not_reproduced"]) == (12, 12, [])
    assert sum(figures["made"]["models"].values()) == 12
    by_lambda = {one["lambda"]: one for one in figures["replayed"]}
    assert by_lambda[1.0]["models"] == {"cheap": 8, "middle": 4}
    rows = pq.read_table(tmp_path / "out" / "replay.parquet").to_pylist()
    assert by_lambda[1.0]["cost_usd"] == pytest.approx(sum(row["cost_usd"] for row in rows if row["lambda"] == 1))
    assert f"{by_lambda[1.0]['cost_usd']:.6f}" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"made_by: no decision .* {other.id}; it has decisions of {router.id}"):
        run_replay(config.model_copy(update={"made_by": other.id}))
    with pytest.raises(InputError, match=r"log: .* holds no decision; give the folder"):
        run_replay(config.model_copy(update={"log": tmp_path / "out"}))
    with pytest.raises(InputError, match="novelty_above, fallback_model: one is given without the other"):
        run_replay(config.model_copy(update={"novelty_above": 0.5}))


def test_feedback_becomes_outcomes(tmp_path: Path, routers: tuple[Router, Router]):
    router, _ = routers
    write_log(tmp_path / "log", router, feedback=True)
    config = LearnConfig(log=tmp_path / "log", output=tmp_path / "outcomes.parquet")
    assert run_learn(config).startswith("12 labels of 12 decisions in")
    made = {name: one["answer"]["served"] for name, one in read_decisions(tmp_path / "log").items()}
    outcomes = pivot(read_outcomes(config.output), sorted(set(made.values())))
    for n, prompt in enumerate(PROMPTS):
        row = outcomes.prompts.tolist().index(prompt)
        (model,) = np.flatnonzero(outcomes.labelled[row])
        assert outcomes.models[model] == made[f"d{n:02d}"]
        assert outcomes.correct[row, model] == n % 2  # of the last feedback
        assert outcomes.input_tokens[row, model] == 10 + n
    assert set(outcomes.benchmarks) == {"log"}


def test_labels_join_earlier_outcomes_of_the_same_prompt(tmp_path: Path, routers: tuple[Router, Router]):
    router, _ = routers
    write_log(tmp_path / "log", router, feedback=True)
    log = read_decisions(tmp_path / "log")
    (served, other) = (log["d05"]["answer"]["served"], log["d06"]["answer"]["served"])
    another = next(name for name in MODELS if name != served)
    earlier = [
        ("old5", PROMPTS[5], another, 1),
        ("old6", PROMPTS[6], other, 1),  # the log says 0: the earlier label stays
        ("old7", PROMPTS[7], log["d07"]["answer"]["served"], None),
    ]
    table = {
        "query_id": [row[0] for row in earlier],
        "benchmark": ["arithmetic"] * 3,
        "prompt": [row[1] for row in earlier],
        "model": [row[2] for row in earlier],
        "correct": [row[3] for row in earlier],
    }
    own = pa.table(table | {"cost_usd": [0.5, 0.25, 0.125]}).replace_schema_metadata({"note": "SIMULATED"})
    pq.write_table(own, tmp_path / "before.parquet")
    config = LearnConfig(log=tmp_path / "log", output=tmp_path / "all.parquet", outcomes=tmp_path / "before.parquet")
    assert run_learn(config).endswith("left out: 0 without a known model or feedback, 0 without prompt, 1 repeated")
    outcomes = pivot(read_outcomes(config.output), sorted({served, another, other}))
    assert len(outcomes) == 12
    assert read_note(config.output) == "SIMULATED"
    costs = {row["query_id"]: row["cost_usd"] for row in pq.read_table(config.output).to_pylist()[:2]}
    assert costs == {"old5": 0.5, "old6": 0.25}
    with pytest.raises(InputError, match=r"output: got .*before.parquet, the file of outcomes"):
        run_learn(config.model_copy(update={"output": config.outcomes}))

    def label(query: str, model: str) -> float:
        return float(outcomes.correct[outcomes.query_ids.tolist().index(query), outcomes.models.index(model)])

    assert (label("old5", another), label("old5", served)) == (1, 1)
    assert label("old6", other) == 1
    assert label("old7", log["d07"]["answer"]["served"]) == 1
    assert outcomes.benchmarks.tolist().count("arithmetic") == 3


def test_the_last_feedback_counts_in_whichever_file_it_is(tmp_path: Path, routers: tuple[Router, Router]):
    write_log(tmp_path, routers[0], feedback=True)
    path = next(tmp_path.glob("*.jsonl"))
    late = {"decision_id": "d00", "kind": "feedback", "time": 2e10, "score": 1.0, "source": None}
    (tmp_path / f"{PREFIX}00000000-000000.jsonl").write_text(json.dumps(late) + "\n")
    assert f"{PREFIX}00000000" < path.name
    assert [one["score"] for one in read_decisions(tmp_path)["d00"]["feedback"]] == [0.0, 0.0, 1.0]


def test_feedback_after_route_is_a_label_of_the_chosen_model(tmp_path: Path, routers: tuple[Router, Router]):
    write_log(tmp_path / "log", routers[0], feedback=True)
    path = next((tmp_path / "log").glob("*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line | {"conversation": line["decision_id"]} for line in lines if line["kind"] != "answer"]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    run_learn(LearnConfig(log=tmp_path / "log", output=tmp_path / "outcomes.parquet"))
    rows = {row["prompt"]: row for row in pq.read_table(tmp_path / "outcomes.parquet").to_pylist()}
    chosen = {line["prompt"]: line["model"] for line in kept if line["kind"] == "decision"}
    rated = {one["decision"]["prompt"] for one in read_decisions(tmp_path / "log").values() if one.get("feedback")}
    assert {prompt: row["model"] for prompt, row in rows.items()} == {prompt: chosen[prompt] for prompt in rated}
    assert {row["output_tokens"] for row in rows.values()} == {None}


def test_a_log_without_labels_is_refused_with_the_reasons(tmp_path: Path, routers: tuple[Router, Router]):
    router, _ = routers
    write_log(tmp_path / "log", router)
    with pytest.raises(InputError, match="12 decisions gives a label: 12 have no known model or no feedback"):
        run_learn(LearnConfig(log=tmp_path / "log", output=tmp_path / "outcomes.parquet"))
    assert not (tmp_path / "outcomes.parquet").exists()


def test_records_are_read_as_they_are_written(tmp_path: Path, routers: tuple[Router, Router], checkpoints: list[Path]):
    write_log(tmp_path, routers[0], feedback=True)
    lines: list[dict[str, Any]] = [
        json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    assert {line["kind"] for line in lines} == {"decision", "answer", "feedback"}
    assert load_checkpoint(checkpoints[0]).id == lines[0]["checkpoint"]
