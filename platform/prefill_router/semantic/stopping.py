"""Training with early stopping on the validation loss, and the loss that the torch routers share.

In: parameters, a function that runs one epoch, and one that returns the validation loss. Out: the parameters, in place,
as they were after the epoch with the lowest validation loss. The loss is binary cross-entropy over labelled (query,
model) pairs. Does not depend on models, features or optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from prefill_router.progress import tqdm


@dataclass(frozen=True)
class Labels:
    """Labels on a device, both [queries, models]: `correct` with 0 if unlabelled, and `labelled`, 1 or 0."""

    correct: Tensor
    labelled: Tensor

    @classmethod
    def of(cls, correct: Float[np.ndarray, "queries models"], device: torch.device | str = "cpu") -> Labels:
        """From labels with NaN if unlabelled."""
        return cls(
            torch.from_numpy(np.nan_to_num(correct, nan=0.0).astype(np.float32)).to(device),
            torch.from_numpy(np.isfinite(correct).astype(np.float32)).to(device),
        )

    def loss(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Mean binary cross-entropy over the labelled pairs of these rows; 0 if there are none."""
        losses = functional.binary_cross_entropy_with_logits(logits, self.correct[rows], reduction="none")
        labelled = self.labelled[rows]
        return (losses * labelled).sum() / labelled.sum().clamp(min=1)


def train(
    parameters: Sequence[Tensor],
    epoch: Callable[[], None],
    validation_loss: Callable[[], float | None],
    max_epochs: int,
    patience: int,
    progress: str,
) -> None:
    """Runs `epoch` until `validation_loss` has not fallen for `patience` epochs, then restores the best parameters.

    A loss of None means that there are no validation labels: all epochs are run and the last parameters are kept. Shows
    a progress bar if stderr is a terminal.
    """
    best_loss, waited = np.inf, 0
    best = [parameter.detach().clone() for parameter in parameters]
    with tqdm(total=max_epochs, desc=progress, unit=" epochs", disable=None, leave=False) as bar:
        for _ in range(max_epochs):
            epoch()
            loss = validation_loss()
            bar.update()
            bar.set_postfix(loss="no validation" if loss is None else f"{loss:.4f}")
            if loss is None:
                continue
            waited += 1
            if loss < best_loss:
                best_loss, waited = loss, 0
                best = [parameter.detach().clone() for parameter in parameters]
            if waited >= patience:
                break
    if np.isfinite(best_loss):
        with torch.no_grad():
            for parameter, kept in zip(parameters, best, strict=True):
                parameter.copy_(kept)


def shuffled_batches(rows: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yields the rows in random order, `size` at a time."""
    order = torch.from_numpy(rng.permutation(rows))
    yield from order.split(size)
