"""Pooled logistic regression and pooled calibration: limits, strength, and what they keep."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit

from prefill_router.routing.calibration import fit_calibrator, fit_platt
from prefill_router.routing.pooled import (
    STRENGTHS,
    choose_strength,
    cross_validation_folds,
    differences_loss,
    fit_pooled,
)
from prefill_router.signals.logistic import fit_logistic

CENTRE = np.array([0.5, 0.0])


def made(n: int = 400, models: int = 5, spread: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two inputs of every query and target, and labels whose weights differ between targets by `spread`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, models, 2))
    weights = np.array([1.0, -0.5]) + spread * rng.normal(size=(models, 2))
    y = (rng.random((n, models)) < expit((x * weights).sum(axis=2) + spread * rng.normal(size=models))).astype(float)
    y[rng.random(y.shape) < 0.1] = np.nan
    return x, y


def test_the_fit_minimises_the_penalised_log_loss():
    x, y = made(n=80, models=3, spread=0.5)
    strength, known = 7.0, ~np.isnan(y)
    with_one = np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=2)

    def loss(parameters: np.ndarray) -> float:
        shared, deviations = parameters[:3], parameters[3:].reshape(3, 3)
        logits = np.einsum("qmj,mj->qm", with_one, shared + deviations)
        losses = np.logaddexp(0, logits) - np.nan_to_num(y) * logits
        return (
            losses[known].sum()
            + strength / 2 * np.square(deviations).sum()
            + 5 * np.square(shared[:2] - CENTRE).sum()
            + 0.005 * shared[2] ** 2
        )

    found = minimize(loss, np.zeros(12), tol=1e-12).x
    expected = found[:3] + found[3:].reshape(3, 3)
    fitted = fit_pooled(x, y, strength, CENTRE)
    np.testing.assert_allclose(fitted.weights, expected[:, :2], atol=1e-4)
    np.testing.assert_allclose(fitted.offsets, expected[:, 2], atol=1e-4)


def test_a_large_strength_gives_equal_weights_and_a_small_one_those_of_each_target_alone():
    x, y = made(spread=0.7)
    together, alone = fit_pooled(x, y, 1e9, CENTRE), fit_pooled(x, y, 0.0, CENTRE)
    assert np.ptp(together.weights, axis=0).max() < 1e-5
    for model in range(5):
        single = fit_logistic(x[:, model], y[:, [model]], c=1e6)[:, 0]
        np.testing.assert_allclose([*alone.weights[model], alone.offsets[model]], single, atol=0.01)


def test_the_strength_is_high_for_equal_targets_and_low_for_different_ones():
    folds = cross_validation_folds(400)
    assert choose_strength(*made(spread=0.0), folds, CENTRE) >= 100
    assert choose_strength(*made(spread=1.5), folds, CENTRE) <= 30


def test_without_a_difference_between_targets_the_strength_is_the_largest():
    x, y = made()
    y[:] = 1.0
    assert choose_strength(x, y, cross_validation_folds(400), CENTRE) == STRENGTHS[-1]


def test_the_loss_of_differences_is_the_mean_over_pairs_of_a_right_and_a_wrong_target():
    logits = np.array([[2.0, 0.0, 1.0], [5.0, 5.0, 5.0]])
    correct = np.array([[1.0, 0.0, np.nan], [1.0, 1.0, 0.0]])
    expected = (np.log1p(np.exp(-2.0)) + 2 * np.log(2)) / 3
    assert differences_loss(logits, correct) == pytest.approx(expected)
    assert differences_loss(logits + 3, correct) == pytest.approx(expected)  # the difficulty of a query has no effect
    assert differences_loss(logits[:1], np.full((1, 3), np.nan)) == 0


def test_one_class_perfect_predictions_and_missing_labels_stay_finite():
    x, y = made(n=50)
    for labels in (np.ones_like(y), np.full_like(y, np.nan), (x[..., 0] > 0).astype(float)):
        for strength in (0.0, 10.0):
            fitted = fit_pooled(10 * x, labels, strength, CENTRE)
            assert np.isfinite(fitted.weights).all()
            assert np.isfinite(fitted.offsets).all()


def test_with_few_queries_pooled_calibration_keeps_the_order_of_close_targets_better_than_platt():
    """Twelve targets of the same accuracy and 60 queries: offsets of each target alone are noise."""
    rng = np.random.default_rng(3)
    kept = {"pooled": [], "platt": []}
    for _ in range(20):
        p = np.clip(expit(rng.normal(size=(60, 12))), 0.01, 0.99)
        y = (rng.random(p.shape) < p).astype(float)
        for name, errors in kept.items():
            errors.append(np.square(fit_calibrator(name, p, y)(p) - p).mean())
    assert np.mean(kept["pooled"]) < 0.5 * np.mean(kept["platt"])


def test_pooled_calibration_undoes_a_common_distortion():
    rng = np.random.default_rng(4)
    p = expit(rng.normal(size=(2000, 4)))
    y = (rng.random(p.shape) < p).astype(float)
    distorted = expit(3 * logit(p) + 1)
    np.testing.assert_allclose(fit_calibrator("pooled", distorted, y)(distorted), p, atol=0.06)
    np.testing.assert_allclose(fit_platt(distorted, y)(distorted), p, atol=0.12)
