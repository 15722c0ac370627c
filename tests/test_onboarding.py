"""Onboarding: Laplace posteriors, recovery of a true head, unchanged columns, fallback only, other prices, removal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from builders import make_pool
from scipy.optimize import minimize
from scipy.special import expit
from tiny_router import HIDDEN, MODELS, tiny_router

from prefill_router.errors import InputError
from prefill_router.experiments.onboarding import Rule, assess, held_out, labels_curve, missing_evidence
from prefill_router.pool import Pool, TargetModel
from prefill_router.routing import policy
from prefill_router.routing.added import AddedHead, HeadInputs
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.laplace import Prior, expected_sigmoid, find_mode
from prefill_router.routing.lengths import LengthModel
from prefill_router.routing.onboarding import Material, TrunkRows, fit_head, targets_prior
from prefill_router.routing.policy import Margin, TrainingMeans
from prefill_router.routing.pooled import PooledLogistic
from prefill_router.routing.repool import NewTarget, add_model, remove_models, reprice
from prefill_router.routing.router import Router
from prefill_router.routing.stack import Neighbours, Stack

FINGERPRINT = "0123456789abcdef"


def stacked_router() -> Router:
    """A router whose confidences depend on all targets: it has a stack with neighbours, a margin and a length head."""
    router, rng = tiny_router(FINGERPRINT), np.random.default_rng(7)
    n, k = len(MODELS), 4
    vectors = rng.normal(size=(150, 3)).astype(np.float16).astype(np.float32)
    neighbours = Neighbours(
        np.zeros(k),
        rng.normal(size=(k, 3)),
        vectors,
        rng.integers(-1, 2, size=(150, n)).astype(np.int8),
        np.full(n, 0.6),
    )
    stack = Stack((neighbours,), PooledLogistic(rng.normal(size=(n, 6)), rng.normal(size=n)))
    weights, uses = 0.1 * rng.normal(size=(k, n)), np.array([True, False, True])
    lengths = LengthModel(weights, np.full(n, 3.0), np.ones(n), np.full(n, 500.0), np.full(n, 100.0), uses)
    margin = Margin(TrainingMeans(np.array([0.5, 0.6, 0.7]), np.array([0.004, 0.04, 0.4])), 0.05)
    return replace(router, stack=stack, lengths=lengths, margin=margin)


def rows_of(n: int = 40, seed: int = 0) -> dict[str, pa.Table]:
    """Activations rows of `n` random queries."""
    states = 0.1 * np.random.default_rng(seed).normal(size=(n, HIDDEN)).astype(np.float32)
    return {
        FINGERPRINT: pa.table(
            {
                "query_id": pa.array([str(at) for at in range(n)]),
                "n_tokens": pa.array(range(10, 10 + n), pa.int32()),
                "error": pa.nulls(n, pa.string()),
                "mean_L2": pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), HIDDEN),
            }
        )
    }


def features_of(router: Router, n: int = 40, seed: int = 0) -> np.ndarray:
    states = 0.1 * np.random.default_rng(seed).normal(size=(n, HIDDEN)).astype(np.float32)
    return router.features(lambda _: states)


def inputs_of(router: Router, features: np.ndarray) -> HeadInputs:
    hidden = router.ensemble.hidden(features)
    return HeadInputs.of(hidden, router.trained_confidences(hidden, features)[0])


def new_target(router: Router, name: str = "newer", usd: float = 2.0, seed: int = 1, **more: object) -> NewTarget:
    """A model with a head that was fitted on random labels of 60 queries."""
    features = features_of(router, 60, seed)
    labels = np.random.default_rng(seed).integers(0, 2, 60).astype(np.float64)
    fitted = fit_head(Material(inputs_of(router, features), labels, TrunkRows.of(router.ensemble)), ["hidden"])
    model = TargetModel.model_validate({"name": name, "input_usd_per_mtok": usd, "output_usd_per_mtok": 4 * usd} | more)
    return NewTarget(model, fitted.head, 0.55, 80.0, 1.25, 30.0)


def figures(router: Router, rows: dict[str, pa.Table], lam: float | None = None, **requirements: object) -> list[dict]:
    """Per query, the choice and the candidates with all figures."""
    found = []
    for one in router.decide(rows, lam, Requirements(**requirements)):
        found.append({"model": one.model, "reason": one.reason, **{each.model: each for each in one.candidates}})
    return found


# Laplace approximation


def test_the_mode_is_the_optimum_that_scipy_finds():
    rng = np.random.default_rng(0)
    for rows in (4, 30):  # fewer and more rows than directions
        x, y = rng.normal(size=(rows, 6)), rng.integers(0, 2, rows).astype(np.float64)
        prior = Prior(rng.normal(size=6), rng.normal(size=(6, 7)))

        def loss(v: np.ndarray, x: np.ndarray = x, y: np.ndarray = y, prior: Prior = prior) -> float:
            logits = x @ (prior.mean + prior.factor @ v)
            return float(np.logaddexp(0, logits).sum() - y @ logits + v @ v / 2)

        best = minimize(loss, np.zeros(7), method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(find_mode(x, y, prior).v, best.x, atol=1e-5)


def test_posterior_and_evidence_agree_with_a_grid_of_two_weights():
    """With many labels the posterior is nearly normal, so that Laplace is nearly exact."""
    rng = np.random.default_rng(1)
    x = np.column_stack([rng.normal(size=300), np.ones(300)])
    y = (rng.random(300) < expit(0.8 * x[:, 0] - 0.3)).astype(np.float64)
    prior = Prior(np.array([0.5, 0.0]), np.array([[0.7, 0.2], [0.0, 1.0]]))
    axis = np.linspace(-0.9, 0.9, 181)
    found = find_mode(x, y, prior).posterior()
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2) + found.mean
    precision = np.linalg.inv(prior.factor @ prior.factor.T)
    off = grid - prior.mean
    size = np.linalg.slogdet(precision)[1] / 2 - np.log(2 * np.pi)
    log_prior = size - np.einsum("ij,jk,ik->i", off, precision, off) / 2
    logits = grid @ x.T
    log_joint = logits @ y - np.logaddexp(0, logits).sum(axis=1) + log_prior
    weights = np.exp(log_joint - log_joint.max())
    evidence = np.log(weights.sum() * (axis[1] - axis[0]) ** 2) + log_joint.max()
    weights /= weights.sum()
    mean = weights @ grid
    covariance = (grid - mean).T @ ((grid - mean) * weights[:, None])
    np.testing.assert_allclose(found.mean, mean, atol=0.02)
    np.testing.assert_allclose(found.factor @ found.factor.T, covariance, atol=0.001)
    assert found.log_evidence == pytest.approx(evidence, abs=0.02)


def test_fewer_rows_than_directions_give_the_posterior_of_the_complete_hessian():
    rng = np.random.default_rng(2)
    x, y, prior = rng.normal(size=(3, 5)), np.array([0.0, 1.0, 1.0]), Prior(np.zeros(5), rng.normal(size=(5, 6)))
    mode = find_mode(x, y, prior)
    p = expit(x @ prior.factor @ mode.v)
    z = x @ prior.factor
    hessian = (z * (p * (1 - p))[:, None]).T @ z + np.eye(6)
    posterior = mode.posterior()
    np.testing.assert_allclose(
        posterior.factor @ posterior.factor.T, prior.factor @ np.linalg.inv(hessian) @ prior.factor.T, atol=1e-4
    )
    assert np.linalg.slogdet(mode.hessian)[1] == pytest.approx(np.linalg.slogdet(hessian)[1], abs=1e-4)


def test_the_expected_sigmoid_is_the_mean_over_samples():
    mean, variance = np.array([-2.0, 0.0, 1.5]), np.array([0.5, 4.0, 1.0])
    draws = expit(mean + np.sqrt(variance) * np.random.default_rng(3).normal(size=(400_000, 3)))
    found = expected_sigmoid(mean, variance)
    np.testing.assert_allclose(found[0], draws.mean(axis=0), atol=0.003)
    np.testing.assert_allclose(found[1], draws.var(axis=0), atol=0.003)


# Heads


def error_with(n: int, seed: int = 0) -> float:
    """Root mean squared error of a head from `n` labels, against true probabilities of an ability on the targets."""
    router = stacked_router()
    features = features_of(router, n + 500, seed)
    inputs = inputs_of(router, features)
    true = expit(1.3 * inputs.targets.mean(axis=1) + 0.3 * inputs.targets[:, 0] - 0.6)
    labels = (np.random.default_rng(seed).random(len(true)) < true).astype(np.float64)
    material = Material(inputs, labels, TrunkRows.of(router.ensemble))
    head = fit_head(material.take(np.arange(n)), ["constant", "targets"]).head
    return float(np.sqrt(np.square(head(inputs.take(np.arange(n, n + 500)))[0] - true[n:]).mean()))


def test_a_true_ability_is_recovered_as_labels_grow():
    errors = [np.mean([error_with(n, seed) for seed in range(4)]) for n in (10, 100, 3000)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
    assert errors[2] < 0.02


def test_without_a_signal_the_constant_rate_has_the_highest_evidence():
    router = stacked_router()
    features = features_of(router, 300)
    labels = np.random.default_rng(5).integers(0, 2, 300).astype(np.float64)
    material = Material(inputs_of(router, features), labels, TrunkRows.of(router.ensemble))
    fitted = fit_head(material, ["targets", "constant"])
    assert fitted.candidate == "constant"
    p, _ = fitted.head(inputs_of(router, features))
    np.testing.assert_allclose(p, labels.mean(), atol=0.01)


def test_a_priori_a_new_model_is_the_mean_target():
    prior = targets_prior(3, 0.1)
    x = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(np.column_stack([x, np.ones(5)]) @ prior.mean, x.mean(axis=1))
    rows = TrunkRows(np.random.default_rng(1).normal(size=(2, 6, 3)))
    np.testing.assert_allclose(rows.prior(1, 1.0, 0.3).mean, rows.values[1].mean(axis=1))
    covariance = rows.prior(1, 1.0, 0.0).factor @ rows.prior(1, 1.0, 0.0).factor.T
    covariance[-1, -1] -= 4.0  # of the ability
    np.testing.assert_allclose(covariance, np.cov(rows.values[1]), atol=1e-12)


def test_uncertainty_falls_as_labels_grow():
    router = stacked_router()
    inputs = inputs_of(router, features_of(router, 600))
    labels = (np.random.default_rng(0).random(600) < expit(inputs.targets.mean(axis=1))).astype(np.float64)
    material = Material(inputs, labels, TrunkRows.of(router.ensemble))
    few, many = (fit_head(material.take(np.arange(n)), ["targets"]).head(inputs)[1].mean() for n in (10, 600))
    assert few > 3 * many


def test_bags_average_heads_of_bootstrap_samples():
    router = stacked_router()
    inputs = inputs_of(router, features_of(router, 80))
    labels = np.random.default_rng(0).integers(0, 2, 80).astype(np.float64)
    material = Material(inputs, labels, TrunkRows.of(router.ensemble))
    one, bagged = (fit_head(material, ["hidden"], bags, seed=3).head for bags in (0, 3))
    assert len(one.mean) == len(inputs.hidden)
    assert len(bagged.mean) == 3 * len(inputs.hidden)
    parts = [AddedHead("hidden", bagged.mean[at : at + 2], bagged.factor[at : at + 2])(inputs)[0] for at in (0, 2, 4)]
    np.testing.assert_allclose(bagged(inputs)[0], np.mean(parts, axis=0))


# A changed pool


def test_added_models_leave_the_other_confidences_bit_equal(tmp_path: Path):
    router, rows = stacked_router(), rows_of()
    once = add_model(router, new_target(router), {"labels": 60})
    twice = add_model(once, new_target(router, "newest", seed=2), {})
    loaded = load_checkpoint(save_checkpoint_at(twice, tmp_path))
    features = features_of(router)
    before, after = router.confidences(features), loaded.confidences(features)
    for old, new in zip(before, after, strict=True):
        assert old.tobytes() == np.ascontiguousarray(new[:, :3]).tobytes()
    assert loaded.pool.names == (*MODELS, "newer", "newest")
    for old, new in zip(figures(router, rows), figures(loaded, rows), strict=True):
        assert {name: old[name] for name in MODELS} == {name: new[name] for name in MODELS}
    records = [(one["model"], one.get("labels")) for one in loaded.manifest["onboarded"]]
    assert records == [("newer", 60), ("newest", None)]


def save_checkpoint_at(router: Router, folder: Path) -> Path:
    save_checkpoint(router, folder / "checkpoint")
    return folder / "checkpoint"


def test_a_saved_head_gives_the_confidences_of_the_fitted_one(tmp_path: Path):
    router = stacked_router()
    new = new_target(router)
    loaded = load_checkpoint(save_checkpoint_at(add_model(router, new, {}), tmp_path))
    features = features_of(router)
    p, uncertainty = new.head(inputs_of(router, features))
    found = loaded.confidences(features)
    np.testing.assert_array_equal(found[0][:, 3], p)
    np.testing.assert_array_equal(found[1][:, 3], uncertainty)


def test_an_added_model_costs_what_its_prices_and_median_output_say():
    router = stacked_router()
    changed = add_model(router, new_target(router, usd=2.0), {})
    (decision,) = changed.decide({name: table.slice(0, 1) for name, table in rows_of().items()}, 0.0)
    own = next(one for one in decision.candidates if one.model == "newer")
    assert own.expected_output_tokens == 80
    assert own.cost_usd == pytest.approx((10 * 1.25 * 2.0 + 80 * 8.0) / 1e6)
    assert (changed.costs.c_min, changed.costs.c_max) == (router.costs.c_min, router.costs.c_max)
    assert changed.margin.means.cost_norm[3] == pytest.approx(
        ((30 * 2.0 + 80 * 8.0) / 1e6 - router.costs.c_min) / (router.costs.c_max - router.costs.c_min)
    )


def test_a_model_onboarded_again_replaces_its_earlier_head():
    router = stacked_router()
    once = add_model(router, new_target(router), {})
    again = add_model(once, new_target(router, seed=9), {})
    direct = add_model(router, new_target(router, seed=9), {})
    features = features_of(router)
    np.testing.assert_array_equal(again.confidences(features)[0], direct.confidences(features)[0])
    assert len(again.changed.heads) == 1


def test_a_trained_target_cannot_be_onboarded():
    router = stacked_router()
    with pytest.raises(InputError, match="'middle' is a model that the checkpoint was trained on"):
        add_model(router, new_target(router, "middle"), {})


@pytest.mark.parametrize("gone", [("middle",), ("newer",), ("cheap", "newer")])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_a_removed_model_leaves_the_decisions_of_a_request_without_it(
    tmp_path: Path, gone: tuple[str, ...], lam: float
):
    router, rows = stacked_router(), rows_of()
    full = add_model(add_model(router, new_target(router), {}), new_target(router, "newest", seed=2), {})
    left = tuple(name for name in full.pool.names if name not in gone)
    removed = load_checkpoint(save_checkpoint_at(remove_models(full, gone), tmp_path))
    assert removed.pool.names == left
    assert figures(removed, rows, lam) == figures(full, rows, lam, models=left)
    features = features_of(router)
    kept = [full.pool.names.index(name) for name in left]
    np.testing.assert_array_equal(removed.confidences(features)[0], full.confidences(features)[0][:, kept])


def test_a_removed_model_can_be_added_with_a_new_head():
    router = stacked_router()
    back = add_model(remove_models(router, ["middle"]), new_target(router, "middle"), {})
    features = features_of(router)
    assert back.pool.names == ("cheap", "dear", "middle")
    np.testing.assert_array_equal(back.confidences(features)[0][:, :2], router.confidences(features)[0][:, [0, 2]])
    np.testing.assert_array_equal(
        back.confidences(features)[0][:, 2], new_target(router).head(inputs_of(router, features))[0]
    )


def test_the_last_model_cannot_be_removed():
    with pytest.raises(InputError, match="got all models of the pool"):
        remove_models(tiny_router(FINGERPRINT), MODELS)


def test_new_prices_give_the_costs_of_eq_2_and_leave_confidences_bit_equal(tmp_path: Path):
    router, rows = replace(stacked_router(), lengths=None), rows_of()
    prices = Pool(models=(TargetModel(name="middle", input_usd_per_mtok=3.0, output_usd_per_mtok=5.0),))
    changed = load_checkpoint(save_checkpoint_at(reprice(router, prices), tmp_path))
    for lam in (0.0, 0.2, 0.6):
        decisions = changed.decide(rows, lam)
        n_tokens = rows[FINGERPRINT].column("n_tokens").to_numpy()
        cost = (n_tokens[:, None] * [0.1, 3.0, 10.0] + 100 * np.array([0.4, 5.0, 40.0])) / 1e6
        p, _ = router.confidences(features_of(router))
        chosen = policy.choose(p, cost, router.costs.normalise(cost, extrapolate=True), lam, margin=changed.margin)
        assert [one.model for one in decisions] == [MODELS[at] for at in chosen]
        for row, one in enumerate(decisions):
            for candidate in one.candidates:
                at = MODELS.index(candidate.model)
                assert candidate.confidence == p[row, at]
                assert candidate.cost_usd == pytest.approx(cost[row, at], rel=1e-12)


def test_new_prices_move_the_mean_cost_of_the_static_choice():
    """Training queries of 50 input tokens on average: the old mean cost implies them."""
    router = stacked_router()
    costs = router.costs

    def norm(usd: np.ndarray) -> np.ndarray:
        return (usd - costs.c_min) / (costs.c_max - costs.c_min)

    usd = (50 * np.array([0.1, 1.0, 10.0]) + 100 * np.array([0.4, 4.0, 40.0])) / 1e6
    margin = Margin(TrainingMeans(router.margin.means.accuracy, norm(usd)), 0.05)
    prices = Pool(models=(TargetModel(name="dear", input_usd_per_mtok=2.0, output_usd_per_mtok=1.0),))
    changed = reprice(replace(router, margin=margin), prices)
    np.testing.assert_allclose(changed.margin.means.cost_norm[2], norm(np.array((50 * 2.0 + 100 * 1.0) / 1e6)))
    np.testing.assert_array_equal(changed.margin.means.cost_norm[:2], margin.means.cost_norm[:2])


def test_new_prices_of_an_unknown_model_are_refused_and_fields_without_prices_are_kept():
    router = stacked_router()
    with pytest.raises(InputError, match="'small' is not in the pool"):
        reprice(router, make_pool())
    only = [one.model_copy(update={"fallback_only": one.name == "dear"}) for one in router.pool.models]
    prices = Pool(models=(TargetModel(name="dear", input_usd_per_mtok=2.0, output_usd_per_mtok=1.0),))
    changed = reprice(replace(router, pool=Pool(models=tuple(only))), prices)
    assert changed.pool.models[2].fallback_only
    assert changed.pool.models[2].output_usd_per_mtok == 1.0
    assert changed.manifest["repriced"][0]["model"] == "dear"


# Fallback only


def test_a_fallback_only_model_is_never_chosen_by_score():
    router, rows = stacked_router(), rows_of()
    new = replace(new_target(router, usd=1e-6), accuracy=1.0)
    sure = AddedHead("targets", np.array([[0, 0, 0, 9]], np.float32), np.zeros((1, 4, 4), np.float32))
    chosen = add_model(router, replace(new, head=sure), {})
    assert {one.model for one in chosen.decide(rows, 0.0)} == {"newer"}
    held = replace(new, head=sure, model=new.model.model_copy(update={"fallback_only": True}))
    changed = add_model(router, held, {})
    for lam in (0.0, 0.5, 1.0):
        for one, old in zip(changed.decide(rows, lam), router.decide(rows, lam), strict=True):
            assert (one.model, one.candidates) == (old.model, old.candidates)
            assert [(each.model, each.fallback) for each in one.excluded] == [("newer", True)]
            assert one.excluded[0].reason.startswith("fallback_only")


def test_a_fallback_only_model_answers_if_no_other_model_can():
    router, rows = stacked_router(), rows_of()
    new = new_target(router, fallback_only=True, capabilities=["tools"])
    changed = add_model(router, new, {})
    for requirements in (Requirements(models=("newer",)), Requirements(capabilities=frozenset(["tools"]))):
        assert {one.model for one in changed.decide(rows, 0.0, requirements)} == {"newer"}


# Evidence


def evidence(n: int, skill: float, seed: int = 0) -> tuple[np.ndarray, object]:
    """Labels, and the held-out figures of predictions with this skill."""
    rng = np.random.default_rng(seed)
    true = rng.random(n)
    labels = (rng.random(n) < true).astype(np.float64)
    p = skill * true + (1 - skill) * 0.5
    return labels, assess(p, np.full(n, labels.mean()), labels, np.arange(n).astype(str), resamples=200)


def test_a_head_decides_only_with_enough_labels_and_a_measurable_gain():
    rule = Rule(labels=50, of_each=5)
    assert missing_evidence(rule, *evidence(200, 1.0)) is None
    assert "49 labels" in missing_evidence(rule, *evidence(49, 1.0))
    assert "not measurably below" in missing_evidence(rule, *evidence(200, 0.0))
    labels = np.zeros(60)
    labels[:4] = 1
    found = assess(np.where(labels == 1, 0.9, 0.05), np.full(60, 0.1), labels, np.arange(60).astype(str), resamples=200)
    assert "4 labels of one class" in missing_evidence(rule, labels, found)


def test_held_out_predictions_do_not_depend_on_their_own_labels():
    router = stacked_router()
    inputs = inputs_of(router, features_of(router, 60))
    labels = np.random.default_rng(0).integers(0, 2, 60).astype(np.float64)
    folds, groups = np.arange(60) % 5, np.arange(60).astype(str)

    def predicted(labels: np.ndarray) -> np.ndarray:
        material = Material(inputs, labels, TrunkRows.of(router.ensemble))
        return held_out(material, labels, groups, folds, ["targets"]).p

    flipped = np.where(folds == 2, 1 - labels, labels)
    np.testing.assert_array_equal(predicted(labels)[folds == 2], predicted(flipped)[folds == 2])
    assert not np.array_equal(predicted(labels)[folds == 1], predicted(flipped)[folds == 1])


def test_the_curve_names_the_labels_at_which_the_rule_lets_the_head_decide():
    router = stacked_router()
    inputs = inputs_of(router, features_of(router, 400))
    labels = (np.random.default_rng(0).random(400) < expit(inputs.targets.mean(axis=1))).astype(np.float64)
    material = Material(inputs, labels, TrunkRows.of(router.ensemble))
    groups = np.arange(400).astype(str)
    found = held_out(material, labels, groups, np.arange(400) % 5, ["targets"])
    curve = labels_curve(material, labels, groups, found, Rule(), draws=3)
    assert [point.labels for point in curve.points] == [40, 80, 160, 320]
    assert curve.labels_needed >= 50
    curve = labels_curve(material, labels, groups, found, Rule(), 3, ["constant"])
    np.testing.assert_allclose(curve.points[0].auc, 0.5)  # the constant head alone: --heads holds for the curve
    assert labels_curve(material.take(np.arange(12)), labels[:12], groups[:12], found, Rule(), draws=3) is None


def test_queries_of_one_group_are_not_on_both_sides_of_a_subsample():
    from prefill_router.experiments.onboarding import _by_group

    groups = np.repeat(np.arange(20), 3).astype(str)
    order = _by_group(groups, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(60))
    assert (np.diff(np.unique(groups[order], return_inverse=True)[1]) != 0).sum() == 19


def test_the_gateway_asks_fallback_only_models_last_and_not_with_a_minimum_confidence():
    from serve.plan import decided  # imports Ray

    router, rows = stacked_router(), rows_of(1)
    (decision,) = add_model(router, new_target(router, fallback_only=True), {}).decide(rows, 0.0)
    order = decided("auto", decision, None).order
    assert order[0] == decision.model
    assert set(order[:-1]) == set(MODELS)
    assert order[-1] == "newer"
    assert "newer" not in decided("auto", decision, 0.0).order
