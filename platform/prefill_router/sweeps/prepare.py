"""Prepares a sweep: the layer scores and projections that all trials share; and runs a trial, epoch by epoch.

In: signals, a split and the configurations of the search space that differ in their layers. Out: `Prepared`, plain
arrays of the training and calibration queries, suitable for shared memory. `run_trial` yields the held-out confidences
of a configuration after every epoch, so that a scheduler can stop the trial.

A trial only trains trunks on prepared projections. Projections and held-out predictions come from the functions of
fit.py, so a finished trial has the held-out figures of `fit_router` with the same configuration and an empty `stack`:
the stack takes longer than an epoch. No label of a test query is kept. Knows nothing of samplers, schedulers or
processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from prefill_router.outcomes.splits import Split, make_folds
from prefill_router.outcomes.table import Outcomes
from prefill_router.pool import Pool
from prefill_router.routing.calibration import calibrated_across, fit_calibrator
from prefill_router.routing.candidates import candidate_layers
from prefill_router.routing.config import FitConfig
from prefill_router.routing.cost import fit_costs
from prefill_router.routing.fit import calibration_queries, check_two_classes, fit_rows, held_out_probabilities
from prefill_router.routing.layers import N_FOLDS, score_layers, select_by_config
from prefill_router.routing.trunk import Fit, train_epochs
from prefill_router.signals.join import Signals
from prefill_router.signals.layer_key import LayerKey, unique_layer_keys
from prefill_router.signals.projection import concatenate_features, project_layer
from prefill_router.signals.selection import Selection

# The fields of a FitConfig that determine the layer keys and their projections.
LAYER_FIELDS = {"mode", "encoders", "pooling", "strategy", "fixed", "each_pooling", "layers_per_target", "components"}


@dataclass(frozen=True)
class Prepared:
    """Data that trials share. Positions are on the axis `rows`: the training and calibration queries.

    `shares`: the labels of the trunk; `correct`: those of everything else. `held_out`: the rows whose predictions are
    evaluated; `folds`: their folds; `fits`: (training rows, validation rows) of every fit; `selections`: by
    `selection_key`; `projected`: by (fit, layer key, k); `costs`: (USD, normalised) costs of the held-out rows, by the
    encoder that counts the tokens.
    """

    correct: Float[np.ndarray, "rows models"]
    shares: Float[np.ndarray, "rows models"]
    held_out: Int[np.ndarray, " held_out"]
    folds: Int[np.ndarray, " held_out"]
    fits: tuple[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]], ...]
    selections: Mapping[str, Selection]
    projected: Mapping[tuple[int, LayerKey, int], Float[np.ndarray, "rows _"]]
    costs: Mapping[str, tuple[Float[np.ndarray, "held_out models"], Float[np.ndarray, "held_out models"]]]

    @property
    def nbytes(self) -> int:
        """Size of the projections in bytes."""
        return sum(array.nbytes for array in self.projected.values())

    def layer_keys(self, config: FitConfig) -> list[tuple[LayerKey, ...]]:
        """The layer keys that each fit of `config` reads."""
        selection = self.selections[selection_key(config)]
        return [unique_layer_keys(layer_keys) for layer_keys in (selection.layer_keys, *selection.layer_keys_without)][
            : len(self.fits)
        ]

    def costs_of(self, config: FitConfig) -> tuple[np.ndarray, np.ndarray]:
        """(USD, normalised) costs [held_out, models], as estimated by the router of `config`."""
        return self.costs[self.layer_keys(config)[0][0].encoder]


@dataclass(frozen=True)
class HeldOut:
    """Confidences of the held-out rows after an epoch; neither ensemble nor calibrator saw their labels.

    `epoch` counts from 1; `last` is True after the final epoch of the trial.
    """

    epoch: int
    last: bool
    p: Float[np.ndarray, "held_out models"]


def selection_key(config: FitConfig) -> str:
    """A key that is equal for configurations with the same choice of layers and components."""
    return config.model_dump_json(include=LAYER_FIELDS)


def prepare(
    signals: Signals, pool: Pool, split: Split, configs: Sequence[FitConfig], progress: bool = False
) -> Prepared:
    """Scores all candidate layers and projects those that any of `configs` reads, for every k and fit.

    Arguments as in `fit_router`; `configs` share seed and scheme. The states of a layer key are read once per k for its
    scores, and once more if it is chosen. (A search over several k at once would differ by rounding from the search of
    `fit_router`, and layers may be nearly equal.) Raises InputError as `fit_router` does.
    """
    outcomes, states = signals.outcomes, signals.states
    train, seed, nested = split.train, configs[0].seed, configs[0].scheme == "85/15"
    assert all((config.seed, config.scheme) == (seed, configs[0].scheme) for config in configs), "one seed, one scheme"
    check_two_classes(outcomes, train)
    folds = make_folds(outcomes, train, seed, N_FOLDS)
    by_key = {selection_key(config): config for config in configs}
    candidates = {
        key: candidate_layers(
            signals.layer_keys, signals.encoders, outcomes.models, config.mode, config.encoders, config.pooling
        )
        for key, config in by_key.items()
    }
    searching = [key for key, config in by_key.items() if config.strategy != "fixed"]
    # Fixed layers come first, so that an unknown layer is refused before any states are read.
    selections = {
        key: select_by_config({}, config, candidates[key], outcomes.models)
        for key, config in by_key.items()
        if config.strategy == "fixed"
    }
    ks = sorted({by_key[key].components for key in searching})
    probed = unique_layer_keys([unique_layer_keys(candidates[key]) for key in searching])
    with_auc = any(by_key[key].strategy == "cv" for key in searching)
    scores = {k: score_layers(outcomes, train, folds, probed, states, k, with_auc, nested, progress) for k in ks}
    selections |= {
        key: select_by_config(scores[by_key[key].components], by_key[key], candidates[key], outcomes.models)
        for key in searching
    }
    wanted: dict[LayerKey, set[tuple[int, int]]] = {}
    for key, selection in selections.items():
        for index, targets in enumerate((selection.layer_keys, *(selection.layer_keys_without if nested else ()))):
            for layer_key in unique_layer_keys(targets):
                wanted.setdefault(layer_key, set()).add((index, by_key[key].components))
    rows = np.sort(np.concatenate([train, split.calibration]))
    projected = {
        (index, layer_key, k): np.asarray(z[rows], dtype=np.float32)
        for layer_key in sorted(wanted)
        for index, k, _, z in project_layer(states(layer_key), train, folds, sorted(wanted[layer_key]))
    }
    held_out, held_out_folds = calibration_queries(outcomes, split, folds, seed)
    fits = [fit_rows(outcomes, train, folds, seed, index) for index in range(1 + N_FOLDS if nested else 1)]
    return Prepared(
        outcomes.correct[rows],
        outcomes.shares[rows],
        np.searchsorted(rows, held_out),
        held_out_folds,
        tuple((np.searchsorted(rows, own), np.searchsorted(rows, validation)) for own, validation in fits),
        selections,
        projected,
        {name: _costs(pool, outcomes, train, held_out, counts) for name, counts in signals.n_tokens.items()},
    )


def run_trial(prepared: Prepared, config: FitConfig) -> Iterator[HeldOut]:
    """Trains the fits of `config`. Yields held-out confidences after every epoch, with each member's best weights so
    far."""
    fits = [
        Fit(
            concatenate_features([prepared.projected[fit, layer_key, config.components] for layer_key in layer_keys]),
            *prepared.fits[fit],
        )
        for fit, layer_keys in enumerate(prepared.layer_keys(config))
    ]
    correct = prepared.correct[prepared.held_out]
    for epoch in train_epochs(fits, prepared.shares, config.trunk, config.seed):
        raw = held_out_probabilities(epoch.ensembles(), fits, prepared.held_out, prepared.folds)
        yield HeldOut(
            epoch.number,
            epoch.training == 0,
            calibrated_across(partial(fit_calibrator, config.calibrator), raw, correct, prepared.folds),
        )


def _costs(
    pool: Pool, outcomes: Outcomes, train: np.ndarray, held_out: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    costs = fit_costs(pool, outcomes, train, counts)
    cost = costs.estimate(counts[held_out], outcomes.input_tokens[held_out], outcomes.prompt_bytes[held_out])
    return cost, costs.normalise(cost)
