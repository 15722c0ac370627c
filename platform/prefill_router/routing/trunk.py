"""SharedTrunkNet: one MLP predicts every target's correctness at once; ensembles of it are trained in one pass.

In: features of one or more fits (a fit is the whole training split, or the split without one fold), labels with NaN
where unlabelled, and each fit's training and validation rows. Out: per fit the kept members' weights. Paper 4.3;
EQUATIONS.md, SharedTrunkNet. Knows nothing of layers, calibration or routing.

All members of all fits are one stack of matrices [members, in, out]: a batch is a batched matrix product, Adam and
dropout act elementwise, and the summed loss gives each member its own gradient. A member's result is that of training
it alone; the cores are just kept busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from prefill_router.routing.ensemble import Ensemble


class TrunkConfig(BaseModel):
    """Shape and training of the ensemble."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(description="units of each hidden layer")] = (256,)
    dropout: Annotated[float, Field(ge=0, lt=1, description="probability, after each hidden layer")] = 0.3
    learning_rate: Annotated[float, Field(gt=0, description="of Adam")] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, description="L2 penalty in Adam's gradient")] = 1e-4
    batch_size: Annotated[int, Field(ge=1, description="queries")] = 256
    max_epochs: Annotated[int, Field(ge=1)] = 60
    patience: Annotated[int, Field(ge=1, description="epochs without a better validation loss")] = 8
    members: Annotated[int, Field(ge=1, description="trained")] = 10
    kept: Annotated[int, Field(ge=1, description="of best validation loss, averaged")] = 5


@dataclass(frozen=True)
class Fit:
    """One ensemble to train: its features for all rows, and the rows it may learn from and stop by."""

    features: Float[np.ndarray, "queries features"]
    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]


