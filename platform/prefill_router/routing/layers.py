"""Choosing the layers of every target on the training queries, by scores of all candidate layers.

In: outcomes, training queries and their folds, candidate layers, states, a `FitConfig`. Out: scores and a selection,
also for the fits that leave out a fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prefill_router.outcomes.table import Outcomes
from prefill_router.routing.candidates import fixed_layers
from prefill_router.routing.config import FitConfig
from prefill_router.signals.layer_key import LayerKey, LayerStates, unique_layer_keys
from prefill_router.signals.search import search_layers
from prefill_router.signals.selection import ProbeScores, Selection, select_layers

N_FOLDS = 5


def choose_layers(
    outcomes: Outcomes,
    train: np.ndarray,
    folds: np.ndarray,
    candidates: Sequence[Sequence[LayerKey]],
    states: LayerStates,
    config: FitConfig,
    progress: bool,
) -> tuple[dict[LayerKey, ProbeScores], Selection]:
    """Scores the candidate layers on the training queries (none under `fixed`) and selects each target's layers."""
    if config.strategy == "fixed":
        return {}, select_by_config({}, config, candidates, outcomes.models)
    scores = score_layers(
        outcomes,
        train,
        folds,
        unique_layer_keys(candidates),
        states,
        config.components,
        config.strategy == "cv",
        config.scheme == "85/15",
        progress,
    )
    return scores, select_by_config(scores, config, candidates, outcomes.models)


def score_layers(
    outcomes: Outcomes,
    train: np.ndarray,
    folds: np.ndarray,
    layer_keys: Sequence[LayerKey],
    states: LayerStates,
    k: int,
    with_auc: bool,
    nested: bool,
    progress: bool,
) -> dict[LayerKey, ProbeScores]:
    """The scores of every layer key on the training queries, at k components. The states are read once."""
    found = search_layers(
        layer_keys,
        lambda key: states(key)[train],
        outcomes.correct[train],
        folds,
        [k],
        with_auc=with_auc,
        nested=nested,
        progress="layer search" if progress else None,
    )
    return {key: searched.at(k) for key, searched in found.items()}


def select_by_config(
    scores: Mapping[LayerKey, ProbeScores],
    config: FitConfig,
    candidates: Sequence[Sequence[LayerKey]],
    models: Sequence[str],
) -> Selection:
    """The selection by `config` from scores at its number of components; strategy `fixed` needs no scores."""
    each = config.mode == "all"
    if config.strategy == "fixed":
        chosen = fixed_layers(config.fixed, candidates, models, each)
        return Selection(chosen, (chosen,) * N_FOLDS)
    own = {key: scores[key] for key in unique_layer_keys(candidates)}
    return select_layers(own, config.strategy, models, config.each_pooling, config.layers_per_target, candidates, each)
