"""Search: a trial is the fit with its configuration, sees no test label, and finds which encoder tells what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import ENCODER, QUICK, States, make_outcomes, make_pool

from prefill_router.errors import InputError
from prefill_router.evaluation.objective import objectives
from prefill_router.outcomes.splits import split_queries
from prefill_router.outcomes.table import Outcomes
from prefill_router.prefill.encoder import EncoderConfig
from prefill_router.routing.fit import FitConfig, fit_router
from prefill_router.routing.search import Prepared, prepare, run_trial
from prefill_router.signals.probe import Block

OTHER = "fedcba9876543210"
BASE = FitConfig(components=4, trunk=QUICK)


class TwoEncoders:
    """Encoder A tells the first target from its first component, encoder B the second; all else is noise."""

    def __init__(self, n: int = 400, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.outcomes, _ = make_outcomes(n=n)
        hidden = rng.normal(size=(n, 3))
        for target in range(3):
            self.outcomes.correct[:, target] = rng.random(n) < 1 / (1 + np.exp(-3 * hidden[:, target]))
        self.values = {}
        for encoder, target in ((ENCODER, 0), (OTHER, 1)):
            for layer in (1, 2):
                x = rng.normal(size=(n, 8)).astype(np.float32)
                if layer == 2:
                    x[:, :4] += 2 * hidden[:, [target]]
                self.values[Block(encoder, "mean", layer)] = x
        self.blocks = tuple(sorted(self.values))
        self.encoders = {ENCODER: EncoderConfig(model="a"), OTHER: EncoderConfig(model="b")}
        self.n_tokens = {name: np.full(n, 12) for name in self.encoders}

    def __call__(self, block: Block) -> np.ndarray:
        return self.values[block]

    def prepare(self, *configs: FitConfig, outcomes: Outcomes | None = None) -> Prepared:
        return prepare(make_pool(), outcomes or self.outcomes, split_queries(self.outcomes, 0, configs[0].scheme),
                       self.blocks, self, self.n_tokens, self.encoders, configs)

    def fit(self, config: FitConfig) -> dict[str, float]:
        return dict(fit_router(make_pool(), self.outcomes, split_queries(self.outcomes, 0, config.scheme), self.blocks,
                               self, self.n_tokens, self.encoders, config, {}).held_out_figures)


def finish(prepared: Prepared, config: FitConfig) -> dict[str, float]:
    *_, last = run_trial(prepared, config)
    assert last.last
    return objectives(last.p, prepared.correct[prepared.held_out], *prepared.costs_of(config))


@pytest.fixture(scope="module")
def two() -> TwoEncoders:
    return TwoEncoders()


VARIANTS = {
    "default": {}, "isotonic": {"calibrator": "isotonic"}, "two layers": {"layers_per_target": 2, "strategy": "fisher"},
    "fixed": {"mode": "single", "encoders": "b", "strategy": "fixed", "fixed": "mean_L2"},
    "per model": {"mode": "per_model", "encoders": {"small": "a", "medium": "b", "large": ENCODER}, "components": 2}}


@pytest.mark.parametrize("scheme", ["85/15", "75/10/15"])
def test_a_finished_trial_has_the_held_out_figures_of_the_fit_with_its_configuration(two: TwoEncoders, scheme: str):
    configs = {name: FitConfig.model_validate(BASE.model_dump() | {"scheme": scheme} | options)
               for name, options in VARIANTS.items()}
    prepared = two.prepare(*configs.values())
    for name, config in configs.items():
        found, fitted = finish(prepared, config), two.fit(config)
        assert (found["auc"], found["brier"]) == (fitted["held_out_auc"], fitted["held_out_brier"]), name


def test_what_trials_share_does_not_depend_on_test_labels(two: TwoEncoders):
    test = split_queries(two.outcomes, 0).test
    turned = replace(two.outcomes, correct=two.outcomes.correct.copy())
    turned.correct[test] = 1 - turned.correct[test]
    before, after = two.prepare(BASE), two.prepare(BASE, outcomes=turned)
    assert before.selections == after.selections
    assert before.projected.keys() == after.projected.keys()
    for key, array in before.projected.items():
        np.testing.assert_array_equal(array, after.projected[key])
    np.testing.assert_array_equal(before.correct, after.correct)
    assert len(before.correct) == len(two.outcomes) - len(test)
    assert finish(before, BASE) == finish(after, BASE)


def test_auto_takes_for_each_target_the_encoder_that_tells_it_and_beats_either_alone(two: TwoEncoders):
    single = [BASE.model_copy(update={"mode": "single", "encoders": name}) for name in ("a", "b")]
    mapped = BASE.model_copy(update={"mode": "per_model", "encoders": {"small": "a", "medium": "b", "large": "a"}})
    prepared = two.prepare(BASE, *single, mapped)
    chosen = prepared.selections[next(iter(prepared.selections))].blocks
    assert chosen[0] == (Block(ENCODER, "mean", 2),)
    assert chosen[1] == (Block(OTHER, "mean", 2),)
    auto = finish(prepared, BASE)["auc"]
    assert all(auto > finish(prepared, config)["auc"] + 0.05 for config in single)
    # `large` is noise to both encoders, so that only its layer may differ.
    assert finish(prepared, mapped)["auc"] == pytest.approx(auto, abs=0.02)


def test_encoders_and_targets_that_are_not_there_are_refused_by_name(two: TwoEncoders):
    for options, said in (({"mode": "single", "encoders": "c"}, r"'c' is not among the activations; .* \(a\)"),
                          ({"mode": "single"}, r"mode single needs one of .*\(a\), .*\(b\)"),
                          ({"mode": "per_model", "encoders": {"huge": "a"}}, "huge is no model of the pool"),
                          ({"mode": "per_model", "encoders": {"small": "a"}}, "medium, large has no encoder"),
                          ({"pooling": "last"}, "no states pooled by 'last'")):
        with pytest.raises(InputError, match=said):
            two.prepare(BASE.model_copy(update=options))


def test_a_block_is_read_for_its_scores_once_and_again_only_where_it_is_chosen():
    outcomes, difficulty = make_outcomes()
    states, read = States(difficulty), []

    def counted(block: Block) -> np.ndarray:
        read.append(block)
        return states(block)

    configs = [BASE.model_copy(update={"each_pooling": False, "components": k}) for k in (2, 4)]
    prepared = prepare(make_pool(), outcomes, split_queries(outcomes, 0), states.blocks, counted,
                       {ENCODER: np.full(len(outcomes), 12)}, {ENCODER: EncoderConfig()}, configs)
    assert sorted(read) == sorted([*states.blocks, *{block for _, block, _ in prepared.projected}])
    assert {k for _, _, k in prepared.projected} == {2, 4}
