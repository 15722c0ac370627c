"""The margin of the best static choice: the bonus, its size, and the exact lambda path with it."""

from __future__ import annotations

import numpy as np
import pytest
from builders import make_router, rows_of

from prefill_router.metrics.lambda_path import lambda_path
from prefill_router.routing.policy import (
    BONUSES,
    LAMBDAS,
    Margin,
    TrainingMeans,
    choose,
    fit_margin,
    training_means,
    utility,
)

MEANS = TrainingMeans(np.array([0.9, 0.5]), np.array([0.8, 0.1]))  # the first is the best static choice below 4/11


def test_the_bonus_belongs_to_the_best_static_choice_at_this_lambda():
    p, cost = np.array([[0.6, 0.65], [0.6, 0.75]]), np.array([[0.8, 0.1]] * 2)
    none = np.zeros_like(cost)
    assert choose(p, none, none, 0.0).tolist() == [1, 1]
    assert choose(p, none, none, 0.0, margin=Margin(MEANS, 0.1)).tolist() == [0, 1]
    assert choose(p[:, ::-1], cost, none, 0.5).tolist() == [0, 0]
    assert choose(p[:, ::-1], cost, none, 0.5, margin=Margin(MEANS, 0.1)).tolist() == [1, 0]


def test_if_the_best_static_choice_is_not_allowed_the_best_allowed_one_has_the_bonus():
    means = TrainingMeans(np.array([0.9, 0.5, 0.6]), np.zeros(3))
    p, free = np.array([[0.9, 0.55, 0.5]]), np.zeros((1, 3))
    allowed = np.array([[False, True, True]])
    assert choose(p, free, free, 0.0, allowed) == [1]
    assert choose(p, free, free, 0.0, allowed, Margin(means, 0.1)) == [2]


def test_at_lambda_0_a_bonus_of_one_always_takes_the_best_static_choice():
    rng = np.random.default_rng(0)
    p, cost = rng.random((50, 2)), rng.random((50, 2))
    assert (choose(p, cost, cost, 0.0, margin=Margin(MEANS, 1.0)) == MEANS.best_static(0.0)).all()


def test_uninformative_confidences_get_a_bonus_that_avoids_the_loss_and_good_ones_get_none():
    rng = np.random.default_rng(1)
    right = np.array([0.8, 0.7, 0.7, 0.7])
    correct = (rng.random((3000, 4)) < right).astype(float)
    cost = np.tile([0.4, 0.3, 0.2, 0.1], (3000, 1))
    means = training_means(correct, cost)
    noise = np.clip(right + 0.2 * rng.normal(size=correct.shape), 0, 1)
    margin = fit_margin(noise, correct, cost, cost, means)
    assert margin.bonus >= 0.3
    fresh = (rng.random((3000, 4)) < right).astype(float)
    chosen = [choose(noise, cost, cost, 0.0, margin=one) for one in (None, margin)]
    without, with_it = (utility(fresh, cost, choices, 0.0).mean() for choices in chosen)
    assert with_it > without + 0.03
    known = np.where(correct == 1, 0.9, 0.1)
    assert fit_margin(known, correct, cost, cost, means).bonus <= 0.1


def test_of_equally_good_bonuses_the_largest_is_taken_and_with_few_complete_labels_none():
    p = np.tile([0.9, 0.1], (50, 1))
    correct, cost = np.tile([1.0, 0.0], (50, 1)), np.zeros((50, 2))
    means = training_means(correct, cost)
    assert fit_margin(p, correct, cost, cost, means).bonus == BONUSES[-1]
    few = np.where(np.arange(50)[:, None] < 25, correct, np.nan)
    assert fit_margin(p, few, cost, cost, means).bonus == 0
    one = correct[:, :1]
    assert fit_margin(p[:, :1], one, cost[:, :1], cost[:, :1], training_means(one, cost[:, :1])).bonus == 0


@pytest.mark.parametrize("seed", range(12))
def test_the_exact_path_has_the_choices_at_every_lambda(seed: int):
    rng = np.random.default_rng(seed)
    p, cost = rng.random((40, 5)), rng.random((40, 5)) * rng.random(5)
    cost_norm = cost / cost.max()
    margin = Margin(TrainingMeans(rng.random(5), cost_norm.mean(axis=0)), float(rng.choice([0.05, 0.2, 0.5])))
    path = lambda_path(p, cost, cost_norm, margin)
    for lam in (*LAMBDAS[:-1], *rng.random(50)):
        np.testing.assert_array_equal(path.choices(float(lam)), choose(p, cost, cost_norm, float(lam), margin=margin))
    assert (np.diff(path.breakpoints) > 0).all()


def test_a_decision_says_when_the_margin_made_it():
    fitted, _, states = make_router()
    rows = rows_of(states, list(range(60)))
    means = fitted.router.margin.means
    without = fitted.router.__class__(**{**vars(fitted.router), "margin": None}).decide(rows, 0.1)
    with_it = fitted.router.__class__(**{**vars(fitted.router), "margin": Margin(means, 0.3)}).decide(rows, 0.1)
    static = fitted.router.pool.names[means.best_static(0.1)]
    assert {decision.reason for decision in without} == {"score"}
    for before, after in zip(without, with_it, strict=True):
        assert after.reason == ("margin" if before.model != after.model else "score")
        assert after.model == before.model or after.model == static
        assert after.chosen.score == max(candidate.score for candidate in after.candidates)
    assert any(decision.reason == "margin" for decision in with_it)
