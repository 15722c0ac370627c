"""Two extensions of the logistic probe: an MLP probe, and concatenated layers (paper section 7).

In: training outcomes, folds, the scores of a nested layer search of one encoder, and its states. Out: AUC per fold and
target of each probe, [folds, models], NaN if a fold has one class. Scaler, PCA, probe, early stopping and the choice of
concatenated layers use only the other folds. The layers to read are chosen on all folds.

Only a few layers are read, so the cost does not grow with the depth of the encoder. The MLP is trained like the
router's trunk, with few members: one network for all targets. The L2 penalty is that of the layer search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from prefill_router.layers.peaks import mean, peak_layers
from prefill_router.outcomes.table import Outcomes
from prefill_router.progress import tqdm
from prefill_router.routing.fit import fit_rows
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.signals.layer_key import LayerKey, LayerStates
from prefill_router.signals.logistic import fit_logistic
from prefill_router.signals.projection import concatenate_features, project_layer
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.signals.search import LayerScores

MLP = TrunkConfig(members=3, kept=3)
BEST = 3  # layers of each pooling that are read because of their AUC


@dataclass(frozen=True)
class Concatenation:
    """The concatenated peak layers of the metrics against the layer of the best AUC, of one pooling or `both`.

    `single` and `layer_keys` are chosen on all folds; `n_features` are their numbers of features. The AUC on each fold
    uses the layers chosen by the other folds.
    """

    pooling: str
    single: LayerKey
    layer_keys: tuple[LayerKey, ...]
    n_features: tuple[int, int]
    auc_single: Float[np.ndarray, "folds models"]
    auc: Float[np.ndarray, "folds models"]


@dataclass(frozen=True)
class PeakProbes:
    """AUC of both probes at each layer key that was read, and the concatenations."""

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
    """Probes, for each pooling, the peak layers of the metrics, the BEST layers by AUC, the first and the last.

    `outcomes` and `states(key)` have the training queries, in the order of `folds`. The states of each layer key are
    read once.
    """
    n_folds = int(folds.max()) + 1
    poolings = {
        pooling: {key: scores for key, scores in found.items() if key.pooling == pooling}
        for pooling in sorted({key.pooling for key in found})
    }
    chosen = {left_out: _peak_sets(poolings, found, k, left_out) for left_out in (None, *range(n_folds))}
    joined = {fold: {key for layer_keys in chosen[fold].values() for key in layer_keys} for fold in range(n_folds)}
    read = {key for own in poolings.values() for key in _worth_reading(own, k)}
    logistic, mlp, kept = {}, {}, {}
    todo = sorted(read.union(*joined.values()))
    for key in tqdm(todo, desc=progress, unit=" layers", disable=progress is None, leave=False):
        z = project_folds(states(key), folds, k)
        if key in read:
            logistic[key] = np.stack(
                [logistic_auc(z[fold], outcomes.correct, folds == fold) for fold in range(n_folds)]
            )
            mlp[key] = mlp_auc(z, outcomes, folds, trunk, seed)
        kept.update({(key, fold): z[fold] for fold in range(n_folds) if key in joined[fold]})
    concatenations = []
    for pooling, on_all in chosen[None].items():
        auc, auc_single = np.empty((2, n_folds, outcomes.correct.shape[1]))
        for fold in range(n_folds):
            layer_keys = chosen[fold][pooling]
            for result, used in ((auc_single, layer_keys[:1]), (auc, layer_keys)):
                result[fold] = logistic_auc(
                    concatenate_features([kept[key, fold] for key in used]), outcomes.correct, folds == fold
                )
        width = min(z.shape[1] for z in kept.values())
        concatenations.append(Concatenation(pooling, on_all[0], on_all, (width, width * len(on_all)), auc_single, auc))
    return PeakProbes(logistic, mlp, tuple(concatenations))


def project_folds(
    states: Float[np.ndarray, "queries hidden"], folds: Int[np.ndarray, " queries"], k: int
) -> list[Float[np.ndarray, "queries components"]]:
    """For each fold, all queries projected to k components by scaler and PCA of the other folds."""
    wanted = [(1 + fold, k) for fold in range(int(folds.max()) + 1)]
    return [z.astype(np.float32) for _, _, _, z in project_layer(states, np.arange(len(states)), folds, wanted)]


def logistic_auc(
    z: Float[np.ndarray, "queries features"], correct: Float[np.ndarray, "queries models"], held_out: np.ndarray
) -> Float[np.ndarray, " models"]:
    """AUC on the `held_out` queries of a logistic probe fitted on the others."""
    weights = fit_logistic(z[~held_out], correct[~held_out])
    return auc_per_model(correct[held_out], z[held_out] @ weights[:-1] + weights[-1])


def mlp_auc(
    z: Sequence[Float[np.ndarray, "queries features"]],
    outcomes: Outcomes,
    folds: Int[np.ndarray, " queries"],
    trunk: TrunkConfig,
    seed: int,
) -> Float[np.ndarray, "folds models"]:
    """AUC on each fold of an MLP for all targets, trained on the other folds, of which a tenth is for early stopping.

    `z[f]` are the features of all queries without fold f.
    """
    rows = np.arange(len(folds))
    fits = [Fit(features, *fit_rows(outcomes, rows, folds, seed, 1 + fold)) for fold, features in enumerate(z)]
    ensembles = train_ensembles(fits, outcomes.shares, trunk, seed)
    return np.stack(
        [
            auc_per_model(outcomes.correct[folds == fold], ensemble.probabilities(fit.features[folds == fold]))
            for fold, (ensemble, fit) in enumerate(zip(ensembles, fits, strict=True))
        ]
    )


def _peak_sets(
    poolings: Mapping[str, Mapping[LayerKey, LayerScores]],
    found: Mapping[LayerKey, LayerScores],
    k: int,
    left_out: int | None,
) -> dict[str, tuple[LayerKey, ...]]:
    """The distinct peak layers of each pooling, that of AUC first; and of `both`, if there are several poolings."""
    peaks = {pooling: peak_layers(own, k, left_out) for pooling, own in poolings.items()}
    chosen = {pooling: tuple(dict.fromkeys([own["auc"], *own.values()])) for pooling, own in peaks.items()}
    if len(chosen) > 1:
        every = [key for layer_keys in chosen.values() for key in layer_keys]
        chosen["both"] = tuple(dict.fromkeys([peak_layers(found, k, left_out)["auc"], *every]))
    return chosen


def _worth_reading(found: Mapping[LayerKey, LayerScores], k: int) -> set[LayerKey]:
    by_layer = sorted(found, key=lambda key: key.layer)
    by_auc = sorted(found, key=lambda key: -(mean(found[key].at(k).auc) or 0))
    return {*peak_layers(found, k).values(), *by_auc[:BEST], by_layer[0], by_layer[-1]}
