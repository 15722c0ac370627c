"""The exact lambda path: choices change only at breakpoints, follow the tie rules there, and cover the grid."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_pool import made_up
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router.metrics import curves
from prefill_router.metrics.lambda_path import along, lambda_path
from prefill_router.routing.policy import LAMBDAS, choose

seeds = st.integers(0, 2**32 - 1)


def small(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidences in quarters or fifths: crossings coincide, also on the grid. cost_norm is clipped at 0 and 1."""
    rng = np.random.default_rng(seed)
    p = rng.integers(0, 6, (8, 4)) / rng.choice([4, 5])
    cost = rng.integers(1, 8, (8, 4)).astype(float)
    return np.minimum(p, 1), cost, np.clip((cost - 2) / 4, 0, 1)


def walked(path, lam: float) -> np.ndarray:
    """Choices at a lambda: all steps up to it, applied in order."""
    choices = path.start.copy()
    for at, query, before, after in zip(path.lambdas, path.query, path.before, path.after, strict=True):
        if at <= lam:
            assert choices[query] == before
            choices[query] = after
    return choices


@settings(max_examples=200, deadline=None)
@given(seeds)
def test_path_gives_the_choices_of_the_policy_at_and_between_breakpoints(seed):
    p, cost, cost_norm = small(seed)
    path = lambda_path(p, cost, cost_norm)
    points = path.breakpoints
    for lam in np.concatenate([LAMBDAS, points, (points[:-1] + points[1:]) / 2]):
        expected = choose(p, cost, cost_norm, float(lam))
        chosen = walked(path, float(lam))
        at = np.arange(len(p))
        for values in (p, cost, cost_norm):  # the policy cannot tell models apart that are equal in all three
            np.testing.assert_array_equal(values[at, chosen], values[at, expected], err_msg=f"lambda {lam}")


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_the_exact_path_contains_every_grid_point(seed):
    predictions = made_up(50, 5, seed=seed, missing=0)
    p, cost = predictions.routers["knn"].p, curves.on_exact_grid(predictions.cost, 50)
    choices = curves.sweep(p, predictions.cost, predictions.cost_norm)
    path = lambda_path(p, predictions.cost, predictions.cost_norm)
    one = np.ones((1, 50))
    exact = set(zip(along(path, cost, one)[0], along(path, predictions.correct, one)[0], strict=True))
    grid = zip(
        curves.weighted_mean(curves.picked(cost, choices), one)[0],
        curves.weighted_mean(curves.picked(predictions.correct, choices), one)[0],
        strict=True,
    )
    assert exact.issuperset(grid)


def test_golden_breakpoints_of_two_queries_in_fractions():
    # q0: B (0.9, cost_norm 1) to A (0.4, cost_norm 0) at 0.5 / 1.5 = 1/3. q1: B (0.6) to A (0.5) at 0.1 / 1.1 = 1/11.
    p, cost, cost_norm = np.array([[0.4, 0.9], [0.5, 0.6]]), np.array([[1.0, 3.0]] * 2), np.array([[0.0, 1.0]] * 2)
    path = lambda_path(p, cost, cost_norm)
    np.testing.assert_allclose(path.breakpoints, [0, 1 / 11, 1 / 3], atol=1e-12)
    assert path.query.tolist() == [1, 0]
    np.testing.assert_array_equal(along(path, cost, np.ones((1, 2))), [[3, 2, 1]])
    np.testing.assert_array_equal(along(path, cost, np.array([[2.0, 0.0]])), [[3, 3, 1]])


def test_golden_two_queries_that_pass_at_one_lambda_make_one_point():
    p, cost, cost_norm = np.array([[0.25, 0.75], [0.5, 1.0]]), np.array([[1.0, 3.0]] * 2), np.array([[0.0, 1.0]] * 2)
    path = lambda_path(p, cost, cost_norm)
    np.testing.assert_allclose(path.breakpoints, [0, 1 / 3], atol=1e-12)
    np.testing.assert_array_equal(along(path, cost, np.ones((1, 2))), [[3, 1]])


