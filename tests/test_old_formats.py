"""Files that commit d52bd7e wrote, under its names (`chat`, `blocks`, `engine`, `embedded`), are still read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import read_predictions, write_predictions
from prefill_router.outcomes.table import load_outcomes
from prefill_router.pool import load_pool, save_pool
from prefill_router.prefill.config import MINILM, EncoderConfig
from prefill_router.prefill.dataset import read_activations
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.signals.join import join

OLD = Path(__file__).parent / "data" / "d52bd7e"


def test_an_old_checkpoint_decides_as_it_did_on_old_activations():
    expected = json.loads((OLD / "expected.json").read_text())
    router, activations = load_checkpoint(OLD / "checkpoint"), read_activations(OLD / "activations")
    rows = {activations.fingerprint: activations.rows(expected["query_ids"])}
    decisions = router.decide(rows, expected["lambda"])
    for now, then in zip(decisions, expected["decisions"], strict=True):
        assert now.model == then["model"]
        for candidate, (model, *numbers) in zip(now.candidates, then["candidates"], strict=True):
            assert candidate.model == model
            mine = [candidate.confidence, candidate.uncertainty, candidate.cost_usd, candidate.score]
            # Scaler, PCA and trunk are in single precision, and BLAS kernels round differently: 2e-8 apart on Haswell.
            assert mine == pytest.approx(numbers, rel=0, abs=1e-5)


def test_an_old_checkpoint_keeps_its_id_and_is_saved_in_the_present_format(tmp_path: Path):
    router = load_checkpoint(OLD / "checkpoint")
    manifest = json.loads((OLD / "checkpoint" / "manifest.json").read_text())
    assert router.id == manifest["id"]
    assert router.manifest["target_layers"] == manifest["lineage"]["target_blocks"]
    save_checkpoint(router, tmp_path / "checkpoint")
    written = json.loads((tmp_path / "checkpoint" / "manifest.json").read_text())
    assert (manifest["format_version"], written["format_version"]) == (1, 3)
    assert written["layer_keys"] == manifest["blocks"]
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert loaded.layer_keys == router.layer_keys
    np.testing.assert_array_equal(loaded.projections[0].components, router.projections[0].components)


def test_old_predictions_give_the_old_figures(tmp_path: Path):
    predictions = read_predictions(OLD / "predictions.parquet")
    then = json.loads((OLD / "metrics.json").read_text())
    now = evaluate(predictions, n_resamples=20, seed=0)["routers"]["prefill"]
    for name in ("auc", "brier", "p_auccc", "headroom_captured", "cost_saving"):
        then_figure, now_figure = then["routers"]["prefill"][name], now[name]
        for end in ("estimate", "lower", "upper"):
            assert now_figure[end] == pytest.approx(then_figure[end], abs=1e-9)
    write_predictions(predictions, tmp_path / "predictions.parquet")
    assert "chat" in pq.read_schema(OLD / "predictions.parquet").names
    names = pq.read_schema(tmp_path / "predictions.parquet").names
    assert "cost_norm" in names
    assert "chat" not in names


def test_an_old_pool_file_keeps_its_self_hosted_cost(tmp_path: Path):
    pool = load_pool(OLD / "pool.yaml")
    assert pool.models[0].self_hosted is not None
    assert pool.models[0].self_hosted.gpu_usd_per_hour == 2.5
    save_pool(pool, tmp_path / "pool.yaml")
    text = (tmp_path / "pool.yaml").read_text()
    assert "self_hosted:" in text
    assert "engine:" not in text
    assert load_pool(tmp_path / "pool.yaml") == pool


def test_old_activations_join_their_outcomes_under_the_present_encoder_name():
    pool, activations = load_pool(OLD / "pool.yaml"), read_activations(OLD / "activations")
    signals = join(load_outcomes(OLD / "outcomes.parquet", pool), [activations])
    assert signals.encoders[activations.fingerprint].model == activations.encoder.model == MINILM
    assert signals.states(signals.layer_keys[0]).shape == (240, 384)


def test_old_spellings_of_an_encoder_configuration_are_read():
    old = {"model": "embedded", "backend": "engine", "engine": {"base_url": "http://127.0.0.1:9/v1"}}
    config = EncoderConfig.model_validate(old)
    assert (config.model, config.backend) == ("minilm", "vllm_server")
    assert config.vllm_server.base_url == "http://127.0.0.1:9/v1"


def test_a_field_given_under_both_names_is_refused():
    with pytest.raises(ValueError, match="vllm_server: given twice, also under its earlier name engine"):
        EncoderConfig.model_validate({"engine": {}, "vllm_server": {}})


def test_the_recorded_fit_of_an_old_checkpoint_has_no_stack_no_margin_and_no_length_head():
    """Further seeds of an evaluation train the router that the checkpoint holds, not the present default."""
    router = load_checkpoint(OLD / "checkpoint")
    fit = FitConfig.recorded(router.manifest["fit"])
    assert (fit.stack, fit.margin, fit.lengths, fit.calibrator) == ((), False, "median", "platt")
    assert (router.stack, router.margin) == (None, None)
    present = FitConfig()
    assert FitConfig.recorded(present.model_dump(mode="json")) == present
