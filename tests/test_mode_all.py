"""Mode all: each target reads its best layers of every encoder, in fits, sweeps and serving."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import ENCODER, OTHER, QUICK, MadeStates, TwoEncoders, make_outcomes, make_pool, make_signals
from pydantic import ValidationError
from tiny_models import save_model

from prefill_router.controller import LocalRouter, encode_prompts
from prefill_router.errors import InputError
from prefill_router.outcomes.splits import split_queries
from prefill_router.prefill.backends import load_encoder
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import FittedRouter, fit_router
from prefill_router.signals.join import Signals
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.selection import ProbeScores, select_layers
from prefill_router.sweeps.prepare import prepare, selection_key
from tune.space import SearchSpace

BASE = FitConfig(mode="all", components=4, trunk=QUICK)
MODELS = ("small", "medium", "large")


def fit(signals: Signals, config: FitConfig) -> FittedRouter:
    return fit_router(signals, make_pool(), split_queries(signals.outcomes, config.seed, config.scheme), config, {})


@pytest.fixture(scope="module")
def two() -> TwoEncoders:
    return TwoEncoders(n=300)


def random_scores() -> dict[LayerKey, ProbeScores]:
    """Scores of two encoders, two poolings and three layers, which differ by fold and target."""
    rng = np.random.default_rng(0)
    keys = [LayerKey(e, p, layer) for e in (ENCODER, OTHER) for p in ("last", "mean") for layer in (1, 2, 3)]
    return {
        key: ProbeScores(rng.random(3), rng.random((5, 3)), rng.random(3), rng.random((5, 3)))
        for key in rng.permutation(np.array(keys, dtype=object))
    }


@pytest.mark.parametrize("strategy", ["cv", "fisher"])
@pytest.mark.parametrize("each_pooling", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_selection_takes_the_best_layers_of_every_encoder_in_every_fold(strategy: str, each_pooling: bool, n: int):
    scores = random_scores()
    found = select_layers(scores, strategy, MODELS, each_pooling, n, each_encoder=True)
    full, without = ("auc", "auc_without") if strategy == "cv" else ("fisher", "fisher_without")
    assert len(found.layer_keys_without) == 5
    for fold, layer_keys in enumerate((found.layer_keys, *found.layer_keys_without)):
        for model in range(3):
            values = {
                key: getattr(score, without)[fold - 1, model] if fold else getattr(score, full)[model]
                for key, score in scores.items()
            }
            expected = set()
            for encoder in (ENCODER, OTHER):
                for poolings in (("last",), ("mean",)) if each_pooling else (("last", "mean"),):
                    own = [key for key in values if key.encoder == encoder and key.pooling in poolings]
                    expected |= set(sorted(own, key=lambda key: -values[key])[:n])
            assert set(layer_keys[model]) == expected
            assert len(layer_keys[model]) == n * 2 * (2 if each_pooling else 1)


@pytest.mark.train
def test_with_one_encoder_all_is_auto():
    outcomes, difficulty = make_outcomes(n=200)
    states = MadeStates(difficulty)
    signals = make_signals(outcomes, states, states.layer_keys)
    auto, every = (fit(signals, BASE.model_copy(update={"mode": mode})) for mode in ("auto", "all"))
    assert auto.selection == every.selection
    np.testing.assert_array_equal(auto.held_out_p, every.held_out_p)


@pytest.mark.train
def test_every_target_of_a_fit_reads_both_encoders(two: TwoEncoders):
    fitted = fit(two.signals, BASE)
    for layer_keys in (fitted.selection.layer_keys, *fitted.selection.layer_keys_without):
        assert all([key.encoder for key in own] == [ENCODER, OTHER] for own in layer_keys)
    assert fitted.selection.layer_keys[0][0] == LayerKey(ENCODER, "mean", 2)
    assert fitted.selection.layer_keys[1][1] == LayerKey(OTHER, "mean", 2)
    assert set(fitted.router.encoders) == {ENCODER, OTHER}


def test_a_fixed_layer_is_that_layer_of_every_encoder(two: TwoEncoders):
    config = BASE.model_copy(update={"strategy": "fixed", "fixed": "mean_L2"})
    shared = prepare(two.signals, make_pool(), split_queries(two.outcomes, 0), [config])
    both = (LayerKey(ENCODER, "mean", 2), LayerKey(OTHER, "mean", 2))
    assert shared.selections[selection_key(config)].layer_keys == (both,) * 3
    assert shared.layer_keys(config) == [both] * 6


def test_a_layer_or_pooling_that_an_encoder_lacks_is_refused(two: TwoEncoders):
    def select(config: FitConfig, *missing: LayerKey) -> None:
        signals = replace(two.signals, layer_keys=tuple(key for key in two.layer_keys if key not in missing))
        prepare(signals, make_pool(), split_queries(two.outcomes, 0), [config])

    fixed = BASE.model_copy(update={"strategy": "fixed", "fixed": "mean_L2"})
    with pytest.raises(InputError, match=f"'mean_L2' in mode all is not a column of the encoder {OTHER}"):
        select(fixed, LayerKey(OTHER, "mean", 2))
    own = [key for key in two.layer_keys if key.encoder == OTHER]
    with pytest.raises(InputError, match=rf"pooling: got 'mean' in mode all, but {OTHER} \(b\) has no states with it"):
        select(BASE.model_copy(update={"pooling": "mean"}), *own)
    with pytest.raises(ValidationError, match="got 'a' in mode all, which uses all encoders"):
        FitConfig(mode="all", encoders="a")


def test_a_search_space_has_mode_all_with_several_encoders_only():
    two_encoders = {name * 16: EncoderConfig(model=name) for name in "ab"}
    space = SearchSpace().resolve(two_encoders)
    assert space.mode == ("auto", "all", "single")
    choices = space.layer_choices(FitConfig())
    assert {config.encoders for config in choices if config.mode == "all"} == {None}
    one = dict(list(two_encoders.items())[:1])
    assert SearchSpace().resolve(one).mode == SearchSpace(mode=("all",)).resolve(one).mode == ("auto",)


@pytest.mark.train
def test_a_saved_router_with_two_encoders_serves_the_confidences_of_its_fit(tmp_path: Path):
    outcomes, _ = make_outcomes(n=150)
    configs, rows = {}, {}
    for kind, layers in (("llama", (1, 3)), ("qwen3", (2, 4))):
        model = save_model(kind, tmp_path / kind)
        config = EncoderConfig(model=str(model), layers=layers, poolings=("mean",), device="cpu")
        with closing(load_encoder(config)) as encoder:
            configs[encoder.info.fingerprint] = config
            rows[encoder.info.fingerprint] = encode_prompts(encoder, list(outcomes.prompts))
    keys = [LayerKey(name, "mean", layer) for name, config in configs.items() for layer in config.layers]

    def states(key: LayerKey) -> np.ndarray:
        column = rows[key.encoder].column(key.column).combine_chunks()
        return np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(len(column), -1)

    n_tokens = {name: table.column("n_tokens").to_numpy() for name, table in rows.items()}
    fitted = fit(make_signals(outcomes, states, keys, configs, n_tokens), BASE)
    fitted.save(tmp_path / "checkpoint")
    with LocalRouter(load_checkpoint(tmp_path / "checkpoint")) as router:
        assert set(router.router.encoders) == set(configs)
        served = router.route_batch(list(outcomes.prompts[:8]), lam=0.2)
    expected = fitted.router.decide({name: table.slice(0, 8) for name, table in rows.items()}, 0.2)
    assert [one.model for one in served] == [one.model for one in expected]
    for one, other in zip(served, expected, strict=True):
        wanted = {candidate.model: candidate.confidence for candidate in other.candidates}
        assert {candidate.model: candidate.confidence for candidate in one.candidates} == pytest.approx(
            wanted, abs=1e-5
        )
