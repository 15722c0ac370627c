"""The probe job: its options, and the layer search as Ray tasks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from builders import ENCODER, MadeStates, make_outcomes

from jobs.probe import ProbeConfig, probe_encoders, search_on_cluster
from prefill_router.cli import parse
from prefill_router.errors import InputError
from prefill_router.layers.mlp_probes import probe_peaks
from prefill_router.outcomes.splits import make_folds
from prefill_router.signals.search import search_layers

INPUTS = ["--outcomes", "o", "--pool", "p", "--activations", "a", "--output", "out"]


@pytest.mark.parametrize(("text", "expected"), [("64", (64,)), ("[16, 128]", (16, 128))])
def test_components_are_a_number_or_a_list(text: str, expected: tuple[int, ...]):
    config = parse(ProbeConfig, "", [*INPUTS, "--components", text])
    assert config.components == expected
    assert config.activations == (Path("a"),)


@pytest.mark.parametrize("text", ["0", "[]", "[16, 0]", "many"])
def test_other_components_are_refused(text: str):
    with pytest.raises(InputError, match="components"):
        parse(ProbeConfig, "", [*INPUTS, "--components", text])


def test_ray_tasks_find_the_same_scores_as_threads(ray_cluster: None):
    outcomes, difficulty = make_outcomes(n=300, missing=0.05)
    columns, train = MadeStates(difficulty).values, np.arange(0, 300, 2)
    folds = make_folds(outcomes, train, 0)
    signals = SimpleNamespace(
        layer_keys=MadeStates.layer_keys,
        outcomes=SimpleNamespace(correct=outcomes.correct),
        states=lambda key, rows: columns[key][rows],
    )
    on_cluster = search_on_cluster(signals, train, folds, [3, 8])
    by_threads = search_layers(
        MadeStates.layer_keys,
        lambda key: columns[key][train],
        outcomes.correct[train],
        folds,
        [3, 8],
        nested=False,
        with_geometry=True,
    )
    assert list(on_cluster) == list(by_threads)
    for key, scores in by_threads.items():
        np.testing.assert_allclose(on_cluster[key].auc, scores.auc, atol=1e-6)
        np.testing.assert_allclose(on_cluster[key].fisher, scores.fisher, rtol=1e-4)
        np.testing.assert_allclose(on_cluster[key].geometry.anisotropy, scores.geometry.anisotropy, rtol=1e-4)


def test_peak_probes_are_the_same_as_ray_tasks(ray_cluster: None):
    outcomes, difficulty = make_outcomes(n=300)
    columns, train = MadeStates(difficulty).values, np.arange(0, 300, 2)
    folds, layer_keys = make_folds(outcomes, train, 0), MadeStates.layer_keys[2:]
    signals = SimpleNamespace(
        outcomes=outcomes, activations={ENCODER: None}, states=lambda key, rows: columns[key][rows]
    )
    found = search_layers(
        layer_keys, lambda key: columns[key][train], outcomes.correct[train], folds, [4], with_geometry=True
    )
    on_cluster = probe_encoders(signals, train, folds, found, 4, 0)[ENCODER]
    here = probe_peaks(outcomes.take(train), folds, found, lambda key: columns[key][train], 4, 0)
    for key in layer_keys:
        np.testing.assert_allclose(on_cluster.mlp[key], here.mlp[key], atol=1e-3)
    for one, other in zip(on_cluster.concatenations, here.concatenations, strict=True):
        assert one.layer_keys == other.layer_keys
        np.testing.assert_allclose(one.auc, other.auc, atol=1e-4)
