"""Network routers: an MLP or multi-task network per model or over all models, and two-stage tiered routing.

In: `Features` and labels. Out: raw p [queries, models]; see `router.SemanticRouter`. The networks are those of
routing/trunk.py: ensembles trained in one pass with early stopping on the validation queries. The second task
(Stripelis et al. 2024; paper 4.2) predicts difficulty. With s the share of labelled models that are right, a query is
easy if s > 2/3, hard if s < 1/3, else middling; or its classes are the soft classes of a judge's difficulty. With
`disagreement` d, a query has weight 1 + 4 d s (1 - s).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit

from prefill_router.errors import InputError
from prefill_router.routing.ensemble import Ensemble
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.semantic.router import Count, Features, Positive, SemanticRouter, Share, Standardiser, Weight

N_CLASSES = 3  # easy, middling, hard


@dataclass
class NetworkRouter(SemanticRouter):
    """Ensembles of MLPs: one over all models if `joint`, else one per model.

    `difficulty` is the weight of the difficulty task's cross-entropy relative to the binary cross-entropy of one label;
    0 gives a plain MLP. `judged` takes the difficulty from `Features.judged`.
    """

    kind = "network"
    joint: bool = True
    difficulty: Weight = 0.5
    disagreement: Weight = 0.0
    judged: bool = False
    widths: tuple[Count, ...] = (256,)
    dropout: Share = 0.5
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 1e-3
    batch_size: Count = 256
    max_epochs: Count = 60
    patience: Count = 8
    members: Count = 5
    kept: Count = 3

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        n_models = correct.shape[1]
        groups = [np.arange(n_models)] if self.joint else [np.array([model]) for model in range(n_models)]
        targets, weights = self._targets(features, correct)
        fits = []
        for group, models in enumerate(groups):
            x = self._read(features, group)
            scaler = Standardiser.of(x[~validation], features.ready)
            self.arrays_ |= {f"{group}.mean": scaler.mean, f"{group}.scale": scaler.scale}
            own = np.zeros_like(weights)
            own[:, [*models, *range(n_models, weights.shape[1])]] = weights[
                :, [*models, *range(n_models, weights.shape[1])]
            ]
            fits.append(Fit(scaler(x), np.flatnonzero(~validation), np.flatnonzero(validation), own))
        config = TrunkConfig(**{name: getattr(self, name) for name in TrunkConfig.model_fields})
        ensembles = train_ensembles(fits, targets, config, seed, classes=N_CLASSES if self.difficulty else 0)
        for group, (models, ensemble) in enumerate(zip(groups, ensembles, strict=True)):
            layers = list(ensemble.layers)
            layers[-1] = (
                layers[-1][0][:, :, models],
                layers[-1][1][:, models],
            )  # drops the outputs of the difficulty task
            self.arrays_ |= ensemble_arrays(group, Ensemble(tuple(layers), ensemble.validation_loss))

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        groups = range(1 if self.joint else len(self.arrays_["fitting"]))
        return np.concatenate(
            [
                restored_ensemble(self.arrays_, group).probabilities(
                    self._scaler(features, group)(self._read(features, group))
                )
                for group in groups
            ],
            axis=1,
        )

    def _scaler(self, features: Features, group: int) -> Standardiser:
        return Standardiser(self.arrays_[f"{group}.mean"], self.arrays_[f"{group}.scale"], features.ready)

    def _read(self, features: Features, group: int) -> np.ndarray:
        return features.flat() if self.joint else features.of_model(group)

    def _targets(self, features: Features, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels and weights [queries, outputs]: the models', then the difficulty classes'."""
        share = share_of_right(correct)
        weight = 1 + self.disagreement * np.nan_to_num(4 * share * (1 - share))
        weights = np.repeat(weight[:, None], correct.shape[1], axis=1)
        if not self.difficulty:
            return correct.astype(np.float32), weights.astype(np.float32)
        classes = _soft_classes(features) if self.judged else _classes(share)
        return (
            np.column_stack([correct, classes]).astype(np.float32),
            np.column_stack([weights, np.full(classes.shape, self.difficulty)]).astype(np.float32),
        )


