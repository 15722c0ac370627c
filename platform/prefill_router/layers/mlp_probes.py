"""Two ways to get more out of layers, tried: an MLP for the logistic probe, and layers side by side (paper section 7).

In: training outcomes, folds, what a nested layer search found of one encoder, and its states. Out: AUC per fold and
target of each probe, [folds, models], NaN where a fold has one class. Everything is fitted without the fold that
it is judged on: scaler and PCA per block, probe, the MLP's early stopping, and the choice of layers by J and AUC.

Only a few layers are read again, so that the cost does not grow with the encoder's depth. The MLP is the router's own
trainer with few members: one network for all targets. The probes' penalty is that of the layer search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from prefill_router.layers.peaks import mean, peak_layers
from prefill_router.outcomes.table import Outcomes
from prefill_router.routing.fit import concatenate_features, fit_rows, project_layer
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.signals.layer_key import LayerKey, LayerStates
from prefill_router.signals.logistic import fit_logistic
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.signals.search import LayerScores

MLP = TrunkConfig(members=3, kept=3)
BEST = 3  # layers of each pooling that are read for their AUC


@dataclass(frozen=True)
class Concatenation:
    """The layers where metrics peak, side by side, against the best one; of one pooling, or `both`.

    `single` and `layer_keys` are the choices on all folds, `n_features` the number of their features. Each fold's AUC
    uses the layers that the other folds choose.
    """

    pooling: str
    single: LayerKey
    layer_keys: tuple[LayerKey, ...]
    n_features: tuple[int, int]
    auc_single: Float[np.ndarray, "folds models"]
    auc: Float[np.ndarray, "folds models"]


@dataclass(frozen=True)
class PeakProbes:
    """AUC by the two probes at each block that was read, and the concatenations."""

    logistic: Mapping[LayerKey, Float[np.ndarray, "folds models"]]
    mlp: Mapping[LayerKey, Float[np.ndarray, "folds models"]]
    concatenations: tuple[Concatenation, ...]


def probe_peaks(
    outcomes: Outcomes,
    folds: Int[np.ndarray, " queries"],
    found: Mapping[LayerKey, LayerScores],
    states: LayerStates,
    k: int,
    seed: int,
    trunk: TrunkConfig = MLP,
    progress: str | None = None,
) -> PeakProbes:
    """Probes the layers where a metric of `found` peaks, the best by AUC, the first and the last, of each pooling.

    `outcomes` and `states(key)` hold the training queries alone, in the order of `folds`. Each block is read once.
    """
    n_folds = int(folds.max()) + 1
    poolings = {
        pooling: {key: scores for key, scores in found.items() if key.pooling == pooling}
        for pooling in sorted({key.pooling for key in found})
    }
    chosen = {view: _side_by_side(poolings, found, k, view) for view in (None, *range(n_folds))}
    beside_in = {fold: {key for layer_keys in chosen[fold].values() for key in layer_keys} for fold in range(n_folds)}
    read = {key for own in poolings.values() for key in _worth_reading(own, k)}
    logistic, mlp, kept = {}, {}, {}
    todo = sorted(read.union(*beside_in.values()))
    for key in tqdm(todo, desc=progress, unit="block", disable=progress is None, leave=False):
        z = project_folds(states(key), folds, k)
        if key in read:
            logistic[key] = np.stack(
                [logistic_auc(z[fold], outcomes.correct, folds == fold) for fold in range(n_folds)]
            )
            mlp[key] = mlp_auc(z, outcomes, folds, trunk, seed)
        kept.update({(key, fold): z[fold] for fold in range(n_folds) if key in beside_in[fold]})
    concatenations = []
    for pooling, whole in chosen[None].items():
        auc, auc_single = np.empty((2, n_folds, outcomes.correct.shape[1]))
        for fold in range(n_folds):
            layer_keys = chosen[fold][pooling]
            for into, part in ((auc_single, layer_keys[:1]), (auc, layer_keys)):
                into[fold] = logistic_auc(
                    concatenate_features([kept[key, fold] for key in part]), outcomes.correct, folds == fold
                )
        width = min(z.shape[1] for z in kept.values())
        concatenations.append(Concatenation(pooling, whole[0], whole, (width, width * len(whole)), auc_single, auc))
    return PeakProbes(logistic, mlp, tuple(concatenations))


def project_folds(
    states: Float[np.ndarray, "queries hidden"], folds: Int[np.ndarray, " queries"], k: int
) -> list[Float[np.ndarray, "queries components"]]:
    """All queries on k components, by the scaler and PCA of the queries outside each fold in turn."""
    wanted = [(1 + fold, k) for fold in range(int(folds.max()) + 1)]
    return [z.astype(np.float32) for _, _, _, z in project_layer(states, np.arange(len(states)), folds, wanted)]


def logistic_auc(
    z: Float[np.ndarray, "queries features"], correct: Float[np.ndarray, "queries models"], held_out: np.ndarray
) -> Float[np.ndarray, " models"]:
    """AUC on the queries held out of the logistic probe fitted on the others."""
    weights = fit_logistic(z[~held_out], correct[~held_out])
    return auc_per_model(correct[held_out], z[held_out] @ weights[:-1] + weights[-1])


def mlp_auc(
    z: Sequence[Float[np.ndarray, "queries features"]],
    outcomes: Outcomes,
    folds: Int[np.ndarray, " queries"],
    trunk: TrunkConfig,
    seed: int,
) -> Float[np.ndarray, "folds models"]:
    """AUC on each fold of an MLP for all targets, which learns from the other folds and stops by a tenth of them."""
    rows = np.arange(len(folds))
    fits = [Fit(features, *fit_rows(outcomes, rows, folds, seed, 1 + fold)) for fold, features in enumerate(z)]
    ensembles = train_ensembles(fits, outcomes.correct, trunk, seed)
    return np.stack(
        [
            auc_per_model(outcomes.correct[folds == fold], ensemble.probabilities(fit.features[folds == fold]))
            for fold, (ensemble, fit) in enumerate(zip(ensembles, fits, strict=True))
        ]
    )


def _side_by_side(
    poolings: Mapping[str, Mapping[LayerKey, LayerScores]],
    found: Mapping[LayerKey, LayerScores],
    k: int,
    view: int | None,
) -> dict[str, tuple[LayerKey, ...]]:
    """By pooling the distinct blocks where metrics peak, that of AUC first; and `both`, if there are several."""
    peaks = {pooling: peak_layers(own, k, view) for pooling, own in poolings.items()}
    chosen = {pooling: tuple(dict.fromkeys([own["auc"], *own.values()])) for pooling, own in peaks.items()}
    if len(chosen) > 1:
        every = [key for layer_keys in chosen.values() for key in layer_keys]
        chosen["both"] = tuple(dict.fromkeys([peak_layers(found, k, view)["auc"], *every]))
    return chosen


def _worth_reading(found: Mapping[LayerKey, LayerScores], k: int) -> set[LayerKey]:
    by_layer = sorted(found, key=lambda key: key.layer)
    by_auc = sorted(found, key=lambda key: -(mean(found[key].at(k).auc) or 0))
    return {*peak_layers(found, k).values(), *by_auc[:BEST], by_layer[0], by_layer[-1]}