def train_ensembles(fits: Sequence[Fit], correct: Float[np.ndarray, "queries models"], config: TrunkConfig, seed: int,
                    device: str = "cpu", progress: str | None = None) -> list[Ensemble]:
    """Trains `config.members` members for every fit in one pass; keeps the `config.kept` of best validation loss.

    Features of fits may differ in width; narrower ones are padded with zeros, which no weight learns from.
    """
    stack = _Stack(fits, correct, config, seed, device)
    best_loss = torch.full((stack.members,), torch.inf, device=device)
    best = [parameter.detach().clone() for parameter in stack.parameters]
    waited = torch.zeros(stack.members, dtype=torch.long, device=device)
    optimiser = torch.optim.Adam(stack.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    bar = tqdm(range(config.max_epochs), desc=progress, unit="epoch", disable=progress is None, leave=False)
    for _ in bar:
        stack.train_epoch(optimiser)
        loss = stack.validation_loss()
        running = waited < config.patience
        better = running & (loss < best_loss)
        best_loss = torch.where(better, loss, best_loss)
        for kept, parameter in zip(best, stack.parameters, strict=True):
            kept[better] = parameter.detach()[better]
        waited = torch.where(better, 0, waited + 1)
        waited = torch.where(running, waited, config.patience)
        bar.set_postfix(loss=f"{best_loss.mean():.4f}", training=int((waited < config.patience).sum()))
        if bool((waited >= config.patience).all()):
            break
    bar.close()
    return [stack.ensemble(index, best, best_loss) for index in range(len(fits))]


class _Stack:
    """The stacked members: parameters, row orders and data on the device."""

    def __init__(self, fits: Sequence[Fit], correct: np.ndarray, config: TrunkConfig, seed: int, device: str) -> None:
        self.config, self.fits, self.members = config, fits, len(fits) * config.members
        self.n_models = correct.shape[1]
        width = max(fit.features.shape[1] for fit in fits)
        features = np.zeros((len(fits), len(correct), width), dtype=np.float32)
        for index, fit in enumerate(fits):
            features[index, :, :fit.features.shape[1]] = fit.features
        self.features = torch.from_numpy(features).to(device)
        labelled = ~np.isnan(correct)
        self.labelled = torch.from_numpy(labelled.astype(np.float32)).to(device)
        self.correct = torch.from_numpy(np.where(labelled, correct, 0).astype(np.float32)).to(device)
        self.fit_of = torch.arange(len(fits), device=device).repeat_interleave(config.members)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.shuffles = np.random.default_rng(seed)
        self.device = device
        self.parameters: list[Tensor] = []
        sizes = (width, *config.widths, self.n_models)
        initial = [torch.Generator(device=device).manual_seed(seed + index) for index in range(len(fits))]
        for layer, (n_in, n_out) in enumerate(pairwise(sizes)):
            weight = torch.zeros(self.members, n_in, n_out, device=device)
            bias = torch.zeros(self.members, n_out, device=device)
            for index, fit in enumerate(fits):  # each at its own width and from its own generator
                own, rows = self.fit_of == index, n_in if layer else fit.features.shape[1]
                weight[own, :rows], bias[own] = self._initial(initial[index], rows, n_out)
            self.parameters += [weight.requires_grad_(), bias.requires_grad_()]

    def _initial(self, generator: torch.Generator, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
        """torch.nn.Linear's default: uniform within 1 / sqrt(inputs)."""
        draws = torch.rand(self.config.members, n_in + 1, n_out, generator=generator, device=self.device)
        draws = (2 * draws - 1) / n_in**0.5
        return draws[:, :n_in], draws[:, n_in]

    def forward(self, hidden: Tensor, training: bool) -> Tensor:
        for layer in range(0, len(self.parameters), 2):
            weight, bias = self.parameters[layer], self.parameters[layer + 1]
            hidden = torch.baddbmm(bias[:, None, :], hidden, weight)
            if layer + 2 < len(self.parameters):
                hidden = functional.relu(hidden)
                if training and self.config.dropout:
                    keep = torch.rand(hidden.shape, generator=self.generator, device=self.device) >= self.config.dropout
                    hidden = hidden * keep / (1 - self.config.dropout)
        return hidden

    def loss(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Masked BCE per member: the mean over labelled (query, model) pairs."""
        losses = functional.binary_cross_entropy_with_logits(logits, self.correct[rows], reduction="none")
        mask = self.labelled[rows]
        return (losses * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1)

    def train_epoch(self, optimiser: torch.optim.Optimizer) -> None:
        # Every member sees its own order. Fits differ in length by a few rows; an epoch is as long as the longest
        # fit, and a shorter one begins its order again.
        longest = max(len(fit.train) for fit in self.fits)
        orders = torch.from_numpy(np.stack([
            np.resize(self.shuffles.permutation(fit.train), longest)
            for fit in self.fits for _ in range(self.config.members)])).to(self.device)
        for start in range(0, longest, self.config.batch_size):
            rows = orders[:, start:start + self.config.batch_size]
            logits = self.forward(self.features[self.fit_of[:, None], rows], training=True)
            optimiser.zero_grad(set_to_none=True)
            self.loss(logits, rows).sum().backward()
            optimiser.step()

    @torch.no_grad()
    def validation_loss(self) -> Tensor:
        longest = max(len(fit.validation) for fit in self.fits)
        rows = torch.from_numpy(np.stack([np.resize(fit.validation, longest) for fit in self.fits])).to(self.device)
        counts = torch.zeros(len(self.fits), longest, device=self.device)
        for index, fit in enumerate(self.fits):
            counts[index, :len(fit.validation)] = 1
        rows, counts = rows[self.fit_of], counts[self.fit_of]
        logits = self.forward(self.features[self.fit_of[:, None], rows], training=False)
        losses = functional.binary_cross_entropy_with_logits(logits, self.correct[rows], reduction="none")
        mask = self.labelled[rows] * counts[:, :, None]
        return (losses * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1)

    def ensemble(self, index: int, best: list[Tensor], best_loss: Tensor) -> Ensemble:
        own = torch.nonzero(self.fit_of == index).flatten()
        own = own[torch.argsort(best_loss[own], stable=True)][:self.config.kept]
        width = self.fits[index].features.shape[1]
        arrays = [parameter[own].cpu().numpy() for parameter in best]
        arrays[0] = np.ascontiguousarray(arrays[0][:, :width])
        pairs = tuple(zip(arrays[0::2], arrays[1::2], strict=True))
        return Ensemble(pairs, best_loss[own].cpu().numpy())
