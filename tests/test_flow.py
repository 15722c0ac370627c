"""All jobs end to end on the built-in sample: files, figures, errors, and equal decisions offline and over HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from within_family import within_family_auc

from jobs import evaluate, prefill, probe, promote, register, train
from prefill_router.experiments import leave_one_out
from prefill_router.files import read_json
from prefill_router.metrics.controls import chance_figures, truncation_figures
from prefill_router.metrics.evaluate import evaluate as recompute
from prefill_router.metrics.predictions import read_predictions
from prefill_router.outcomes.sample import write_sample
from prefill_router.outcomes.table import load_outcomes
from prefill_router.pool import load_pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import read_activations
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.config import FitConfig

ROOT = Path(__file__).parents[1]
RESAMPLES = 20


@dataclass(frozen=True)
class Flow:
    folder: Path

    @property
    def inputs(self) -> dict[str, object]:
        return {
            "outcomes": self.folder / "sample/outcomes.parquet",
            "pool": self.folder / "sample/pool.yaml",
            "activations": (self.folder / "activations",),
        }


@pytest.fixture(scope="module")
def flow(ray_cluster: None, minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flow]:
    """Sample, prefill, probe, train and evaluate, once for this file."""
    folder = tmp_path_factory.mktemp("flow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        write_sample(folder / "sample", n_queries=1200)
        made = Flow(folder)
        prefill.run(
            prefill.PrefillConfig(
                input=folder / "sample/outcomes.parquet",
                output=folder / "activations",
                encoder=EncoderConfig(model=minilm),
                actors=2,
            )
        )
        probe.run(probe.ProbeConfig(**made.inputs, output=folder / "probe"))
        train.run(train.TrainConfig(**made.inputs, output=folder, fit=FitConfig()))
        evaluate.run(
            evaluate.EvaluateConfig(
                **made.inputs, checkpoint=folder / "checkpoint", output=folder / "evaluation", resamples=RESAMPLES
            )
        )
        yield made


def test_within_a_family_the_prefill_router_ranks_and_the_category_prior_cannot(flow: Flow):
    outcomes = load_outcomes(flow.inputs["outcomes"], load_pool(flow.inputs["pool"]))
    predictions = read_predictions(flow.folder / "evaluation/predictions.parquet")
    place = {query_id: row for row, query_id in enumerate(outcomes.query_ids)}
    test = np.array([place[query_id] for query_id in predictions.query_ids])
    within = {}
    for name, router in predictions.routers.items():
        p = np.full(outcomes.correct.shape, np.nan)
        p[test] = router.p
        within[name] = within_family_auc(outcomes, test, p)
    assert within["category_prior"] == 0.5
    assert within["prefill"] >= 0.70


def test_metrics_follow_from_the_parquet_files_alone(flow: Flow):
    folder = flow.folder / "evaluation"
    metrics = read_json(folder / "metrics.json")
    assert set(metrics["routers"]) == {"prefill", "category_prior", "knn", "unified_mlp", "best_single"}
    predictions, drawn = read_predictions(folder / "predictions.parquet"), {"n_resamples": RESAMPLES, "seed": 0}
    controls = {
        **chance_figures(read_predictions(folder / "controls.parquet"), **drawn),
        "truncation": truncation_figures(pq.read_table(folder / "truncation.parquet"), predictions, **drawn),
    }
    assert {**recompute(predictions, **drawn), "controls": controls} == metrics


def test_the_report_says_that_the_data_is_simulated_and_names_the_encoder(flow: Flow):
    report = (flow.folder / "evaluation/report.html").read_text()
    assert "SIMULATED DATA" in report
    assert "bidirectional" in report


def test_evaluation_refuses_other_prices(flow: Flow, tmp_path: Path):
    pool = (flow.folder / "sample/pool.yaml").read_text()
    (tmp_path / "pool.yaml").write_text(pool.replace("input_usd_per_mtok: ", "input_usd_per_mtok: 1", 1))
    said = refuse(
        "evaluate",
        "--outcomes",
        flow.inputs["outcomes"],
        "--pool",
        tmp_path / "pool.yaml",
        "--activations",
        flow.folder / "activations",
        "--checkpoint",
        flow.folder / "checkpoint",
        "--output",
        tmp_path / "e",
    )
    assert "is not the pool of the checkpoint" in said


def test_the_probe_writes_a_row_per_layer_key_and_target_and_a_summary(flow: Flow):
    table = pq.read_table(flow.folder / "probe/layers.parquet")
    assert table.num_rows == 8 * 6
    assert {
        "pooling",
        "layer",
        "target",
        "auc",
        "fisher_j",
        "d_eff",
        "d_eff_raw",
        "anisotropy",
        "anisotropy_raw",
    } <= set(table.column_names)
    summary = read_json(flow.folder / "probe/summary.json")
    assert -1 <= summary["rank_correlation"] <= 1
    assert summary["auc_lost"] >= 0
    assert "sentence encoder" in (flow.folder / "probe/geometry.html").read_text()


def test_the_protocols_are_evaluated_and_a_second_run_trains_nothing(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trunk = {"widths": [16], "learning_rate": 0.01, "members": 2, "kept": 1, "max_epochs": 3}
    train.run(
        train.TrainConfig(
            **flow.inputs, output=tmp_path, fit=FitConfig.model_validate({"strategy": "fisher", "trunk": trunk})
        )
    )
    config = evaluate.EvaluateConfig(
        **flow.inputs,
        checkpoint=tmp_path / "checkpoint",
        output=tmp_path / "evaluation",
        resamples=RESAMPLES,
        baselines=False,
        seeds=2,
        leave_one_benchmark_out=True,
        perturbed_queries=30,
    )
    evaluate.run(config)
    first = read_json(tmp_path / "evaluation/metrics.json")
    assert first["seeds"]["seeds"] == [0, 1]
    assert first["seeds"]["routers"]["prefill"]["auc"]["by_seed"][0] == first["routers"]["prefill"]["auc"]["estimate"]
    unseen = first["leave_one_benchmark_out"]["routers"]["prefill"]["auc"]["estimate"]
    assert unseen != first["routers"]["prefill"]["auc"]["estimate"]
    assert 0 <= first["routers"]["prefill"]["robustness"]["all"]["flip_rate"]["estimate"] < 1
    assert "prefill" in (tmp_path / "evaluation/seeds.md").read_text()

    def train_nothing(*args: object, **kwargs: object) -> None:
        raise AssertionError("the second run must not train")

    monkeypatch.setattr("prefill_router.workflows.evaluate.fit_router", train_nothing)
    monkeypatch.setattr(leave_one_out, "fit_router", train_nothing)
    evaluate.run(config)
    assert read_json(tmp_path / "evaluation/metrics.json") == first


def test_one_prompt_gets_one_decision_by_the_dataset_and_by_http(flow: Flow):
    from ray import serve as ray_serve

    from serve.config import RouterAppConfig
    from serve.local import start

    register.register(
        register.RegisterConfig(checkpoint=flow.folder / "checkpoint", evaluation=flow.folder / "evaluation")
    )
    promote.promote(promote.PromoteConfig(version=1))
    router, activations = load_checkpoint(flow.folder / "checkpoint"), read_activations(flow.folder / "activations")
    outcomes = load_outcomes(flow.inputs["outcomes"], router.pool)
    queries = np.random.default_rng(0).choice(len(outcomes), 24, replace=False)
    rows = activations.rows(list(outcomes.query_ids[queries]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = start(
        RouterAppConfig.model_validate(
            {
                "checkpoint": "models:/prefill-router@champion",
                "gateway": {"cpus": 0.1},
                "router": {"cpus": 0.1},
                "encoder": {"cpus": 0.5},
            }
        ),
        port,
    )
    try:
        for lam in (0.0, 0.35):
            batch = router.decide({activations.fingerprint: rows}, lam)
            for query, decision in zip(queries, batch, strict=True):
                answer = httpx.post(
                    f"{url}/v1/route", json={"prompt": outcomes.prompts[query], "lambda": lam}, timeout=60
                ).json()
                assert answer["checkpoint"] == router.id
                assert answer["model"] == decision.model
                assert [c["model"] for c in answer["candidates"]] == [c.model for c in decision.candidates]
                for mine, theirs in zip(decision.candidates, answer["candidates"], strict=True):
                    assert theirs["confidence"] == pytest.approx(mine.confidence, abs=1e-3)
                    # The expected output tokens are predicted from the states, as the confidence is.
                    for name in ("cost_usd", "expected_output_tokens"):
                        assert theirs[name] == pytest.approx(getattr(mine, name), rel=1e-3)
    finally:
        ray_serve.shutdown()


def refuse(job: str, *options: object) -> str:
    """Runs the command of a job, which must exit with 2 and one line on stderr; returns the line."""
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_evaluation_refuses_outcomes_that_the_checkpoint_was_not_trained_on(flow: Flow, tmp_path: Path):
    table = pq.read_table(flow.inputs["outcomes"])
    pq.write_table(table.slice(0, table.num_rows - 60), tmp_path / "fewer.parquet")
    said = refuse(
        "evaluate",
        "--outcomes",
        tmp_path / "fewer.parquet",
        "--pool",
        flow.inputs["pool"],
        "--activations",
        flow.folder / "activations",
        "--checkpoint",
        flow.folder / "checkpoint",
        "--output",
        tmp_path / "e",
    )
    assert "they are not the outcomes that the checkpoint was trained on" in said
    assert not (tmp_path / "e").exists()


def test_training_refuses_activations_of_other_prompts(flow: Flow, tmp_path: Path):
    table = pq.read_table(flow.inputs["outcomes"]).to_pandas()
    first = table["query_id"].iloc[0]
    table.loc[table["query_id"] == first, "prompt"] = "something else entirely"
    table.to_parquet(tmp_path / "other.parquet")
    said = refuse(
        "train",
        "--outcomes",
        tmp_path / "other.parquet",
        "--pool",
        flow.inputs["pool"],
        "--activations",
        flow.folder / "activations",
        "--output",
        tmp_path / "t",
    )
    assert f"query_id {first!r} was encoded from another prompt" in said
    assert not (tmp_path / "t" / "checkpoint").exists()
