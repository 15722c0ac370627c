"""The standard baselines of an evaluation: best single model, category prior, kNN vote and unified multi-task MLP.

In: outcomes, the training queries with their folds, and each query's embedding (the encoder's final layer, mean
pooled). Out: a `FittedBaseline`: a fitted `SemanticRouter`, p of all queries and held-out p of the training queries.

kNN vote and MLP are tuned by out-of-fold AUC on the training queries, each on its own grid, and Platt calibrated out of
fold like the prefill router. The strength of the category prior's shrinkage is tuned by out-of-fold Brier score. No
label of a test query is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.errors import InputError
from prefill_router.outcomes.splits import make_folds
from prefill_router.outcomes.table import Outcomes
from prefill_router.routing.calibration import PlattScaling, fit_platt
from prefill_router.routing.fit import VALIDATION_FOLDS
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.semantic.classifiers import KNNRouter
from prefill_router.semantic.neighbours import Embedding, votes
from prefill_router.semantic.networks import ensemble_arrays, restored_ensemble, share_of_right
from prefill_router.semantic.router import Count, Features, Positive, SemanticRouter, Share, Weight
from prefill_router.signals.roc_auc import auc_per_model

K_GRID = (10, 25, 50, 100, 200, 400)
STRENGTH_GRID = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)  # in training labels of a benchmark
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


@dataclass(frozen=True)
class FittedBaseline:
    """A fitted baseline and its predictions.

    `p`: calibrated p of all queries of the outcomes; only that of non-training queries is an honest estimate.
    `held_out_p`: calibrated p of the training queries from folds without them; NaN elsewhere. `platt` is None for a
    router that needs no calibration.
    """

    p: Float[np.ndarray, "queries models"]
    held_out_p: Float[np.ndarray, "queries models"]
    settings: Mapping[str, Any]
    router: SemanticRouter
    platt: PlattScaling | None = None

    def predict(
        self, benchmarks: np.ndarray, states: Float[np.ndarray, "queries hidden"]
    ) -> Float[np.ndarray, "queries models"]:
        """Calibrated p of any queries, from their benchmarks and their mean-pooled final-layer states."""
        raw = self.router.predict(_features(benchmarks, states, self.p.shape[1]))
        return raw if self.platt is None else self.platt(raw)


class _Baseline(SemanticRouter):
    """Base of the baselines: fits every model, even if its training labels are all equal; p may be 0 or 1."""

    fits_one_class: ClassVar[bool] = True
    clip: ClassVar[float] = 0.0


@dataclass
class BestSingleRouter(_Baseline):
    """Each model's accuracy on the training queries, the same p for every query. At lambda 0 it is a single model.

    Counts the queries with a label for every model, or each model's labelled queries if there is no such query. Ignores
    features and `validation`.
    """

    kind: ClassVar[str] = "best_single"

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        complete = np.isfinite(correct).all(axis=1)
        self.arrays_["accuracy"] = _mean_label(correct[complete] if complete.any() else correct)

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        return np.tile(self.arrays_["accuracy"], (len(features), 1))


@dataclass
class CategoryPriorRouter(_Baseline):
    """Each model's accuracy on the query's benchmark, shrunk towards its overall accuracy.

    The overall accuracy counts as `strength` labels of the benchmark. It is the p of a benchmark without training
    labels. Reads `Features.benchmarks` alone and ignores `validation`.
    """

    kind: ClassVar[str] = "category_prior"
    strength: Weight = 0.0

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        benchmarks, overall = self._benchmarks(features), _mean_label(correct)
        names = sorted(set(benchmarks))
        accuracy = []
        for name in names:
            own = correct[benchmarks == name]
            n = np.isfinite(own).sum(axis=0)
            shrunk = (n * _mean_label(own) + self.strength * overall) / np.maximum(n + self.strength, 1)
            accuracy.append(np.where(n > 0, shrunk, overall))
        self.arrays_ |= {
            "names": np.frombuffer(json.dumps(names).encode(), dtype=np.uint8),
            "accuracy": np.stack(accuracy),
            "overall": overall,
        }

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        accuracy = dict(zip(json.loads(self.arrays_["names"].tobytes()), self.arrays_["accuracy"], strict=True))
        return np.stack([accuracy.get(name, self.arrays_["overall"]) for name in self._benchmarks(features)])

    def _benchmarks(self, features: Features) -> np.ndarray:
        if features.benchmarks is None:
            raise InputError(f"features: {self.kind} reads benchmarks, got None; set Features.benchmarks")
        return features.benchmarks


@dataclass
class KNNVoteRouter(_Baseline, KNNRouter):
    """kNN vote that falls back to the model's accuracy if no neighbour is labelled. `k` may be changed after `fit`.

    A search always returns as many neighbours as the largest k of K_GRID, so that the order of neighbours at equal
    distance does not depend on `k`.
    """

    kind: ClassVar[str] = "knn_vote"

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        embedding = Embedding(self.arrays_["mean"])(features.flat())
        return self._votes(embedding, np.ones(len(self.arrays_["known"]), dtype=bool))[self.k]

    def out_of_fold(self, folds: Int[np.ndarray, " known"]) -> dict[int, Float[np.ndarray, "known models"]]:
        """By k of K_GRID: p of the training queries, each voted by the queries of the other folds."""
        p = {k: np.empty(self.arrays_["correct"].shape) for k in K_GRID}
        for fold in np.unique(folds):
            own = folds == fold
            for k, values in self._votes(self.arrays_["known"][own], ~own).items():
                p[k][own] = values
        return p

    def _votes(self, embedding: np.ndarray, among: np.ndarray) -> dict[int, np.ndarray]:
        known, correct = self.arrays_["known"][among], self.arrays_["correct"][among]
        return votes(known, correct, embedding, sorted({*K_GRID, self.k}), self.kernel, _mean_label(correct))


@dataclass
class UnifiedMLPRouter(_Baseline):
    """One MLP over all models on the embedding, with an auxiliary difficulty task, ensembled like the trunk.

    The difficulty task has two binary outputs: whether more than 2/3 of the labelled models are right (easy), and
    whether less than 1/3 are (hard).
    """

    kind: ClassVar[str] = "unified_mlp"
    widths: tuple[Count, ...] = (256,)
    dropout: Share = 0.5
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 1e-3
    batch_size: Count = 256
    max_epochs: Count = 60
    patience: Count = 8
    members: Count = 10
    kept: Count = 5

    def fit_parts(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        parts: Sequence[tuple[Int[np.ndarray, " _"], Bool[np.ndarray, " _"]]],
        seed: int = 0,
        progress: str | None = None,
    ) -> list[UnifiedMLPRouter]:
        """Trains one router per part in one pass. A part is its rows and a mask of its validation rows.

        All routers centre embeddings on the mean embedding of all given queries.
        """
        embed = Embedding(features.flat().mean(axis=0))
        embedding, share = embed(features.flat()), share_of_right(correct)
        difficulty = [np.where(np.isnan(share), np.nan, label) for label in (share > 2 / 3, share < 1 / 3)]
        targets = np.column_stack([correct, *difficulty]).astype(np.float32)
        routers, fits = [], []
        for rows, validation in parts:
            mean, scale = embedding[rows].mean(axis=0), embedding[rows].std(axis=0)
            router = UnifiedMLPRouter(**self.settings)
            router._reset(correct[rows[~validation]])
            router.arrays_ |= {"centre": embed.mean, "mean": mean, "scale": np.where(scale > 1e-6, scale, 1)}
            routers.append(router)
            fits.append(Fit(router._inputs(features), rows[~validation], rows[validation]))
        ensembles = train_ensembles(fits, targets, TrunkConfig(**self.settings), seed, progress=progress)
        for router, ensemble in zip(routers, ensembles, strict=True):
            router.arrays_ |= ensemble_arrays(0, ensemble)
        return routers

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        self.arrays_ = self.fit_parts(features, correct, [(np.arange(len(features)), validation)], seed)[0].arrays_

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        p = restored_ensemble(self.arrays_, 0).probabilities(self._inputs(features))
        return p[:, : len(self.arrays_["prior"])]  # the last two outputs are the difficulty task's

    def _inputs(self, features: Features) -> np.ndarray:
        embedding = Embedding(self.arrays_["centre"])(features.flat())
        return (embedding - self.arrays_["mean"]) / self.arrays_["scale"]


def best_single(
    outcomes: Outcomes, train: Int[np.ndarray, " train"], folds: Int[np.ndarray, " train"]
) -> FittedBaseline:
    """Fits the best single model. Its p are accuracies and are not calibrated."""
    return _by_benchmark(outcomes, train, folds, BestSingleRouter)


def category_prior(
    outcomes: Outcomes,
    train: Int[np.ndarray, " train"],
    folds: Int[np.ndarray, " train"],
    grid: Sequence[float] = STRENGTH_GRID,
) -> FittedBaseline:
    """Fits the category prior, with the strength of its shrinkage tuned by out-of-fold Brier score over `grid`.

    Its p are not calibrated.
    """

    def brier(fitted: FittedBaseline) -> float:
        error = np.square(fitted.held_out_p[train] - outcomes.correct[train])
        return float(_mean_label(error).mean())

    fits = (_by_benchmark(outcomes, train, folds, partial(CategoryPriorRouter, strength)) for strength in grid)
    return min(fits, key=brier)


def knn_vote(
    outcomes: Outcomes,
    train: Int[np.ndarray, " train"],
    folds: Int[np.ndarray, " train"],
    states: Float[np.ndarray, "queries hidden"],
) -> FittedBaseline:
    """Fits the kNN vote on `states` of all queries, with k tuned out of fold over K_GRID."""
    features = _features(outcomes.benchmarks, states, len(outcomes.models))
    router = KNNVoteRouter().fit(features.take(train), outcomes.correct[train], np.zeros(len(train), dtype=bool))
    held_out = {}
    for k, p in router.out_of_fold(folds).items():
        held_out[k] = np.full(outcomes.correct.shape, np.nan)
        held_out[k][train] = p
    router.k = max(K_GRID, key=lambda k: _mean_auc(outcomes, train, held_out[k]))
    return _calibrated(outcomes, train, features, router, held_out[router.k], {"k": router.k})


def unified_mlp(
    outcomes: Outcomes,
    train: Int[np.ndarray, " train"],
    folds: Int[np.ndarray, " train"],
    states: Float[np.ndarray, "queries hidden"],
    seed: int,
    progress: bool = False,
    grid: Sequence[Mapping[str, Any]] = UNIFIED_GRID,
) -> FittedBaseline:
    """Fits the unified MLP on `states` of all queries.

    Tunes the settings out of fold over `grid` with three members each, then trains ten members and keeps five.
    """
    features = _features(outcomes.benchmarks, states, len(outcomes.models))
    own, correct, names = features.take(train), outcomes.correct[train], np.unique(folds)
    parts = [
        (rows, make_folds(outcomes, train[rows], seed + 1, VALIDATION_FOLDS) == 0)
        for rows in [np.arange(len(train)), *(np.flatnonzero(folds != fold) for fold in names)]
    ]

    def held_out(routers: Sequence[UnifiedMLPRouter]) -> np.ndarray:
        by_fold = dict(zip(names, routers, strict=True))
        return _held_out(outcomes, train, folds, lambda fold: by_fold[fold], features)

    def auc(index: int) -> float:
        label = f"unified MLP, setting {index + 1} of {len(grid)}" if progress else None
        router = UnifiedMLPRouter(**grid[index], members=3, kept=3)
        return _mean_auc(outcomes, train, held_out(router.fit_parts(own, correct, parts[1:], seed, label)))

    best = grid[max(range(len(grid)), key=auc) if len(grid) > 1 else 0]
    label = "unified MLP" if progress else None
    router, *routers = UnifiedMLPRouter(**best).fit_parts(own, correct, parts, seed, label)
    return _calibrated(outcomes, train, features, router, held_out(routers), dict(best))


def _by_benchmark(
    outcomes: Outcomes, train: np.ndarray, folds: np.ndarray, make: Callable[[], SemanticRouter]
) -> FittedBaseline:
    """Fits a router that reads no states."""
    features = _features(outcomes.benchmarks, np.empty((len(outcomes), 0), dtype=np.float32), len(outcomes.models))

    def fit(rows: np.ndarray) -> SemanticRouter:
        return make().fit(features.take(rows), outcomes.correct[rows], np.zeros(len(rows), dtype=bool))

    held_out = _held_out(outcomes, train, folds, lambda fold: fit(train[folds != fold]), features)
    router = fit(train)
    return FittedBaseline(router.predict(features), held_out, router.settings, router)


def _features(benchmarks: np.ndarray, states: np.ndarray, n_models: int) -> Features:
    own = np.empty((len(states), n_models, 0), dtype=np.float32)
    return Features(states, own, benchmarks=benchmarks)


def _held_out(
    outcomes: Outcomes,
    train: np.ndarray,
    folds: np.ndarray,
    router_without: Callable[[Any], SemanticRouter],
    features: Features,
) -> np.ndarray:
    """[queries, models]: raw p of each training query by the router that was fitted without its fold; NaN elsewhere."""
    p = np.full(outcomes.correct.shape, np.nan)
    for fold in np.unique(folds):
        queries = train[folds == fold]
        # The whole batch is predicted: BLAS kernels round the same row differently in batches of different sizes.
        p[queries] = router_without(fold).predict(features)[queries]
    return p


def _mean_label(correct: np.ndarray) -> np.ndarray:
    """The mean of each column over its known values; 0 for a column without one."""
    known = np.isfinite(correct)
    return np.where(known, correct, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)


def _mean_auc(outcomes: Outcomes, train: np.ndarray, p: np.ndarray) -> float:
    return float(auc_per_model(outcomes.correct[train], p[train]).mean())


def _calibrated(
    outcomes: Outcomes,
    train: np.ndarray,
    features: Features,
    router: SemanticRouter,
    held_out: np.ndarray,
    settings: Mapping[str, Any],
) -> FittedBaseline:
    platt = fit_platt(held_out[train], outcomes.correct[train])
    return FittedBaseline(platt(router.predict(features)), platt(held_out), settings, router, platt)
