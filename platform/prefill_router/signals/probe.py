"""The layer probe: how well each (encoder, pooling, layer) separates right from wrong, per target, and the choice.

In: states of one block at a time, labels, one partition of the training queries into folds. Out: cross-validated
AUC of a logistic probe on k components and Fisher's J, for the whole training split and again without each fold,
so that a router fitted without a fold also chose its layers without it (EQUATIONS.md, Layer selection and
SharedTrunkNet). Knows nothing of files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from prefill_router.errors import InputError
from prefill_router.signals.geometry import anisotropy, effective_dimension, fisher_separability
from prefill_router.signals.logistic import decision, fit_logistic
from prefill_router.signals.projection import Moments, fit_projection, standardised_covariance

Strategy = Literal["cv", "fisher", "fixed"]
MAX_BLOCKS = 4
FISHER_COMPONENTS = 64  # J never falls as k grows, so layers are compared at one k


@dataclass(frozen=True, order=True)
class Block:
    """One candidate: the states of one encoder (by fingerprint) at one layer and pooling."""

    encoder: str
    pooling: str
    layer: int

    @property
    def column(self) -> str:
        """The column's name in the activations dataset."""
        return f"{self.pooling}_L{self.layer}"


Result = TypeVar("Result")
States = Callable[[Block], Float[np.ndarray, "queries hidden"]]


@dataclass(frozen=True)
class ProbeScores:
    """One block's scores. NaN where a target has one class only.

    `auc_without[f]`, `fisher_without[f]` come from the folds other than f alone; inside them the probe is validated
    on each remaining fold in turn.
    """

    auc: Float[np.ndarray, " models"]
    auc_without: Float[np.ndarray, "folds models"]
    fisher: Float[np.ndarray, " models"]
    fisher_without: Float[np.ndarray, "folds models"]


@dataclass(frozen=True)
class Geometry:
    """Label-free geometry of one block on the training split; `_raw` before standardising."""

    d_eff: float
    d_eff_raw: float
    anisotropy: float
    anisotropy_raw: float


def auc_per_model(correct: Float[np.ndarray, "queries models"], score: Float[np.ndarray, "queries models"]
                  ) -> Float[np.ndarray, " models"]:
    """ROC-AUC over labelled rows, ties counted half; NaN where one class is missing."""
    result = np.full(correct.shape[1], np.nan)
    for model in range(correct.shape[1]):
        labelled = ~np.isnan(correct[:, model])
        right = correct[labelled, model] == 1
        n_right, n_wrong = int(right.sum()), int((~right).sum())
        if n_right and n_wrong:
            ranks = rankdata(score[labelled, model])
            result[model] = (ranks[right].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong)
    return result


def fold_moments(states: Float[np.ndarray, "queries hidden"], folds: Int[np.ndarray, " queries"]) -> list[Moments]:
    """Moments of each fold about one common origin."""
    origin = states.mean(axis=0, dtype=np.float64)
    return [Moments.of(states[folds == fold], origin) for fold in range(int(folds.max()) + 1)]


def probe_block(states: Float[np.ndarray, "queries hidden"], correct: Float[np.ndarray, "queries models"],
                folds: Int[np.ndarray, " queries"], k: int, c: float = 1.0, with_auc: bool = True,
                nested: bool = True) -> ProbeScores:
    """Scores of one block on the training queries. Without `nested`, those without a fold are left NaN.

    A fit without folds f and g serves twice: scored on g it validates the choice made without f, and the reverse.
    """
    moments = fold_moments(states, folds)
    total = sum(moments[1:], moments[0])
    n_folds, n_models = len(moments), correct.shape[1]
    held_out = np.full((n_folds, n_folds, n_models), np.nan)  # [left out as well, scored on, models]
    fisher = _fisher(states, correct, total)
    fisher_without = np.full((n_folds, n_models), np.nan)
    for fold in range(n_folds):
        rest = folds != fold
        if nested:
            fisher_without[fold] = _fisher(states[rest], correct[rest], total - moments[fold])
        if with_auc:
            held_out[fold, fold] = _held_out_auc(states, correct, total - moments[fold], rest, [folds == fold], k, c)[0]
    if with_auc and nested:
        for f, g in combinations(range(n_folds), 2):
            fit_rows = (folds != f) & (folds != g)
            scored = [folds == g, folds == f]
            held_out[f, g], held_out[g, f] = _held_out_auc(
                states, correct, total - moments[f] - moments[g], fit_rows, scored, k, c)
    own = np.eye(n_folds, dtype=bool)
    return ProbeScores(_nanmean(held_out[own]),
                       np.stack([_nanmean(held_out[fold, ~own[fold]]) for fold in range(n_folds)]),
                       fisher, fisher_without)


