"""Signals: geometry by definition, projection and probe against scikit-learn, nested selection."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from builders import ENCODER, MadeStates, make_outcomes
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from prefill_router.errors import InputError
from prefill_router.outcomes.splits import make_folds
from prefill_router.signals.geometry import (
    anisotropy,
    effective_dimension,
    fisher_separability,
    measure_geometry,
)
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.logistic import fit_logistic
from prefill_router.signals.projection import Moments, fit_projection, fold_moments
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.signals.search import search_layer
from prefill_router.signals.selection import ProbeScores, select_layers

RNG = np.random.default_rng(0)


def probe_layer(states: np.ndarray, correct: np.ndarray, folds: np.ndarray, k: int) -> ProbeScores:
    return search_layer(states, correct, folds, [k]).at(k)


def test_effective_dimension_is_that_of_the_eigenvalues():
    x = RNG.normal(size=(200, 6)) * [5, 3, 1, 1, 0.5, 0.1]
    covariance = np.cov(x.T, bias=True)
    e = np.linalg.eigvalsh(covariance)
    assert effective_dimension(covariance) == pytest.approx(e.sum() ** 2 / np.square(e).sum())
    assert effective_dimension(np.eye(7)) == pytest.approx(7)
    assert np.isnan(effective_dimension(np.zeros((3, 3))))


def test_anisotropy_is_the_mean_cosine_over_all_pairs():
    x = RNG.normal(size=(40, 5)) + 0.5
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert anisotropy(x) == pytest.approx((cosines.sum() - 40) / (40 * 39))
    assert anisotropy(np.ones((9, 3))) == pytest.approx(1)


def test_fisher_j_is_the_quadratic_form_and_ignores_missing_labels():
    z = RNG.normal(size=(300, 4))
    y = (z[:, 0] + RNG.normal(size=300) > 0).astype(np.float32)
    right, wrong = z[y == 1], z[y == 0]
    within = (np.cov(right.T, bias=True) * len(right) + np.cov(wrong.T, bias=True) * len(wrong)) / 300
    d = right.mean(0) - wrong.mean(0)
    assert fisher_separability(z, y) == pytest.approx(d @ np.linalg.inv(within) @ d, rel=1e-6)
    with_missing = np.concatenate([y, [np.nan] * 50]).astype(np.float32)
    more = np.vstack([z, RNG.normal(size=(50, 4))])
    assert fisher_separability(more, with_missing) == pytest.approx(fisher_separability(z, y))
    assert np.isnan(fisher_separability(z, np.ones(300, dtype=np.float32)))


def test_j_is_invariant_under_invertible_maps_and_grows_with_k():
    z = RNG.normal(size=(200, 6))
    y = (RNG.random(200) < 0.5).astype(np.float32)
    assert fisher_separability(z @ RNG.normal(size=(6, 6)), y) == pytest.approx(fisher_separability(z, y), rel=1e-5)
    js = [fisher_separability(z[:, :k], y) for k in range(1, 7)]
    assert (np.diff(js) >= -1e-9).all()


def test_projection_equals_standard_scaler_and_pca_up_to_one_common_factor():
    x = (RNG.normal(size=(500, 20)) @ RNG.normal(size=(20, 20)) + 3).astype(np.float32)
    z = fit_projection(Moments.of(x, x.mean(axis=0)), 5)(x)
    reference = PCA(5, svd_solver="full").fit_transform(StandardScaler().fit_transform(x))
    assert np.square(z).mean() == pytest.approx(1, rel=1e-3)
    factor = np.linalg.norm(reference) / np.linalg.norm(z)
    np.testing.assert_allclose(np.abs(z) * factor, np.abs(reference), atol=2e-2)


@pytest.mark.parametrize(("precision", "error"), [(np.float64, 1e-9), (np.float32, 1e-6)])
def test_moments_without_a_fold_are_the_total_minus_that_fold(precision: type, error: float):
    x = RNG.normal(size=(100, 8)).astype(precision)
    folds = np.arange(100) % 5
    by_fold = fold_moments(x, folds)
    rest = sum(by_fold[1:], by_fold[0]) - by_fold[2]
    direct = Moments.of(x[folds != 2], by_fold[0].origin)
    np.testing.assert_allclose(rest.mean, direct.mean, atol=error)
    np.testing.assert_allclose(rest.covariance, direct.covariance, atol=error)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_constant_columns_and_layers_do_not_crash(offset: float):
    x = RNG.normal(size=(60, 4)).astype(np.float32)
    x[:, 1] = offset
    z = fit_projection(Moments.of(x, x.mean(axis=0, dtype=np.float64)), 3)(x)
    assert np.isfinite(z).all()
    x[:] = offset
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (fit_projection(Moments.of(x, x.mean(axis=0, dtype=np.float64)), 3)(x) == 0).all()
        assert np.isnan(measure_geometry(x).d_eff)


def test_logistic_regression_equals_scikit_learn_for_every_target():
    z = RNG.normal(size=(600, 8))
    y = (RNG.random((600, 4)) < 1 / (1 + np.exp(-z[:, :4] * 2 + [0, 1, 2, 4]))).astype(np.float32)
    y[RNG.random(y.shape) < 0.1] = np.nan
    weights = fit_logistic(z, y, c=0.5, tolerance=1e-9)
    for target in range(4):
        known = ~np.isnan(y[:, target])
        model = LogisticRegression(C=0.5, tol=1e-10, max_iter=5000).fit(z[known], y[known, target])
        np.testing.assert_allclose(weights[:-1, target], model.coef_[0], atol=1e-4)
        np.testing.assert_allclose(weights[-1, target], model.intercept_[0], atol=1e-4)


def test_logistic_regression_on_one_class_or_separable_labels_stays_finite():
    z = RNG.normal(size=(50, 3))
    labels = np.column_stack([np.ones(50), z[:, 0] > 0, np.full(50, np.nan)])
    assert np.isfinite(fit_logistic(z, labels.astype(np.float32))).all()


def test_auc_equals_scikit_learn_with_ties_and_gaps():
    y = (RNG.random((200, 2)) < 0.4).astype(np.float32)
    score = np.round(RNG.random((200, 2)) + 0.3 * y, 1)
    y[:20, 0] = np.nan
    assert auc_per_model(y, score)[0] == pytest.approx(roc_auc_score(y[20:, 0], score[20:, 0]))
    assert np.isnan(auc_per_model(np.ones((5, 1), np.float32), np.ones((5, 1)))[0])


def test_the_probe_equals_scikit_learn_pipelines_fold_by_fold():
    outcomes, difficulty = make_outcomes(n=300, missing=0.05)
    states, folds = MadeStates(difficulty), make_folds(outcomes, np.arange(300), 0)
    key = states.layer_keys[3]
    scores = probe_layer(states(key), outcomes.correct, folds, k=5)

    def reference(fit: np.ndarray, test: np.ndarray, target: int) -> float:
        fit, test = (rows & outcomes.labelled[:, target] for rows in (fit, test))
        # The projection is label-free: it is fitted on all rows of the folds, labelled or not.
        scaler = StandardScaler().fit(states(key)[all_fit])
        pca = PCA(5, svd_solver="full").fit(scaler.transform(states(key)[all_fit]))
        factor = np.sqrt(pca.explained_variance_.mean() * (all_fit.sum() - 1) / all_fit.sum())
        z = pca.transform(scaler.transform(states(key))) / factor
        model = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(z[fit], outcomes.correct[fit, target])
        return float(roc_auc_score(outcomes.correct[test, target], model.decision_function(z[test])))

    for target in range(3):
        aucs = []
        for fold in range(5):
            all_fit = folds != fold
            aucs.append(reference(all_fit, folds == fold, target))
        assert scores.auc[target] == pytest.approx(np.mean(aucs), abs=1e-3)
        inner = []
        for fold in range(1, 5):
            all_fit = (folds != 0) & (folds != fold)
            inner.append(reference(all_fit, folds == fold, target))
        assert scores.auc_without[0, target] == pytest.approx(np.mean(inner), abs=1e-3)


def test_a_left_out_fold_does_not_affect_the_selection_without_it():
    outcomes, difficulty = make_outcomes(n=300)
    states, folds = MadeStates(difficulty), make_folds(outcomes, np.arange(300), 0)
    x, changed = states(states.layer_keys[3]), outcomes.correct.copy()
    changed[folds == 2] = 1 - changed[folds == 2]
    before = probe_layer(x, outcomes.correct, folds, k=4)
    noisy = np.where((folds == 2)[:, None], RNG.normal(size=x.shape).astype(np.float32), x)
    after = probe_layer(noisy, changed, folds, k=4)
    np.testing.assert_allclose(after.auc_without[2], before.auc_without[2], atol=1e-6)
    np.testing.assert_allclose(after.fisher_without[2], before.fisher_without[2], rtol=1e-4)
    assert not np.allclose(after.auc_without[1], before.auc_without[1])


@pytest.mark.parametrize("strategy", ["cv", "fisher"])
def test_selection_finds_the_layer_with_the_signal(strategy: str):
    outcomes, difficulty = make_outcomes(n=400)
    states, folds = MadeStates(difficulty), make_folds(outcomes, np.arange(400), 0)
    scores = {key: probe_layer(states(key), outcomes.correct, folds, k=4) for key in states.layer_keys}
    selection = select_layers(scores, strategy, outcomes.models)
    assert set(selection.layer_keys) == {(LayerKey(ENCODER, "mean", 2),)} == {(states.layer_keys[3],)}
    assert len(selection.layer_keys_without) == 5
    both = select_layers(scores, strategy, outcomes.models, each_pooling=True)
    assert set(both.layer_keys) == {(LayerKey(ENCODER, "last", 2), LayerKey(ENCODER, "mean", 2))}


def test_a_target_of_one_class_is_named():
    outcomes, difficulty = make_outcomes(n=100)
    outcomes.correct[:, 1] = 1
    states, folds = MadeStates(difficulty), make_folds(outcomes, np.arange(100), 0)
    scores = {key: probe_layer(states(key), outcomes.correct, folds, k=4) for key in states.layer_keys}
    with pytest.raises(InputError, match=r"labels of medium .* one class only"):
        select_layers(scores, "cv", outcomes.models)
