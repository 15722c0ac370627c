"""Sweeps: a trial equals the fit of its configuration, uses no test label and finds each target's encoder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import ENCODER, OTHER, QUICK, MadeStates, TwoEncoders, make_outcomes, make_pool, make_signals

from prefill_router.errors import InputError
from prefill_router.outcomes.splits import split_queries
from prefill_router.outcomes.table import Outcomes
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_router
from prefill_router.signals.layer_key import LayerKey
from prefill_router.sweeps.objective import objectives
from prefill_router.sweeps.prepare import Prepared, prepare, run_trial, selection_key

pytestmark = pytest.mark.train

BASE = FitConfig(components=4, trunk=QUICK)


def prepared(two: TwoEncoders, *configs: FitConfig, outcomes: Outcomes | None = None) -> Prepared:
    outcomes = outcomes or two.outcomes
    return prepare(
        make_signals(outcomes, two, two.layer_keys, two.encoders, two.n_tokens),
        make_pool(*outcomes.models),
        split_queries(two.outcomes, 0, configs[0].scheme),
        configs,
    )


def fitted(two: TwoEncoders, config: FitConfig) -> dict[str, float]:
    return dict(
        fit_router(two.signals, make_pool(), split_queries(two.outcomes, 0, config.scheme), config, {}).held_out_figures
    )


def finish(shared: Prepared, config: FitConfig) -> dict[str, float]:
    *_, last = run_trial(shared, config)
    assert last.last
    return objectives(last.p, shared.correct[shared.held_out], *shared.costs_of(config))


@pytest.fixture(scope="module")
def two() -> TwoEncoders:
    return TwoEncoders()


VARIANTS = {
    "default": {},
    "isotonic": {"calibrator": "isotonic"},
    "two layers": {"layers_per_target": 2, "strategy": "fisher"},
    "fixed": {"mode": "single", "encoders": "b", "strategy": "fixed", "fixed": "mean_L2"},
    "per model": {"mode": "per_model", "encoders": {"small": "a", "medium": "b", "large": ENCODER}, "components": 2},
}


@pytest.mark.parametrize("scheme", ["85/15", "75/10/15"])
def test_a_finished_trial_has_the_held_out_figures_of_its_fit(two: TwoEncoders, scheme: str):
    configs = {
        name: FitConfig.model_validate(BASE.model_dump() | {"scheme": scheme} | options)
        for name, options in VARIANTS.items()
    }
    shared = prepared(two, *configs.values())
    for name, config in configs.items():
        found, direct = finish(shared, config), fitted(two, config.model_copy(update={"stack": ()}))
        assert (found["auc"], found["brier"]) == (direct["held_out_auc"], direct["held_out_brier"]), name


def test_prepared_data_do_not_depend_on_test_labels(two: TwoEncoders):
    test = split_queries(two.outcomes, 0).test
    inverted = replace(two.outcomes, correct=two.outcomes.correct.copy())
    inverted.correct[test] = 1 - inverted.correct[test]
    before, after = prepared(two, BASE), prepared(two, BASE, outcomes=inverted)
    assert before.selections == after.selections
    assert before.projected.keys() == after.projected.keys()
    for key, array in before.projected.items():
        np.testing.assert_array_equal(array, after.projected[key])
    np.testing.assert_array_equal(before.correct, after.correct)
    assert len(before.correct) == len(two.outcomes) - len(test)
    assert finish(before, BASE) == finish(after, BASE)


def test_mode_auto_equals_the_right_map_and_beats_each_encoder(two: TwoEncoders):
    rows = two.outcomes
    two_targets = replace(
        rows,
        models=rows.models[:2],
        correct=rows.correct[:, :2],
        input_tokens=rows.input_tokens[:, :2],
        output_tokens=rows.output_tokens[:, :2],
    )  # no encoder predicts the third target
    single = [BASE.model_copy(update={"mode": "single", "encoders": name}) for name in ("a", "b")]
    maps = [dict(zip(two_targets.models, names, strict=True)) for names in ("ab", "ba")]
    right, wrong = (BASE.model_copy(update={"mode": "per_model", "encoders": names}) for names in maps)
    shared = prepared(two, BASE, *single, right, wrong, outcomes=two_targets)
    assert shared.selections[selection_key(BASE)].layer_keys == (
        (LayerKey(ENCODER, "mean", 2),),
        (LayerKey(OTHER, "mean", 2),),
    )
    auto = finish(shared, BASE)
    assert all(auto["auc"] > finish(shared, config)["auc"] + 0.05 for config in (*single, wrong))
    assert finish(shared, right) == auto


def test_unknown_encoders_and_targets_are_refused_by_name(two: TwoEncoders):
    for options, message in (
        ({"mode": "single", "encoders": "c"}, r"'c' is not an encoder of the activations; .* \(a\)"),
        ({"mode": "single"}, r"got none in mode single; name one of .*\(a\), .*\(b\)"),
        ({"mode": "per_model", "encoders": {"huge": "a"}}, "got unknown models huge; the pool has small"),
        ({"mode": "per_model", "encoders": {"small": "a"}}, "no encoder for medium, large"),
        ({"pooling": "last"}, "got 'last', but the activations have no states with it"),
    ):
        with pytest.raises(InputError, match=message):
            prepared(two, BASE.model_copy(update=options))


def test_an_unknown_fixed_layer_is_refused_before_states_are_read(two: TwoEncoders):
    def unread(layer_key: LayerKey) -> np.ndarray:
        raise AssertionError(f"{layer_key} was read")

    for fixed, message in (
        ("mean_L9", "'mean_L9' is not in the activations"),
        ("mean_L2", "column of several encoders"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(
                make_signals(two.outcomes, unread, two.layer_keys, two.encoders, two.n_tokens),
                make_pool(),
                split_queries(two.outcomes, 0),
                [BASE, BASE.model_copy(update={"strategy": "fixed", "fixed": fixed})],
            )


def test_states_are_read_once_per_k_and_once_more_if_chosen():
    outcomes, difficulty = make_outcomes()
    states, read = MadeStates(difficulty), []

    def counted(layer_key: LayerKey) -> np.ndarray:
        read.append(layer_key)
        return states(layer_key)

    configs = [BASE.model_copy(update={"each_pooling": False, "components": k}) for k in (2, 4)]
    shared = prepare(
        make_signals(outcomes, counted, states.layer_keys), make_pool(), split_queries(outcomes, 0), configs
    )
    assert sorted(read) == sorted(
        [*states.layer_keys, *states.layer_keys, *{layer_key for _, layer_key, _ in shared.projected}]
    )
    assert {k for _, _, k in shared.projected} == {2, 4}