def test_golden_a_model_that_only_touches_the_envelope_is_passed_over():
    # A, B and C meet at lambda 1/2; the tie goes to the cheapest.
    p, cost_norm = np.array([[1.0, 0.75, 0.5]]), np.array([[0.5, 0.25, 0.0]])
    path = lambda_path(p, np.array([[3.0, 2.0, 1.0]]), cost_norm)
    np.testing.assert_allclose(path.breakpoints, [0, 1 / 2])
    assert path.after.tolist() == [2]


def test_golden_at_lambda_one_a_tie_of_cost_norm_goes_to_the_cheapest():
    # cost_norm is 0 for both models, so the confidence decides until lambda is 1.
    path = lambda_path(np.array([[0.9, 0.5]]), np.array([[2.0, 1.0]]), np.zeros((1, 2)))
    assert (path.lambdas.tolist(), path.after.tolist()) == ([1.0], [1])


def test_a_pool_of_one_model_has_a_path_of_one_point():
    path = lambda_path(np.array([[0.3], [0.4]]), np.ones((2, 1)), np.zeros((2, 1)))
    assert path.breakpoints.tolist() == [0]
    assert along(path, np.ones((2, 1)), np.ones((1, 2))).tolist() == [[1]]


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_the_area_along_a_path_is_the_area_of_its_points(seed):
    p, cost, cost_norm = small(seed)
    rng = np.random.default_rng(seed)
    correct, weights = (rng.random(p.shape) < p).astype(float), rng.poisson(1.0, (6, len(p))).astype(float)
    weights[:, 0] += 1
    path = lambda_path(p, cost, cost_norm)
    model_cost, accuracy = curves.weighted_mean(cost, weights), curves.weighted_mean(correct, weights)
    at = curves.anchors(model_cost, accuracy, curves.weighted_mean(correct.max(axis=1, keepdims=True), weights)[:, 0])
    x, y = curves.normalise(along(path, cost, weights), along(path, correct, weights), at)
    defined = np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)
    np.testing.assert_allclose(curves.area_along(x, y)[defined], curves.area(x, y)[defined], atol=1e-12)
    assert (np.diff(x[defined], axis=1) >= 0).all()


@pytest.mark.parametrize("finer", [1001, 10001])
def test_a_finer_grid_approaches_the_exact_area(finer):
    predictions = made_up(200, 6, missing=0)
    p, one = predictions.routers["prefill"].p, np.ones((1, 200))
    accuracy = curves.weighted_mean(predictions.correct, one)
    oracle = predictions.correct.max(axis=1).mean(keepdims=True)
    at = curves.anchors(curves.weighted_mean(predictions.cost, one), accuracy, oracle)

    def area(cost, correct):
        return curves.area_along(*curves.normalise(cost, correct, at))[0]

    path = lambda_path(p, predictions.cost, predictions.cost_norm)
    exact = area(along(path, predictions.cost, one), along(path, predictions.correct, one))
    choices = curves.sweep(p, predictions.cost, predictions.cost_norm, np.linspace(0, 1, finer))
    on_grid = area(
        *(
            curves.weighted_mean(curves.picked(values, choices), one)
            for values in (predictions.cost, predictions.correct)
        )
    )
    assert on_grid == pytest.approx(exact, abs=40 / finer)


def test_the_area_of_points_out_of_order_is_that_of_the_sorted_points():
    # If cost_norm falls while the cost rises, X is not sorted along lambda.
    x = np.array([[0.5, 0.2, 0.2, 1.0], [0.0, 0.4, 0.4, 0.9]])
    y = np.array([[0.5, 0.3, 0.6, 0.0], [1.0, 0.2, 0.7, 0.1]])
    np.testing.assert_allclose(curves.area_along(x, y), curves.area(x, y))
