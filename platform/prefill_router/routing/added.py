"""The targets of a pool that has changed since the training: heads of added models, and which columns the pool has.

In: the hidden layer of the trunk's members, and the confidences of the trained targets. Out: confidences and
uncertainties [queries, models] of the present pool, NumPy only. The columns of trained targets are passed on bit for
bit. onboarding.py fits heads, repool.py changes pools.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logit

from prefill_router.routing.laplace import expected_sigmoid

EPSILON = 1e-6  # confidences are clipped to [EPSILON, 1 - EPSILON] before the logit
Reads = Literal["hidden", "targets"]


@dataclass(frozen=True)
class HeadInputs:
    """What a head reads of each query.

    `hidden`: the last hidden layer of each member of the trunk. `targets`: the logits of the trained targets'
    confidences.
    """

    hidden: Float[np.ndarray, "members queries units"]
    targets: Float[np.ndarray, "queries trained"]

    @classmethod
    def of(
        cls, hidden: Float[np.ndarray, "members queries units"], confidences: Float[np.ndarray, "queries trained"]
    ) -> HeadInputs:
        """The inputs, from the trained targets' confidences."""
        return cls(hidden, np.asarray(logit(np.clip(confidences, EPSILON, 1 - EPSILON))))

    def take(self, rows: Int[np.ndarray, " part"]) -> HeadInputs:
        """The inputs of the queries at `rows`."""
        return HeadInputs(self.hidden[:, rows], self.targets[rows])

    def read(self, reads: Reads) -> Float[np.ndarray, "sources queries inputs_and_one"]:
        """The inputs with a last column of ones; one source per member, or one for `targets`."""
        x = self.hidden if reads == "hidden" else self.targets[None]
        return np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=2, dtype=np.float64)


@dataclass(frozen=True)
class AddedHead:
    """Head of a model that was added after the training: Gaussian posteriors of logistic regressions.

    `mean` are weights, the last one the offset; `factor` x `factor`' is their covariance. With more regressions than
    sources, regression i reads source i mod sources. The confidence is the mean of the regressions' expected
    probabilities. The uncertainty is the standard deviation of the probability, over regressions and within them.
    """

    reads: Reads
    mean: Float[np.ndarray, "regressions inputs_and_one"]
    factor: Float[np.ndarray, "regressions inputs_and_one inputs_and_one"]

    def __call__(self, inputs: HeadInputs) -> tuple[Float[np.ndarray, " queries"], Float[np.ndarray, " queries"]]:
        """Confidence and uncertainty."""
        sources = inputs.read(self.reads)
        found = [
            expected_sigmoid(x @ mean, np.square(x @ factor).sum(axis=1))
            for x, mean, factor in zip(
                (sources[index % len(sources)] for index in range(len(self.mean))),
                self.mean.astype(np.float64),
                self.factor.astype(np.float64),
                strict=True,
            )
        ]
        means, within = (np.stack(parts) for parts in zip(*found, strict=True))
        return means.mean(axis=0), np.sqrt(means.var(axis=0) + within.mean(axis=0))


@dataclass(frozen=True)
class ChangedPool:
    """Added heads, and the column of each model of the pool: trained targets first, then the added heads."""

    heads: tuple[AddedHead, ...]
    columns: Int[np.ndarray, " models"]

    def confidences(
        self,
        confidence: Float[np.ndarray, "queries trained"],
        uncertainty: Float[np.ndarray, "queries trained"],
        hidden: Float[np.ndarray, "members queries units"],
    ) -> tuple[Float[np.ndarray, "queries models"], Float[np.ndarray, "queries models"]]:
        """Confidences and uncertainties of the pool, from those of the trained targets."""
        inputs = HeadInputs.of(hidden, confidence)
        added = [head(inputs) for head in self.heads]
        return (
            np.column_stack([confidence, *(one for one, _ in added)])[:, self.columns],
            np.column_stack([uncertainty, *(one for _, one in added)])[:, self.columns],
        )

    def output_tokens(
        self, trained: Float[np.ndarray, "queries trained"], median: Float[np.ndarray, " models"]
    ) -> Float[np.ndarray, "queries models"]:
        """Expected output tokens of the pool: those of the trained targets, and the `median` of added models."""
        known = self.columns < trained.shape[1]
        return np.where(known, trained[:, np.where(known, self.columns, 0)], median)
