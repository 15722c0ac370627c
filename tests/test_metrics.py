"""Figures of the confidences equal those of scikit-learn, with weights and within parts."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from prefill_router.metrics import confidences


@pytest.fixture
def labelled():
    rng = np.random.default_rng(0)
    p = np.round(rng.random((300, 4)), 2)  # rounded: many ties
    correct = (rng.random(p.shape) < 0.3 + 0.5 * p).astype(float)
    correct[rng.random(p.shape) < 0.1] = np.nan
    weights = rng.poisson(1.0, (5, 300)).astype(float)
    weights[0] = 1
    return p, correct, weights, rng.integers(3, size=300)


def test_auc_equals_scikit_learn_with_ties_weights_and_missing_labels(labelled):
    p, correct, weights, _ = labelled
    ours = confidences.roc_auc_per_model(p, correct, weights)
    for model in range(p.shape[1]):
        known = ~np.isnan(correct[:, model])
        for row, weight in enumerate(weights):
            theirs = roc_auc_score(correct[known, model], p[known, model], sample_weight=weight[known])
            assert ours[row, model] == pytest.approx(theirs, abs=1e-12)


def test_auc_within_parts_equals_the_auc_of_each_part_alone(labelled):
    p, correct, weights, part_of = labelled
    together = confidences.roc_auc_by_part(p, correct, weights, part_of, 4)
    for part in range(3):
        alone = confidences.roc_auc_per_model(p[part_of == part], correct[part_of == part], weights[:, part_of == part])
        np.testing.assert_allclose(together[:, :, part], alone, atol=1e-12)
    assert np.isnan(together[:, :, 3]).all()  # a part without queries


def test_brier_equals_scikit_learn(labelled):
    p, correct, weights, _ = labelled
    ours = confidences.brier_per_model(p, correct, weights)
    for model in range(p.shape[1]):
        known = ~np.isnan(correct[:, model])
        for row, weight in enumerate(weights):
            theirs = brier_score_loss(correct[known, model], p[known, model], sample_weight=weight[known])
            assert ours[row, model] == pytest.approx(theirs, abs=1e-12)


def test_auc_and_brier_of_four_queries_by_hand():
    p, correct = np.array([[0.5], [0.5], [0.7], [0.2]]), np.array([[1.0], [0.0], [1.0], [0.0]])
    ones = np.ones((1, 4))
    assert confidences.roc_auc_per_model(p, correct, ones)[0, 0] == 7 / 8  # one of four pairs is a tie
    assert confidences.brier_per_model(p, correct, ones)[0, 0] == pytest.approx(0.63 / 4, abs=1e-15)


def test_auc_of_one_class_is_undefined_and_left_out_of_the_mean():
    p, correct = np.array([[0.1, 0.1], [0.9, 0.9]]), np.array([[1.0, 0.0], [1.0, 1.0]])
    auc = confidences.roc_auc_per_model(p, correct, np.array([[1.0, 1.0], [0.0, 1.0]]))
    np.testing.assert_array_equal(auc, [[np.nan, 1.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(confidences.mean_over_models(auc), [1.0, np.nan])


def test_conditional_accuracy_weighted_by_volume_is_the_routed_accuracy():
    rng = np.random.default_rng(1)
    correct, cost = (rng.random((50, 3)) < 0.5).astype(float), rng.random((50, 3))
    choices, weights = rng.integers(3, size=50), rng.poisson(1.0, (4, 50)).astype(float)
    figures = confidences.routed_to(choices, correct, cost, weights)
    routed = (weights @ correct[np.arange(50), choices]) / weights.sum(axis=1)
    np.testing.assert_allclose((figures.share * figures.accuracy).sum(axis=1), routed)


def test_routing_delta_by_hand():
    correct, cost = np.array([[1.0, 0], [0, 1], [0, 1], [1, 0]]), np.array([[1.0, 4], [2, 4], [3, 8], [4, 8]])
    figures = confidences.routed_to(np.array([0, 1, 1, 1]), correct, cost, np.ones((1, 4)))
    np.testing.assert_allclose(figures.share, [[1 / 4, 3 / 4]])
    np.testing.assert_allclose(figures.accuracy, [[1, 2 / 3]])
    np.testing.assert_allclose(figures.accuracy_delta, [[1 - 1 / 3, 2 / 3 - 0]])
    np.testing.assert_allclose(figures.cost_delta, [[1 - 3, 20 / 3 - 4]])
