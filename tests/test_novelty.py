"""Novelty: distances by hand, ranks of held-out queries, outliers, the fallback, checkpoints without it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import ENCODER, make_router, rows_of
from scipy.stats import kstest

from prefill_router.errors import InputError
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.router import NoveltyFallback
from prefill_router.signals.novelty import Novelty, Spread
from prefill_router.signals.projection import Moments, Projection, fit_projection, project_layer


def test_the_distance_of_two_components_by_hand():
    projection = Projection(np.array([1.0, 0, 0]), np.array([1.0, 2, 1]), np.array([[0.5, 0], [0, 0.5], [0, 0]]))
    spread = Spread(np.array([0.25, 0.5]), residual=4.0)
    # Standardised: (2, 1, 3); projected: (1, 0.5); residual: 3^2.
    expected = (1 / 0.25 + 0.25 / 0.5 + 1 * 9 / 4) / 3
    np.testing.assert_allclose(spread.distance(np.array([[3.0, 2, 3]]), projection), [expected])


def test_the_mean_distance_of_the_training_states_is_one():
    states = np.random.default_rng(0).normal(size=(500, 12)) @ np.random.default_rng(1).normal(size=(12, 12))
    projection = fit_projection(Moments.of(states, states.mean(axis=0)), 4)
    assert Spread.of(states, projection).distance(states, projection).mean() == pytest.approx(1, abs=1e-3)


def test_all_components_and_constant_columns_give_finite_distances():
    states = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    states[:, 1] = 7
    projection = fit_projection(Moments.of(states, states.mean(axis=0)), 3)
    spread = Spread.of(states, projection)
    assert np.isfinite(spread.distance(states, projection)).all()
    assert np.isfinite(spread.distance(np.full((1, 3), 1e3), projection)).all()


@pytest.mark.parametrize("n", [40, 60, 400])
def test_novelty_is_calibrated_with_fewer_training_queries_than_components(n: int):
    random = np.random.default_rng(0)
    x, other = (random.normal(size=(rows, 384)).astype(np.float32) for rows in (n, 300))
    folds, distances = np.arange(n) % 5, np.zeros(n)
    for fit, _, projection, _ in project_layer(x, np.arange(n), folds, [(fit, 64) for fit in (1, 2, 3, 4, 5, 0)]):
        spread = Spread.of(x[folds != fit - 1] if fit else x, projection)
        if fit:
            held_out = folds == fit - 1
            distances[held_out] = spread.distance(x[held_out], projection)
    novelty = Novelty((spread,), np.sort(distances).astype(np.float32))
    assert 0.2 < novelty([other], [projection]).mean() < 0.8
    assert (novelty([3 * other], [projection]) > 0.99).mean() > 0.99


def test_novelty_is_the_share_of_held_out_queries_that_are_closer():
    projection, spread = Projection(np.zeros(1), np.ones(1), np.ones((1, 1))), Spread(np.ones(1), 0.0)
    novelty = Novelty((spread,), np.array([1.0, 4.0, 9.0, 16.0]))
    states = np.array([[0.5], [1.5], [3.5], [5.0]])
    np.testing.assert_allclose(novelty([states], [projection]), [0, 0.25, 0.75, 1])


def test_novelty_is_uniform_on_test_queries_and_high_on_other_states():
    fitted, _, states = make_router()
    test = rows_of(states, fitted.split.test.tolist())
    usual = [decision.novelty for decision in fitted.router.decide(test)]
    assert kstest(usual, "uniform").pvalue > 0.01
    key = fitted.router.layer_keys[0]
    shifted = lambda _: states(key)[:20] + 6.0  # noqa: E731
    assert (
        fitted.router.novelty([shifted(key)] * len(fitted.router.layer_keys), fitted.router.projections) > 0.99
    ).all()


def test_the_fallback_takes_novel_queries_only_and_only_if_it_is_a_candidate():
    fitted, _, states = make_router()
    router, rows = fitted.router, rows_of(states, list(range(100)))
    plain = router.decide(rows, 1.0)
    assert {decision.reason for decision in plain} == {"score"}
    assert "large" not in {decision.model for decision in plain}
    novel = [decision.novelty > 0.9 for decision in plain]
    assert 0 < sum(novel) < 100
    fallback = NoveltyFallback(0.9, "large")
    routed = router.decide(rows, 1.0, fallback=fallback)
    assert [decision.reason == "novelty" for decision in routed] == novel
    assert [decision.model == "large" for decision in routed] == novel
    assert all(decision.candidates[0].model == decision.model for decision in routed)
    others = router.decide(rows, 1.0, Requirements(models=("small", "medium")), fallback)
    assert {decision.reason for decision in others} == {"score"}
    with pytest.raises(InputError, match="fallback_model: 'huge' is not in the pool; known: small, medium, large"):
        router.check_fallback(NoveltyFallback(0.9, "huge"))


def test_novelty_survives_a_checkpoint_and_older_checkpoints_have_none(tmp_path):
    fitted, _, states = make_router()
    rows = rows_of(states, [0, 1, 2])
    save_checkpoint(fitted.router, tmp_path / "new")
    loaded = load_checkpoint(tmp_path / "new")
    assert [d.novelty for d in loaded.decide(rows)] == [d.novelty for d in fitted.router.decide(rows)]
    save_checkpoint(replace(fitted.router, novelty=None), tmp_path / "old")
    old = load_checkpoint(tmp_path / "old")
    assert [d.novelty for d in old.decide(rows)] == [None] * 3
    with pytest.raises(InputError, match=r"novelty_above: the checkpoint has no novelty.*train it again"):
        old.check_fallback(NoveltyFallback(0.9, "large"))
    assert ENCODER in rows
