"""The stack: its parts, the regression over them, and that no held-out prediction reads its own fold's labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import QUICK, MadeStates, make_outcomes, make_pool, make_router, make_signals
from scipy.special import expit, logit

from prefill_router.outcomes.splits import split_queries
from prefill_router.routing import fit, stack
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_router
from prefill_router.routing.stack import DomainPrior, Neighbours, context_of, fit_parts, fit_regression

DOMAINS = np.array(["algebra", "law", "medicine"])


def made(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features in three clusters, labels whose rates depend on cluster and target, and the clusters' names."""
    rng = np.random.default_rng(seed)
    of_query = rng.integers(0, 3, n)
    centres = 4 * np.eye(3, 6)
    features = centres[of_query] + rng.normal(size=(n, 6))
    rates = np.array([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    correct = (rng.random((n, 2)) < rates[of_query]).astype(float)
    correct[rng.random(correct.shape) < 0.05] = np.nan
    return features, correct, DOMAINS[of_query]


def fitted_on(benchmarks: np.ndarray) -> tuple[stack.Part, ...]:
    """The parts of a router on 300 synthetic queries of these benchmarks, with the split that ignores them."""
    outcomes, difficulty = make_outcomes(n=300)
    states, split = MadeStates(difficulty), split_queries(outcomes, 0)
    changed = replace(outcomes, benchmarks=benchmarks)
    signals = make_signals(changed, states, states.layer_keys)
    return fit_router(signals, make_pool(), split, FitConfig(components=4, trunk=QUICK), {}).router.stack.parts


def test_the_domain_prior_is_the_shrunk_share_of_the_benchmark():
    features, correct, benchmarks = made()
    (prior,) = fit_parts(("domain",), features, correct, benchmarks)
    known = ~np.isnan(correct)
    overall = np.nansum(correct, axis=0) / known.sum(axis=0)
    own = benchmarks == "law"
    right, count = np.nansum(correct[own], axis=0), known[own].sum(axis=0)
    np.testing.assert_allclose(prior.shares[1], (right + 20 * overall) / (count + 20), atol=0.01)
    (logits,) = prior(4 * np.eye(3, 6)[[1]])  # the centre of the cluster
    np.testing.assert_allclose(expit(logits[0]), prior.shares[1], atol=0.1)


def test_an_unfamiliar_query_has_the_overall_shares():
    features, correct, benchmarks = made()
    (prior,) = fit_parts(("domain",), features, correct, benchmarks)
    none_likely = DomainPrior(prior.weights, np.full(3, -30.0), prior.shares, prior.overall)
    np.testing.assert_allclose(expit(none_likely(features[:5])[0]), np.tile(prior.overall, (5, 1)))


def test_neighbours_have_the_smallest_angles_and_their_weighted_share_is_shrunk():
    features, correct, benchmarks = made(n=700)
    (part,) = fit_parts(("neighbours",), features, correct, benchmarks)
    queries = made(n=300, seed=1)[0]  # more than one chunk
    centred, known = queries - features.mean(axis=0), features - features.mean(axis=0)
    cosine = (centred @ known.T) / np.linalg.norm(centred, axis=1)[:, None] / np.linalg.norm(known, axis=1)
    nearest = np.argsort(-cosine, axis=1)[:, :10]
    labels, distance = correct[nearest], 1 - np.take_along_axis(cosine, nearest, axis=1)
    below = distance[:, -1:] - distance
    weights = (10 * below / below.sum(axis=1, keepdims=True))[:, :, None]
    overall = np.nansum(correct, axis=0) / (~np.isnan(correct)).sum(axis=0)
    right, known = np.nansum(weights * labels, axis=1), (weights * ~np.isnan(labels)).sum(axis=1)
    np.testing.assert_allclose(expit(part(queries)[0]), (right + 5 * overall) / (known + 5), atol=0.02)
    np.testing.assert_allclose(part(queries[:1])[0], part(queries)[0][:1], atol=1e-6)


def test_the_neighbours_change_without_steps():
    """Rounding of the states can reorder neighbours; the shares then change as little as the states."""
    features, correct, benchmarks = made(n=700)
    (part,) = fit_parts(("neighbours",), features, correct, benchmarks)
    queries = made(n=300, seed=1)[0]
    rng = np.random.default_rng(2)
    moved = queries * (1 + 1e-4 * rng.normal(size=queries.shape))
    for before, after in zip(part(queries), part(moved), strict=True):
        assert np.abs(expit(before) - expit(after)).max() < 0.01


def test_neighbours_at_equal_distances_have_equal_weights():
    features, correct, benchmarks = made(n=200)
    same = np.tile(features[:1], (200, 1)) + 1e-9
    same[:10] = -features[0]
    (part,) = fit_parts(("neighbours",), same, correct, benchmarks)
    assert all(np.isfinite(logits).all() for logits in part(same))


def test_fewer_training_queries_than_neighbours_are_all_neighbours():
    features, correct, benchmarks = made(n=7)
    (part,) = fit_parts(("neighbours",), features, correct, benchmarks)
    few, many = part(features[:3])
    np.testing.assert_array_equal(few, many)


def test_one_benchmark_has_no_domain_prior():
    assert [type(part) for part in fitted_on(np.repeat("law", 300))] == [Neighbours]


def test_a_benchmark_within_one_fold_keeps_the_domain_prior():
    """The fit without that fold has queries of one benchmark only; its prior is the overall shares."""
    features, correct, _ = made(n=60)
    (prior,) = fit_parts(("domain",), features, correct, np.repeat("law", 60))
    known = ~np.isnan(correct)
    overall = (np.nansum(correct, axis=0) + 0.5) / (known.sum(axis=0) + 1)
    np.testing.assert_allclose(expit(prior(features)[0]), np.tile(overall, (60, 1)), atol=2e-3)
    benchmarks = np.repeat("law", 300).astype(object)
    benchmarks[split_queries(make_outcomes(n=300)[0], 0).train[0]] = "rare"
    assert [type(part) for part in fitted_on(benchmarks)] == [DomainPrior, Neighbours]


def test_the_regression_improves_predictions_that_lack_the_domain():
    features, correct, benchmarks = made(n=1200)
    parts = fit_parts(("domain", "neighbours"), features[:600], correct[:600], benchmarks[:600])
    p = np.full((600, 2), 0.5) + 0.01 * np.random.default_rng(0).normal(size=(600, 2))
    folds = np.arange(600) % 5
    _, stacked = fit_regression(p, context_of(parts, features[600:]), correct[600:], folds)
    before, after = (np.nanmean(np.square(q - correct[600:])) for q in (p, stacked))
    assert after < before - 0.05


def test_the_held_out_probabilities_of_a_fold_do_not_depend_on_its_labels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stack, "choose_strength", lambda *_: 10.0)  # its choice reads all labels
    features, correct, benchmarks = made()
    context = context_of(fit_parts(("domain",), features, correct, benchmarks), features)
    p, folds = expit(features[:, :2]), np.arange(300) % 5
    turned = np.where(folds[:, None] == 1, 1 - correct, correct)
    before, after = (fit_regression(p, context, labels, folds)[1] for labels in (correct, turned))
    np.testing.assert_array_equal(before[folds == 1], after[folds == 1])
    assert not np.allclose(before[folds == 0], after[folds == 0])


def test_context_of_a_fold_comes_from_parts_without_it(monkeypatch: pytest.MonkeyPatch):
    """The labels of the rows that fit each part never include the rows that it is applied to."""
    seen: list[tuple[int, ...]] = []
    original = fit.fit_parts

    def recording(names, features, correct, benchmarks):
        seen.append(tuple(correct.shape))
        return original(names, features, correct, benchmarks)

    monkeypatch.setattr(fit, "fit_parts", recording)
    fitted, _, _ = make_router()
    n = len(fitted.split.train)
    assert seen[0][0] == n
    assert sum(n - rows for rows, _ in seen[1:]) == n  # five fits, each without its fold


def test_each_part_can_be_switched_off_and_the_checkpoint_keeps_the_others(tmp_path):
    for names, kinds in (
        (("domain", "neighbours"), [DomainPrior, Neighbours]),
        (("neighbours",), [Neighbours]),
        ((), None),
    ):
        fitted, _, states = make_router(stack=names)
        router = fitted.router
        assert (None if router.stack is None else [type(part) for part in router.stack.parts]) == kinds
        saved = save_checkpoint(router, tmp_path / "-".join(("checkpoint", *names)))
        loaded = load_checkpoint(tmp_path / "-".join(("checkpoint", *names)))
        features = router.features(states)
        for one, other in zip(saved.confidences(features), loaded.confidences(features), strict=True):
            np.testing.assert_array_equal(one, other)
        assert loaded.margin.bonus == router.margin.bonus


def test_the_uncertainty_is_the_spread_of_the_stacked_members():
    fitted, _, states = make_router()
    router = fitted.router
    features = router.features(states)[:20]
    members = expit(router.ensemble.logits(features).astype(np.float64))
    context = context_of(router.stack.parts, features)
    pairs = [logit(members), *(np.broadcast_to(one, members.shape) for one in context)]
    x = [
        part
        for one in pairs
        for part in (np.repeat(one.mean(-1, keepdims=True), members.shape[-1], -1), one - one.mean(-1, keepdims=True))
    ]
    by_hand = router.calibrator(
        expit(
            sum(w * one for w, one in zip(router.stack.regression.weights.T, x, strict=True))
            + router.stack.regression.offsets
        )
    )
    np.testing.assert_allclose(router.confidences(features)[1], by_hand.std(axis=0), atol=1e-9)


def test_the_trunk_learns_fractional_labels_and_the_rest_counts_them_from_one_half():
    outcomes, difficulty = make_outcomes(n=300)
    states, split = MadeStates(difficulty), split_queries(outcomes, 0)
    config = FitConfig(components=4, trunk=QUICK)
    trunks = []
    for labels in (outcomes, replace(outcomes, fractions=np.where(outcomes.correct == 1, 0.6, 0.0).astype(np.float32))):
        signals = make_signals(labels, states, states.layer_keys)
        trunks.append(fit.train_trunks(signals, make_pool(), split, config))
    whole, fractional = trunks
    assert whole.selection == fractional.selection
    assert fractional.raw.mean() < 0.85 * whole.raw.mean()
