"""MIRT: a multidimensional two-parameter logistic item response model with item parameters predicted from features.

In: features of queries (the items), labels of models (the persons). Out: p(right) = sigmoid(a(x) . theta_m - b(x)).
Discriminations are a(x) = softplus(W x + c) > 0; the difficulty b(x) is a linear map of the standardised features x, or
a small network if `hidden` > 0; theta_m are the models' abilities. Sources: Embretson and Reise (2000), Item Response
Theory for Psychologists; Reckase (2009), Multidimensional Item Response Theory (intercept form, with the sign of
difficulty). The item parameters are amortised: a new query needs no answers. Does not handle texts, costs or
calibration.

Identification. Positive discriminations fix the sign of each dimension and restrict rotation. Location and scale are
not identified: a . theta - b is the same for (theta + t, b + a . t) and for (theta / s, s a). They are fixed by the
usual convention for persons: in every dimension the models' abilities have mean 0 and standard deviation 1. The order
of dimensions is arbitrary; for D > 1 they are determined up to a linear map that keeps discriminations positive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.special import expit
from torch import Tensor
from torch.nn import functional

from prefill_router.errors import InputError
from prefill_router.semantic.router import Count, Features, Positive, SemanticRouter, Standardiser, Weight
from prefill_router.semantic.stopping import Labels, shuffled_batches, train


class ItemParameters(NamedTuple):
    """Item parameters of queries, on the scale of abilities with mean 0 and standard deviation 1."""

    discrimination: Float[np.ndarray, "queries dimensions"]
    difficulty: Float[np.ndarray, " queries"]


@dataclass
class MIRTRouter(SemanticRouter):
    """Multidimensional 2PL model on `Features.flat()`, trained by AdamW on the masked log loss.

    `arrays_` holds `ability` [models, dimensions] with mean 0 and standard deviation 1, the `location` and `scale`
    [dimensions] of the abilities before standardising, and the maps from features to discriminations and difficulty.
    """

    kind: ClassVar[str] = "mirt"

    dimensions: Count = 4
    hidden: int = 0  # hidden units of the difficulty network; 0 is a linear map
    learning_rate: Positive = 2e-3
    weight_decay: Weight = 0.1  # decoupled, as in AdamW; applies to weights, not to offsets and abilities
    max_epochs: Count = 200
    patience: Count = 20
    batch_size: Count = 256

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        x = features.flat()
        standardise = Standardiser.of(x[~validation], features.ready)
        inputs, labels = torch.from_numpy(standardise(x)), Labels.of(correct)
        parameters = self._initial(inputs.shape[1], correct[~validation], torch.Generator().manual_seed(seed))
        decayed = [name for name in parameters if name.endswith("weight")]
        optimiser = torch.optim.AdamW(
            [
                {"params": [parameters[name] for name in decayed], "weight_decay": self.weight_decay},
                {"params": [parameters[name] for name in parameters if name not in decayed], "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            fused=True,
        )
        rng = np.random.default_rng(seed)
        validation_rows = torch.from_numpy(np.flatnonzero(validation))
        has_validation = bool(labels.labelled[validation_rows].any())

        def epoch() -> None:
            for rows in shuffled_batches(np.flatnonzero(~validation), self.batch_size, rng):
                optimiser.zero_grad(set_to_none=True)
                labels.loss(_logits(parameters, inputs[rows]), rows).backward()
                optimiser.step()

        @torch.no_grad()
        def validation_loss() -> float | None:
            if not has_validation:
                return None
            return float(labels.loss(_logits(parameters, inputs[validation_rows]), validation_rows))

        train(list(parameters.values()), epoch, validation_loss, self.max_epochs, self.patience, "MIRT")
        learned = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
        ability = learned.pop("ability")
        location, deviation = ability.mean(axis=0), ability.std(axis=0)
        scale = np.where(deviation > 1e-6, deviation, 1).astype(np.float32)
        self.arrays_ |= {
            "mean": standardise.mean,
            "deviation": standardise.scale,
            **learned,
            "location": location,
            "scale": scale,
            "ability": (ability - location) / scale,
        }

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        items = self._items(features)
        return expit(items.discrimination @ self.arrays_["ability"].T - items.difficulty[:, None])

    def items(self, features: Features) -> ItemParameters:
        """Discriminations and difficulty of queries.

        Abilities belong to the models `arrays_["fitting"]`, which have right and wrong training answers. Raises
        InputError if there is no such model or the router is not fitted.
        """
        if "ability" not in self.arrays_:
            raise InputError(
                "mirt: no model has an ability; call fit with labels of both classes for at least one model"
            )
        return self._items(replace(features, own=features.own[:, self.arrays_["fitting"]]))

    def _items(self, features: Features) -> ItemParameters:
        learned = self.arrays_
        x = torch.from_numpy(Standardiser(learned["mean"], learned["deviation"], features.ready)(features.flat()))
        a, b = _parameters({name: torch.from_numpy(array) for name, array in learned.items()}, x)
        discrimination, difficulty = a.numpy(), b[:, 0].numpy()
        return ItemParameters(discrimination * learned["scale"], difficulty - discrimination @ learned["location"])

    def _initial(self, width: int, learned: np.ndarray, generator: torch.Generator) -> dict[str, Tensor]:
        """Initial parameters: small weights, discriminations near 1, abilities from logits of accuracies plus noise."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        right = torch.from_numpy((np.nansum(learned, axis=0) + 1) / (np.isfinite(learned).sum(axis=0) + 2)).float()
        ability = (torch.logit(right)[:, None] + 0.5 * normal(len(right), self.dimensions)) / self.dimensions
        inputs = max(width, 1)
        parameters = {
            "ability": ability,
            "discrimination.weight": 0.1 * normal(width, self.dimensions) / inputs**0.5,
            "discrimination.offset": torch.full((self.dimensions,), 0.54),  # softplus(0.54) = 1
            "difficulty.weight": 0.1 * normal(self.hidden or width, 1) / (self.hidden or inputs) ** 0.5,
            "difficulty.offset": torch.zeros(1),
        }
        if self.hidden:
            parameters |= {
                "hidden.weight": normal(width, self.hidden) / inputs**0.5,
                "hidden.offset": torch.zeros(self.hidden),
            }
        return {name: parameter.requires_grad_() for name, parameter in parameters.items()}


def _parameters(learned: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Discriminations [queries, dimensions] and difficulty [queries, 1], before abilities are standardised."""
    a = functional.softplus(torch.addmm(learned["discrimination.offset"], x, learned["discrimination.weight"]))
    if "hidden.weight" in learned:
        x = functional.relu(torch.addmm(learned["hidden.offset"], x, learned["hidden.weight"]))
    return a, torch.addmm(learned["difficulty.offset"], x, learned["difficulty.weight"])


def _logits(learned: dict[str, Tensor], x: Tensor) -> Tensor:
    a, b = _parameters(learned, x)
    return a @ learned["ability"].T - b
