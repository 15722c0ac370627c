"""Routing: policy ties, costs by hand, the ensemble against torch modules, nesting, checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import ENCODER, QUICK, MadeStates, make_outcomes, make_pool, make_router, make_signals, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from prefill_router.errors import InputError
from prefill_router.files import temporary_suffix
from prefill_router.outcomes.splits import make_folds, split_queries
from prefill_router.pool import Pool
from prefill_router.routing import fit, policy
from prefill_router.routing.calibration import fit_platt
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.cost import fit_costs
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.fit import fit_router, train_trunks
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles

RNG = np.random.default_rng(0)


def row(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float64)


def test_lambda_zero_is_the_most_confident_and_one_the_cheapest():
    p, cost, cost_norm = row(0.2, 0.9, 0.5), row(1, 3, 2), row(0, 1, 0.5)
    assert policy.choose(p, cost, cost_norm, 0.0) == [1]
    assert policy.choose(p, cost, cost_norm, 1.0) == [0]


def test_ties_go_to_lower_cost_then_higher_confidence_then_pool_order():
    assert policy.choose(row(0.5, 0.5, 0.5), row(2, 1, 3), row(0.2, 0.1, 0.3), 0.0) == [1]
    # lambda 1 with clipped cost_norm: equal scores and costs, so p decides
    assert policy.choose(row(0.1, 0.4, 0.3), row(1, 1, 1), row(0, 0, 0), 1.0) == [1]
    assert policy.choose(row(0.4, 0.4, 0.4), row(1, 1, 1), row(0, 0, 0), 0.3) == [0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_choose_equals_a_loop_over_the_tie_rules(seed: int, lam: float):
    rng = np.random.default_rng(seed)
    p, cost = rng.integers(0, 4, (20, 4)) / 4, rng.integers(1, 4, (20, 4)).astype(float)
    cost_norm = np.clip((cost - 1) / 2, 0, 1)
    for q, chosen in enumerate(policy.choose(p, cost, cost_norm, lam)):
        score = [(1 - lam) * p[q, m] - lam * cost_norm[q, m] for m in range(4)]
        tied = [m for m in range(4) if score[m] >= max(score) - policy.SAME_SCORE]
        assert chosen == min(tied, key=lambda m: (cost[q, m], -p[q, m], m))


@pytest.mark.parametrize("lam", [-0.1, 1.01, float("nan")])
def test_a_lambda_outside_its_range_is_refused(lam: float):
    with pytest.raises(InputError, match=r"lambda: got .* allowed is 0"):
        policy.choose(row(0.1, 0.2), row(1, 2), row(0, 1), lam)


def test_costs_by_hand_for_api_and_self_hosted_models():
    outcomes, _ = make_outcomes(n=40)
    outcomes.input_tokens[:, 0] = np.nan  # never recorded: the encoder's count is used, ratio 1
    outcomes.input_tokens[:, 1:] = 30.0
    pool = Pool.model_validate(
        {
            "models": [
                {"name": "small", "input_usd_per_mtok": 1, "output_usd_per_mtok": 2},
                {"name": "medium", "input_usd_per_mtok": 1, "output_usd_per_mtok": 2},
                {"name": "large", "self_hosted": {"gpu_usd_per_hour": 3.6, "ttft_s_per_1k_tokens": 0.5, "itl_s": 0.01}},
            ]
        }
    )
    n_tokens = np.full(40, 10)
    costs = fit_costs(pool, outcomes, np.arange(20), n_tokens)
    np.testing.assert_allclose(costs.token_ratio, [1, 3, 3])
    expected = [(10 * 1 + 20 * 2) / 1e6, (30 * 1 + 30 * 2) / 1e6, 0.001 * (0.5 * 30 / 1000 + 40 * 0.01)]
    np.testing.assert_allclose(costs.estimate(n_tokens[:1])[0], expected)
    np.testing.assert_allclose(costs.normalise(costs.estimate(n_tokens[:1]))[0, [0, 2]], [0, 1])
    expected = [(10 * 1 + 7 * 2) / 1e6, (30 * 1 + 8 * 2) / 1e6, 0.001 * (0.5 * 30 / 1000 + 9 * 0.01)]
    np.testing.assert_allclose(costs.estimate(n_tokens[:1], output_tokens=row(7, 8, 9))[0], expected)
    outcomes.output_tokens[:, 2] = np.nan
    with pytest.raises(InputError, match="'output_tokens' is empty for large"):
        fit_costs(pool, outcomes, np.arange(20), n_tokens)


def make_fits(widths: tuple[int, ...]) -> tuple[list[Fit], np.ndarray]:
    y = (RNG.random((120, 3)) < 0.5).astype(np.float32)
    y[RNG.random(y.shape) < 0.1] = np.nan
    rows = np.arange(120)
    return [
        Fit(RNG.normal(size=(120, width)).astype(np.float32), rows[rows % 6 != i], rows[rows % 6 == i])
        for i, width in enumerate(widths)
    ], y


def test_numpy_inference_equals_a_torch_module_with_the_same_weights():
    fits, y = make_fits((5,))
    (ensemble,) = train_ensembles(fits, y, TrunkConfig(widths=(8, 6), members=2, kept=2, max_epochs=3), seed=0)
    for member in range(2):
        layers: list[torch.nn.Module] = []
        for weight, bias in ensemble.layers:
            linear = torch.nn.Linear(*weight.shape[1:])
            linear.weight.data = torch.from_numpy(weight[member].T.copy())
            linear.bias.data = torch.from_numpy(bias[member])
            layers += [linear, torch.nn.ReLU()]
        with torch.no_grad():
            expected = torch.nn.Sequential(*layers[:-1])(torch.from_numpy(fits[0].features))
        np.testing.assert_allclose(ensemble.logits(fits[0].features)[member], expected.numpy(), atol=1e-5)


def test_one_batched_step_equals_adam_on_each_member_alone():
    """Without dropout and in one batch, a member trains like a plain torch module."""
    fits, y = make_fits((5,))
    config = TrunkConfig(widths=(7,), dropout=0.0, members=3, kept=3, max_epochs=1, batch_size=1000, weight_decay=0.01)
    start = train_ensembles(fits, y, config.model_copy(update={"learning_rate": 1e-12}), seed=3)[0]
    after = train_ensembles(fits, y, config, seed=3)[0]
    order = [int(np.argmin([np.abs(s - w).max() for s in start.layers[0][0]])) for w in after.layers[0][0]]
    assert sorted(order) == [0, 1, 2]
    rows = fits[0].train
    x, labels = torch.from_numpy(fits[0].features[rows]), torch.from_numpy(y[rows])
    known = ~torch.isnan(labels)
    for member, origin in enumerate(order):
        tensors = [torch.from_numpy(part[origin].copy()).requires_grad_() for pair in start.layers for part in pair]
        adam = torch.optim.Adam(tensors, lr=config.learning_rate, weight_decay=config.weight_decay)
        logits = torch.relu(x @ tensors[0] + tensors[1]) @ tensors[2] + tensors[3]
        torch.nn.functional.binary_cross_entropy_with_logits(logits[known], labels[known]).backward()
        adam.step()
        np.testing.assert_allclose(after.layers[0][0][member], tensors[0].detach().numpy(), atol=2e-6)
        np.testing.assert_allclose(after.layers[1][1][member], tensors[3].detach().numpy(), atol=2e-6)


def test_missing_labels_do_not_train_their_target():
    fits, y = make_fits((5,))
    config = TrunkConfig(widths=(6,), members=2, kept=2, max_epochs=2)
    y[:, 2] = np.nan
    (ensemble,) = train_ensembles(fits, y, config.model_copy(update={"weight_decay": 0.0}), seed=0)
    (frozen,) = train_ensembles(fits, y, config.model_copy(update={"weight_decay": 0.0, "max_epochs": 1}), seed=0)
    np.testing.assert_array_equal(
        np.sort(ensemble.layers[1][0][:, :, 2], axis=None), np.sort(frozen.layers[1][0][:, :, 2], axis=None)
    )


def test_members_of_lowest_validation_loss_are_kept_and_the_seed_matters():
    fits, y = make_fits((5, 3))
    config = TrunkConfig(widths=(6,), members=5, kept=5, max_epochs=3)
    everyone = train_ensembles(fits, y, config, seed=1)
    best = train_ensembles(fits, y, config.model_copy(update={"kept": 2}), seed=1)
    for all_of, two in zip(everyone, best, strict=True):
        np.testing.assert_array_equal(two.validation_loss, np.sort(all_of.validation_loss)[:2])
    other = train_ensembles(fits, y, config, seed=2)
    assert not np.array_equal(everyone[0].validation_loss, other[0].validation_loss)
    assert everyone[1].layers[0][0].shape == (5, 3, 6)


def test_platt_equals_logistic_regression_on_the_logit():
    p = RNG.random((4000, 2))
    y = (RNG.random((4000, 2)) < p**2).astype(np.float32)
    y[:100, 1] = np.nan
    platt = fit_platt(p, y)
    z = np.log(p / (1 - p))
    model = LogisticRegression(C=1e6).fit(z[100:, [1]], y[100:, 1])
    assert platt.slope[1] == pytest.approx(model.coef_[0, 0], abs=0.02)
    assert platt.offset[1] == pytest.approx(model.intercept_[0], abs=0.02)


def test_platt_stays_finite_for_one_class_and_perfect_predictions():
    y = np.column_stack([np.ones(30), np.arange(30) % 2]).astype(np.float32)
    p = np.column_stack([RNG.random(30), np.arange(30) % 2])
    assert np.isfinite(fit_platt(p, y)(p)).all()


def test_a_fitted_router_ranks_held_out_queries():
    fitted, outcomes, states = make_router()
    rows = np.isfinite(fitted.held_out_p).all(axis=1)
    for m in range(3):
        known = rows & outcomes.labelled[:, m]
        assert roc_auc_score(outcomes.correct[known, m], fitted.held_out_p[known, m]) > 0.75
    p, uncertainty = fitted.router.confidences(fitted.router.features(states))
    assert ((p > 0) & (p < 1)).all()
    assert uncertainty.min() >= 0
    assert uncertainty.max() > 0


@pytest.mark.parametrize(
    "options", [{"strategy": "fisher"}, {"strategy": "fixed", "fixed": "mean_L2"}, {"scheme": "75/10/15"}]
)
def test_every_strategy_and_scheme_fits(options: dict[str, str]):
    fitted, _, _ = make_router(**options)
    assert fitted.router.layer_keys == (MadeStates.layer_keys[3],)
    held_out = np.isfinite(fitted.held_out_p).all(axis=1).sum()
    assert held_out == (40 if "scheme" in options else 340)


def test_labels_of_a_fold_do_not_reach_its_held_out_predictions(monkeypatch):
    """If the labels of a fold are inverted, the predictions of the other folds change and its own do not."""
    outcomes, difficulty = make_outcomes(n=300)
    states, pool = MadeStates(difficulty), make_pool()
    config = FitConfig(components=4, trunk=QUICK)
    split = split_queries(outcomes, 0)
    folds = make_folds(outcomes, split.train, 0)
    # Stratification reads labels too; the folds are fixed so that only the fit depends on labels.
    monkeypatch.setattr(fit, "make_folds", lambda _, rows, seed, n: make_folds(outcomes, rows, seed, n))

    def raw(correct: np.ndarray) -> np.ndarray:
        changed = outcomes.take(np.arange(300))
        changed.correct[:] = correct
        return logit(train_trunks(make_signals(changed, states, states.layer_keys), pool, split, config).raw)

    turned = outcomes.correct.copy()
    turned[split.train[folds == 1]] = 1 - turned[split.train[folds == 1]]
    before, after = raw(outcomes.correct), raw(turned)
    np.testing.assert_allclose(after[folds == 1], before[folds == 1], atol=1e-4)
    assert not np.allclose(after[folds == 0], before[folds == 0], atol=1e-2)


def test_a_loaded_checkpoint_decides_bit_for_bit_as_before_saving(tmp_path):
    fitted, _, states = make_router(lineage={"code_version": "x"})
    saved = save_checkpoint(fitted.router, tmp_path / "checkpoint")
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert loaded.id == saved.id
    assert loaded.manifest["code_version"] == "x"
    assert loaded.pool == fitted.router.pool
    rows = rows_of(states, list(range(50)))
    for lam in (0.0, 0.3, None):
        assert loaded.decide(rows, lam) == saved.decide(rows, lam)
    assert save_checkpoint(loaded, tmp_path / "copy").id == saved.id


def test_damaged_checkpoints_are_refused_naming_the_file(tmp_path):
    folder = tmp_path / "checkpoint"
    save_checkpoint(make_router()[0].router, folder)
    tensors, manifest = folder / "checkpoint.safetensors", folder / "manifest.json"
    complete, text = tensors.read_bytes(), manifest.read_text()
    tensors.write_bytes(complete[:-100])
    with pytest.raises(InputError, match=r"checkpoint.safetensors: its sha256 differs"):
        load_checkpoint(folder)
    tensors.unlink()
    with pytest.raises(InputError, match=r"checkpoint.safetensors: missing"):
        load_checkpoint(folder)
    tensors.write_bytes(complete)
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"manifest.json: not valid JSON"):
        load_checkpoint(folder)
    changed = json.loads(text)
    manifest.write_text(json.dumps({**changed, "format_version": 99}))
    with pytest.raises(InputError, match=r"format_version is 99, this version reads 1"):
        load_checkpoint(folder)
    manifest.write_text(json.dumps({**changed, "chosen_lambda": 0.99}))
    with pytest.raises(InputError, match="does not match its id"):
        load_checkpoint(folder)
    with pytest.raises(InputError, match="is not a folder"):
        load_checkpoint(tmp_path / "nowhere")


def test_saving_deletes_what_a_killed_process_left(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".checkpoint{temporary_suffix(ended.pid)}"
    of_another = tmp_path / f".other{temporary_suffix(ended.pid)}"
    for folder in (left, of_another):
        folder.mkdir()
        (folder / "pool.yaml").touch()
    save_checkpoint(make_router()[0].router, tmp_path / "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == [of_another.name, "checkpoint"]


def test_saving_never_replaces_a_folder_that_is_not_a_checkpoint(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="exists and is not a checkpoint"):
        save_checkpoint(make_router()[0].router, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_decisions_list_candidates_and_obey_restrictions():
    fitted, _, states = make_router()
    router, rows = fitted.router, rows_of(states, [0, 1, 2])
    for decision in router.decide(rows, 0.2):
        assert decision.model == decision.candidates[0].model
        assert [c.score for c in decision.candidates] == sorted((c.score for c in decision.candidates), reverse=True)
    assert {d.model for d in router.decide(rows, 0.0, Requirements(models=("small",)))} == {"small"}
    cheap = min(c.cost_usd for c in router.decide(rows, 0.0)[0].candidates)
    assert {d.model for d in router.decide(rows, 0.0, Requirements(max_cost_usd=cheap * 1.01))} == {"small"}
    with pytest.raises(InputError, match=r"max_cost_usd: no model is left .*exceeds the maximum of 0 USD"):
        router.decide(rows, 0.0, Requirements(max_cost_usd=0.0))
    with pytest.raises(InputError, match="'huge' is not in the pool; known: small, medium, large"):
        router.decide(rows, 0.0, Requirements(models=("huge",)))
    with pytest.raises(InputError, match="reads encoder 0123456789abcdef, got other"):
        router.decide({"other": rows[ENCODER]}, 0.0)
    with pytest.raises(InputError, match="column 'mean_L2' is missing"):
        router.decide({ENCODER: rows[ENCODER].drop_columns(["mean_L2"])}, 0.0)


def test_the_encoder_of_a_checkpoint_reads_only_its_layer_keys():
    router = make_router()[0].router
    assert router.encoders[ENCODER].layers == (2,)
    assert router.encoders[ENCODER].poolings == ("mean",)


def test_a_target_of_one_class_is_refused_by_name_before_fitting():
    outcomes, difficulty = make_outcomes(n=100)
    outcomes.correct[:, 2] = 0
    with pytest.raises(InputError, match=r"training labels of large are \[0\]"):
        fit_router(
            make_signals(outcomes, MadeStates(difficulty), MadeStates.layer_keys),
            make_pool(),
            split_queries(outcomes, 0),
            FitConfig(trunk=QUICK),
            {},
        )
