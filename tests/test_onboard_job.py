"""jobs.onboard and jobs.repool: checkpoints, records and pages from files, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import TwoEncoders
from scipy.special import expit
from tiny_router import MODELS, tiny_router

from prefill_router.errors import InputError
from prefill_router.experiments.predict_pair import seen_in_training
from prefill_router.files import read_json
from prefill_router.outcomes.splits import split_queries
from prefill_router.outcomes.table import load_outcomes
from prefill_router.pool import Pool, TargetModel, load_pool, save_pool
from prefill_router.prefill.dataset import read_activations
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.repool import remove_models
from prefill_router.routing.router import Router
from prefill_router.workflows import onboard, repool
from prefill_router.workflows.inputs import note_fallback_only
from prefill_router.workflows.onboard import OnboardConfig
from prefill_router.workflows.repool import RepoolConfig

N = 120


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A checkpoint with random weights, activations of its encoder, and labels of `newer` that follow layer 2."""
    folder = tmp_path_factory.mktemp("onboard")
    made = TwoEncoders(n=N)
    activations = made.write(folder)["activations"][0]
    router = tiny_router(read_activations(activations).fingerprint, hidden=8)
    save_checkpoint(router, folder / "checkpoint")
    states = made.values[made.layer_keys[1]]
    p, _ = router.confidences(router.features(lambda _: states))
    logits = np.log(p / (1 - p)).mean(axis=1)
    right = np.random.default_rng(0).random(N) < expit(8 * (logits - logits.mean()))
    rows = [
        {
            "query_id": made.outcomes.query_ids[at],
            "benchmark": made.outcomes.benchmarks[at],
            "prompt": made.outcomes.prompts[at],
            "model": model,
            "correct": (int(right[at]) if model == "newer" else int(at % 2)) if at < 100 else None,
            "input_tokens": 24,
            "output_tokens": 55,
        }
        for at in range(N)
        for model in ("newer", "other")
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "new.parquet")
    model = TargetModel(name="newer", input_usd_per_mtok=0.2, output_usd_per_mtok=0.4)
    models = (model, model.model_copy(update={"name": "other"}))
    save_pool(Pool(models=models), folder / "new.yaml")
    return {
        "outcomes": folder / "new.parquet",
        "pool": folder / "new.yaml",
        "activations": (activations,),
        "checkpoint": str(folder / "checkpoint"),
        "draws": 2,
        "folds": 3,
    }


def added(inputs: dict[str, object], output: Path, **more: object) -> tuple[str, Router]:
    summary = onboard.run(OnboardConfig.model_validate(inputs | {"model": "newer", "output": output} | more))
    return summary, load_checkpoint(output / "checkpoint")


def test_a_head_with_evidence_becomes_a_candidate_and_its_record_is_in_the_manifest(inputs, tmp_path: Path):
    summary, router = added(inputs, tmp_path)
    assert router.pool.names == (*MODELS, "newer")
    assert "newer is a candidate" in summary
    record = read_json(tmp_path / "onboard.json")
    (kept,) = router.manifest["onboarded"]
    assert kept == {name: value for name, value in record.items() if name != "checkpoint"}
    assert (record["labels"], record["fallback_only"], record["checkpoint"]) == (100, False, router.id)
    assert record["from"] == load_checkpoint(inputs["checkpoint"]).id
    held_out = pq.read_table(tmp_path / "held_out.parquet")
    p, correct = (held_out.column(name).to_numpy() for name in ("p", "correct"))
    assert record["held_out"]["brier"]["estimate"] == pytest.approx(np.square(p - correct).mean())
    assert router.costs.median_output[-1] == 55
    assert router.costs.token_ratio[-1] == pytest.approx(2.0)  # 24 recorded tokens, 12 of the encoder
    page = (tmp_path / "onboard.html").read_text()
    assert "after 100 labelled queries" in page
    assert "<svg" in page


def test_a_head_learns_fractional_labels_as_right_or_wrong(inputs, tmp_path: Path):
    rows = pq.read_table(inputs["outcomes"]).to_pylist()
    share = {0: 0.4, 1: 0.6, None: None}
    fractional = [row | {"correct": share[row["correct"]]} for row in rows]
    pq.write_table(pa.Table.from_pylist(fractional), tmp_path / "fractional.parquet")
    whole, shares = (
        added(inputs | {"outcomes": outcomes}, tmp_path / name)[1]
        for name, outcomes in (("whole", inputs["outcomes"]), ("shares", tmp_path / "fractional.parquet"))
    )
    np.testing.assert_array_equal(whole.changed.heads[0].mean, shares.changed.heads[0].mean)


