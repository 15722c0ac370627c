"""The length head compared with scikit-learn, and the targets that use it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from prefill_router.routing.cost import CostModel
from prefill_router.routing.lengths import PENALTIES, LengthModel, fit_lengths, without_regret

N, FOLDS = 300, 5


def sample(missing: float = 0.0, seed: int = 0, n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, 6], output tokens of three models that depend on them, and folds. The last model's are noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(1.0, 1.0, size=(n, 6)).astype(np.float32)
    slopes = np.array([[0.8, 0.3, 0, 0, 0, 0], [0, 0, 0.5, 0, 0, -0.4], [0] * 6]).T
    tokens = np.round(np.exp(4 + features @ slopes + rng.normal(0, 0.7, size=(n, 3)))).astype(np.float32)
    tokens[rng.random(tokens.shape) < missing] = np.nan
    return features, tokens, np.arange(n) % FOLDS


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_head_equals_ridge_regressions_of_scikit_learn(missing: float) -> None:
    features, tokens, folds = sample(missing)
    rows = np.random.default_rng(1).permutation(N)[:250]  # other queries have no influence
    model, head = fit_lengths(features, tokens, rows, folds[rows])
    x, logs = features[rows].astype(np.float64), np.log1p(tokens[rows].astype(np.float64))
    for target in range(3):
        known = ~np.isnan(logs[:, target])
        out = np.empty((len(PENALTIES), len(rows)))
        for index, penalty in enumerate(PENALTIES):
            for fold in range(FOLDS):
                used = known & (folds[rows] != fold)
                fit = Ridge(alpha=penalty).fit(x[used], logs[used, target])
                out[index, folds[rows] == fold] = fit.predict(x[folds[rows] == fold])
        errors = np.square(out - logs[:, target])[:, known].mean(axis=1)
        best = int(errors.argmin())
        final = Ridge(alpha=PENALTIES[best]).fit(x[known], logs[known, target])
        smearing = np.exp(logs[known, target] - out[best, known]).mean()
        np.testing.assert_allclose(model.weights[:, target], final.coef_, rtol=0, atol=1e-3)
        np.testing.assert_allclose(model.offset[target], final.intercept_, rtol=0, atol=1e-3)
        np.testing.assert_allclose(model.smearing[target], smearing, rtol=1e-3)
        expected = np.minimum(np.exp(out[best]) * smearing - 1, np.nanmax(tokens[rows, target]))
        np.testing.assert_allclose(head[:, target], expected, rtol=5e-3)
        constants = [np.nanmedian(tokens[rows, target]), np.nanmean(tokens[rows, target])]
        by_head, *others = (np.nanmean(np.square(one - tokens[rows, target])) for one in (head[:, target], *constants))
        assert model.uses_head[target] == (by_head < min(others))


def test_a_target_whose_length_the_features_do_not_predict_keeps_its_median() -> None:
    features, tokens, folds = sample()
    model, _ = fit_lengths(features, tokens, np.arange(N), folds)
    assert model.uses_head.tolist() == [True, True, False]
    expected = model(features)
    np.testing.assert_array_equal(expected[:, 2], np.median(tokens[:, 2]))
    np.testing.assert_array_equal(expected[:, :2], model.head(features)[:, :2])


def test_smearing_makes_the_expected_tokens_right_on_average() -> None:
    features, tokens, folds = sample(n=4000)
    model, _ = fit_lengths(features, tokens, np.arange(2000), folds[:2000])
    new = slice(2000, None)
    ratio = model.head(features[new]).sum(axis=0) / tokens[new].sum(axis=0)
    np.testing.assert_allclose(ratio, 1, atol=0.06)
    without = replace(model, smearing=np.ones(3)).head(features[new]).sum(axis=0) / tokens[new].sum(axis=0)
    assert (without < 0.85).all()


def test_expected_tokens_stay_within_the_recorded_lengths() -> None:
    features, tokens, folds = sample()
    model, _ = fit_lengths(features, tokens, np.arange(N), folds)
    extreme = model.head(np.concatenate([1e4 * features, -1e4 * features]))
    assert np.isfinite(extreme).all()
    assert (extreme >= 0).all()
    assert (extreme.max(axis=0) == tokens.max(axis=0))[:2].all()


def test_a_head_that_lowers_the_utility_of_decisions_is_dropped_and_others_stay() -> None:
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.choice([10.0, 1000.0], size=N), rng.uniform(400, 600, size=N)], axis=1)
    wrong = np.stack([1010 - tokens[:, 0], tokens[:, 1]], axis=1)  # long answers of the first model are predicted short
    model, p = lengths_of(np.array([505.0, 500.0])), np.ones((N, 2))
    kept = without_regret(model, wrong, tokens, p, p, COSTS, p)
    assert kept.uses_head.tolist() == [False, True]
    kept = without_regret(model, tokens, tokens, p, p, COSTS, p)
    assert kept.uses_head.all()


def test_without_complete_held_out_queries_every_target_keeps_its_median() -> None:
    tokens, nothing = np.full((4, 2), 10.0), np.full((4, 2), np.nan)
    for p, correct, lengths in ((nothing, tokens, tokens), (tokens, nothing, tokens), (tokens, tokens, nothing)):
        kept = without_regret(lengths_of(tokens[0]), tokens, lengths, p, correct, COSTS, tokens)
        assert not kept.uses_head.any()


# One USD per thousand output tokens; input is free.
COSTS = CostModel(np.zeros(2), np.ones(2), np.ones(2), np.ones(2), 0.0, 1.0, np.full(2, 1e-3))


def lengths_of(median: np.ndarray) -> LengthModel:
    n = len(median)
    return LengthModel(np.zeros((1, n)), np.zeros(n), np.ones(n), median, median, np.ones(n, dtype=bool))
