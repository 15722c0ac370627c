"""Baselines that every evaluation reports: category prior, kNN vote, unified multi-task MLP.

In: outcomes, the training queries and their folds, and the encoder's final layer, mean pooled, for every query. Out:
a `FittedBaseline`: p [queries, models] for these queries and held-out p for the training queries, and the same for
queries that were not there: from their benchmarks and states.

kNN and MLP are tuned on out-of-fold AUC of the training split over their own grids and calibrated like the prefill
router (Platt, out of fold). None sees the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from prefill_router.outcomes.splits import make_folds
from prefill_router.outcomes.table import Outcomes
from prefill_router.routing.calibration import fit_platt
from prefill_router.routing.ensemble import Ensemble
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.semantic.neighbours import CHUNK, Embedding, search, share_right
from prefill_router.signals.roc_auc import auc_per_model

NEIGHBOURS = (10, 25, 50, 100, 200, 400)
UNIFIED_GRID: tuple[Mapping[str, Any], ...] = (
    {"weight_decay": 1e-4},
    {"weight_decay": 1e-3},
    {"weight_decay": 3e-3},
    {"dropout": 0.3},
    {"widths": (512,)},
    {"widths": (128,)},
    {"widths": (256, 128)},
    {"learning_rate": 3e-4},
)


Predict = Callable[[np.ndarray, Float[np.ndarray, "queries hidden"]], Float[np.ndarray, "queries models"]]


@dataclass(frozen=True)
class FittedBaseline:
    """`p` for all queries (the test part is honest), `held_out_p` for training queries (NaN elsewhere).

    `predict(benchmarks, states)` takes any queries' benchmarks and final-layer states, mean pooled and as they come,
    and returns p calibrated alike: `p` is what it says of the queries that were there.
    """

    p: Float[np.ndarray, "queries models"]
    held_out_p: Float[np.ndarray, "queries models"]
    settings: Mapping[str, Any]
    predict: Predict


def category_prior(
    outcomes: Outcomes, train: Int[np.ndarray, " train"], folds: Int[np.ndarray, " train"]
) -> FittedBaseline:
    """Each model's accuracy on the query's benchmark. A benchmark unseen in training gets the overall accuracy."""

    def fit(rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        overall = _mean_label(outcomes.correct[rows])
        accuracy = {}
        for benchmark in set(outcomes.benchmarks[rows]):
            own = outcomes.correct[rows[outcomes.benchmarks[rows] == benchmark]]
            accuracy[benchmark] = np.where(np.isfinite(own).any(axis=0), _mean_label(own), overall)
        return lambda benchmarks: np.reshape([accuracy.get(name, overall) for name in benchmarks], (-1, len(overall)))

    held_out = np.full(outcomes.correct.shape, np.nan)
    for fold in np.unique(folds):
        queries = train[folds == fold]
        held_out[queries] = fit(train[folds != fold])(outcomes.benchmarks[queries])
    prior = fit(train)
    return FittedBaseline(prior(outcomes.benchmarks), held_out, {}, lambda benchmarks, _: prior(benchmarks))


def knn_vote(
    outcomes: Outcomes,
    train: Int[np.ndarray, " train"],
    folds: Int[np.ndarray, " train"],
    states: Float[np.ndarray, "queries hidden"],
) -> FittedBaseline:
    """The share of right answers among the k nearest training queries (Euclidean), k tuned out of fold.

    `states` are the final layer's, mean pooled, for every query.
    """
    embed = Embedding(states[train].mean(axis=0))
    known, correct = embed(states[train]), outcomes.correct[train]
    held_out = {k: np.full(outcomes.correct.shape, np.nan) for k in NEIGHBOURS}
    for fold in np.unique(folds):
        own = folds == fold
        for k, p in _votes(known[own], known[~own], correct[~own]).items():
            held_out[k][train[own]] = p
    k = max(NEIGHBOURS, key=lambda k: _mean_auc(outcomes, train, held_out[k]))
    return _calibrated(
        outcomes, train, states, lambda _, states: _votes(embed(states), known, correct)[k], held_out[k], {"k": k}
    )


def unified_mlp(
    outcomes: Outcomes,
    train: Int[np.ndarray, " train"],
    folds: Int[np.ndarray, " train"],
    states: Float[np.ndarray, "queries hidden"],
    seed: int,
    progress: bool = False,
    grid: Sequence[Mapping[str, Any]] = UNIFIED_GRID,
) -> FittedBaseline:
    """One MLP over all models on the embedding, with an auxiliary difficulty task, ensembled like the trunk.

    Difficulty (how many models were right) enters as two ordinal thresholds, easy and hard. Width, dropout, weight
    decay and learning rate are tuned out of fold with three members over `grid`, then ten are trained and five kept.
    """
    share = np.where(outcomes.labelled.any(axis=1), _mean_label(outcomes.correct.T), np.nan)
    difficulty = [np.where(np.isnan(share), np.nan, hard) for hard in (share > 2 / 3, share < 1 / 3)]
    targets = np.column_stack([outcomes.correct, *difficulty]).astype(np.float32)
    embed = Embedding(states[train].mean(axis=0))
    embedding = embed(states)
    fits, scalers = [], []
    for rows in [train, *(train[folds != fold] for fold in np.unique(folds))]:
        mean, scale = embedding[rows].mean(axis=0), embedding[rows].std(axis=0)
        validation = make_folds(outcomes, rows, seed + 1, 10) == 0
        scalers.append((mean, np.where(scale > 1e-6, scale, 1)))
        fits.append(Fit((embedding - mean) / scalers[-1][1], rows[~validation], rows[validation]))
    n_models = len(outcomes.models)

    def out_of_fold(config: TrunkConfig, chosen: list[Fit], label: str) -> tuple[Ensemble, np.ndarray]:
        """The first fit's ensemble, and held-out p by the fits without a fold, which stand last."""
        ensembles = train_ensembles(chosen, targets, config, seed, progress=label if progress else None)
        held_out, names = np.full(outcomes.correct.shape, np.nan), np.unique(folds)
        for fold, ensemble, fit in zip(names, ensembles[-len(names) :], chosen[-len(names) :], strict=True):
            queries = train[folds == fold]
            held_out[queries] = ensemble.probabilities(fit.features)[queries, :n_models]
        return ensembles[0], held_out

    def tuned(index: int) -> float:
        config = TrunkConfig(**grid[index], members=3, kept=3)
        label = f"unified MLP, setting {index + 1} of {len(grid)}"
        return _mean_auc(outcomes, train, out_of_fold(config, fits[1:], label)[1])

    best = grid[max(range(len(grid)), key=tuned) if len(grid) > 1 else 0]
    ensemble, held_out = out_of_fold(TrunkConfig(**best), fits, "unified MLP")
    mean, scale = scalers[0]
    return _calibrated(
        outcomes,
        train,
        states,
        lambda _, states: ensemble.probabilities((embed(states) - mean) / scale)[:, :n_models],
        held_out,
        dict(best),
    )


