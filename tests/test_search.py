"""The layer search: statistics, spectrum and batched probes against slow references and scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from benchmarks.reference import reference_layer
from prefill_router.signals import spectrum
from prefill_router.signals.geometry import fisher_separability, measure_geometry
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.logistic import View, fit_logistic, fit_nested_logistic
from prefill_router.signals.projection import Moments, principal_components
from prefill_router.signals.roc_auc import area_under_curve, auc_per_model
from prefill_router.signals.search import LayerScores, search_layer, search_layers
from prefill_router.signals.spectrum import leading_eigenvectors
from prefill_router.signals.statistics import Statistics, gather, separability, without
from prefill_router.signals.subspace import Subspace

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One BLAS thread, as in the search: threads on small matrices are slow on a busy machine."""
    with threadpool_limits(1):
        yield


def made_up(
    n: int = 400, hidden: int = 24, missing: float = 0.05, seed: int = 0, strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlated states far from the origin, labels of three targets that depend on them, and folds."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n, 12)) / np.sqrt(np.arange(1, 13))
    states = factors @ rng.normal(size=(12, hidden)) + 0.3 * rng.normal(size=(n, hidden)) + 5 * rng.normal(size=hidden)
    logits = strength * factors[:, :3] @ rng.normal(size=(3, 3)) * 1.5
    correct = (rng.random((n, 3)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    correct[rng.random(correct.shape) < missing] = np.nan
    return states.astype(np.float32), correct, rng.permutation(n) % 5


def all_statistics(states: np.ndarray, correct: np.ndarray, folds: np.ndarray) -> Statistics:
    by_fold = gather([(states, correct, folds)], 5)
    return sum(by_fold[1:], by_fold[0])


def mostly_missing(correct: np.ndarray) -> np.ndarray:
    """One target has labels for a tenth of the queries: more labels are missing than the states have columns."""
    correct = correct.copy()
    correct[np.arange(len(correct)) % 10 > 0, 1] = np.nan
    return correct


@pytest.mark.parametrize("labels", ["complete", "a few missing", "mostly missing"])
def test_j_from_statistics_is_j_of_the_projected_rows(labels: str):
    states, correct, folds = made_up(missing=0.0 if labels == "complete" else 0.1)
    correct = mostly_missing(correct) if labels == "mostly missing" else correct
    statistics = all_statistics(states, correct, folds)
    principal = principal_components(statistics.moments, 16)
    found = separability(statistics, principal).fisher
    z = principal.projection(states)
    for k in range(1, 17):
        for target in range(3):
            assert found[k - 1, target] == pytest.approx(fisher_separability(z[:, :k], correct[:, target]), rel=1e-4)
    assert (np.diff(found, axis=0) >= -1e-9).all()


def test_j_without_a_fold_is_j_of_the_other_folds():
    states, correct, folds = made_up()
    by_fold = gather([(states, correct, folds)], 5)
    rest = without(sum(by_fold[1:], by_fold[0]), by_fold, [1, 3])
    keep = (folds != 1) & (folds != 3)
    z = (principal := principal_components(rest.moments, 8)).projection(states[keep])
    expected = [fisher_separability(z, correct[keep, target]) for target in range(3)]
    np.testing.assert_allclose(separability(rest, principal).fisher[-1], expected, rtol=1e-4)


def test_statistics_of_pieces_equal_those_of_all_rows():
    states, correct, folds = made_up()
    correct = mostly_missing(correct)
    cuts = [slice(0, 130), slice(130, 131), slice(131, 400)]
    pieces = gather([(states[cut], correct[cut], folds[cut]) for cut in cuts], 5)
    at_once = gather([(states, correct, folds)], 5)
    a, b = (
        separability(total, principal_components(total.moments, 10), [4, 10])
        for total in (sum(by_fold[1:], by_fold[0]) for by_fold in (pieces, at_once))
    )
    np.testing.assert_allclose(a.fisher, b.fisher, rtol=1e-4)
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-2, atol=1e-3)


def test_memory_of_rows_with_missing_labels_is_bounded_by_the_width():
    correct = mostly_missing(np.ones((5000, 3), dtype=np.float32))
    statistics = Statistics.of(RNG.normal(size=(5000, 6)).astype(np.float32), correct, np.zeros(6))
    assert statistics.gaps.shape == (7, 7)
    assert len((statistics + statistics).gaps) == 7


def test_discriminants_of_every_k_are_those_of_k_components_alone():
    states, correct, folds = made_up(missing=0)
    statistics = all_statistics(states, correct, folds)
    principal = principal_components(statistics.moments, 10)
    weights, z = separability(statistics, principal, [3, 10]).weights, principal.projection(states).astype(np.float64)
    for at, k in enumerate((3, 10)):
        for target in range(3):
            right, wrong = z[correct[:, target] == 1, :k], z[correct[:, target] == 0, :k]
            within = np.cov(right.T, bias=True) * len(right) + np.cov(wrong.T, bias=True) * len(wrong)
            direction = np.linalg.solve(within / 400, right.mean(axis=0) - wrong.mean(axis=0))
            offset = np.log(len(right) / len(wrong)) - direction @ (right.mean(axis=0) + wrong.mean(axis=0)) / 2
            np.testing.assert_allclose(weights[at, target, :k], direction, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(weights[at, target, k:-1], 0)
            assert weights[at, target, -1] == pytest.approx(offset, abs=1e-3)


def test_batched_logistic_regressions_equal_single_ones_from_any_start():
    z = RNG.normal(size=(500, 9)) * np.linspace(2, 0.5, 9)
    labels = (RNG.random((500, 3)) < 1 / (1 + np.exp(-z[:, :3]))).astype(np.float32)
    labels[RNG.random(labels.shape) < 0.1] = np.nan
    rows, ks, penalties = [slice(0, 100), slice(100, 260), slice(260, 500)], [2, 5, 8], np.array([1.0, 0.3, 2.0])
    kept = np.array([[True, True, True], [True, False, True], [False, True, True]])
    start, maps = RNG.normal(size=(3, 3, 3, 9)), np.zeros((3, 10, 9))
    maps[:, :9, :8] = np.linalg.qr(RNG.normal(size=(3, 9, 9)))[0][..., :8]
    maps[:, 9] = [*np.linspace(-0.3, 0.3, 8), 1]
    ones = np.ones((500, 1))
    for precision, error in ((np.float64, 1e-7), (np.float32, 1e-4)):
        pieces = [(z[own].astype(precision), labels[own]) for own in rows]
        mapped = [np.hstack([z, ones]) @ map_ for map_ in maps]
        views = [
            View(kept[view], maps[view], np.square(mapped[view][:, :-1]).mean(axis=0), penalties) for view in range(3)
        ]
        together = fit_nested_logistic(pieces, views, ks, start, tolerance=1e-9 if precision is np.float64 else 1e-6)
        for view, at in np.ndindex(3, 3):
            own = np.concatenate([np.arange(500)[part] for part, has in zip(rows, kept[view], strict=True) if has])
            alone = fit_logistic(mapped[view][own, : ks[at]], labels[own], penalties[at], tolerance=1e-10)
            expected = maps[view][:, [*range(ks[at]), 8]] @ alone
            np.testing.assert_allclose(together[view, at].T, expected, atol=error)


def shift_one_fold(states: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """States with a fold of other mean and scale, and a column that is constant outside this fold."""
    states, own = states.copy(), folds == 2
    states[own] = states[own] * np.linspace(1, 3, states.shape[1], dtype=np.float32) + 2
    states[~own, 3] = 1
    return states


def test_scaler_and_pca_without_folds_equal_those_of_the_other_folds():
    states, correct, folds = made_up()
    order = np.argsort(folds, kind="stable")
    states, correct, folds = shift_one_fold(states, folds)[order], correct[order], folds[order]
    rows = [slice(*np.searchsorted(folds, [fold, fold + 1])) for fold in range(5)]
    total = Moments.of(states, states.mean(axis=0))
    subspace = Subspace.of(states - total.origin, total, rows, 24)
    z = subspace(states - total.origin)
    by_fold = gather([(z, correct, folds)], 5)
    for left_out in ((2,), (0, 3), (2, 4), ()):
        rest = without(sum(by_fold[1:], by_fold[0]), by_fold, left_out)
        kept = ~np.isin(folds, left_out)
        found = subspace.principal_without(left_out, rest.moments, 8)
        expected = principal_components(Moments.of(states[kept], states[kept].mean(axis=0)), 8)
        np.testing.assert_allclose(found.variances, expected.variances, rtol=1e-4)
        np.testing.assert_allclose(
            np.abs(found.projection(z[kept])), np.abs(expected.projection(states[kept])), atol=5e-3
        )


def test_the_subspace_is_small_if_the_spectrum_decays_and_large_if_flat():
    mix, sizes = np.linalg.qr(RNG.normal(size=(300, 300)))[0], []
    for strength in (np.exp(-np.arange(300) / 10), np.ones(300)):
        states = ((RNG.normal(size=(400, 300)) * strength) @ mix).astype(np.float32)
        total = Moments.of(states, states.mean(axis=0))
        rows = [slice(start, start + 80) for start in range(0, 400, 80)]
        basis = Subspace.of(states - total.origin, total, rows, 16).basis
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-4)
        sizes.append(basis.shape[1])
    assert 16 < sizes[0] < 40
    assert sizes[1] > 150


def test_areas_of_many_scores_equal_single_ones_with_ties_and_missing_labels():
    correct = (RNG.random((150, 3)) < 0.4).astype(np.float32)
    correct[RNG.random(correct.shape) < 0.2] = np.nan
    correct[~np.isnan(correct[:, 2]), 2] = 1
    scores = RNG.normal(size=(4, 3, 150))
    scores[1] = scores[1].round(1)
    areas = area_under_curve(correct, scores)
    for at in range(4):
        np.testing.assert_allclose(areas[at], auc_per_model(correct, scores[at].T))
    assert np.isnan(areas[:, 2]).all()


@pytest.mark.parametrize(("hidden", "share"), [(24, True), (24, False), (600, True)])
def test_the_search_equals_scikit_learn_and_chooses_the_same_layer(hidden: int, share: bool):
    ks, searched, expected = [2, 5, 12], [], []
    for layer in range(3):
        states, correct, folds = made_up(hidden=hidden)
        states = states + (2 - layer) * RNG.normal(size=states.shape).astype(np.float32)
        searched.append(search_layer(states, correct, folds, ks, nested=False).auc)
        expected.append(reference_layer(states, correct, folds, ks, share))
    assert np.abs(np.array(searched) - expected).max() <= 1e-3
    ours, theirs = np.argmax(searched, axis=0), np.argmax(expected, axis=0)
    best = np.sort(expected, axis=0)
    assert (ours == theirs)[best[-1] - best[-2] > 1e-3].all()


def test_a_search_over_many_k_equals_searches_over_one_k():
    states, correct, folds = made_up()
    together = search_layer(states, correct, folds, [3, 8, 20])
    for k in (3, 8, 20):
        alone = search_layer(states, correct, folds, [k]).at(k)
        np.testing.assert_allclose(together.at(k).auc, alone.auc, atol=2e-4)
        np.testing.assert_allclose(together.at(k).auc_without, alone.auc_without, atol=5e-4)
        np.testing.assert_allclose(together.at(k).fisher, alone.fisher, rtol=1e-5)


def test_the_order_of_queries_and_the_units_of_states_do_not_matter():
    states, correct, folds = made_up()
    before = search_layer(states, correct, folds, [4, 12], with_geometry=True)
    shuffled, units = RNG.permutation(400), 10.0 ** RNG.integers(-2, 3, size=24)
    moved = ((states - 3) * units).astype(np.float32)[shuffled]
    after = search_layer(moved, correct[shuffled], folds[shuffled], [4, 12], with_geometry=True)
    np.testing.assert_allclose(after.auc, before.auc, atol=5e-4)
    np.testing.assert_allclose(after.fisher, before.fisher, rtol=2e-3)
    assert after.geometry.d_eff == pytest.approx(before.geometry.d_eff, rel=1e-4)
    assert after.geometry.anisotropy == pytest.approx(before.geometry.anisotropy, abs=1e-5)


def test_inputs_are_not_changed():
    states, correct, folds = made_up()
    copies = states.copy(), correct.copy(), folds.copy()
    search_layer(states, correct, folds, [4], with_geometry=True)
    for given, copy in zip((states, correct, folds), copies, strict=True):
        np.testing.assert_array_equal(given, copy)


def test_a_target_of_one_class_is_nan_and_does_not_affect_the_others():
    states, correct, folds = made_up()
    one = correct.copy()
    one[:, 1] = np.where(np.isnan(one[:, 1]), np.nan, 1)
    before, after = search_layer(states, correct, folds, [4, 8]), search_layer(states, one, folds, [4, 8])
    assert np.isnan(after.auc[:, 1]).all()
    assert np.isnan(after.fisher[:, 1]).all()
    np.testing.assert_allclose(after.auc[:, [0, 2]], before.auc[:, [0, 2]], atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 0.1, 1000.0])
@pytest.mark.parametrize("hidden", [24, 600])
def test_constant_states_give_auc_one_half_without_warnings(hidden: int, offset: float):
    _, correct, folds = made_up()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = search_layer(np.full((400, hidden), offset, np.float32), correct, folds, [4, 8], with_geometry=True)
    assert (scores.auc == 0.5).all()
    assert (scores.auc_without == 0.5).all()
    assert (scores.fisher == 0).all()
    assert np.isnan(scores.geometry.d_eff)


def test_constant_columns_change_nothing():
    states, correct, folds = made_up()
    wider = np.concatenate([states, np.full((400, 3), 7.3, np.float32)], axis=1)
    before, after = search_layer(states, correct, folds, [4, 12]), search_layer(wider, correct, folds, [4, 12])
    np.testing.assert_allclose(after.auc, before.auc, atol=5e-4)
    np.testing.assert_allclose(after.fisher[:24], before.fisher, rtol=1e-4)


def test_more_components_than_columns_or_queries_do_not_crash():
    states, correct, folds = made_up(n=60, hidden=100)
    scores = search_layer(states, correct, folds, [16, 64])
    assert np.isfinite(scores.auc).all()
    states, correct, folds = made_up(n=200, hidden=8)
    scores = search_layer(states, correct, folds, [4, 64])
    np.testing.assert_allclose(scores.auc[1], search_layer(states, correct, folds, [8]).auc[0], atol=5e-4)
    assert scores.fisher.shape == (8, 3)


def test_geometry_from_given_moments_equals_that_of_the_states():
    states, correct, folds = made_up()
    found, direct = search_layer(states, correct, folds, [4], with_geometry=True).geometry, measure_geometry(states)
    for name in ("d_eff", "d_eff_raw", "anisotropy", "anisotropy_raw"):
        assert getattr(found, name) == pytest.approx(getattr(direct, name), rel=1e-4, abs=1e-6)


def test_a_search_of_many_layers_equals_single_searches():
    layer_keys = [LayerKey("e", "mean", layer) for layer in range(3)]
    columns = {key: made_up(seed=key.layer)[0] for key in layer_keys}
    _, correct, folds = made_up()
    found = search_layers(layer_keys, columns.__getitem__, correct, folds, [4, 8], nested=False)
    assert list(found) == layer_keys
    for key in layer_keys:
        alone: LayerScores = search_layer(columns[key], correct, folds, [4, 8], nested=False)
        np.testing.assert_array_equal(found[key].auc, alone.auc)


def covariance(width: int = 700, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(1000, width)) / np.sqrt(np.arange(1, width + 1))) @ np.random.default_rng(9).normal(
        size=(width, width)
    )
    return (x.T @ x / 1000).astype(np.float32)


def test_leading_eigenvectors_of_a_wide_matrix_equal_lapack():
    matrix = covariance()
    values, vectors = leading_eigenvectors(matrix, 32)
    expected, basis = np.linalg.eigh(matrix.astype(np.float64))
    np.testing.assert_allclose(values[:32], expected[::-1][:32], rtol=1e-5)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-4)
    for k in (4, 16, 32):  # cosines of the principal angles
        cosines = np.linalg.svd(vectors[:, :k].T @ basis[:, ::-1][:, :k], compute_uv=False)
        assert cosines.min() > 0.999


@pytest.mark.parametrize("matrix", [np.zeros((600, 600)), np.eye(600), np.diag(np.arange(600.0) < 3)])
def test_spectra_without_gap_or_of_low_rank_are_found(matrix: np.ndarray):
    values, vectors = leading_eigenvectors(matrix.astype(np.float32), 8)
    np.testing.assert_allclose(values[:8], np.sort(np.diag(matrix))[::-1][:8], atol=1e-5)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-4)


def test_lapack_is_the_fallback_if_the_rounds_do_not_suffice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spectrum, "MAX_ROUNDS", 1)
    values, _ = leading_eigenvectors(covariance(), 32)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(covariance().astype(np.float64))[::-1][:48], rtol=1e-4)
