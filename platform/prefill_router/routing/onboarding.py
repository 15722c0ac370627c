"""Onboarding: the head of a model that joins a trained router, from a few labelled queries.

In: what heads read of the labelled queries (`added.HeadInputs`), labels, and the router's trunk. Out: a fitted head.
Three candidates are Bayesian logistic regressions (laplace.py) with a prior from the trained targets; the one with the
highest evidence is used (docs/equations.md, Onboarding):

- `constant`: the rate of right answers;
- `targets`: an item response model whose item parameters are the logits of the trained targets. A priori the new model
  is a mean target with another ability; the data move the slope and the weights of the targets;
- `hidden`: weights on the last hidden layer of each member of the trunk. The mean and covariance of the prior are those
  of the rows of the trained targets (empirical Bayes), with a share of independent variance.

Knows nothing of costs, decisions and files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from prefill_router.routing.added import AddedHead, HeadInputs, Reads
from prefill_router.routing.ensemble import Ensemble
from prefill_router.routing.laplace import Mode, Prior, find_mode

Candidate = Literal["constant", "targets", "hidden"]
CANDIDATES: tuple[Candidate, ...] = get_args(Candidate)
ABILITY = 2.0  # standard deviation of the offset a priori, in logits
SLOPE = 0.5  # of the slope on the mean target
WEIGHTS = (0.03, 0.1, 0.3, 1.0)  # of the weights of the targets' deviations
SCALES = (0.5, 1.0, 2.0)  # of the rows of the trained targets, as factors of their standard deviation
SHARES = (0.1, 1.0)  # of independent variance in the prior of the hidden layer's weights


@dataclass(frozen=True)
class TrunkRows:
    """Output weights of the trained targets: [members, units + 1, trained], the offset last."""

    values: Float[np.ndarray, "members units_and_one trained"]

    @classmethod
    def of(cls, ensemble: Ensemble) -> TrunkRows:
        """The last layer of the trunk."""
        weight, bias = ensemble.layers[-1]
        return cls(np.concatenate([weight, bias[:, None]], axis=1, dtype=np.float64))

    @property
    def trained(self) -> int:
        """The number of trained targets."""
        return int(self.values.shape[2])

    def prior(self, member: int, scale: float, share: float) -> Prior:
        """Mean of the rows; covariance of the rows with a share of independent variance, times `scale` squared."""
        rows = self.values[member].T
        mean = rows.mean(axis=0)
        spread = (rows - mean) / np.sqrt(max(len(rows) - 1, 1))
        # The rows of one target have no spread: the size of its row is used.
        total = np.square(spread).sum() or np.square(mean).sum() or 1.0
        alone = np.sqrt(share * total / len(mean)) * np.eye(len(mean))
        ability = np.zeros((len(mean), 1))
        ability[-1] = ABILITY
        return Prior(mean, np.column_stack([scale * np.sqrt(1 - share) * spread.T, scale * alone, ability]))


@dataclass(frozen=True)
class Fitted:
    """A fitted head, the candidate it is, the chosen spread of its prior, and the log evidence of every candidate."""

    head: AddedHead
    candidate: Candidate
    spread: tuple[float, ...]
    log_evidence: Mapping[Candidate, float]


@dataclass(frozen=True)
class Material:
    """The labelled queries of a new model, and the trunk. `y` are labels 0 or 1."""

    inputs: HeadInputs
    y: Float[np.ndarray, " queries"]
    rows: TrunkRows

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Int[np.ndarray, " part"]) -> Material:
        """The material of the queries at `rows`."""
        return Material(self.inputs.take(rows), self.y[rows], self.rows)

    @cached_property
    def read(self) -> Mapping[Reads, np.ndarray]:
        """The inputs of each kind, [sources, queries, inputs and one]."""
        return {reads: self.inputs.read(reads) for reads in get_args(Reads)}


def fit_head(material: Material, candidates: Sequence[Candidate] = CANDIDATES, bags: int = 0, seed: int = 0) -> Fitted:
    """The head of the candidate with the highest evidence on the labelled queries; ties: the first.

    With `bags`, the regressions are fitted on this many bootstrap samples of the queries, with the candidate and the
    spread of the whole.
    """
    found = {name: _best(material, name) for name in candidates}
    name = max(candidates, key=lambda one: found[one][0])
    spread = found[name][1]
    samples = [material]
    if bags:
        rng = np.random.default_rng(seed)
        samples = [material.take(rng.integers(len(material), size=len(material))) for _ in range(bags)]
    posteriors = [mode.posterior() for one in samples for mode in _modes(one, name, spread)]
    head = AddedHead(
        "hidden" if name == "hidden" else "targets",
        np.stack([one.mean for one in posteriors]).astype(np.float32),
        np.stack([one.factor for one in posteriors]).astype(np.float32),
    )
    return Fitted(head, name, spread, {one: evidence for one, (evidence, _) in found.items()})


def _best(material: Material, name: Candidate) -> tuple[float, tuple[float, ...]]:
    """The highest log evidence of a candidate, and its spread. `hidden` is compared on the trunk's best member."""
    spreads: dict[Candidate, list[tuple[float, ...]]] = {
        "constant": [()],
        "targets": [(one,) for one in WEIGHTS],
        "hidden": [(scale, share) for scale in SCALES for share in SHARES],
    }
    found = [(_modes(material, name, spread, first=True)[0].log_evidence, spread) for spread in spreads[name]]
    return max(found, key=lambda one: one[0])


def _modes(material: Material, name: Candidate, spread: tuple[float, ...], first: bool = False) -> list[Mode]:
    """The mode of each regression of a candidate; `first`: of the first alone."""
    if name == "hidden":
        x = material.read["hidden"][: 1 if first else None]
        priors = [material.rows.prior(member, *spread) for member in range(len(x))]
    else:
        x = material.read["targets"]
        priors = [constant_prior(x.shape[2]) if name == "constant" else targets_prior(x.shape[2] - 1, *spread)]
    return [find_mode(one, material.y, prior) for one, prior in zip(x, priors, strict=True)]


def constant_prior(inputs: int) -> Prior:
    """Weights of 0 and a free offset."""
    factor = np.zeros((inputs, 1))
    factor[-1] = ABILITY
    return Prior(np.zeros(inputs), factor)


def targets_prior(trained: int, weight: float) -> Prior:
    """Weights around 1 / `trained`: a slope on the targets' mean logit, deviations that sum to 0, and an offset."""
    mean = np.append(np.full(trained, 1 / trained), 0.0)
    factor = np.zeros((trained + 1, trained + 2))
    factor[:trained, 0] = SLOPE / trained
    factor[:trained, 1:-1] = weight * (np.eye(trained) - 1 / trained)
    factor[-1, -1] = ABILITY
    return Prior(mean, factor)
