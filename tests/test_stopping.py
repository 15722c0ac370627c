"""Early stopping: which parameters stay, and when it ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefill_router.semantic.stopping import Labels, train


@pytest.mark.parametrize(
    ("losses", "kept", "epochs"),
    [
        ([3, 1, 2, 2, 0, 0], 2, 4),  # two epochs without a better loss end it: the later, better ones are never seen
        ([3, 2, 1, 1.5], 3, 4),
        ([None] * 4, 4, 4),
    ],
)  # no validation loss
def test_the_parameters_of_the_best_epoch_stay_and_patience_ends_it(losses: list[float | None], kept: int, epochs: int):
    parameter, coming = torch.zeros(1), iter(losses)
    done: list[int] = []

    def epoch() -> None:
        done.append(1)
        parameter.add_(1)

    train([parameter], epoch, lambda: next(coming), max_epochs=len(losses), patience=2, progress="test")
    assert (float(parameter), len(done)) == (kept, epochs)


def test_the_loss_is_the_mean_over_labelled_pairs_and_zero_without_any():
    correct = np.array([[1, np.nan], [0, 1], [np.nan, np.nan]])
    logits = np.array([[0.3, 9], [-1, 2], [5, 5]])
    p = 1 / (1 + np.exp(-logits))
    labels, given = Labels.of(correct), torch.from_numpy(logits).float()
    expected = -(np.log(p[0, 0]) + np.log(1 - p[1, 0]) + np.log(p[1, 1])) / 3
    assert float(labels.loss(given, torch.arange(3))) == pytest.approx(expected, abs=1e-6)
    assert float(labels.loss(given[2:], torch.tensor([2]))) == 0
