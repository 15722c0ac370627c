"""Figures of evaluations, compared with pools computed by hand; see test_curves.py for the plane."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from evaluation_pool import made_up
from test_curves import figures, is_null, pool

from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import RouterPredictions, with_overhead
from prefill_router.routing.policy import TrainingMeans


def value(figure):
    return figure["estimate"]


def test_golden_ece_by_bins_of_a_fifteenth():
    # A: bin 1 holds 0.08 and 0.12 (wrong, right), bin 13 holds 0.9 (right). B: two bins with one label each.
    _, router = figures(pool([[0, 1], [1, 0], [1, np.nan]], [1, 2], [[0.08, 0.9], [0.12, 0.3], [0.9, 0.5]]))
    assert value(router["ece"]["per_model"]["A"]) == pytest.approx((abs(0.20 - 1) + 0.1) / 3)
    assert value(router["ece"]["per_model"]["B"]) == pytest.approx((0.1 + 0.3) / 2)
    assert value(router["ece"]) == pytest.approx((0.9 / 3 + 0.2) / 2)


def test_golden_ece_accepts_confidences_of_0_and_1():
    _, router = figures(pool([[0, 1], [1, 1]], [1, 2], [[0, 1], [1, 1]]))
    assert value(router["ece"]) == 0


def test_golden_near_misses():
    # B is always first: q0 wrong, A right and 0.03 below; q1 both wrong; q2 wrong, A right and 0.5 below; q3 right.
    _, router = figures(
        pool([[1, 0], [0, 0], [1, 0], [1, 1]], [1, 2], [[0.5, 0.53], [0.6, 0.62], [0.1, 0.6], [0.3, 0.9]])
    )
    assert {name: value(figure) for name, figure in router["near_misses"].items()} == pytest.approx(
        {"second_right": 2 / 3, "narrow": 2 / 3, "near_miss": 1 / 3}
    )


def test_golden_near_misses_are_undefined_without_wrong_first_choices():
    _, router = figures(pool([[1, 0], [1, 0]], [1, 2], [[0.9, 0.1], [0.9, 0.1]]))
    assert is_null(router["near_misses"]["near_miss"], "no first choice was wrong")


def test_golden_disagreement_equals_an_evaluation_of_those_queries():
    # The part leaves out q2 (all right) and q3 (all wrong).
    p = [[0.9, 0.2], [0.4, 0.6], [0.1, 0.1], [0.8, 0.9]]
    _, full = figures(pool([[1, 0], [0, 1], [1, 1], [0, 0]], [1, 2], p))
    _, part = figures(pool([[1, 0], [0, 1]], [1, 2], p[:2], cost_norm=[0, 1]))
    disagreement = full["disagreement"]
    for name in ("auc", "brier", "ece", "p_auccc", "p_auccc_exact", "headroom_captured", "routed_to_accuracy"):
        assert value(disagreement[name]) == pytest.approx(value(part[name])), name
    assert value(disagreement["auc"]) == 1
    assert value(disagreement["routed_to_accuracy"]) == 1
    assert value(full["routed_to_accuracy"]) == 3 / 4


def test_golden_without_disagreement_the_part_is_left_out():
    _, router = figures(pool([[1, 1], [0, 0]], [1, 2], [[0.9, 0.8], [0.1, 0.9]]))
    assert "disagreement" not in router


def test_golden_macro_counts_benchmarks_micro_counts_queries():
    # Three queries of b, one of c. At lambda 0 the router always chooses B: right on b, b, c.
    pool_figures, router = figures(
        pool([[0, 1], [0, 1], [1, 0], [0, 1]], [1, 2], [[0.1, 0.9]] * 4, benchmarks=["b", "b", "b", "c"])
    )
    assert value(router["routed_to_accuracy"]) == 3 / 4
    assert value(router["macro"]["routed_to_accuracy"]) == pytest.approx((2 / 3 + 1) / 2)
    assert value(pool_figures["macro"]["best_single_accuracy"]) == pytest.approx((2 / 3 + 1) / 2)
    assert value(pool_figures["macro"]["oracle_accuracy"]) == 1
    assert value(router["literature"]["llmrouterbench"]["avg_acc"]) == pytest.approx(5 / 6)
    assert value(router["literature"]["llmrouterbench"]["gain_over_random"]) == pytest.approx((1 / 3 + 1) / 2)


def test_golden_overhead_changes_costs_but_no_choice_and_breaks_even():
    # The router chooses A, A, B at cost 1, 1, 4: mean 2. The best single model is B at 4.
    before = pool([[1, 1], [1, 1], [0, 1]], [1, 4], [[0.9, 0.5], [0.9, 0.5], [0.1, 0.9]])
    _, free = figures(before)
    _, paid = figures(with_overhead(before, 0.5))
    assert value(free["break_even_overhead_usd"]) == value(paid["break_even_overhead_usd"]) == 2
    assert value(paid["cost_at_chosen_lambda"]) == 2.5
    assert value(paid["cost_saving_at_chosen_lambda"]) == 1 - 2.5 / 4
    assert paid["curve"]["accuracy"] == free["curve"]["accuracy"]
    assert paid["curve"]["cost"] == [cost + 0.5 for cost in free["curve"]["cost"]]
    assert value(paid["p_auccc"]) < value(free["p_auccc"])
    _, exact = figures(with_overhead(before, 2.0))
    assert value(exact["cost_saving_at_chosen_lambda"]) == 0


def test_golden_exact_area_of_three_points():
    # q1 moves to the cheaper model A at 1/11, q0 at 1/3. Points (C, A): (3, 1), (2, 1), (1, 1/2).
    pool_figures, router = figures(pool([[0, 1], [1, 1]], [1, 3], [[0.4, 0.9], [0.5, 0.6]], cost_norm=[0, 1]))
    assert router["path_points"] == 3
    x = [0, (1 / 2 - 1 / 3) / (1 - 1 / 3), 1]  # anchors: A at 1 with 1/2, B at 3 with 1
    assert value(router["p_auccc_exact"]) == pytest.approx(x[1] * 1 + (1 - x[1]) * 1 / 2)
    hull = value(pool_figures["mixture_hull"]["p_auccc"])
    assert hull == pytest.approx(3 / 2 * (-1 / 2 * (1 - 1 / 3) + 1 / 2 * math.log(3)))
    assert value(router["p_auccc_exact_over_hull"]) == pytest.approx(value(router["p_auccc_exact"]) - hull)


def test_golden_strong_and_weak_are_the_most_accurate_and_the_cheapest_model():
    pool_figures, router = figures(
        pool([[1, 0, 1], [0, 1, 1], [0, 1, 1]], [1, 2, 3], [[0.5, 0.5, 0.6], [0.1, 0.9, 0.9], [0.5, 0.5, 0.55]])
    )
    assert pool_figures["strong_weak"] == {"strong": "C", "weak": "A"}
    # By p_C - p_A: q1 (gain 1), q0 (0), q2 (1).
    assert value(router["literature"]["routellm"]["apgr"]) == pytest.approx((1 / 4 + 1 / 2 + 3 / 4) / 3)
    assert value(router["literature"]["routellm"]["cpt_80"]) == pytest.approx(2 / 3 + 1 / 3 * 3 / 5)


def test_every_undefined_figure_has_the_reason_of_its_split():
    nan = np.nan
    pools = {
        "nothing complete": pool([[1, nan], [nan, 1], [0, nan]], [1, 2], 0.5),
        "all wrong": pool([[0, 0], [0, 0]], [1, 2], [[0.5, 0.4], [0.3, 0.6]]),
        "all free": pool([[1, 0], [0, 1]], [0, 0], [[0.9, 0.1], [0.1, 0.9]]),
        "another cheapest model in the disagreement part": pool(
            [[1, 0, 0], [1, 1, 1], [1, 1, 1]], [[4, 1, 2], [1, 4, 8], [1, 4, 8]], 0.5
        ),
        "a benchmark without complete labels": pool(
            [[1, 0], [0, 1], [1, nan]], [1, 2], 0.5, benchmarks=["b", "b", "c"]
        ),
        "one model": pool([[1], [0]], [1], 0.5),
    }

    def walk(tree, where):
        if "estimate" in tree and tree["estimate"] is None:
            assert tree["reason"], where
        for name, below in tree.items():
            if isinstance(below, dict):
                walk(below, (*where, name))

    for name, predictions in pools.items():
        walk(evaluate(predictions, n_resamples=3), (name,))
    part = evaluate(pools["nothing complete"], n_resamples=0)["routers"]["prefill"]
    assert is_null(part["near_misses"]["narrow"], "no query has a label for every model")


def test_a_model_and_a_benchmark_may_be_named_like_a_figure():
    predictions = made_up(120, 4, missing=0)
    named = dataclasses.replace(
        predictions,
        models=("ece", "auc", "disagreement", "accuracy"),
        benchmarks=np.where(predictions.benchmarks == "logic", "ece", predictions.benchmarks),
    )
    plain, odd = (evaluate(given, n_resamples=50)["routers"]["knn"] for given in (predictions, named))
    for one, two in zip(predictions.models, named.models, strict=True):
        assert plain["routed_to"][one] == odd["routed_to"][two]
    assert plain["benchmarks"]["logic"] == odd["benchmarks"]["ece"]


def test_a_dominated_model_that_is_never_chosen_changes_no_curve_figure():
    predictions = made_up(200, 5, missing=0)
    dominated = dataclasses.replace(
        predictions,
        models=(*predictions.models, "dominated"),
        correct=np.column_stack([predictions.correct, np.zeros(200)]),
        cost=np.column_stack([predictions.cost, predictions.cost[:, 2] * 1.01]),
        cost_norm=np.column_stack([predictions.cost_norm, predictions.cost_norm[:, 2]]),
        routers={
            name: RouterPredictions(np.column_stack([r.p, np.zeros(200)]), r.chosen_lambda)
            for name, r in predictions.routers.items()
        },
        training=TrainingMeans(
            np.append(predictions.training.accuracy, 0), np.append(predictions.training.cost_norm, 0.01)
        ),
    )
    before, after = (evaluate(given, n_resamples=0) for given in (predictions, dominated))
    hulls = [value(metrics["pool"]["mixture_hull"]["p_auccc"]) for metrics in (before, after)]
    assert hulls[0] == pytest.approx(hulls[1])
    for name in predictions.routers:
        one, two = before["routers"][name], after["routers"][name]
        for figure in (
            "p_auccc",
            "p_auccc_exact",
            "mdp_auccc",
            "efficacy",
            "headroom_captured",
            "cost_saving",
            "routed_to_accuracy",
        ):
            assert value(two[figure]) == pytest.approx(value(one[figure])), (name, figure)
        for source, figure in (
            ("routerarena", "arena_score"),
            ("routerarena", "optimal_selection"),
            ("routerbench", "aiq"),
            ("routellm", "apgr"),
            ("llmrouterbench", "pareto_dist"),
        ):
            assert value(two["literature"][source][figure]) == pytest.approx(value(one["literature"][source][figure]))


def test_the_oracle_dominates_every_router_at_every_point_of_their_paths():
    predictions = made_up(300, 6, missing=0)
    metrics = evaluate(predictions, n_resamples=100)
    for router in metrics["routers"].values():
        assert max(router["curve"]["accuracy"]) <= value(metrics["pool"]["oracle_accuracy"])
        assert max(router["curve"]["Y"]) <= 1
        assert router["literature"]["llmrouterbench"]["gap_to_oracle"]["lower"] >= 0
        assert router["p_auccc_exact"]["upper"] < 1
