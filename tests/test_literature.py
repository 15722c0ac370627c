"""Figures of other router benchmarks, compared with values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evaluation_pool import made_up
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router.metrics import curves, literature
from prefill_router.metrics.evaluate import evaluate


def one(*values: float) -> np.ndarray:
    return np.array([values], dtype=float)


def anchors(cost_lo=1.0, cost_hi=4.0, accuracy_lo=0.5, best=0.9, oracle=1.0) -> curves.Anchors:
    return curves.Anchors(*(np.array([value]) for value in (cost_lo, cost_hi, accuracy_lo, best, oracle)))


def test_golden_macro_gains_count_every_benchmark_once():
    values = literature.macro_gains(one(0.6, 0.8), one(0.5, 0.4), one(0.6, 0.9), one(1.0, 0.9))
    assert values.avg_acc == pytest.approx(0.7)
    assert values.gain_over_random == pytest.approx((1 / 5 + 1) / 2)
    assert values.gain_over_best_single == pytest.approx((0 - 1 / 9) / 2)
    assert values.gap_to_oracle == pytest.approx((2 / 5 + 1 / 9) / 2)


def test_golden_cost_save_is_at_the_cheapest_point_as_accurate_as_the_best_model():
    values = literature.cost_tradeoff(one(4, 3, 2, 1), one(0.8, 0.9, 0.7, 0.5), np.array([5.0]), np.array([0.7]))
    assert values.perf_gain == pytest.approx(0.9 / 0.7 - 1)
    assert values.cost_save == pytest.approx(1 - 2 / 5)
    worse = literature.cost_tradeoff(one(2, 1), one(0.6, 0.5), np.array([5.0]), np.array([0.7]))
    assert np.isnan(worse.cost_save[0])
    assert worse.perf_gain == pytest.approx(0.6 / 0.7 - 1)


def test_golden_pareto_distance_to_the_nearest_point_of_the_common_frontier():
    # Normalised: models at (0, 0) and (1, 1), router a at (1/2, 1/2) on the frontier, b at (1/2, 1/4) below a.
    own = {"a": slice(2, 3), "b": slice(3, 4)}
    found = literature.pareto_distance(one(1, 3, 2, 2), one(0.5, 1, 0.75, 0.625), own, anchors(cost_hi=3.0))
    assert found["a"] == 0
    assert found["b"] == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("usd_per_1k", "score"),
    [
        (200, 0),
        (1000, 0),
        (0.0044, 1.1 * 0.8 / 1.08),
        (0.001, 1.1 * 0.8 / 1.08),
        (math.sqrt(0.0044 * 200), 1.1 * 0.8 * 0.5 / (0.08 + 0.5)),
    ],
)
def test_golden_arena_score_at_both_ends_of_its_costs_and_in_their_middle(usd_per_1k, score):
    assert literature.arena(np.array([0.8]), np.array([usd_per_1k / 1000])) == pytest.approx(score)


def test_golden_optimality_leaves_out_queries_that_no_model_answers():
    correct, cost = np.array([[1.0, 1], [0, 1], [0, 0], [1, 0]]), np.array([[1.0, 2]] * 4)
    found = literature.optimality(np.array([1, 1, 0, 0]), correct, cost, np.ones((1, 4)))
    assert found.optimal_selection == pytest.approx(2 / 3)  # on q0 a correct model costs 1
    assert found.optimal_accuracy == 1
    assert found.optimal_cost == pytest.approx((1 + 2 + 1) / (2 + 2 + 1))


def test_golden_recovered_gap_of_four_queries():
    found = literature.recovered_gap(
        np.array([0.1, 0.3, 0.2, 0.4]), np.array([1.0, 1, 0, 1]), np.array([0.0, 1, 0, 0]), np.ones((1, 4))
    )
    # Order of the queries: q3, q1, q2, q0. Recovered: 1/2, 1/2, 1/2, 1 of the gap.
    assert found.apgr == pytest.approx((1 / 4 + 1 / 2 + 1 / 2 + 3 / 4) / 4)
    assert found.cpt_20 == pytest.approx(0.25 * 2 / 5)
    assert found.cpt_50 == pytest.approx(0.25)
    assert found.cpt_80 == pytest.approx(0.75 + 0.25 * 3 / 5)


def test_golden_equal_preferences_recover_the_gap_linearly():
    strong, weak = np.array([1.0, 1, 1]), np.array([0.0, 1, 0])
    found = literature.recovered_gap(np.zeros(3), strong, weak, np.ones((1, 3)))
    assert {name: value[0] for name, value in vars(found).items()} == pytest.approx(
        {"apgr": 0.5, "cpt_20": 0.2, "cpt_50": 0.5, "cpt_80": 0.8}
    )
    reversed_gap = literature.recovered_gap(np.zeros(3), weak, strong, np.ones((1, 3)))
    assert all(np.isnan(value[0]) for value in vars(reversed_gap).values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_a_random_preference_recovers_half_the_gap_and_a_perfect_one_more(seed):
    rng = np.random.default_rng(seed)
    strong, weak = (rng.random((2, 400)) < np.array([[0.8], [0.4]])).astype(float)
    weights = rng.poisson(1.0, (3, 400)).astype(float)
    random = literature.recovered_gap(rng.random(400), strong, weak, weights).apgr
    perfect = literature.recovered_gap(strong - weak, strong, weak, weights).apgr
    assert (np.abs(random - 0.5) < 0.25).all()
    assert (perfect > random).all()


def test_golden_aiq_is_the_mean_height_of_the_hull():
    assert literature.aiq(one(4, 3, 2, 1), one(0.9, 0.6, 0.9, 0.5), anchors()) == pytest.approx((0.7 + 2 * 0.9) / 3)
    # The cheapest point of the router costs 2, so the height between 1 and 2 is 0.
    assert literature.aiq(one(3, 2), one(0.7, 0.5), anchors()) == pytest.approx((0.6 + 0.7) / 3)


def test_a_router_that_is_the_oracle_is_optimal_everywhere():
    predictions = made_up(200, 5, missing=0)
    router = next(iter(predictions.routers.values()))
    oracle = type(router)(predictions.correct, 0.0)
    metrics = evaluate(type(predictions)(**{**vars(predictions), "routers": {"oracle": oracle}}), n_resamples=0)
    found = metrics["routers"]["oracle"]["literature"]
    for figure, value in (("optimal_selection", 1), ("optimal_accuracy", 1), ("optimal_cost", 1)):
        assert found["routerarena"][figure]["estimate"] == pytest.approx(value), figure
    assert found["llmrouterbench"]["gap_to_oracle"]["estimate"] == 0
    assert found["llmrouterbench"]["pareto_dist"]["estimate"] == pytest.approx(0, abs=1e-12)
