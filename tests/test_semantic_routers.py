"""Contracts of every semantic router: seeds, missing labels, one class, order of rows and models, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from prefill_router.errors import InputError
from prefill_router.semantic.classifiers import KNNRouter, LogisticRouter, XGBoostRouter
from prefill_router.semantic.graph import GraphRouter
from prefill_router.semantic.grid import ROUTERS
from prefill_router.semantic.irt import MIRTRouter
from prefill_router.semantic.networks import NetworkRouter, TieredRouter
from prefill_router.semantic.router import Features, SemanticRouter, Standardiser
from prefill_router.signals.roc_auc import auc_per_model

pytestmark = pytest.mark.train

N, N_MODELS = 360, 4
SMALL = {"widths": (16,), "members": 2, "kept": 1, "learning_rate": 1e-2}
MAKE = {
    "kNN vote": lambda: KNNRouter(k=15),
    "kNN score": lambda: KNNRouter(k=15, kernel="inverse"),
    "logistic": LogisticRouter,
    "XGBoost": lambda: XGBoostRouter(n_trees=60, learning_rate=0.1),
    "MLP": lambda: NetworkRouter(joint=False, difficulty=0.0, **SMALL),
    "MT": lambda: NetworkRouter(joint=False, **SMALL),
    "unified MT": lambda: NetworkRouter(**SMALL),
    "disagreement-weighted": lambda: NetworkRouter(disagreement=2.0, **SMALL),
    "judged": lambda: NetworkRouter(judged=True, **SMALL),
    "two-stage": lambda: TieredRouter(**SMALL),
    "MIRT": lambda: MIRTRouter(max_epochs=30),
    "graph": lambda: GraphRouter(max_epochs=6),
}
EACH_ALONE = ("kNN vote", "kNN score", "logistic")  # each model is fitted alone, and row order enters sums only
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@pytest.fixture(scope="module")
def data() -> tuple[Features, np.ndarray, np.ndarray]:
    """Features that tell each model's correctness, labels with holes, and a validation mask."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 6)).astype(np.float32)
    own = rng.normal(size=(N, N_MODELS, 2)).astype(np.float32)
    logits = 2 * x[:, :1] + np.array([1.0, 0.0, -1.0, 0.5]) * x[:, 1:2] + own[:, :, 0]
    correct = (rng.random((N, N_MODELS)) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    correct[rng.random(correct.shape) < 0.1] = np.nan
    return Features(x, own, judged=1 / (1 + np.exp(x[:, 0]))), correct, np.arange(N) % 6 == 0


def fitted(make, data, seed: int = 0) -> SemanticRouter:
    return make().fit(*data, seed)


def test_every_kind_is_among_those_tried():
    assert {make().kind for make in MAKE.values()} | {"lora"} == set(ROUTERS)  # LoRA reads texts: test_finetune.py


@every
def test_it_learns_what_the_features_tell(make, data):
    features, correct, validation = data
    p = fitted(make, data).predict(features)
    assert p.shape == correct.shape
    assert ((p > 0) & (p < 1)).all()
    assert np.nanmean(auc_per_model(correct[validation], p[validation])) > 0.68


@every
def test_a_seed_gives_the_same_router_and_the_input_is_not_changed(make, data):
    features, correct, validation = data
    before = [array.copy() for array in (features.shared, features.own, correct, validation)]
    one, other = (fitted(make, data, seed=3).predict(features) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    for array, was in zip((features.shared, features.own, correct, validation), before, strict=True):
        np.testing.assert_array_equal(array, was)


@every
def test_a_missing_label_is_neither_right_nor_wrong(make, data):
    features, correct, validation = data
    correct = correct.copy()
    correct[np.random.default_rng(4).random(N) < 0.8, 0] = np.nan  # taken for wrong, it would look hopeless
    p = make().fit(features, correct, validation, 0).predict(features)
    assert abs(p[:, 0].mean() - np.nanmean(correct[:, 0])) < 0.2


@every
def test_a_model_of_one_class_or_without_labels_gets_its_share(make, data):
    features, correct, validation = data
    correct = correct.copy()
    correct[:, 1], correct[:, 2] = 1, np.nan
    p = make().fit(features, correct, validation, 0).predict(features)
    n = (~validation).sum()
    np.testing.assert_allclose(p[:, 1], (n + 1) / (n + 2), atol=1e-6)
    np.testing.assert_allclose(p[:, 2], 0.5)
    assert np.nanmean(auc_per_model(correct[validation][:, [0, 3]], p[validation][:, [0, 3]])) > 0.65


@every
def test_if_no_model_can_be_fitted_all_get_their_shares(make, data):
    features, correct, validation = data
    p = make().fit(features, np.zeros_like(correct), validation, 0).predict(features)
    np.testing.assert_allclose(p, 1 / ((~validation).sum() + 2))


@every
def test_validation_queries_may_have_no_labels(make, data):
    features, correct, validation = data
    p = make().fit(features, np.where(validation[:, None], np.nan, correct), validation, 0).predict(features)
    assert np.nanmean(auc_per_model(correct[validation], p[validation])) > 0.6


@pytest.mark.parametrize("name", ["logistic", "unified MT", "MT", "two-stage", "MIRT"])
def test_principal_components_are_not_scaled_and_other_features_are(name: str, data):
    features, correct, validation = data
    longer = features.shared * np.float32([1, 1, 1, 1, 1, 30])

    def p(shared: np.ndarray, ready: int) -> np.ndarray:
        given = replace(features, shared=shared, ready=ready)
        return MAKE[name]().fit(given, correct, validation, 0).predict(given)

    np.testing.assert_allclose(p(longer, 0), p(features.shared, 0), atol=1e-3)
    assert np.abs(p(longer, 6) - p(features.shared, 6)).max() > 0.05


@every
def test_a_row_is_predicted_alike_in_any_company(make, data):
    features = data[0]
    router = fitted(make, data)
    order = np.random.default_rng(1).permutation(N)
    p = router.predict(features)
    np.testing.assert_allclose(router.predict(features.take(order)), p[order], atol=1e-5)
    np.testing.assert_allclose(router.predict(features.take(np.array([7]))), p[[7]], atol=1e-5)
    assert router.predict(features.take(np.array([], dtype=int))).shape == (0, N_MODELS)


@every
def test_the_order_of_models_carries_no_meaning(make, data):
    """Approximately: networks start from other random weights, so only correlation is compared."""
    features, correct, validation = data
    order = np.array([2, 0, 3, 1])
    p = fitted(make, data).predict(features)
    moved = replace(features, own=features.own[:, order])
    other = make().fit(moved, correct[:, order], validation, 0).predict(moved)
    for place, model in enumerate(order):
        assert np.corrcoef(p[:, model], other[:, place])[0, 1] > 0.75


@pytest.mark.parametrize("name", EACH_ALONE)
def test_the_order_of_training_rows_and_models_carries_no_meaning(name: str, data):
    features, correct, validation = data
    features = replace(features, own=np.empty((N, N_MODELS, 0), dtype=np.float32))  # kNN reads all models' own
    rows, models = np.random.default_rng(2).permutation(N), np.array([2, 0, 3, 1])
    p = MAKE[name]().fit(features, correct, validation, 0).predict(features)
    own = features.take(rows)
    other = MAKE[name]().fit(own, correct[rows][:, models], validation[rows], 0).predict(features)
    np.testing.assert_allclose(other, p[:, models], atol=2e-3)


@every
def test_a_saved_router_predicts_the_same(make, data, tmp_path: Path):
    router = fitted(make, data)
    router.save(tmp_path)
    loaded = type(router).load(tmp_path)
    assert loaded == router
    np.testing.assert_array_equal(loaded.predict(data[0]), router.predict(data[0]))


def test_a_file_of_another_kind_is_refused(data, tmp_path: Path):
    fitted(LogisticRouter, data).save(tmp_path)
    with pytest.raises(InputError, match=r"holds a router of kind 'logistic'.*expected 'knn'"):
        KNNRouter.load(tmp_path)


def test_arrays_that_do_not_fit_and_features_that_are_not_finite_are_refused(data):
    features, correct, validation = data
    with pytest.raises(InputError, match="same queries and models"):
        LogisticRouter().fit(features.take(np.arange(N - 1)), correct, validation, 0)
    with pytest.raises(InputError, match="every query is a validation query"):
        LogisticRouter().fit(features, correct, np.ones_like(validation), 0)
    shared = features.shared.copy()
    shared[11, 2] = np.inf
    with pytest.raises(InputError, match="shared, query 11: not finite"):
        LogisticRouter().fit(replace(features, shared=shared), correct, validation, 0)
    with pytest.raises(InputError, match="has not been fitted"):
        LogisticRouter().predict(features)


def test_logistic_is_that_of_scikit_learn(data):
    """On one penalty: standardised by the rows learned from, fitted on all."""
    features, correct, validation = data
    p = LogisticRouter(penalties=(0.05,)).fit(features, correct, validation, 0).predict(features)
    for model in range(N_MODELS):
        x, known = features.of_model(model), np.isfinite(correct[:, model])
        z = Standardiser.of(x[~validation], 0)(x)
        reference = LogisticRegression(C=0.05, tol=1e-8, max_iter=1000).fit(z[known], correct[known, model])
        np.testing.assert_allclose(p[:, model], reference.predict_proba(z)[:, 1], atol=2e-4)


def test_tiers_add_up_and_judges_labels_are_needed(data):
    features, correct, validation = data
    sure = np.tile((features.shared[:, :1] > 0).astype(np.float64), (1, N_MODELS))  # never a disagreement
    p = TieredRouter(**SMALL).fit(features, sure, validation, 0).predict(features)
    assert p[features.shared[:, 0] > 1].min() > 0.8
    assert p[features.shared[:, 0] < -1].max() < 0.2
    with pytest.raises(InputError, match="no judge's labels"):
        NetworkRouter(judged=True, **SMALL).fit(replace(features, judged=None), correct, validation, 0)


def test_the_difficulty_task_and_the_weight_of_disagreement_change_what_is_learned(data):
    base = NetworkRouter(difficulty=0.0, **SMALL).fit(*data, 0).predict(data[0])
    for setting in ({"difficulty": 2.0}, {"difficulty": 0.0, "disagreement": 4.0}):
        assert np.abs(NetworkRouter(**setting, **SMALL).fit(*data, 0).predict(data[0]) - base).max() > 0.01