def probe_blocks(blocks: Sequence[Block], measure: Callable[[Block], Result], progress: str | None = None
                 ) -> dict[Block, Result]:
    """`measure` of every block, several blocks at once with a core each: one block's matrices are too small to share.

    At most MAX_BLOCKS blocks are in memory.
    """
    workers = min(MAX_BLOCKS, os.cpu_count() or 1)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as threads:
        results = tqdm(threads.map(measure, blocks), total=len(blocks), desc=progress, unit="block",
                       disable=progress is None, leave=False)
        return dict(zip(blocks, results, strict=True))


def measure_geometry(states: Float[np.ndarray, "queries hidden"]) -> Geometry:
    """Eq. 11 and 12 on standardised and on raw states."""
    moments = Moments.of(states, states.mean(axis=0, dtype=np.float64))
    correlation, scale = standardised_covariance(moments)
    standardised = (states - moments.mean) / scale
    return Geometry(effective_dimension(correlation), effective_dimension(moments.covariance),
                    anisotropy(standardised), anisotropy(states))


@dataclass(frozen=True)
class Selection:
    """The chosen blocks per target, for the whole training split and, from a nested probe, without each fold."""

    blocks: tuple[tuple[Block, ...], ...]
    blocks_without: tuple[tuple[tuple[Block, ...], ...], ...]


def select(scores: Mapping[Block, ProbeScores], strategy: Literal["cv", "fisher"], models: Sequence[str],
           each_pooling: bool = False, n: int = 1, candidates: Sequence[Sequence[Block]] | None = None) -> Selection:
    """Chooses for each target its best `n` blocks, or `n` of each pooling; `cv` by AUC, `fisher` by J.

    `candidates` are the blocks that each target may have; all where it is not given. Of equal scores the lower layer
    wins, for it is cheaper to compute. Raises InputError for a target of one class.
    """
    blocks = sorted(scores, key=lambda block: (block.layer, block.encoder, block.pooling))
    full, without = ("auc", "auc_without") if strategy == "cv" else ("fisher", "fisher_without")
    table = np.stack([np.concatenate([getattr(scores[block], full)[None], getattr(scores[block], without)])
                      for block in blocks])  # [blocks, 1 + folds, models]
    if np.isnan(table[:, 1:]).all():  # the probe was not nested
        table = table[:, :1]
    undefined = np.isnan(table).all(axis=0).any(axis=0)
    if undefined.any():
        names = ", ".join(name for name, bad in zip(models, undefined, strict=True) if bad)
        raise InputError(f"outcomes: the labels of {names} on the training split are of one class only (or too few); "
                         "leave the model out of the pool or add outcomes")
    table = np.where(np.isnan(table), -np.inf, table)
    groups = [{pooling} for pooling in sorted({block.pooling for block in blocks})] if each_pooling else [None]

    def best(view: int, model: int) -> tuple[Block, ...]:
        own = [index for index, block in enumerate(blocks) if candidates is None or block in candidates[model]]
        parts = [[index for index in own if group is None or blocks[index].pooling in group] for group in groups]
        return tuple(blocks[part[place]] for part in parts
                     for place in np.argsort(-table[view, part, model], kind="stable")[:n])

    table = table.transpose(1, 0, 2)
    picks = [tuple(best(view, model) for model in range(len(models))) for view in range(len(table))]
    return Selection(picks[0], tuple(picks[1:]))


def unique_blocks(targets: Sequence[Sequence[Block]]) -> tuple[Block, ...]:
    """The distinct blocks of all targets in a fixed order: phi concatenates each once (Eq. 1)."""
    return tuple(sorted({block for blocks in targets for block in blocks}))


def _held_out_auc(states: np.ndarray, correct: np.ndarray, moments: Moments, fit_rows: np.ndarray,
                  scored: list[np.ndarray], k: int, c: float) -> list[np.ndarray]:
    z = fit_projection(moments, k)(states)
    weights = fit_logistic(z[fit_rows], correct[fit_rows], c)
    return [auc_per_model(correct[rows], decision(z[rows], weights)) for rows in scored]


def _fisher(states: np.ndarray, correct: np.ndarray, moments: Moments) -> np.ndarray:
    z = fit_projection(moments, FISHER_COMPONENTS)(states)
    return np.array([fisher_separability(z, correct[:, model]) for model in range(correct.shape[1])])


def _nanmean(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
