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

from prefill_router.evaluation.peaks import mean, peak_blocks
from prefill_router.outcomes.table import Outcomes
from prefill_router.routing.fit import beside, fit_rows, project_block
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.signals.logistic import fit_logistic
from prefill_router.signals.probe import Block, States, auc_per_model
from prefill_router.signals.search import LayerScores

MLP = TrunkConfig(members=3, kept=3)
BEST = 3  # layers of each pooling that are read for their AUC


@dataclass(frozen=True)
class Concatenation:
    """The layers where metrics peak, side by side, against the best one; of one pooling, or `both`.

    `single` and `blocks` (it and the others) are what all folds choose, `n_features` how many features those have; each
    fold's AUC is by what the other folds choose.
    """

    pooling: str
    single: Block
    blocks: tuple[Block, ...]
    n_features: tuple[int, int]
    auc_single: Float[np.ndarray, "folds models"]
    auc: Float[np.ndarray, "folds models"]


@dataclass(frozen=True)
class PeakProbes:
    """AUC by the two probes at each block that was read, and the concatenations."""

    logistic: Mapping[Block, Float[np.ndarray, "folds models"]]
    mlp: Mapping[Block, Float[np.ndarray, "folds models"]]
    concatenations: tuple[Concatenation, ...]


def probe_peaks(
    outcomes: Outcomes,
    folds: Int[np.ndarray, " queries"],
    found: Mapping[Block, LayerScores],
    states: States,
    k: int,
    seed: int,
    trunk: TrunkConfig = MLP,
    progress: str | None = None,
) -> PeakProbes:
    """Probes the layers where a metric of `found` peaks, the best by AUC, the first and the last, of each pooling.

    `outcomes` and `states(block)` hold the training queries alone, in the order of `folds`. Each block is read once.
    """
    n_folds = int(folds.max()) + 1
    poolings = {
        pooling: {block: scores for block, scores in found.items() if block.pooling == pooling}
        for pooling in sorted({block.pooling for block in found})
    }
    chosen = {view: _side_by_side(poolings, found, k, view) for view in (None, *range(n_folds))}
    beside_in = {fold: {block for blocks in chosen[fold].values() for block in blocks} for fold in range(n_folds)}
    read = {block for own in poolings.values() for block in _worth_reading(own, k)}
    logistic, mlp, kept = {}, {}, {}
    todo = sorted(read.union(*beside_in.values()))
    for block in tqdm(todo, desc=progress, unit="block", disable=progress is None, leave=False):
        z = project_folds(states(block), folds, k)
        if block in read:
            logistic[block] = np.stack(
                [logistic_auc(z[fold], outcomes.correct, folds == fold) for fold in range(n_folds)]
            )
            mlp[block] = mlp_auc(z, outcomes, folds, trunk, seed)
        kept.update({(block, fold): z[fold] for fold in range(n_folds) if block in beside_in[fold]})
    concatenations = []
    for pooling, whole in chosen[None].items():
        auc, auc_single = np.empty((2, n_folds, outcomes.correct.shape[1]))
        for fold in range(n_folds):
            blocks = chosen[fold][pooling]
            for into, part in ((auc_single, blocks[:1]), (auc, blocks)):
                into[fold] = logistic_auc(
                    beside([kept[block, fold] for block in part]), outcomes.correct, folds == fold
                )
        width = min(z.shape[1] for z in kept.values())
        concatenations.append(Concatenation(pooling, whole[0], whole, (width, width * len(whole)), auc_single, auc))
    return PeakProbes(logistic, mlp, tuple(concatenations))


def project_folds(
    states: Float[np.ndarray, "queries hidden"], folds: Int[np.ndarray, " queries"], k: int
) -> list[Float[np.ndarray, "queries components"]]:
    """All queries on k components, by the scaler and PCA of the queries outside each fold in turn."""
    wanted = [(1 + fold, k) for fold in range(int(folds.max()) + 1)]
    return [z.astype(np.float32) for _, _, _, z in project_block(states, np.arange(len(states)), folds, wanted)]


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
    poolings: Mapping[str, Mapping[Block, LayerScores]], found: Mapping[Block, LayerScores], k: int, view: int | None
) -> dict[str, tuple[Block, ...]]:
    """By pooling the distinct blocks where metrics peak, that of AUC first; and `both`, if there are several."""
    peaks = {pooling: peak_blocks(own, k, view) for pooling, own in poolings.items()}
    chosen = {pooling: tuple(dict.fromkeys([own["auc"], *own.values()])) for pooling, own in peaks.items()}
    if len(chosen) > 1:
        every = [block for blocks in chosen.values() for block in blocks]
        chosen["both"] = tuple(dict.fromkeys([peak_blocks(found, k, view)["auc"], *every]))
    return chosen


def _worth_reading(found: Mapping[Block, LayerScores], k: int) -> set[Block]:
    by_layer = sorted(found, key=lambda block: block.layer)
    by_auc = sorted(found, key=lambda block: -(mean(found[block].at(k).auc) or 0))
    return {*peak_blocks(found, k).values(), *by_auc[:BEST], by_layer[0], by_layer[-1]}
