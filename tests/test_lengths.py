"""The length head compared with scikit-learn, and the targets that use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import QUICK, MadeStates, make_outcomes, make_pool, make_signals, rows_of
from sklearn.linear_model import Ridge

from prefill_router.experiments import predict
from prefill_router.outcomes.splits import split_queries
from prefill_router.pool import Pool
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.cost import CostModel, fit_costs
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.fit import fit_router
from prefill_router.routing.lengths import PENALTIES, LengthModel, choose_lengths, fit_lengths, without_regret
from prefill_router.routing.router import Router

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


def test_a_router_whose_targets_all_keep_their_median_has_no_length_model() -> None:
    outcomes, _ = make_outcomes(n=60)  # every model's length is constant
    rows, features = np.arange(60), np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    costs = fit_costs(make_pool(), outcomes, rows, np.full(60, 12))
    p = np.full((60, 3), 0.5)
    assert choose_lengths(features, outcomes, rows, rows % FOLDS, rows, p, costs, np.full(60, 12)) is None


class LengthsFromDifficulty:
    """Outcomes with output tokens that depend on the query, and a router fitted on them."""

    def __init__(self) -> None:
        outcomes, difficulty = make_outcomes(n=250)
        rng = np.random.default_rng(3)
        tokens = np.exp(5 + 0.8 * difficulty[:, None] + rng.normal(0, 0.3, size=(len(outcomes), 3)))
        self.outcomes = replace(outcomes, output_tokens=np.round(tokens).astype(np.float32))
        self.states = MadeStates(difficulty)
        self.signals = make_signals(self.outcomes, self.states, self.states.layer_keys)
        self.split = split_queries(self.outcomes, 0, "75/10/15")

    def fit(self, lengths: str) -> Router:
        config = FitConfig.model_validate(
            {"scheme": "75/10/15", "components": 4, "each_pooling": False, "trunk": QUICK, "lengths": lengths}
        )
        return fit_router(self.signals, make_pool(), self.split, config, {}).router


@pytest.fixture(scope="module")
def made() -> tuple[LengthsFromDifficulty, Router, Router]:
    data = LengthsFromDifficulty()
    return data, data.fit("auto"), data.fit("median")


def test_decisions_cost_the_expected_tokens_of_each_query(
    made: tuple[LengthsFromDifficulty, Router, Router], tmp_path: Path
) -> None:
    data, router, _ = made
    assert router.lengths is not None
    queries = data.split.test[:20].tolist()
    rows = rows_of(data.states, queries)
    decisions = router.decide(rows, 0.3)
    expected = router.lengths(router.features(lambda key: data.states(key)[queries]))
    assert len(np.unique(expected[:, 0])) == 20
    for row, decision in enumerate(decisions):
        for candidate in decision.candidates:
            model = router.pool.names.index(candidate.model)
            price = router.pool.models[model].output_usd_per_mtok or 0.0
            fixed = 12 * router.costs.token_ratio[model] * router.costs.per_input_token[model]
            assert candidate.expected_output_tokens == pytest.approx(expected[row, model])
            assert candidate.cost_usd == pytest.approx(fixed + expected[row, model] * price / 1e6)
    limit = max(min(one.cost_usd for one in decision.candidates) for decision in decisions)
    for free, cheap in zip(decisions, router.decide(rows, 0.3, Requirements(max_cost_usd=limit)), strict=True):
        within = {one.model for one in free.candidates if one.cost_usd <= limit}
        assert {one.model for one in cheap.candidates} == within
    save_checkpoint(router, tmp_path / "checkpoint")
    assert load_checkpoint(tmp_path / "checkpoint").decide(rows, 0.3) == decisions


def test_the_context_window_must_hold_the_expected_answer(made: tuple[LengthsFromDifficulty, Router, Router]) -> None:
    data, router, _ = made
    queries = data.split.test.tolist()
    expected = router.output_tokens(router.features(lambda key: data.states(key)[queries]))
    assert expected is not None
    limit = int(np.median(expected[:, 0])) + 12
    models = router.pool.models
    narrow = replace(router, pool=Pool(models=(models[0].model_copy(update={"context_tokens": limit}), *models[1:])))
    decisions = narrow.decide(rows_of(data.states, queries), 0.0)
    fits = 12 * router.costs.token_ratio[0] + expected[:, 0] <= limit
    assert [not decision.excluded for decision in decisions] == fits.tolist()
    assert 0 < fits.sum() < len(queries)


def test_medians_are_an_option_and_checkpoints_without_lengths_use_them(
    made: tuple[LengthsFromDifficulty, Router, Router],
) -> None:
    data, _, router = made
    assert router.lengths is None
    (decision,) = router.decide(rows_of(data.states, [int(data.split.test[0])]), 0.3)
    for candidate in decision.candidates:
        assert candidate.expected_output_tokens == router.costs.median_output[router.pool.names.index(candidate.model)]


def test_the_evaluation_estimates_the_costs_that_decisions_estimate(
    made: tuple[LengthsFromDifficulty, Router, Router], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, router, _ = made
    monkeypatch.setattr(predict, "check_encoders", lambda *_: None)  # these signals have no datasets
    predictions, _ = predict.predict_test(router, data.signals, data.split, baselines=False)
    recorded = data.outcomes.input_tokens[data.split.test]
    expected = router.output_tokens(router.features(data.signals.states))
    assert expected is not None
    prices = np.array([model.output_usd_per_mtok or 0.0 for model in router.pool.models]) / 1e6
    cost = recorded * router.costs.per_input_token + expected[data.split.test] * prices
    np.testing.assert_allclose(predictions.cost, cost)
    medians = recorded * router.costs.per_input_token + router.costs.median_output * prices
    np.testing.assert_allclose(predictions.with_median_costs().cost, medians)
    assert (
        predict.predict_test(replace(router, lengths=None), data.signals, data.split, baselines=False)[0].medians
        is None
    )
