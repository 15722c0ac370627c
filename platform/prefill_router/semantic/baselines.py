"""Baselines that every evaluation reports: category prior, kNN vote, unified multi-task MLP.

In: outcomes, the training queries and their folds, and one embedding per query: the encoder's final layer, mean
pooled (`embed`). Out: p [queries, models] for the queries asked, and held-out p for the training queries.

kNN and MLP are tuned on out-of-fold AUC of the training split over their own grids and calibrated like the prefill
router (Platt, out of fold). None sees the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from prefill_router.outcomes.splits import make_folds
from prefill_router.outcomes.table import Outcomes
from prefill_router.routing.calibration import fit_platt
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.signals.probe import auc_per_model

NEIGHBOURS = (10, 25, 50, 100, 200, 400)
UNIFIED_GRID: tuple[Mapping[str, Any], ...] = (
    {"weight_decay": 1e-4}, {"weight_decay": 1e-3}, {"weight_decay": 3e-3}, {"dropout": 0.3}, {"widths": (512,)},
    {"widths": (128,)}, {"widths": (256, 128)}, {"learning_rate": 3e-4})


@dataclass(frozen=True)
class FittedBaseline:
    """`p` for all queries (the test part is honest), `held_out_p` for training queries (NaN elsewhere)."""

    p: Float[np.ndarray, "queries models"]
    held_out_p: Float[np.ndarray, "queries models"]
    settings: Mapping[str, Any]


def embed(states: Float[np.ndarray, "queries hidden"], train: Int[np.ndarray, " train"]
          ) -> Float[np.ndarray, "queries hidden"]:
    """States less the training mean, at unit length: centring takes out the direction that all texts share."""
    centred = states - states[train].mean(axis=0)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def category_prior(outcomes: Outcomes, train: Int[np.ndarray, " train"], folds: Int[np.ndarray, " train"]
                   ) -> FittedBaseline:
    """Each model's accuracy on the query's benchmark. A benchmark unseen in training gets the overall accuracy."""
    def predict(rows: np.ndarray) -> np.ndarray:
        overall = _mean_label(outcomes.correct[rows])
        p = np.tile(overall, (len(outcomes), 1))
        for benchmark in np.unique(outcomes.benchmarks[rows].astype(str)):
            own = outcomes.correct[rows[outcomes.benchmarks[rows] == benchmark]]
            p[outcomes.benchmarks == benchmark] = np.where(np.isfinite(own).any(axis=0), _mean_label(own), overall)
        return p

    return FittedBaseline(predict(train), _held_out(predict, train, folds, outcomes.correct.shape), {})


def knn_vote(outcomes: Outcomes, train: Int[np.ndarray, " train"], folds: Int[np.ndarray, " train"],
             embedding: Float[np.ndarray, "queries hidden"]) -> FittedBaseline:
    """The share of right answers among the k nearest training queries (Euclidean), k tuned out of fold."""
    def predict(rows: np.ndarray, queries: np.ndarray) -> dict[int, np.ndarray]:
        return _votes(embedding[queries], embedding[rows], outcomes.correct[rows])

    held_out = {k: np.full(outcomes.correct.shape, np.nan) for k in NEIGHBOURS}
    for fold in np.unique(folds):
        queries = train[folds == fold]
        for k, p in predict(train[folds != fold], queries).items():
            held_out[k][queries] = p
    k = max(NEIGHBOURS, key=lambda k: _mean_auc(outcomes, train, held_out[k]))
    return _calibrated(outcomes, train, predict(train, np.arange(len(outcomes)))[k], held_out[k], {"k": k})


def unified_mlp(outcomes: Outcomes, train: Int[np.ndarray, " train"], folds: Int[np.ndarray, " train"],
                embedding: Float[np.ndarray, "queries hidden"], seed: int, progress: bool = False) -> FittedBaseline:
    """One MLP over all models on the embedding, with an auxiliary difficulty task, ensembled like the trunk.

    Difficulty (how many models were right) enters as two ordinal thresholds, easy and hard. Width, dropout, weight
    decay and learning rate are tuned out of fold with three members, then ten are trained and five kept.
    """
    share = np.where(outcomes.labelled.any(axis=1), _mean_label(outcomes.correct.T), np.nan)
    difficulty = [np.where(np.isnan(share), np.nan, hard) for hard in (share > 2 / 3, share < 1 / 3)]
    targets = np.column_stack([outcomes.correct, *difficulty]).astype(np.float32)
    fits = []
    for rows in [train, *(train[folds != fold] for fold in np.unique(folds))]:
        mean, scale = embedding[rows].mean(axis=0), embedding[rows].std(axis=0)
        watched = make_folds(outcomes, rows, seed + 1, 10) == 0
        fits.append(Fit((embedding - mean) / np.where(scale > 1e-6, scale, 1), rows[~watched], rows[watched]))
    n_models = len(outcomes.models)

    def out_of_fold(config: TrunkConfig, chosen: list[Fit], label: str) -> tuple[list[np.ndarray], np.ndarray]:
        ensembles = train_ensembles(chosen, targets, config, seed, progress=label if progress else None)
        pairs = zip(ensembles, chosen, strict=True)
        p = [ensemble.probabilities(fit.features)[:, :n_models] for ensemble, fit in pairs]
        held_out = np.full(outcomes.correct.shape, np.nan)
        for fold, predicted in zip(np.unique(folds), p[-len(np.unique(folds)):], strict=True):
            held_out[train[folds == fold]] = predicted[train[folds == fold]]
        return p, held_out

    aucs = []
    for index, grid in enumerate(UNIFIED_GRID):
        config = TrunkConfig(**grid, members=3, kept=3)
        label = f"unified MLP, setting {index + 1} of {len(UNIFIED_GRID)}"
        aucs.append(_mean_auc(outcomes, train, out_of_fold(config, fits[1:], label)[1]))
    best = UNIFIED_GRID[int(np.argmax(aucs))]
    p, held_out = out_of_fold(TrunkConfig(**best), fits, "unified MLP")
    return _calibrated(outcomes, train, p[0], held_out, dict(best))


def _votes(queries: np.ndarray, known: np.ndarray, correct: np.ndarray, chunk: int = 2048) -> dict[int, np.ndarray]:
    """For every k of NEIGHBOURS: the mean known label among the k nearest, the overall mean where none is known."""
    filled, labelled = np.nan_to_num(correct), np.isfinite(correct).astype(np.float32)
    fallback = _mean_label(correct)
    votes = {k: np.empty((len(queries), correct.shape[1])) for k in NEIGHBOURS}
    depth = min(max(NEIGHBOURS), len(known))
    half_square = 0.5 * np.square(known).sum(axis=1)
    for start in range(0, len(queries), chunk):
        closeness = queries[start:start + chunk] @ known.T - half_square  # orders as Euclidean distance does
        top = np.argpartition(-closeness, depth - 1, axis=1)[:, :depth]
        order = np.take_along_axis(top, np.argsort(-np.take_along_axis(closeness, top, 1), axis=1, kind="stable"), 1)
        right, count = filled[order].cumsum(axis=1), labelled[order].cumsum(axis=1)
        for k in NEIGHBOURS:
            at = min(k, depth) - 1
            share = right[:, at] / np.maximum(count[:, at], 1)
            votes[k][start:start + chunk] = np.where(count[:, at] > 0, share, fallback)
    return votes


def _mean_label(correct: np.ndarray) -> np.ndarray:
    known = np.isfinite(correct)
    return np.where(known, correct, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)


def _mean_auc(outcomes: Outcomes, train: np.ndarray, p: np.ndarray) -> float:
    return float(auc_per_model(outcomes.correct[train], p[train]).mean())


def _held_out(predict: Callable[[np.ndarray], np.ndarray], train: np.ndarray, folds: np.ndarray,
              shape: tuple[int, ...]) -> np.ndarray:
    p = np.full(shape, np.nan)
    for fold in np.unique(folds):
        p[train[folds == fold]] = predict(train[folds != fold])[train[folds == fold]]
    return p


def _calibrated(outcomes: Outcomes, train: np.ndarray, p: np.ndarray, held_out: np.ndarray,
                settings: Mapping[str, Any]) -> FittedBaseline:
    platt = fit_platt(held_out[train], outcomes.correct[train])
    return FittedBaseline(platt(p), platt(held_out), settings)
