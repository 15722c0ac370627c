"""Summary over seeds: variances add up, differences are paired, undefined figures have a reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import ENCODER, QUICK, make_pool, make_router
from evaluation_pool import made_up
from scipy.stats import t

from prefill_router.errors import InputError
from prefill_router.experiments import leave_one_out
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import RouterPredictions
from prefill_router.metrics.seeds import across_seeds, markdown
from prefill_router.outcomes.splits import split_queries
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import Activations
from prefill_router.routing.config import FitConfig
from prefill_router.signals.join import Signals


def run(auc, width, difference=None):
    """metrics.json of one seed: one figure, and a second router with a difference."""
    figure = {"estimate": auc, "lower": auc - width / 2, "upper": auc + width / 2}
    other = {
        "auc": figure | {"per_model": {"A": figure}},
        "chosen_lambda": 0.1,
        "differences": {"auc": {"estimate": difference, "lower": None, "upper": None}},
    }
    return {"pool": {"n_queries": 10, "oracle_accuracy": figure}, "routers": {"prefill": {"auc": figure}, "knn": other}}


def test_golden_three_seeds_and_the_two_variances_apart():
    summary = across_seeds({0: run(0.70, 0.0392), 1: run(0.72, 0.0392), 2: run(0.80, 0.0392)})
    found = summary["routers"]["prefill"]["auc"]
    sd = np.std([0.70, 0.72, 0.80], ddof=1)
    assert found["mean"] == pytest.approx(0.74)
    assert found["by_seed"] == [0.70, 0.72, 0.80]
    assert found["sd_seeds"] == pytest.approx(sd)
    assert found["sd_test"] == pytest.approx(0.01, rel=1e-3)
    assert found["sd_training"] ** 2 + found["sd_test"] ** 2 == pytest.approx(sd**2)
    half = t.ppf(0.975, 2) * sd * np.sqrt(1 / 3 + 15 / 85)
    assert (found["lower"], found["upper"]) == (pytest.approx(0.74 - half), pytest.approx(0.74 + half))
    assert summary["pool"]["oracle_accuracy"]["mean"] == pytest.approx(0.74)
    assert summary["routers"]["knn"]["auc"]["per_model"]["A"]["mean"] == pytest.approx(0.74)


def test_sd_training_is_null_if_the_test_draw_exceeds_sd_seeds():
    summary = across_seeds({0: run(0.7, 0.4), 1: run(0.7001, 0.4)})
    assert summary["routers"]["prefill"]["auc"]["sd_training"] is None


def test_differences_are_those_of_each_seed():
    summary = across_seeds({0: run(0.7, 0.04, -0.01), 1: run(0.9, 0.04, -0.03)})
    found = summary["routers"]["knn"]["differences"]["auc"]
    assert found["by_seed"] == [-0.01, -0.03]
    assert "| prefill less knn | +0.0200 [" in markdown(summary)


def test_a_figure_that_is_undefined_at_one_seed_has_no_mean():
    undefined = run(0.7, 0.04)
    undefined["routers"]["prefill"]["auc"] = {"estimate": None, "lower": None, "upper": None, "reason": "one class"}
    found = across_seeds({0: run(0.7, 0.04), 1: undefined})["routers"]["prefill"]["auc"]
    assert found["mean"] is None
    assert "one class" in found["reason"]


def test_summary_covers_every_figure_and_the_table_every_router():
    by_seed = {seed: evaluate(made_up(200, 5, seed=seed), n_resamples=20) for seed in range(3)}
    summary = across_seeds(by_seed)
    assert summary["seeds"] == [0, 1, 2]
    prefill = summary["routers"]["prefill"]
    for path in (("p_auccc_exact",), ("disagreement", "auc"), ("macro", "auc"), ("literature", "routellm", "apgr")):
        node = prefill
        for step in path:
            node = node[step]
        assert node["lower"] <= node["mean"] <= node["upper"], path
    table = markdown(summary)
    assert all(f"| {name} |" in table for name in summary["routers"])
    assert "| prefill less knn |" in table


def test_left_out_confidences_replace_those_in_domain_query_by_query():
    predictions = made_up(90, 3, missing=0)
    other = {name: RouterPredictions(1 - router.p, 0.9) for name, router in predictions.routers.items()}
    unseen = dataclasses.replace(predictions, routers=other)
    names = sorted(set(predictions.benchmarks))
    parts = {name: unseen.take(np.flatnonzero(predictions.benchmarks == name)[::-1]) for name in names}
    combined = leave_one_out.combine(predictions, parts)
    for name, router in predictions.routers.items():
        np.testing.assert_array_equal(combined.routers[name].p, 1 - router.p)
        assert combined.routers[name].chosen_lambda == router.chosen_lambda


def test_one_benchmark_cannot_be_left_out():
    leave_one_out.check(np.array(["one", "two"], dtype=object))
    with pytest.raises(InputError, match="all queries are of the benchmark 'only'"):
        leave_one_out.check(np.full(60, "only", dtype=object))


class SignalsInMemory(Signals):
    """Signals with states in memory."""

    def __init__(self, outcomes, states):
        n_tokens = {ENCODER: np.full(len(outcomes), 12)}
        for name, value in {
            "outcomes": outcomes,
            "layer_keys": states.layer_keys,
            "in_memory": states,
            "n_tokens": n_tokens,
            "activations": {ENCODER: object.__new__(Activations)},
        }.items():
            object.__setattr__(self, name, value)

    def states(self, key):
        return self.in_memory(key)

    @property
    def encoders(self):
        return {ENCODER: EncoderConfig()}


def test_labels_of_a_benchmark_do_not_reach_the_router_that_leaves_it_out():
    _, outcomes, states = make_router()
    config = FitConfig(components=4, each_pooling=False, trunk=QUICK)
    split = split_queries(outcomes, 0)

    def predict(outcomes):
        return leave_one_out.predict_unseen(
            make_pool(), SignalsInMemory(outcomes, states), split, config, "bench1", baselines=False
        )

    before = predict(outcomes)
    assert set(before.benchmarks) == {"bench1"}
    assert set(before.query_ids) <= set(outcomes.query_ids[split.test])
    flipped = np.where((outcomes.benchmarks == "bench1")[:, None], 1 - outcomes.correct, outcomes.correct)
    after = predict(dataclasses.replace(outcomes, correct=flipped))
    np.testing.assert_array_equal(before.routers["prefill"].p, after.routers["prefill"].p)