@dataclass
class TieredRouter(SemanticRouter):
    """Two networks over all models: p = P(all right) + P(disagree) p(right | disagree).

    The first predicts the tier of a query: all models right, all wrong, or models disagree. It learns from queries with
    labels for every model; if there are none, from queries whose known labels disagree. The second predicts which
    models are right and learns from queries on which models disagree.
    """

    kind = "tiered"
    widths: tuple[Count, ...] = (256,)
    dropout: Share = 0.5
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 1e-3
    members: Count = 5
    kept: Count = 3

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        share, complete = share_of_right(correct), np.isfinite(correct).all(axis=1)
        disagree = (share > 0) & (share < 1)
        tiers = np.column_stack([share == 1, share == 0, disagree]).astype(np.float32)
        tiers[~(complete if complete[~validation].any() else complete | disagree)] = np.nan
        x = features.flat()
        scaler = Standardiser.of(x[~validation], features.ready)
        fit = Fit(scaler(x), np.flatnonzero(~validation), np.flatnonzero(validation))
        config = TrunkConfig(
            widths=self.widths,
            dropout=self.dropout,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            members=self.members,
            kept=self.kept,
        )
        inside = np.where(disagree[:, None], correct, np.nan).astype(np.float32)
        stages = [
            train_ensembles([fit], tiers, config, seed, classes=3)[0],
            train_ensembles([fit], inside, config, seed + 1)[0],
        ]
        self.arrays_ |= {"mean": scaler.mean, "scale": scaler.scale}
        for stage, ensemble in enumerate(stages):
            self.arrays_ |= ensemble_arrays(stage, ensemble)

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        z = Standardiser(self.arrays_["mean"], self.arrays_["scale"], features.ready)(features.flat())
        tier, inside = (restored_ensemble(self.arrays_, stage).logits(z).astype(np.float64) for stage in (0, 1))
        odds = np.exp(tier - tier.max(axis=-1, keepdims=True))
        shares = (odds / odds.sum(axis=-1, keepdims=True)).mean(axis=0)
        return shares[:, :1] + shares[:, 2:] * expit(inside).mean(axis=0)


def share_of_right(correct: Float[np.ndarray, "queries models"]) -> Float[np.ndarray, " queries"]:
    """Share of labelled models that are right, per query; NaN if no model is labelled."""
    known = np.isfinite(correct)
    count = known.sum(axis=1)
    return np.where(count > 0, np.where(known, correct, 0).sum(axis=1) / np.maximum(count, 1), np.nan)


def ensemble_arrays(part: int, ensemble: Ensemble) -> dict[str, np.ndarray]:
    """The ensemble's arrays, named by `part`; the inverse of `restored_ensemble`."""
    arrays = {f"{part}.loss": ensemble.validation_loss}
    for layer, (weight, bias) in enumerate(ensemble.layers):
        arrays |= {f"{part}.weight{layer}": weight, f"{part}.bias{layer}": bias}
    return arrays


def restored_ensemble(arrays: Mapping[str, np.ndarray], part: int) -> Ensemble:
    n_layers = sum(name.startswith(f"{part}.weight") for name in arrays)
    return Ensemble(
        tuple((arrays[f"{part}.weight{layer}"], arrays[f"{part}.bias{layer}"]) for layer in range(n_layers)),
        arrays[f"{part}.loss"],
    )


def _classes(share: np.ndarray) -> Float[np.ndarray, "queries three"]:
    hard, easy = share < 1 / 3, share > 2 / 3
    classes = np.column_stack([easy, ~easy & ~hard, hard]).astype(np.float32)
    classes[np.isnan(share)] = np.nan
    return classes


def _soft_classes(features: Features) -> Float[np.ndarray, "queries three"]:
    """A judge's difficulty in [0, 1], interpolated between the classes easy (0), middling (1/2) and hard (1)."""
    judged = features.judged
    if judged is None:
        raise InputError(
            "judged: there are no judge's labels, Features.judged is None; name their column in the outcomes, or "
            "set judged to false"
        )
    hard, easy = np.clip(2 * judged - 1, 0, 1), np.clip(1 - 2 * judged, 0, 1)
    return np.column_stack([easy, 1 - easy - hard, hard])