def _votes(queries: np.ndarray, known: np.ndarray, correct: np.ndarray) -> dict[int, np.ndarray]:
    """For every k of NEIGHBOURS: the mean known label among the k nearest, the overall mean where none is known."""
    distances, rows = search(known, queries, max(NEIGHBOURS))
    fallback, votes = _mean_label(correct)[None], {k: np.empty((len(queries), correct.shape[1])) for k in NEIGHBOURS}
    for start in range(0, len(queries), CHUNK):
        part = slice(start, start + CHUNK)
        labels = correct[rows[part]]
        for k in NEIGHBOURS:
            votes[k][part] = share_right(distances[part, :k], labels[:, :k], "uniform", fallback)
    return votes


def _mean_label(correct: np.ndarray) -> np.ndarray:
    known = np.isfinite(correct)
    return np.where(known, correct, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)


def _mean_auc(outcomes: Outcomes, train: np.ndarray, p: np.ndarray) -> float:
    return float(auc_per_model(outcomes.correct[train], p[train]).mean())


def _calibrated(
    outcomes: Outcomes,
    train: np.ndarray,
    states: np.ndarray,
    raw: Predict,
    held_out: np.ndarray,
    settings: Mapping[str, Any],
) -> FittedBaseline:
    platt = fit_platt(held_out[train], outcomes.correct[train])

    def predict(benchmarks: np.ndarray, states: np.ndarray) -> np.ndarray:
        return platt(raw(benchmarks, states))

    return FittedBaseline(predict(outcomes.benchmarks, states), platt(held_out), settings, predict)
