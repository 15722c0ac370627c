"""The layer search: every (encoder, pooling, layer) against every target and every k, from statistics and one solver.

In: states of one block at a time, labels, one partition of the training queries into folds. Out: `LayerScores`:
cross-validated AUC of a logistic probe for every k, Fisher's J for every k, for the whole training split and again
without each fold, so that a router fitted without a fold also chose its layers without it (EQUATIONS.md, Layer
selection and SharedTrunkNet). Knows nothing of files.

A block is brought once into its leading subspace (subspace.py), which comes from the states of all training queries and
no label. There the statistics of each fold are gathered (statistics.py), and whatever leaves folds out follows from
them: scaler, PCA, J, and the discriminants from which the probes of all targets, k and folds start; these are solved
together (logistic.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from prefill_router.signals.geometry import Geometry, measure_geometry
from prefill_router.signals.layer_key import LayerKey, LayerStates
from prefill_router.signals.logistic import View, decision, fit_nested_logistic
from prefill_router.signals.projection import Moments, PrincipalComponents
from prefill_router.signals.roc_auc import area_under_curve
from prefill_router.signals.selection import ProbeScores
from prefill_router.signals.statistics import gather, separability, without
from prefill_router.signals.subspace import Subspace

TOLERANCE = 3e-4  # of a probe's gradient: three times scikit-learn's, it moves AUC by about 2e-5
FISHER_COMPONENTS = 64  # J never falls as k grows, so layers are compared at one k
MAX_BLOCKS = 4

Result = TypeVar("Result")


@dataclass(frozen=True)
class LayerScores:
    """One block's scores for every k of `ks`. NaN where a target has one class only.

    `auc` is the mean of `auc_on_fold`, each by the probe that did not see the fold. `fisher` holds J on the first k
    components in row k - 1. What is `without` a fold comes from the other folds alone; inside them the probe is
    validated on each remaining fold in turn.
    """

    ks: tuple[int, ...]
    auc: Float[np.ndarray, "ks models"]
    auc_on_fold: Float[np.ndarray, "ks folds models"]
    auc_without: Float[np.ndarray, "ks folds models"]
    fisher: Float[np.ndarray, "components models"]
    fisher_without: Float[np.ndarray, "folds components models"]
    geometry: Geometry | None

    def fisher_at(self, k: int) -> Float[np.ndarray, " models"]:
        """J on k components, or on all there are."""
        return self.fisher[min(k, len(self.fisher)) - 1]

    def at(self, k: int) -> ProbeScores:
        """The scores that choose layers: AUC on k components, J on FISHER_COMPONENTS."""
        index, row = self.ks.index(k), min(FISHER_COMPONENTS, len(self.fisher)) - 1
        return ProbeScores(self.auc[index], self.auc_without[index], self.fisher[row], self.fisher_without[:, row])


def search_layers(
    layer_keys: Sequence[LayerKey],
    states: LayerStates,
    correct: Float[np.ndarray, "queries models"],
    folds: Int[np.ndarray, " queries"],
    ks: Sequence[int],
    c: float = 1.0,
    with_auc: bool = True,
    nested: bool = True,
    with_geometry: bool = False,
    progress: str | None = None,
) -> dict[LayerKey, LayerScores]:
    """`search_layer` of every block, several at once; `states(key)` gives the rows of `correct`, read when needed."""
    return map_layers(
        layer_keys,
        lambda key: search_layer(states(key), correct, folds, ks, c, with_auc, nested, with_geometry),
        progress,
    )


def search_layer(
    states: Float[np.ndarray, "queries hidden"],
    correct: Float[np.ndarray, "queries models"],
    folds: Int[np.ndarray, " queries"],
    ks: Sequence[int],
    c: float = 1.0,
    with_auc: bool = True,
    nested: bool = True,
    with_geometry: bool = False,
) -> LayerScores:
    """Scores of one block on the training queries. Without `nested`, those without a fold are left NaN.

    A fit without folds f and g serves twice: scored on g it validates the choice made without f, and the reverse.
    """
    order = np.argsort(folds, kind="stable")
    folds, correct = folds[order], correct[order]
    n_folds, n_models = int(folds[-1]) + 1, correct.shape[1]
    rows = [slice(*np.searchsorted(folds, [fold, fold + 1])) for fold in range(n_folds)]
    centred = states[order]
    origin = centred.mean(axis=0)
    centred -= origin
    moments = Moments.of_centred(centred, origin)
    geometry = measure_geometry(states, moments) if with_geometry else None
    subspace = Subspace.of(centred, moments, rows, max(*ks, FISHER_COMPONENTS), 2 if nested and with_auc else 1)
    z = subspace(centred)
    del centred  # as large as the states
    parts = gather([(z, correct, folds)], n_folds)
    total = sum(parts[1:], parts[0])
    k_all, k_max = (min(k, z.shape[1]) for k in (max(*ks, FISHER_COMPONENTS), max(ks)))
    fisher = separability(total, subspace.principal_without((), total.moments, k_all)).fisher
    fisher_without = np.full((n_folds, *fisher.shape), np.nan)
    held_out = np.full((n_folds, n_folds, len(ks), n_models), np.nan)  # [left out as well, scored on, ks, models]
    left_outs: list[tuple[int, ...]] = [(fold,) for fold in range(n_folds) if nested or with_auc]
    left_outs += combinations(range(n_folds), 2) if nested and with_auc else ()
    views, starts = [], []
    for left_out in left_outs:
        rest = without(total, parts, left_out)
        principal = subspace.principal_without(left_out, rest.moments, k_all)
        discriminants = separability(rest, principal, ks)
        if nested and len(left_out) == 1:
            fisher_without[left_out] = discriminants.fisher
        views.append(_view(~np.isin(range(n_folds), left_out), principal, ks, c))
        starts.append(np.delete(discriminants.weights, np.s_[k_max:-1], axis=2))
    if with_auc:
        pieces = [(z[fold], correct[fold]) for fold in rows]
        weights = fit_nested_logistic(pieces, views, ks, np.stack(starts), tolerance=TOLERANCE)
        for fold, (own, labels) in enumerate(pieces):
            out = [view for view, left_out in enumerate(left_outs) if fold in left_out]
            scores = decision(own, weights[out]).reshape(-1, n_models, len(own))
            also = [next((other for other in left_outs[view] if other != fold), fold) for view in out]
            held_out[also, fold] = area_under_curve(labels, scores).reshape(len(out), len(ks), n_models)
    own = np.eye(n_folds, dtype=bool)
    return LayerScores(
        tuple(ks),
        _nanmean(held_out[own]),
        held_out[own].transpose(1, 0, 2),
        np.stack([_nanmean(held_out[fold, ~own[fold]]) for fold in range(n_folds)], axis=1),
        fisher,
        fisher_without,
        geometry,
    )


def _view(pieces: np.ndarray, principal: PrincipalComponents, ks: Sequence[int], c: float) -> View:
    """The penalty is on components scaled to unit mean variance over the first k, those here to that over all."""
    components, k = principal.projection.components, min(max(ks), len(principal.variances))
    map_ = np.zeros((len(components) + 1, k + 1))
    map_[:-1, :-1], map_[-1, -1] = components[:, :k], 1
    map_[-1, :-1] = -principal.projection.mean @ components[:, :k]
    mean_variance = np.array([principal.variances[:k].mean() for k in ks])
    return View(pieces, map_, principal.variances[:k], c / np.where(mean_variance > 0, mean_variance, 1))


def _nanmean(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def map_layers(
    layer_keys: Sequence[LayerKey], measure: Callable[[LayerKey], Result], progress: str | None = None
) -> dict[LayerKey, Result]:
    """`measure` of every block, several blocks at once with a core each: one block's matrices are too small to share.

    At most MAX_BLOCKS blocks are in memory.
    """
    workers = min(MAX_BLOCKS, os.cpu_count() or 1)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as threads:
        results = tqdm(
            threads.map(measure, layer_keys),
            total=len(layer_keys),
            desc=progress,
            unit="block",
            disable=progress is None,
            leave=False,
        )
        return dict(zip(layer_keys, results, strict=True))
