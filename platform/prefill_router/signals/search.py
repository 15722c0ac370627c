"""The layer search: every (encoder, pooling, layer) against every target and every k, from statistics and one solver.

In: states of one block at a time, labels, one partition of the training queries into folds. Out: `LayerScores`:
cross-validated AUC of a logistic probe for every k, Fisher's J for every k, for the whole training split and again
without each fold, so that a router fitted without a fold also chose its layers without it (EQUATIONS.md, Layer
selection and SharedTrunkNet). Knows nothing of files.

Per block one pass gathers the statistics of each fold (statistics.py). Whatever leaves folds out follows from them:
scaler, PCA, J, and the discriminants from which the probes of all targets and k, solved together (logistic.py), start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int

from prefill_router.signals.geometry import Geometry, measure_geometry
from prefill_router.signals.logistic import decision, fit_nested_logistic
from prefill_router.signals.probe import Block, ProbeScores, States, area_under_curve, probe_blocks
from prefill_router.signals.projection import PrincipalComponents, principal_components
from prefill_router.signals.statistics import Separability, Statistics, gather, separability, without

FISHER_COMPONENTS = 64  # J never falls as k grows, so layers are compared at one k


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


def search_layers(blocks: Sequence[Block], states: States, correct: Float[np.ndarray, "queries models"],
                  folds: Int[np.ndarray, " queries"], ks: Sequence[int], c: float = 1.0, with_auc: bool = True,
                  nested: bool = True, with_geometry: bool = False, progress: str | None = None
                  ) -> dict[Block, LayerScores]:
    """`search_block` of every block, several at once; `states(block)` gives the rows of `correct`, read when needed."""
    return probe_blocks(blocks, lambda block: search_block(states(block), correct, folds, ks, c, with_auc, nested,
                                                           with_geometry), progress)


def search_block(states: Float[np.ndarray, "queries hidden"], correct: Float[np.ndarray, "queries models"],
                 folds: Int[np.ndarray, " queries"], ks: Sequence[int], c: float = 1.0, with_auc: bool = True,
                 nested: bool = True, with_geometry: bool = False) -> LayerScores:
    """Scores of one block on the training queries. Without `nested`, those without a fold are left NaN.

    A fit without folds f and g serves twice: scored on g it validates the choice made without f, and the reverse.
    """
    order = np.argsort(folds, kind="stable")
    folds, correct = folds[order], correct[order]
    n_folds, n_models = int(folds[-1]) + 1, correct.shape[1]
    rows = [slice(*np.searchsorted(folds, [fold, fold + 1])) for fold in range(n_folds)]
    states = states[order]
    parts = gather([(states, correct, folds)], n_folds)
    total = sum(parts[1:], parts[0])
    geometry = measure_geometry(states, total.moments) if with_geometry else None
    states -= total.moments.origin
    k_all = max(*ks, FISHER_COMPONENTS)
    whole = principal_components(total.moments, k_all)
    fisher = separability(total, whole).fisher
    fisher_without = np.full((n_folds, *fisher.shape), np.nan)
    held_out = np.full((n_folds, n_folds, len(ks), n_models), np.nan)  # [left out as well, scored on, ks, models]
    views = [*combinations(range(n_folds), 1), *(combinations(range(n_folds), 2) if nested and with_auc else ())]
    probes = None
    for left_out in views if nested or with_auc else ():
        rest = without(total, parts, left_out)
        principal = principal_components(rest.moments, k_all if len(left_out) == 1 else max(ks), whole.basis)
        discriminants = separability(rest, principal, ks)
        if nested and len(left_out) == 1:
            fisher_without[left_out] = discriminants.fisher
        if with_auc:
            z = _components(states, rest, principal, max(ks))
            kept = ~np.isin(folds, left_out)
            probes = _fit_probes(z[kept], correct[kept], principal, discriminants, ks, c, probes)
            for fold in left_out:
                held_out[left_out[0] if fold == left_out[-1] else left_out[-1], fold] = area_under_curve(
                    correct[rows[fold]], decision(z[rows[fold]], probes.weights))
    own = np.eye(n_folds, dtype=bool)
    return LayerScores(tuple(ks), _nanmean(held_out[own]), held_out[own].transpose(1, 0, 2),
                       np.stack([_nanmean(held_out[fold, ~own[fold]]) for fold in range(n_folds)], axis=1),
                       fisher, fisher_without, geometry)


@dataclass(frozen=True)
class _Probes:
    """Weights [ks, models, components_and_intercept]; and what they add to the discriminants, in units of states."""

    weights: np.ndarray
    added: np.ndarray  # [hidden, problems]
    added_intercepts: np.ndarray  # [ks, models]


def _components(centred: np.ndarray, statistics: Statistics, principal: PrincipalComponents, k: int) -> np.ndarray:
    map_ = principal.projection.components[:, :k] / principal.projection.scale[:, None]
    z = centred @ map_
    z -= (statistics.moments.total / statistics.moments.count).astype(np.float32) @ map_
    return np.asarray(z)


def _fit_probes(z: np.ndarray, correct: np.ndarray, principal: PrincipalComponents, discriminants: Separability,
                ks: Sequence[int], c: float, others: _Probes | None) -> _Probes:
    """Starts from the discriminants and from what the probes of other folds, much the same, added to theirs."""
    k, scale = z.shape[1], principal.projection.scale
    components = principal.projection.components[:, :k]
    # The penalty is on components scaled to unit mean variance over the first k, z to that over all.
    mean_variance = np.array([principal.variances[:k].mean() for k in ks])
    start = plain = np.delete(discriminants.weights, np.s_[k:-1], axis=2)
    if others is not None:
        length = np.maximum(np.square(components).sum(axis=0), np.finfo(np.float32).tiny)
        added = ((others.added.T * scale) @ (components / length)).reshape(*plain.shape[:2], k)
        start = plain + np.concatenate([added, others.added_intercepts[..., None]], axis=2)
    weights = fit_nested_logistic(z, correct, ks, c / np.where(mean_variance > 0, mean_variance, 1), start)
    added = (weights - plain).reshape(-1, k + 1)[:, :-1]
    return _Probes(weights, (components @ added.T) / scale[:, None], (weights - plain)[..., -1])


def _nanmean(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
