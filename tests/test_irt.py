"""MIRT: the parameters of simulated models and queries come back, and the identification holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from prefill_router.semantic.irt import MIRTRouter
from prefill_router.semantic.router import Features

pytestmark = pytest.mark.train


def simulated(
    dimensions: int, n: int = 3000, models: int = 12, width: int = 6, seed: int = 0
) -> tuple[Features, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels, and the true abilities (mean 0, deviation 1), discriminations and difficulties."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)).astype(np.float32)
    ability = rng.normal(size=(models, dimensions))
    ability = (ability - ability.mean(axis=0)) / ability.std(axis=0)
    discrimination = np.logaddexp(0, x @ rng.normal(0, 0.6, (width, dimensions)) + 0.8)
    difficulty = x @ rng.normal(0, 0.6, width)
    p = expit(discrimination @ ability.T - difficulty[:, None])
    correct = (rng.random(p.shape) < p).astype(np.float32)
    correct[rng.random(p.shape) < 0.1] = np.nan
    return Features(x, np.zeros((n, models, 0), np.float32)), correct, ability, discrimination, difficulty


def every_fifth(n: int) -> np.ndarray:
    return np.arange(n) % 5 == 0


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of columns with the same columns."""
    return np.array([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(a.shape[1])])


def test_in_one_dimension_abilities_discriminations_and_difficulties_are_recovered():
    features, correct, ability, discrimination, difficulty = simulated(1)
    router = MIRTRouter(dimensions=1, weight_decay=0.0).fit(features, correct, every_fifth(len(features)))
    items = router.items(features)
    assert correlations(router.arrays_["ability"], ability) > 0.9
    assert correlations(items.discrimination, discrimination) > 0.9
    assert np.corrcoef(items.difficulty, difficulty)[0, 1] > 0.9
    np.testing.assert_allclose(items.discrimination.mean(), discrimination.mean(), rtol=0.15)


def test_in_two_dimensions_they_are_recovered_up_to_a_linear_map():
    """If theta = theta^ A then a . theta = (a A^T) . theta^: discriminations go back by the inverse of A^T."""
    features, correct, ability, discrimination, difficulty = simulated(2)
    router = MIRTRouter(dimensions=2, weight_decay=0.0).fit(features, correct, every_fifth(len(features)))
    items = router.items(features)
    found = router.arrays_["ability"]
    map_ = np.linalg.lstsq(found, ability, rcond=None)[0]
    assert (correlations(found @ map_, ability) > 0.9).all()
    assert (correlations(items.discrimination @ np.linalg.inv(map_.T), discrimination) > 0.9).all()
    assert np.corrcoef(items.difficulty, difficulty)[0, 1] > 0.9


def as_trained(router: MIRTRouter, x: np.ndarray) -> np.ndarray:
    """p by the formula, on the abilities before they were standardised."""
    learned = router.arrays_
    x = (x - learned["mean"]) / learned["deviation"]
    ability = learned["ability"] * learned["scale"] + learned["location"]
    a = np.logaddexp(0, x @ learned["discrimination.weight"] + learned["discrimination.offset"])
    units = np.maximum(x @ learned["hidden.weight"] + learned["hidden.offset"], 0) if router.hidden else x
    return expit(a @ ability.T - units @ learned["difficulty.weight"] - learned["difficulty.offset"])


@pytest.mark.parametrize("hidden", [0, 8])
def test_p_is_the_formula_on_standardised_abilities_and_survives_a_round_trip(tmp_path: Path, hidden: int):
    features, correct, *_ = simulated(2, n=300)
    correct[:, 3] = 1  # has no ability
    router = MIRTRouter(hidden=hidden, max_epochs=5).fit(features, correct, every_fifth(300))
    ability, items = router.arrays_["ability"], router.items(features)
    np.testing.assert_allclose(ability.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(ability.std(axis=0), 1, atol=1e-5)
    fitting, p = np.delete(np.arange(12), 3), router.predict(features)
    expected = expit(items.discrimination @ ability.T - items.difficulty[:, None])
    np.testing.assert_allclose(p[:, fitting], expected, atol=1e-6)
    np.testing.assert_allclose(p[:, fitting], as_trained(router, features.shared), atol=1e-6)
    router.save(tmp_path)
    loaded = MIRTRouter.load(tmp_path)
    assert loaded == router
    np.testing.assert_array_equal(loaded.predict(features), p)
    np.testing.assert_allclose(router.predict(features.take(np.array([7, 3]))), p[[7, 3]], atol=1e-6)


def test_a_network_of_difficulty_learns_what_a_line_cannot():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1500, 2)).astype(np.float32)
    correct = (rng.random((1500, 4)) < expit(4 - 4 * np.abs(x[:, :1]))).astype(np.float32)
    features, validation = Features(x, np.zeros((1500, 4, 0), np.float32)), every_fifth(1500)

    def loss(hidden: int) -> float:
        router = MIRTRouter(dimensions=1, hidden=hidden, learning_rate=0.01, max_epochs=60)
        p = router.fit(features, correct, validation).predict(features)
        return float(-np.mean(np.log(np.where(correct == 1, p, 1 - p))))

    # Softplus discriminations bend a little by themselves.
    assert loss(16) < loss(0) - 0.05


def test_a_seed_decides_everything_and_validation_rows_may_be_unlabelled():
    features, correct, *_ = simulated(1, n=200)
    validation = every_fifth(200)
    correct[validation] = np.nan
    first, again, other = (
        MIRTRouter(max_epochs=3).fit(features, correct, validation, seed).predict(features) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4
