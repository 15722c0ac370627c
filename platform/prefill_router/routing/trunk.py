"""SharedTrunkNet: one MLP predicts the correctness of every target; ensembles of it are trained in one batched pass.

In: features, training rows and validation rows of one or more fits (a fit uses all training queries, or leaves out one
fold), and labels (NaN: unlabelled). Out: the weights of the kept members of each fit. Source: paper 4.3,
docs/equations.md, SharedTrunkNet. Knows nothing of layers, calibration or routing.

All members of all fits are stacked in matrices [members, in, out]. A step is one batched matrix product per layer; Adam
and dropout act elementwise; the summed loss gives each member its own gradient, as if it were trained alone. No library
does this: torch.func.vmap batches the forward pass of modules, but not early stopping per member, masked labels or
fits of different widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from prefill_router.config import FrozenModel
from prefill_router.progress import tqdm
from prefill_router.routing.ensemble import Ensemble


class TrunkConfig(FrozenModel):
    """Layer widths and training settings of the SharedTrunkNet ensemble."""

    widths: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(description="units of each hidden layer; empty: no hidden layer")
    ] = (256,)
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout probability after each hidden layer")] = 0.5
    learning_rate: Annotated[float, Field(gt=0, description="learning rate of Adam")] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, description="L2 penalty in the gradient of Adam")] = 1e-3
    batch_size: Annotated[int, Field(ge=1, description="queries per batch")] = 256
    max_epochs: Annotated[int, Field(ge=1, description="most epochs of training")] = 60
    patience: Annotated[
        int, Field(ge=1, description="epochs without a lower validation loss before a member stops")
    ] = 8
    members: Annotated[int, Field(ge=1, description="members trained per ensemble")] = 10
    kept: Annotated[
        int, Field(ge=1, description="members kept, those of lowest validation loss; their probabilities are averaged")
    ] = 5

    @model_validator(mode="after")
    def _enough(self) -> TrunkConfig:
        if self.kept > self.members:
            raise ValueError(f"kept: got {self.kept}, allowed is at most members = {self.members}")
        return self


@dataclass(frozen=True)
class Fit:
    """One ensemble to train: features of all queries, training rows, and validation rows for early stopping.

    `weights` are weights of the labels; None gives every label weight 1.
    """

    features: Float[np.ndarray, "queries features"]
    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    weights: Float[np.ndarray, "queries outputs"] | None = None


@dataclass(frozen=True)
class Epoch:
    """State after an epoch.

    `number` counts from 1. `loss` is the mean over members of their best validation loss so far. `training` is the
    number of members that continue (0 after the last epoch). `ensembles()` returns, per fit, the ensemble of the best
    weights so far.
    """

    number: int
    loss: float
    training: int
    ensembles: Callable[[], list[Ensemble]]


def train_ensembles(
    fits: Sequence[Fit],
    correct: Float[np.ndarray, "queries outputs"],
    config: TrunkConfig,
    seed: int,
    device: str = "cpu",
    progress: str | None = None,
    classes: int = 0,
) -> list[Ensemble]:
    """Trains `config.members` members for every fit and keeps the `config.kept` with the lowest validation loss.

    Fits may differ in their number of features: narrower features are padded with zeros, which have no effect. Each fit
    has its own random generators. An epoch is one pass over the training rows of the largest fit; smaller fits repeat
    rows within it. `progress` labels a progress bar; None shows none.

    The outputs are the models. With `classes`, the last `classes` outputs are an auxiliary softmax task over classes,
    whose labels are shares that sum to 1.
    """
    with tqdm(total=config.max_epochs, desc=progress, unit=" epochs", disable=progress is None, leave=False) as bar:
        for epoch in train_epochs(fits, correct, config, seed, device, classes):
            bar.update()
            bar.set_postfix(loss=f"{epoch.loss:.4f}", training=epoch.training)
    return epoch.ensembles()


def train_epochs(
    fits: Sequence[Fit],
    correct: Float[np.ndarray, "queries outputs"],
    config: TrunkConfig,
    seed: int,
    device: str = "cpu",
    classes: int = 0,
) -> Iterator[Epoch]:
    """As `train_ensembles`, but yields after every epoch. Ends at `config.max_epochs` or when all members have stopped.

    A fit without a weighted label in its validation rows is trained to the last epoch.
    """
    stack = _Stack(fits, correct, config, seed, device, classes)
    best_loss = torch.full((stack.size,), torch.inf, device=device)
    best = [parameter.detach().clone() for parameter in stack.parameters]
    waited = torch.zeros(stack.size, dtype=torch.long, device=device)
    for number in range(1, config.max_epochs + 1):
        stack.train_epoch()
        loss = torch.full_like(best_loss, torch.inf)
        loss[stack.member] = torch.where(stack.has_validation[stack.fit_of], stack.validation_loss(), -number)
        better = (waited < config.patience) & (loss < best_loss)
        best_loss = torch.where(better, loss, best_loss)
        improved = better[stack.member]
        for kept, parameter in zip(best, stack.parameters, strict=True):
            kept[stack.member[improved]] = parameter.detach()[improved]
        waited = torch.where(better, 0, waited + (waited < config.patience))
        running = waited < config.patience
        left = int(running.sum()) if number < config.max_epochs else 0
        yield Epoch(number, float(best_loss.mean()), left, partial(stack.ensembles, best, best_loss))
        if not left:
            break
        stack.drop(running[stack.member])


class _Stack:
    """The members in training: parameters, state of Adam, row orders and data on the device.

    `member` [stacked] has the index of each stacked member among all members of all fits. Stopped members are dropped
    from the stack.
    """

    def __init__(
        self, fits: Sequence[Fit], correct: np.ndarray, config: TrunkConfig, seed: int, device: str, classes: int
    ) -> None:
        self.config, self.fits, self.device, self.size = config, fits, device, len(fits) * config.members
        self.classes = classes
        width = max(fit.features.shape[1] for fit in fits)
        features = np.zeros((len(fits), len(correct), width), dtype=np.float32)
        for index, fit in enumerate(fits):
            features[index, :, : fit.features.shape[1]] = fit.features
        labelled = ~np.isnan(correct)
        self.features = torch.from_numpy(features).to(device)
        self.labelled = torch.from_numpy(labelled.astype(np.float32)).to(device)
        self.weights = self._weights(correct.shape)
        self.correct = torch.from_numpy(np.where(labelled, correct, 0).astype(np.float32)).to(device)
        self.member = torch.arange(self.size, device=device)
        self.generators = [torch.Generator(device=device).manual_seed(seed + index) for index in range(len(fits))]
        self.shuffles = [np.random.default_rng((seed, index)) for index in range(len(fits))]
        self.validation, self.counted = self._validation_rows()
        self.has_validation = self._has_validation()
        self.parameters: list[Tensor] = []
        for layer, (n_in, n_out) in enumerate(pairwise((width, *config.widths, correct.shape[1]))):
            weight = torch.zeros(self.size, n_in, n_out, device=device)
            bias = torch.zeros(self.size, n_out, device=device)
            for index, fit in enumerate(fits):
                own, rows = self.fit_of == index, n_in if layer else fit.features.shape[1]
                weight[own, :rows], bias[own] = self._initial(index, rows, n_out)
            self.parameters += [weight.requires_grad_(), bias.requires_grad_()]
        self.optimiser = self._adam()

    @property
    def fit_of(self) -> Tensor:
        return self.member // self.config.members

    def train_epoch(self) -> None:
        # Every member has its own row order.
        longest = max(len(fit.train) for fit in self.fits)
        orders = torch.from_numpy(
            np.stack(
                [
                    np.resize(shuffle.permutation(fit.train), longest)
                    for fit, shuffle in zip(self.fits, self.shuffles, strict=True)
                    for _ in range(self.config.members)
                ]
            )
        )
        orders, fit_of = orders.to(self.device)[self.member], self.fit_of[:, None]
        for start in range(0, longest, self.config.batch_size):
            rows = orders[:, start : start + self.config.batch_size]
            logits = self._forward(self.features[fit_of, rows], training=True)
            self.optimiser.zero_grad(set_to_none=True)
            self._loss(logits, rows, None).sum().backward()
            self.optimiser.step()

    @torch.no_grad()
    def validation_loss(self) -> Tensor:
        """[stacked], the masked loss of each member on the validation rows of its fit."""
        fit_of = self.fit_of
        rows = self.validation[fit_of]
        return self._loss(
            self._forward(self.features[fit_of[:, None], rows], training=False), rows, self.counted[fit_of]
        )

    def drop(self, running: Tensor) -> None:
        """Drops stopped members once they are a quarter of the stack, because copying the rest takes time."""
        if running.sum() > 0.75 * len(running):
            return
        moments = [
            {name: value[running] if value.dim() else value for name, value in self.optimiser.state[parameter].items()}
            for parameter in self.parameters
        ]
        self.member = self.member[running]
        self.parameters = [parameter.detach()[running].clone().requires_grad_() for parameter in self.parameters]
        self.optimiser = self._adam()
        for parameter, moment in zip(self.parameters, moments, strict=True):
            self.optimiser.state[parameter] = moment

    def ensembles(self, best: list[Tensor], best_loss: Tensor) -> list[Ensemble]:
        return [self._ensemble(index, best, best_loss) for index in range(len(self.fits))]

    def _ensemble(self, index: int, best: list[Tensor], best_loss: Tensor) -> Ensemble:
        first = index * self.config.members
        own = best_loss[first : first + self.config.members]
        kept = first + torch.argsort(own, stable=True)[: self.config.kept]
        arrays = [parameter[kept].cpu().numpy() for parameter in best]
        arrays[0] = np.ascontiguousarray(arrays[0][:, : self.fits[index].features.shape[1]])
        return Ensemble(tuple(zip(arrays[0::2], arrays[1::2], strict=True)), best_loss[kept].cpu().numpy())

    def _forward(self, hidden: Tensor, training: bool) -> Tensor:
        for layer in range(0, len(self.parameters), 2):
            weight, bias = self.parameters[layer], self.parameters[layer + 1]
            hidden = torch.baddbmm(bias[:, None, :], hidden, weight)
            if layer + 2 < len(self.parameters):
                hidden = functional.relu(hidden)
                if training and self.config.dropout:
                    hidden = hidden * self._dropout(hidden.shape[1], hidden.shape[2])
        return hidden

    def _dropout(self, rows: int, units: int) -> Tensor:
        """0 or 1 / (1 - dropout) per unit, from one random byte, faster than a float: rounds to 1/256."""
        count = self.config.members * rows * units
        draws = torch.cat(
            [
                torch.randint(
                    -(2**63), 2**63 - 1, (-(-count // 8),), generator=generator, dtype=torch.int64, device=self.device
                ).view(torch.uint8)[:count]
                for generator in self.generators
            ]
        ).view(self.size, rows, units)
        threshold = min(round(256 * self.config.dropout), 255)
        return (draws[self.member] >= threshold) * (256 / (256 - threshold))

    def _loss(self, logits: Tensor, rows: Tensor, counted: Tensor | None) -> Tensor:
        """[stacked], the weighted mean loss over labelled (query, output) pairs; `counted` masks rows."""
        correct = self.correct[rows]
        losses = functional.binary_cross_entropy_with_logits(logits, correct, reduction="none")
        if self.classes:
            of_classes = -correct[..., -self.classes :] * functional.log_softmax(logits[..., -self.classes :], dim=-1)
            losses = torch.cat([losses[..., : -self.classes], of_classes], dim=-1)
        mask = self.labelled[rows]
        if self.weights is not None:
            mask = mask * self.weights[self.fit_of[:, None], rows]
        if counted is not None:
            mask = mask * counted[:, :, None]
        total = mask.sum(dim=(1, 2))
        return (losses * mask).sum(dim=(1, 2)) / torch.where(total > 0, total, 1)

    def _has_validation(self) -> Tensor:
        """[fits], whether the validation rows have a label of positive weight."""
        labelled = self.labelled if self.weights is None else self.labelled * self.weights
        every = labelled if labelled.dim() == 3 else labelled.expand(len(self.fits), *labelled.shape)
        return torch.stack(
            [(every[index, torch.from_numpy(fit.validation)] > 0).any() for index, fit in enumerate(self.fits)]
        )

    def _weights(self, shape: tuple[int, ...]) -> Tensor | None:
        """[fits, queries, outputs]; None if no fit has weights."""
        if all(fit.weights is None for fit in self.fits):
            return None
        weights = [np.ones(shape) if fit.weights is None else fit.weights for fit in self.fits]
        return torch.from_numpy(np.stack(weights).astype(np.float32)).to(self.device)

    def _initial(self, index: int, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the members of one fit, drawn as by torch.nn.Linear: uniform within 1 / sqrt(inputs)."""
        draws = torch.rand(self.config.members, n_in + 1, n_out, generator=self.generators[index], device=self.device)
        draws = (2 * draws - 1) / n_in**0.5
        return draws[:, :n_in], draws[:, n_in]

    def _validation_rows(self) -> tuple[Tensor, Tensor]:
        """[fits, longest] validation rows, repeated in smaller fits, and a mask that is 0 for repeated rows."""
        longest = max(len(fit.validation) for fit in self.fits)
        rows = np.stack([np.resize(fit.validation, longest) for fit in self.fits])
        counted = np.stack([np.arange(longest) < len(fit.validation) for fit in self.fits]).astype(np.float32)
        return torch.from_numpy(rows).to(self.device), torch.from_numpy(counted).to(self.device)

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(
            self.parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
        )
