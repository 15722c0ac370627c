"""metrics.json: contract, intervals, invariances, and recomputation from predictions.parquet."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluation_pool import made_up
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router.errors import InputError
from prefill_router.metrics.bootstrap import interval, resample
from prefill_router.metrics.evaluate import evaluate, evaluate_figures
from prefill_router.metrics.figures import all_figures
from prefill_router.metrics.predictions import (
    Predictions,
    RouterPredictions,
    read_predictions,
    write_predictions,
)
from prefill_router.metrics.split import prepare
from prefill_router.routing.policy import TrainingMeans

SCALARS = (
    "auc",
    "brier",
    "ece",
    "p_auccc",
    "mdp_auccc",
    "p_auccc_exact",
    "p_auccc_exact_over_hull",
    "efficacy",
    "oracle_accuracy",
    "best_single_accuracy",
    "max_router_accuracy",
    "headroom_captured",
    "cost_saving",
    "routed_to_accuracy",
    "headroom_captured_at_chosen_lambda",
    "cost_saving_at_chosen_lambda",
)


@pytest.fixture(scope="module")
def predictions():
    return made_up(group_size=3)


@pytest.fixture(scope="module")
def metrics(predictions):
    return evaluate(predictions, n_resamples=200, seed=1)


def take(predictions, queries):
    ids = np.array([f"{predictions.query_ids[q]}/{i}" for i, q in enumerate(queries)], dtype=object)
    return dataclasses.replace(
        predictions,
        query_ids=ids,
        benchmarks=predictions.benchmarks[queries],
        groups=predictions.groups[queries],
        correct=predictions.correct[queries],
        cost=predictions.cost[queries],
        cost_norm=predictions.cost_norm[queries],
        routers={
            name: RouterPredictions(router.p[queries], router.chosen_lambda)
            for name, router in predictions.routers.items()
        },
    )


def estimates(predictions):
    """The estimate of every figure, by its path."""
    return first_row(all_figures(prepare(predictions), np.ones((1, len(predictions)))))


def first_row(figures, path=()):
    """The first resample of every figure of a group, by its path."""
    if figures is None:
        return {}
    if isinstance(figures, np.ndarray):
        return {path: figures[0]}
    below = figures if isinstance(figures, dict) else vars(figures)
    return {key: value for name, part in below.items() for key, value in first_row(part, (*path, name)).items()}


def assert_same(ours, theirs, scale=1.0):
    assert ours.keys() == theirs.keys()
    for path in ours:
        if path[-1] == "arena_score" and scale != 1:
            continue  # its cost range is in US dollars
        by = (
            scale
            if re.fullmatch(
                r"cost(?!_sav)(_.*)?|.*_(single|oracle)_cost|oracle_cost|.*_usd",
                path[-1].removesuffix("_at_chosen_lambda"),
            )
            else 1.0
        )
        assert ours[path] * by == pytest.approx(theirs[path], abs=1e-9 * by, rel=1e-7, nan_ok=True), path


def leaves(tree):
    return [tree] if "estimate" in tree else [leaf for below in tree.values() for leaf in leaves(below)]


def test_metrics_json_has_the_documented_structure_and_no_nan(metrics):
    json.dumps(metrics, allow_nan=False)
    for name, router in metrics["routers"].items():
        for scalar in SCALARS:
            figure = router[scalar]
            assert figure["lower"] <= figure["estimate"] <= figure["upper"], (name, scalar)
        assert set(router["auc"]["per_model"]) == {model["name"] for model in metrics["pool"]["models"]}
        assert router["auc"]["estimate"] == pytest.approx(
            np.mean([model["estimate"] for model in router["auc"]["per_model"].values()])
        )
        assert {len(router["curve"][column]) for column in ("lambda", "cost", "accuracy", "X", "Y")} == {101}
        assert ("differences" in router) == (name != "prefill")
    assert sum(part["n"] for part in metrics["pool"]["partitions"].values()) == metrics["pool"]["n_queries"]


def test_metrics_recomputed_from_the_parquet_file_are_the_same(tmp_path, predictions, metrics):
    write_predictions(predictions, tmp_path / "predictions.parquet")
    assert evaluate(read_predictions(tmp_path / "predictions.parquet"), n_resamples=200, seed=1) == metrics


def test_the_parquet_file_may_come_in_any_row_order(tmp_path, predictions):
    write_predictions(predictions, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.field("correct").type == "int8"
    assert table["correct"].null_count == np.isnan(predictions.correct).sum() * len(predictions.routers)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), tmp_path / "b.parquet")
    assert_same(estimates(read_predictions(tmp_path / "b.parquet")), estimates(predictions))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["cost_norm"]), "columns cost_norm are missing"),
        (lambda t: t.slice(1), "each triple must occur exactly once"),
        (lambda t: t.set_column(6, "est_cost_usd", [np.arange(len(t), dtype=float)]), "differs between routers"),
        (lambda t: t.set_column(5, "p", [np.full(len(t), 1.5)]), "allowed is a probability"),
    ],
)
def test_a_broken_predictions_file_is_refused_with_the_reason(tmp_path, predictions, change, message):
    write_predictions(predictions, tmp_path / "predictions.parquet")
    pq.write_table(change(pq.read_table(tmp_path / "predictions.parquet")), tmp_path / "broken.parquet")
    with pytest.raises(InputError, match=message):
        read_predictions(tmp_path / "broken.parquet")


def test_weights_are_the_same_as_duplicated_rows():
    predictions = made_up(120, 4)
    counts = np.random.default_rng(0).poisson(1.0, len(predictions))
    weighted = all_figures(prepare(predictions), counts[None].astype(float))
    duplicated = take(predictions, np.repeat(np.arange(len(predictions)), counts))
    assert_same(first_row(weighted), estimates(duplicated))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(4)), st.sampled_from([0.001, 0.25, 3.7, 1000.0]))
def test_figures_do_not_depend_on_row_order_model_order_or_the_price_scale(seed, models, scale):
    predictions = made_up(60, 4, seed=seed)
    queries = np.random.default_rng(seed).permutation(len(predictions))
    shuffled = take(predictions, queries)
    turned = dataclasses.replace(
        shuffled,
        models=tuple(predictions.models[m] for m in models),
        correct=shuffled.correct[:, models],
        cost=shuffled.cost[:, models] * scale,
        cost_norm=shuffled.cost_norm[:, models],
        routers={
            name: RouterPredictions(router.p[:, models], router.chosen_lambda)
            for name, router in shuffled.routers.items()
        },
        training=TrainingMeans(predictions.training.accuracy[models], predictions.training.cost_norm[models]),
    )
    assert_same(estimates(predictions), estimates(turned), scale)


def test_a_duplicated_test_split_changes_no_estimate(predictions):
    assert_same(estimates(predictions), estimates(take(predictions, np.tile(np.arange(len(predictions)), 2))))


def test_the_oracle_as_router_dominates_every_router():
    predictions = made_up(300, 6, missing=0.0)
    oracle = RouterPredictions(predictions.correct, 0.0)
    metrics = evaluate(
        dataclasses.replace(predictions, routers={**predictions.routers, "oracle": oracle}), n_resamples=50
    )["routers"]
    assert metrics["oracle"]["headroom_captured"]["estimate"] == 1
    assert metrics["oracle"]["auc"]["estimate"] == 1
    assert metrics["oracle"]["brier"]["estimate"] == 0
    for name in predictions.routers:
        for figure, sign in (("p_auccc", 1), ("mdp_auccc", 1), ("efficacy", -1), ("max_router_accuracy", 1)):
            assert sign * (metrics["oracle"][figure]["lower"] - metrics[name][figure]["lower"]) > 0, (name, figure)


def test_differences_are_paired_and_point_from_the_reference(predictions, metrics):
    twin = dataclasses.replace(predictions, routers={**predictions.routers, "twin": predictions.routers["prefill"]})
    for figure in leaves(evaluate(twin, n_resamples=50)["routers"]["twin"]["differences"]):
        assert figure["estimate"] == figure["lower"] == figure["upper"] == 0
    knn, prefill = metrics["routers"]["knn"], metrics["routers"]["prefill"]
    assert {"auc", "ece", "p_auccc_exact", "accuracy_at_chosen_lambda"} <= knn["differences"].keys()
    for name in ("auc", "ece", "p_auccc_exact", "accuracy_at_chosen_lambda"):
        assert knn["differences"][name]["estimate"] == pytest.approx(knn[name]["estimate"] - prefill[name]["estimate"])


def test_resamples_depend_on_the_seed_alone_and_keep_groups_whole():
    groups = np.array(["b", "a", "b", "c", "a", "b"], dtype=object)

    def look(weights):
        return {"weights": weights.copy()}

    draws = resample(look, groups, 30, seed=3, block=7)["weights"]
    np.testing.assert_array_equal(draws, resample(look, groups, 30, seed=3, block=30)["weights"])
    assert not np.array_equal(draws, resample(look, groups, 30, seed=4)["weights"])
    np.testing.assert_array_equal(draws[0], 1)
    for group in "abc":
        assert (draws[:, groups == group] == draws[:, groups == group][:, :1]).all()
    assert (draws[1:, [1, 0, 3]].sum(axis=1) == 3).all()  # three groups are drawn
    order = np.array([3, 1, 0, 5, 4, 2])
    np.testing.assert_array_equal(resample(look, groups[order], 30, seed=3)["weights"], draws[:, order])


def test_the_interval_of_an_accuracy_has_the_binomial_width():
    right = (np.arange(400) < 280).astype(float)
    draws = resample(lambda w: {"a": w @ right / w.sum(axis=1)}, np.arange(400), 4000, seed=0)["a"]
    found = interval(draws)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 400)
    assert found.estimate == 0.7
    assert (found.lower, found.upper) == (pytest.approx(0.7 - half, abs=0.004), pytest.approx(0.7 + half, abs=0.004))


def test_typed_figures_are_those_of_metrics_json(predictions, metrics):
    evaluation = evaluate_figures(predictions, n_resamples=200, seed=1)
    knn = evaluation.routers["knn"]
    assert knn.split.confidence.ece.mean.to_json().items() <= metrics["routers"]["knn"]["ece"].items()
    assert knn.split.curve.p_auccc.to_json() == metrics["routers"]["knn"]["p_auccc"]
    assert knn.benchmarks["logic"].auc.to_json() == metrics["routers"]["knn"]["benchmarks"]["logic"]["auc"]
    difference = evaluation.differences["knn"].split.literature.routellm
    assert difference.apgr.to_json() == metrics["routers"]["knn"]["differences"]["literature"]["routellm"]["apgr"]
    assert evaluation.pool.oracle_cost.to_json() == metrics["pool"]["oracle_cost"]


def test_an_interval_counts_the_resamples_in_which_the_figure_is_undefined():
    assert interval(np.array([0.5, 0.4, np.nan, 0.6])).to_json()["undefined_resamples"] == 1
    assert interval(np.array([np.nan, 0.4]), "because").to_json() == {
        "estimate": None,
        "lower": None,
        "upper": None,
        "reason": "because",
    }


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("correct", 0.5, "correct, query 0, model 0: got 0.5, allowed is 0, 1 or NaN"),
        ("cost", np.nan, "cost, query 0, model 0: got nan"),
        ("cost_norm", 1.5, "cost_norm, query 0, model 0: got 1.5"),
    ],
)
def test_predictions_refuse_numbers_out_of_range(field, value, message):
    predictions = made_up(60, 3)
    wrong = getattr(predictions, field).copy()
    wrong[0, 0] = value
    with pytest.raises(InputError, match=message):
        dataclasses.replace(predictions, **{field: wrong})


def test_predictions_refuse_a_lambda_out_of_range_and_no_routers():
    predictions = made_up(60, 3)
    with pytest.raises(InputError, match=r"chosen_lambda of router 'prefill': got 1\.5"):
        dataclasses.replace(predictions, routers={"prefill": RouterPredictions(predictions.cost_norm, 1.5)})
    with pytest.raises(InputError, match="0 routers"):
        dataclasses.replace(predictions, routers={})
    assert isinstance(predictions, Predictions)