def test_the_queries_of_training_and_onboarding_count_as_seen_after_the_pool_has_changed(inputs, tmp_path: Path):
    router = load_checkpoint(inputs["checkpoint"])
    rows = [
        {"query_id": f"t{at}", "benchmark": "b", "prompt": f"training {at}", "model": model, "correct": at % 2}
        for at in range(60)
        for model in MODELS
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "training.parquet")
    trained = load_outcomes(tmp_path / "training.parquet", router.pool)
    fit = FitConfig()
    manifest = {**router.manifest, "outcomes_digest": trained.digest(), "fit": fit.model_dump(mode="json")}
    save_checkpoint(replace(router, manifest=manifest, id=""), tmp_path / "checkpoint")
    _, onboarded = added(inputs | {"checkpoint": str(tmp_path / "checkpoint")}, tmp_path / "added")
    changed = remove_models(onboarded, ["cheap"])
    assert changed.manifest["trained_targets"] == list(MODELS)

    test = split_queries(trained, fit.seed, fit.scheme).test
    labels = load_outcomes(inputs["outcomes"], Pool(models=(onboarded.pool.models[-1],)))
    tables = [tmp_path / "training.parquet", inputs["outcomes"]]
    for one in (onboarded, changed):
        np.testing.assert_array_equal(np.flatnonzero(~seen_in_training(one, trained, tables)), np.sort(test))
        np.testing.assert_array_equal(seen_in_training(one, labels, tables), labels.labelled[:, 0])
    with pytest.raises(InputError, match=r"none of .* has the labels with which newer was added"):
        seen_in_training(onboarded, trained, tables[:1])
    without_record = {key: value for key, value in changed.manifest.items() if key != "trained_targets"}
    with pytest.raises(InputError, match="an earlier release did not record which"):
        seen_in_training(replace(changed, manifest=without_record), trained, tables)


def test_the_same_inputs_give_the_same_checkpoint(inputs, tmp_path: Path):
    assert added(inputs, tmp_path / "a")[1].id == added(inputs, tmp_path / "b")[1].id


def test_a_head_without_evidence_is_offered_as_fallback_only(inputs, tmp_path: Path):
    summary, _ = added(inputs, tmp_path / "auto", least_labels=200)
    assert "offered as fallback only (100 labels, at least 200 are needed)" in summary
    assert load_pool(tmp_path / "auto/checkpoint/pool.yaml").models[-1].fallback_only
    assert "offered as fallback only" in (tmp_path / "auto/onboard.html").read_text()
    forced = added(inputs, tmp_path / "forced", least_labels=200, offer="candidate")[1]
    assert not forced.pool.models[-1].fallback_only


def test_a_pool_with_fallback_only_models_is_warned_of_once_and_another_never(capsys: pytest.CaptureFixture[str]):
    models = tiny_router("a" * 16).pool.models
    note_fallback_only(Pool(models=models))
    assert not capsys.readouterr().out
    held = [one.model_copy(update={"fallback_only": one.name != "cheap"}) for one in models]
    note_fallback_only(Pool(models=tuple(held)))
    assert capsys.readouterr().out.startswith("warning: fallback_only of middle, dear does not hold")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "absent"}, "'absent' is not in the pool"),
        ({"model": "middle"}, "'middle' is a model that the checkpoint was trained on"),
    ],
)
def test_unsuitable_models_are_refused(inputs, tmp_path: Path, change: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        onboard.run(OnboardConfig.model_validate(inputs | {"output": tmp_path} | change))


def test_too_few_labels_are_refused(inputs, tmp_path: Path):
    pq.write_table(pq.read_table(inputs["outcomes"]).slice(0, 12), tmp_path / "few.parquet")
    with pytest.raises(InputError, match="6 labelled queries of newer, at least 10 are needed"):
        added(inputs | {"outcomes": tmp_path / "few.parquet"}, tmp_path / "out")


def test_repool_changes_prices_and_removes_models(inputs, tmp_path: Path):
    prices = Pool(models=(TargetModel(name="dear", input_usd_per_mtok=1.0, output_usd_per_mtok=1.0),))
    save_pool(prices, tmp_path / "prices.yaml")
    summary = repool.run(
        RepoolConfig(
            checkpoint=inputs["checkpoint"], output=tmp_path, reprice=tmp_path / "prices.yaml", remove=("cheap",)
        )
    )
    router = load_checkpoint(tmp_path / "checkpoint")
    assert router.pool.names == ("middle", "dear")
    assert router.costs.per_input_token[1] == pytest.approx(1e-6)
    assert "cheap removed; dear repriced; 2 models" in summary
    (removed,), (repriced,) = router.manifest["removed"], router.manifest["repriced"]
    assert (removed["model"], repriced["model"], repriced["after"]["input_usd_per_mtok"]) == ("cheap", "dear", 1.0)


def test_a_repool_without_a_change_is_refused(inputs, tmp_path: Path):
    with pytest.raises(ValueError, match="reprice, remove: got neither"):
        RepoolConfig(checkpoint=inputs["checkpoint"], output=tmp_path)
