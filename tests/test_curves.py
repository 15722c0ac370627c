"""The normalised plane and its figures, compared with pools computed by hand and with a slow reference."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router.metrics import curves
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import Predictions, RouterPredictions


def pool(correct, cost, p, cost_norm=None, chosen_lambda=0.0, benchmarks=None):
    """Predictions of one router from nested lists [queries models]."""
    correct, cost = np.array(correct, dtype=float), np.broadcast_to(np.array(cost, dtype=float), np.shape(correct))
    cost_norm = (
        (cost - cost.min()) / max(cost.max() - cost.min(), 1e-9)
        if cost_norm is None
        else np.broadcast_to(np.array(cost_norm, dtype=float), correct.shape)
    )
    ids = np.array([f"q{i}" for i in range(len(correct))], dtype=object)
    return Predictions(
        ids,
        np.array(benchmarks or ["b"] * len(ids), dtype=object),
        ids,
        tuple("ABCDEF"[: correct.shape[1]]),
        correct,
        cost,
        cost_norm,
        {"prefill": RouterPredictions(np.broadcast_to(np.array(p, dtype=float), correct.shape), chosen_lambda)},
    )


def figures(predictions):
    metrics = evaluate(predictions, n_resamples=0)
    json.dumps(metrics, allow_nan=False)
    return metrics["pool"], metrics["routers"]["prefill"]


def is_null(figure, word):
    return figure["estimate"] is figure["lower"] is figure["upper"] is None and word in figure["reason"]


def test_golden_two_models_a_sweep_of_four_points():
    # B is chosen while p_B - p_A > lambda / (1 - lambda), so q4, q2 and q3 move to A after 0.16, 0.28 and 0.41.
    pool_figures, router = figures(
        pool(
            [[1, 1], [0, 1], [0, 1], [0, 0]],
            [1, 4],
            [[0.9, 0.8], [0.5, 0.9], [0.2, 0.9], [0.1, 0.3]],
            chosen_lambda=0.3,
        )
    )
    curve = router["curve"]
    ranges = [
        (17, 13 / 4, 3 / 4, 1 / 13, 1),
        (12, 5 / 2, 3 / 4, 1 / 5, 1),
        (13, 7 / 4, 1 / 2, 3 / 7, 1 / 2),
        (59, 1, 1 / 4, 1, 0),
    ]
    for column, name in enumerate(("cost", "accuracy", "X", "Y"), start=1):
        assert curve[name] == pytest.approx([s[column] for s in ranges for _ in range(s[0])], abs=1e-12), name
    assert router["p_auccc"]["estimate"] == pytest.approx(18 / 35)
    assert pool_figures["model_only"]["p_auccc"]["estimate"] == pytest.approx(1 / 2)
    assert router["mdp_auccc"]["estimate"] == pytest.approx(18 / 35 - 1 / 2)
    distances = 17 * 12 / 13 + 12 * 4 / 5 + 13 * math.hypot(4 / 7, 1 / 2) + 59
    assert router["efficacy"]["estimate"] == pytest.approx(distances / 101)
    assert pool_figures["model_only"]["efficacy"]["estimate"] == 1
    assert pool_figures["mixture_hull"]["p_auccc"]["estimate"] == pytest.approx(4 / 9 * (math.log(4) - 3 / 4))
    assert router["max_router_accuracy"]["estimate"] == 3 / 4
    assert router["cost_saving"]["estimate"] == 1 - 5 / 8  # the cheaper of two equally accurate ranges of lambda
    assert is_null(router["headroom_captured"], "no better than the best single model")
    assert router["accuracy_at_chosen_lambda"]["estimate"] == 1 / 2
    assert router["accuracy_gain_at_chosen_lambda"]["estimate"] == -1 / 4
    assert router["cost_saving_at_chosen_lambda"]["estimate"] == 1 - 7 / 16
    assert router["routed_to"]["B"]["accuracy"]["estimate"] == pytest.approx(2 / 3)
    assert router["routed_to"]["B"]["accuracy_delta"]["estimate"] == pytest.approx(2 / 3 - 1)
    assert pool_figures["random_choice"]["accuracy"]["estimate"] == 1 / 2
    assert pool_figures["oracle_cost"]["estimate"] == (1 + 4 + 4 + 1) / 4


def test_golden_negative_mdp():
    # The router uses only models A and C; B is as accurate as C at half the cost.
    pool_figures, router = figures(pool([[0, 1, 1], [0, 1, 1]], [1, 2, 4], [0.5, 0, 1], cost_norm=[0, 1 / 3, 1]))
    assert [model["pareto"] for model in pool_figures["models"]] == [True, True, False]
    assert pool_figures["model_only"]["p_auccc"]["estimate"] == pytest.approx(1 / 3 + 2 / 3 / 2)
    assert router["p_auccc"]["estimate"] == pytest.approx(1 / 2)
    assert router["mdp_auccc"]["estimate"] == pytest.approx(-1 / 6)


def test_golden_equal_x_takes_the_highest_y_and_y_is_not_clipped():
    # C until 0.09, A until 0.16, then B. A and B cost the same, so the more accurate one, B, is the cheapest model.
    pool_figures, router = figures(
        pool([[1, 1, 0], [0, 1, 0], [0, 0, 1]], [1, 1, 2], [0.9, 0.8, 0.95], cost_norm=[0.5, 0, 1])
    )
    assert router["curve"]["X"] == [0] * 10 + [1] * 91
    assert router["curve"]["Y"] == pytest.approx([-1] * 17 + [0] * 84)
    assert router["p_auccc"]["estimate"] == pytest.approx(-1 / 2)
    assert router["efficacy"]["estimate"] == pytest.approx((10 * math.sqrt(5) + 7 * 2 + 84) / 101)
    assert [model["pareto"] for model in pool_figures["models"]] == [False, True, False]
    assert pool_figures["model_only"]["p_auccc"]["estimate"] == 0
    assert router["headroom_captured"]["estimate"] == 0


def test_golden_ties_of_score_go_to_the_cheaper_then_the_more_confident():
    # All scores tie at lambda 0: A costs less on q0, B on q1. From lambda 0.01, cost_norm decides for A.
    _, router = figures(pool([[1, 0], [0, 1]], [[1, 2], [4, 2]], 0.5, cost_norm=[0, 1]))
    assert router["curve"]["accuracy"] == [1] + [1 / 2] * 100
    assert router["curve"]["cost"] == [3 / 2] + [5 / 2] * 100
    # C_lo = 2 (B) with A_lo = 1/2, C_hi = 5/2 (A): the first point is cheaper than any model, so X is clipped.
    assert router["curve"]["X"] == [1] + [0] * 100
    assert router["p_auccc"]["estimate"] == pytest.approx(1 / 2)
    assert router["headroom_captured"]["estimate"] == 1


def test_golden_missing_labels_leave_the_curve_but_not_the_auc():
    nan = np.nan
    pool_figures, router = figures(
        pool([[1, 1], [0, 1], [1, nan], [0, nan]], [1, 2], [[0.9, 0.5], [0.1, 0.9], [0.2, 0.1], [0.3, 0.1]])
    )
    assert (pool_figures["n_queries"], pool_figures["n_complete"], pool_figures["n_labelled_pairs"]) == (4, 2, 6)
    assert {name: part["n"] for name, part in pool_figures["partitions"].items()} == {
        "all-correct": 1,
        "all-incorrect": 0,
        "disagreement": 1,
        "undecided": 2,
    }
    assert pool_figures["models"][0]["accuracy"]["estimate"] == 1 / 2
    assert router["auc"]["per_model"]["A"]["estimate"] == 3 / 4
    assert is_null(router["auc"]["per_model"]["B"], "both classes")
    assert router["auc"]["estimate"] == 3 / 4  # over the models for which it is defined
    assert router["routed_to_accuracy"]["estimate"] == 1


def test_golden_equal_costs_have_no_plane_but_have_headroom():
    pool_figures, router = figures(
        pool([[1, 0], [0, 1], [0, 0]], [2, 2], [[0.9, 0.1], [0.1, 0.9], [0.1, 0.2]], cost_norm=0)
    )
    for figure in (
        router["p_auccc"],
        router["mdp_auccc"],
        router["efficacy"],
        pool_figures["model_only"]["p_auccc"],
        pool_figures["mixture_hull"]["p_auccc"],
    ):
        assert is_null(figure, "cost the same")
    assert router["curve"]["X"] == [None] * 101
    assert router["headroom_captured"]["estimate"] == 1
    assert router["cost_saving"]["estimate"] == 0


def test_golden_oracle_no_better_than_the_cheapest_model():
    _, router = figures(pool([[1, 1], [0, 0]], [1, 2], [[0.9, 0.8], [0.1, 0.9]]))
    assert is_null(router["p_auccc"], "no better than the cheapest model")
    assert is_null(router["headroom_captured"], "no better than the best single model")


def test_golden_a_free_model_has_no_inverse_cost():
    pool_figures, router = figures(pool([[1, 0], [0, 1]], [0, 2], [[0.9, 0.1], [0.1, 0.9]]))
    assert is_null(router["p_auccc"], "costs nothing")
    assert is_null(pool_figures["mixture_hull"]["p_auccc"], "costs nothing")
    assert router["cost_saving"]["estimate"] == 1 / 2


def test_golden_no_query_with_complete_labels():
    nan = np.nan
    pool_figures, router = figures(pool([[1, nan], [nan, 1], [0, nan]], [1, 2], 0.5))
    for figure in (
        router["p_auccc"],
        router["headroom_captured"],
        router["cost_saving"],
        router["routed_to_accuracy"],
        router["routed_to"]["A"]["accuracy"],
        pool_figures["oracle_accuracy"],
        pool_figures["models"][0]["accuracy"],
    ):
        assert is_null(figure, "no query has a label for every model")
    assert router["auc"]["estimate"] == 1 / 2


# --- comparison with a slow reference on small integers, which have many ties ---------------------------------------

small_pools = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def slow_area(points):
    """P-AUCCC (docs/equations.md) as a loop."""
    best = {}
    for x, y in points:
        best[x] = max(y, best.get(x, -math.inf))
    line = sorted(best.items())
    line.insert(0, (0.0, line[0][1]))
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(line))


@settings(max_examples=60, deadline=None)
@given(small_pools)
def test_area_equals_the_slow_reference(rng):
    x, y = rng.integers(0, 5, (7, 6)) / 4, rng.integers(-3, 5, (7, 6)) / 4
    for row, value in enumerate(curves.area(x, y)):
        assert value == pytest.approx(slow_area(zip(x[row], y[row], strict=True)), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(small_pools)
def test_pareto_and_its_area_equal_the_slow_reference(rng):
    cost, accuracy = rng.integers(1, 5, (7, 5)).astype(float), rng.integers(0, 5, (7, 5)) / 4
    x, y = rng.integers(0, 5, (7, 5)) / 4, rng.integers(-3, 5, (7, 5)) / 4
    optimal = curves.pareto(cost, accuracy)
    areas = curves.area_of_models(x, y, optimal)
    for row in range(7):
        models = list(zip(cost[row], accuracy[row], strict=True))
        slow = [not any(c <= c0 and a >= a0 and (c < c0 or a > a0) for c, a in models) for c0, a0 in models]
        assert optimal[row].tolist() == slow
        points = [(x[row, i], y[row, i]) for i in range(5) if slow[i]]
        assert areas[row] == pytest.approx(slow_area(points), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(small_pools)
def test_hull_is_the_best_mixture_and_its_area_the_limit_of_a_fine_grid(rng):
    cost, accuracy = rng.integers(1, 9, (5, 5)).astype(float), rng.integers(0, 9, (5, 5)) / 8
    at = curves.anchors(cost, accuracy, np.full(5, 1.25))
    hull_cost, hull_accuracy = curves.mixture_hull(cost, accuracy)
    areas = curves.area_of_hull(hull_cost, hull_accuracy, at)
    for row in range(5):
        pairs = list(itertools.product(zip(cost[row], accuracy[row], strict=True), repeat=2))
        fine = np.linspace(hull_cost[row, 0], hull_cost[row, -1], 4001)
        best = np.full(len(fine), -np.inf)
        for (c0, a0), (c1, a1) in pairs:
            inside = (fine >= c0) & (fine <= c1)
            share = (fine[inside] - c0) / (c1 - c0) if c1 > c0 else np.zeros(inside.sum())
            best[inside] = np.maximum(best[inside], a0 + share * (a1 - a0))
        ours = np.interp(fine, hull_cost[row], hull_accuracy[row])
        np.testing.assert_allclose(ours[1:], best[1:], atol=1e-9)
        assert ours[-1] == accuracy[row].max()
        if len(set(cost[row])) > 1:
            one = curves.Anchors(
                *(
                    values[row : row + 1]
                    for values in (at.cost_lo, at.cost_hi, at.accuracy_lo, at.accuracy_best, at.accuracy_oracle)
                )
            )
            mapped = curves.area(*curves.normalise(fine[None], ours[None], one))[0]
            assert areas[row] == pytest.approx(mapped, abs=1e-5)


def test_sums_of_gridded_costs_are_exact_in_any_order():
    rng = np.random.default_rng(0)
    cost = rng.lognormal(-9, 1, (2000, 3))
    gridded = curves.on_exact_grid(cost, 2000)
    for column in gridded.T:
        for _ in range(20):
            assert rng.permutation(column).cumsum()[-1] == math.fsum(column)
    assert np.abs(gridded - cost).max() <= cost.max() * 2000 * 2.0**-51
    assert curves.on_exact_grid(np.zeros((3, 2)), 3).tolist() == np.zeros((3, 2)).tolist()
