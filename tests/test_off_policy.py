"""Off-policy estimators: formulas by hand, exact expectations over all logs, and simulations of known truth."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import t as student

from prefill_router.decisions.off_policy import (
    LEVEL,
    Linear,
    Logged,
    Weights,
    bounds,
    empirical_bernstein,
    estimates,
    weigh,
)
from prefill_router.decisions.outcome_model import recalibrated, rescaled

PROPENSITIES = np.array([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7]])
TARGET = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
TRUTH = np.array([[0.9, 0.4], [0.2, 0.7], [0.5, 0.6]])  # of each decision and model
MODEL = np.array([[0.5, 0.9], [0.4, 0.8], [0.1, 0.8]])  # wrong


def weights_of(logged: Logged, target: np.ndarray, outcome: np.ndarray, cap: float | None = None) -> Weights:
    return weigh(logged, target, ~np.isnan(outcome), np.zeros(len(outcome), dtype=int), cap)


def found(
    logged: Logged, target: np.ndarray, outcome: np.ndarray, predicted: np.ndarray, cap: float | None = None
) -> dict[str, Linear]:
    return estimates(logged, target, outcome, predicted, weights_of(logged, target, outcome, cap))


def simulated(seed: int, n: int, rates: tuple[float, ...] = (1.0, 1.0, 1.0)) -> tuple[Logged, np.ndarray, np.ndarray]:
    """A log of n decisions between three models, its outcomes, and the true probability of each model."""
    random = np.random.default_rng(seed)
    truth = np.clip(random.normal([0.7, 0.5, 0.4], 0.15, size=(n, 3)), 0.02, 0.98)
    favourite = np.eye(3)[truth.argmax(axis=1)]
    propensities = 0.6 * favourite + 0.4 / 3
    chosen = (random.random((n, 1)) < propensities.cumsum(axis=1)).argmax(axis=1)
    logged = Logged(chosen, propensities, np.arange(n))
    right = (random.random(n) < logged.of_chosen(truth)).astype(float)
    return logged, np.where(random.random(n) < np.array(rates)[chosen], right, np.nan), truth


def test_estimators_equal_their_formulas_by_hand():
    logged = Logged(np.array([1, 0, 1]), PROPENSITIES, np.arange(3))
    outcome = np.array([1.0, 0.5, 0.25])
    one = found(logged, TARGET, outcome, MODEL)
    w = np.array([1 / 0.2, 0.5 / 0.8, 0.0])
    dm = np.array([0.9, 0.6, 0.1])
    assert one["ips"].value == pytest.approx((w * outcome).mean())
    assert one["snips"].value == pytest.approx((w * outcome).sum() / w.sum())
    assert one["dm"].value == pytest.approx(dm.mean())
    assert one["dr"].value == pytest.approx((dm + w * (outcome - [0.9, 0.4, 0.8])).mean())
    weights = weights_of(logged, TARGET, outcome)
    assert weights.effective_sample_size == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert (weights.matched, weights.largest, weights.clipped) == (2, pytest.approx(5.0), 0.0)


def test_ips_and_dr_are_unbiased_over_all_logs():
    # Every choice of every decision and every outcome 0 or 1, with its exact probability.
    expected = {"ips": 0.0, "dr": 0.0, "dm": 0.0}
    for chosen in product(range(2), repeat=3):
        logged = Logged(np.array(chosen), PROPENSITIES, np.arange(3))
        for outcome in product((0.0, 1.0), repeat=3):
            truth = logged.of_chosen(TRUTH)
            chance = np.prod(logged.of_chosen(PROPENSITIES) * np.where(outcome, truth, 1 - truth))
            one = found(logged, TARGET, np.array(outcome), MODEL)
            for name in ("dr", "dm"):
                expected[name] += chance * one[name].value
            expected["ips"] += chance * np.nan_to_num(one["ips"].value)  # without a match the sum of weights is 0
    value = (TARGET * TRUTH).sum(axis=1).mean()
    assert expected["ips"] == pytest.approx(value)
    assert expected["dr"] == pytest.approx(value)
    assert abs(expected["dm"] - value) > 0.05


def test_dr_is_exact_with_a_perfect_outcome_model():
    logged, _, truth = simulated(0, 40)
    target = np.eye(3)[truth.argmin(axis=1)]
    one = found(logged, target, logged.of_chosen(truth), truth)
    assert one["dr"].value == pytest.approx(truth.min(axis=1).mean())
    assert abs(one["ips"].value - truth.min(axis=1).mean()) > 0.01


def test_dr_is_consistent_with_a_wrong_model_and_estimated_rates():
    logged, outcome, truth = simulated(1, 200_000, rates=(0.1, 0.3, 0.6))
    target = np.eye(3)[np.argsort(truth, axis=1)[:, 1]]
    value = (target * truth).sum(axis=1).mean()
    weights = weigh(logged, target, ~np.isnan(outcome), logged.chosen)
    one = estimates(logged, target, outcome, np.full(truth.shape, 0.9), weights)
    for name in ("ips", "snips", "dr"):
        assert abs(one[name].value - value) < 0.015
    assert abs(one["dm"].value - value) > 0.3
    pooled = found(logged, target, outcome, np.full(truth.shape, 0.9))  # one rate for all models
    assert abs(pooled["ips"].value - value) > 0.03


def test_intervals_cover_the_truth_as_often_as_they_say():
    runs, covered = 120, {"ips": 0, "snips": 0, "dr": 0, "naive": 0}
    for seed in range(runs):
        logged, outcome, truth = simulated(seed, 400, rates=(0.9, 0.5, 0.2))
        target = np.full(truth.shape, 1 / 3)
        value = 0.5333  # mean of clipped normals of means 0.7, 0.5, 0.4, up to 0.001
        weights = weigh(logged, target, ~np.isnan(outcome), logged.chosen)
        one = estimates(logged, target, outcome, np.full(truth.shape, 0.5), weights)
        for name in ("ips", "snips", "dr"):
            interval = one[name].interval(logged.clusters)
            covered[name] += interval.lower <= value <= interval.upper
        plain = outcome[~np.isnan(outcome)]
        covered["naive"] += abs(plain.mean() - value) < 1.96 * plain.std() / np.sqrt(len(plain))
    assert all(0.89 <= covered[name] / runs <= 0.99 for name in ("ips", "snips", "dr"))
    assert covered["naive"] / runs < 0.8


def test_the_interval_of_the_logging_policy_is_that_of_the_mean():
    logged, outcome, _ = simulated(2, 50)
    one = found(logged, logged.propensities, outcome, np.full((50, 3), 0.5))
    interval = one["snips"].interval(logged.clusters)
    half = student.ppf((1 + LEVEL) / 2, 49) * outcome.std(ddof=1) / np.sqrt(50)
    assert (interval.estimate, interval.upper) == pytest.approx((outcome.mean(), outcome.mean() + half))


def test_decisions_of_one_cluster_count_once():
    logged, outcome, _ = simulated(3, 60)
    doubled = Logged(
        np.repeat(logged.chosen, 3), np.repeat(logged.propensities, 3, axis=0), np.repeat(logged.clusters, 3)
    )
    predicted = np.full((60, 3), 0.5)
    target = np.eye(3)[np.zeros(60, dtype=int)]
    single = found(logged, target, outcome, predicted)
    tripled = found(doubled, np.repeat(target, 3, axis=0), np.repeat(outcome, 3), np.repeat(predicted, 3, axis=0))
    for name in ("ips", "snips", "dr", "dm"):
        one, other = single[name].interval(logged.clusters), tripled[name].interval(doubled.clusters)
        assert (one.lower, one.upper) == pytest.approx((other.lower, other.upper))
    bernstein = empirical_bernstein(logged, outcome, weights_of(logged, target, outcome))
    again = empirical_bernstein(
        doubled, np.repeat(outcome, 3), weights_of(doubled, np.repeat(target, 3, axis=0), np.repeat(outcome, 3))
    )
    assert again.lower == pytest.approx(bernstein.lower)


def test_choices_without_support_are_counted_and_bounded():
    n = 2000
    logged, _, truth = simulated(4, n)
    propensities = np.where(np.arange(3) == 2, 0.0, logged.propensities)
    propensities /= propensities.sum(axis=1, keepdims=True)
    random = np.random.default_rng(0)
    logged = Logged((random.random((n, 1)) < propensities.cumsum(axis=1)).argmax(axis=1), propensities, np.arange(n))
    outcome = (random.random(n) < logged.of_chosen(truth)).astype(float)
    target = np.tile([0.5, 0.1, 0.4], (n, 1))  # model 2 is never chosen
    weights = weights_of(logged, target, outcome)
    assert weights.supported.mean() == pytest.approx(0.6)
    value = (target * truth).sum(axis=1).mean()
    part = (target * truth)[:, :2].sum(axis=1).mean() / 0.6
    one = estimates(logged, target, outcome, np.full((n, 3), 0.9), weights)
    assert abs(one["snips"].value - part) < 0.03
    assert abs(one["ips"].value - part) < 0.03
    assert abs(one["dr"].value - value) > 0.1  # the model is wrong where nothing corrects it
    low, high = bounds(logged, target, outcome, np.full((n, 3), 0.9), weights)
    assert high.value - low.value == pytest.approx(0.4)
    assert low.value < value < high.value


def test_a_model_without_any_feedback_has_no_support():
    logged, outcome, _ = simulated(5, 100)
    outcome = np.where(logged.chosen == 1, np.nan, outcome)
    target = np.tile([0.5, 0.5, 0.0], (100, 1))
    weights = weigh(logged, target, ~np.isnan(outcome), logged.chosen)
    assert weights.supported.mean() == pytest.approx(0.5)
    assert not weights.support[:, 1].any()


def test_a_cap_bounds_the_weights_and_is_reported():
    logged = Logged(np.array([1, 0, 1]), PROPENSITIES, np.arange(3))
    outcome = np.ones(3)
    weights = weights_of(logged, TARGET, outcome, 2.0)
    assert weights.w.tolist() == [2.0, 0.625, 0.0]
    assert (weights.clipped, weights.largest) == (pytest.approx(1 / 3), 2.0)


def test_the_bernstein_interval_equals_its_formula_and_is_wider():
    logged, outcome, _ = simulated(6, 500)
    target = np.tile([1.0, 0.0, 0.0], (500, 1))
    weights = weights_of(logged, target, outcome)
    interval = empirical_bernstein(logged, outcome, weights)
    x = weights.total * outcome
    log = np.log(4 / 0.05)
    half = np.sqrt(2 * x.var(ddof=1) * log / 500) + 7 * (3 / 0.4) * log / (3 * 499)
    assert interval.upper - x.mean() == pytest.approx(half)
    asymptotic = found(logged, target, outcome, np.zeros((500, 3)))["ips"].interval(logged.clusters)
    assert interval.lower < asymptotic.lower


def test_few_observed_outcomes_give_no_interval():
    logged, outcome, _ = simulated(7, 30)
    few = np.where(np.arange(30) < 5, outcome, np.nan)
    target = logged.propensities
    one = found(logged, target, few, np.full((30, 3), 0.5))
    interval = one["dr"].interval(logged.clusters)
    assert (interval.estimate is None, interval.lower) == (False, None)
    assert interval.reason == "5 observed outcomes of the policy's choices, 10 are needed"
    none = found(logged, target, np.full(30, np.nan), np.full((30, 3), 0.5))["snips"].interval(logged.clusters)
    assert (none.estimate, none.reason) == (None, "no observed outcome of the policy's choices")


def test_recalibration_reads_no_decision_of_its_own_cluster():
    logged, outcome, truth = simulated(8, 400)
    clusters = np.repeat(np.arange(80), 5)
    logged = Logged(logged.chosen, logged.propensities, clusters)
    before = recalibrated(logged, truth, outcome)
    after = recalibrated(logged, truth, np.where(clusters == 7, 1 - outcome, outcome))
    assert np.array_equal(before[clusters == 7], after[clusters == 7])
    assert not np.array_equal(before, after)
    costs = rescaled(logged, truth, np.where(clusters == 7, 9.0, outcome))
    assert np.array_equal(costs[clusters == 7], rescaled(logged, truth, outcome)[clusters == 7])


def test_recalibration_repairs_confidences_that_are_too_low():
    logged, outcome, truth = simulated(9, 4000)
    wrong = truth**4
    repaired = recalibrated(logged, wrong, outcome)
    assert np.abs(wrong.mean(axis=0) - truth.mean(axis=0)).max() > 0.3
    assert np.abs(repaired.mean(axis=0) - truth.mean(axis=0)).max() < 0.03
    unlabelled = recalibrated(logged, wrong, np.full(4000, np.nan))
    assert unlabelled == pytest.approx(wrong, abs=1e-6)
    ratios = rescaled(logged, np.full(truth.shape, 0.01), 0.02 + 0.01 * logged.chosen)
    assert ratios.mean(axis=0) == pytest.approx([0.02, 0.03, 0.04], rel=0.02)


def test_the_estimated_rate_adds_no_variance_to_a_constant_score():
    logged = Logged(np.zeros(40, dtype=int), np.ones((40, 1)), np.arange(40))
    outcome = np.where(np.arange(40) % 3 == 0, np.nan, 1.0)
    interval = found(logged, np.ones((40, 1)), outcome, np.zeros((40, 1)))["ips"].interval(logged.clusters)
    assert (interval.lower, interval.estimate, interval.upper) == pytest.approx((1.0, 1.0, 1.0))
