"""kNN router, and routers with one classifier per model: logistic regression and XGBoost.

In: `Features` and labels. Out: raw p [queries, models]; see `router.SemanticRouter`. Sources: paper 4.2; Shao et al.
2024 (kNN); Chen and Guestrin 2016 (XGBoost).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field
from scipy.special import expit

from prefill_router.semantic.neighbours import Embedding, Kernel, votes
from prefill_router.semantic.router import Count, Features, Positive, SemanticRouter, Standardiser, Weight
from prefill_router.signals.logistic import fit_logistic
from prefill_router.signals.roc_auc import auc_per_model


@dataclass
class KNNRouter(SemanticRouter):
    """The share of right answers among the k nearest training queries, weighted by `kernel`. Validation queries are
    neighbours too: nothing is tuned on them."""

    kind = "knn"
    k: Count = 50
    kernel: Kernel = "uniform"

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        x = features.flat()
        mean = x.mean(axis=0)
        self.arrays_ |= {"mean": mean, "known": Embedding(mean)(x), "correct": correct.astype(np.float32)}

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        known, correct, mean = (self.arrays_[name] for name in ("known", "correct", "mean"))
        fallback = self.arrays_["prior"][self.arrays_["fitting"]]
        return votes(known, correct, Embedding(mean)(features.flat()), (self.k,), self.kernel, fallback)[self.k]


@dataclass
class LogisticRouter(SemanticRouter):
    """One L2 logistic regression per model on standardised features. C maximises the AUC of the validation queries; the
    final fit uses all queries."""

    kind = "logistic"
    penalties: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        groups = (
            [(features.shared, np.arange(correct.shape[1]))]
            if not features.own.shape[2]
            else [(features.of_model(model), np.array([model])) for model in range(correct.shape[1])]
        )
        fitted = [self._weights(x, correct[:, models], validation, features.ready) for x, models in groups]
        for name, parts in zip(("mean", "scale", "weights"), zip(*fitted, strict=True), strict=True):
            self.arrays_[name] = np.stack(parts)

    def _weights(
        self, x: np.ndarray, correct: np.ndarray, validation: np.ndarray, ready: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scaler = Standardiser.of(x[~validation], ready)
        z = scaler(x)
        # The solver converges faster along the principal axes; a rotation does not change the L2 penalty.
        axes = np.linalg.eigh(z.T @ z)[1]
        rotated = np.ascontiguousarray(z @ axes)

        def validation_auc(c: float) -> float:
            weights = fit_logistic(rotated[~validation], correct[~validation], c)
            logits = rotated[validation] @ weights[:-1] + weights[-1]
            auc = auc_per_model(correct[validation], logits)
            return float(np.nanmean(auc)) if np.isfinite(auc).any() else 0.0

        best = max(self.penalties, key=validation_auc)
        weights = fit_logistic(rotated, correct, best)
        return scaler.mean, scaler.scale, np.concatenate([axes @ weights[:-1], weights[-1:]]).astype(np.float32)

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        columns = []
        for group, (mean, scale, weights) in enumerate(
            zip(*(self.arrays_[name] for name in ("mean", "scale", "weights")), strict=True)
        ):
            x = features.of_model(group) if features.own.shape[2] else features.shared
            columns.append(Standardiser(mean, scale, features.ready)(x) @ weights[:-1] + weights[-1])
        return expit(np.concatenate(columns, axis=1).astype(np.float64))


@dataclass
class XGBoostRouter(SemanticRouter):
    """Gradient-boosted trees per model, with early stopping on the log loss of the validation queries."""

    kind = "xgboost"
    max_depth: Count = 4
    learning_rate: Positive = 0.05
    n_trees: Count = 400
    subsample: Annotated[float, Field(gt=0, le=1)] = 0.8
    features_per_tree: Annotated[float, Field(gt=0, le=1)] = 0.5
    min_child_weight: Weight = 5.0
    patience: Count = 25

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        import xgboost

        parameters: dict[str, Any] = {
            "objective": "binary:logistic",
            "tree_method": "hist",
            "max_depth": self.max_depth,
            "learning_rate": self.learning_rate,
            "subsample": self.subsample,
            "colsample_bytree": self.features_per_tree,
            "min_child_weight": self.min_child_weight,
            "seed": seed,
            "nthread": 1,
            "verbosity": 0,
        }
        for model in range(correct.shape[1]):
            x, known = features.of_model(model), np.isfinite(correct[:, model])
            training_rows, validation_rows = (
                xgboost.DMatrix(x[part], correct[part, model], nthread=1)
                for part in (known & ~validation, known & validation)
            )
            stopping: dict[str, Any] = (
                {"evals": [(validation_rows, "validation")], "early_stopping_rounds": self.patience}
                if validation_rows.num_row()
                else {}
            )
            booster = xgboost.train(parameters, training_rows, self.n_trees, verbose_eval=False, **stopping)
            if stopping:
                booster = booster[: booster.best_iteration + 1]
            self.arrays_[f"booster_{model}"] = np.frombuffer(bytes(booster.save_raw("ubj")), dtype=np.uint8)

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        import xgboost

        columns = []
        for model in range(len(self.arrays_["fitting"])):
            booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(self.arrays_[f"booster_{model}"].tobytes()))
            columns.append(booster.predict(xgboost.DMatrix(features.of_model(model), nthread=1)))
        return np.column_stack(columns).astype(np.float64)
