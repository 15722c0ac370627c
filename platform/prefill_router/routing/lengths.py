"""The length head: expected output tokens of each query on each target, from the features of the trunk.

In: features [queries, features], outcomes, and held-out confidences. Out: a `LengthModel`, NumPy only. A target keeps
its training median unless the head is better on held-out queries (docs/equations.md, Output length).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.outcomes.table import Outcomes
from prefill_router.routing import policy
from prefill_router.routing.cost import CostModel

PENALTIES = tuple(np.logspace(0, 5, 11).tolist())  # of the ridge regression; components have a mean variance of 1
ROUNDS, TOLERANCE = 100, 1e-4  # of the imputation of missing lengths; the tolerance is in log tokens
LAMBDAS = policy.LAMBDAS[::5]  # of the comparison of utilities


@dataclass(frozen=True)
class LengthModel:
    """Expected output tokens of a query: the head's for targets with `uses_head`, the training median for others.

    The head is exp(features x `weights` + `offset`) x `smearing` - 1, limited to `longest`, the largest recorded
    number of output tokens. `smearing` corrects the mean of an exponential (Duan 1983). `median` is in tokens.
    """

    weights: Float[np.ndarray, "features models"]
    offset: Float[np.ndarray, " models"]
    smearing: Float[np.ndarray, " models"]
    longest: Float[np.ndarray, " models"]
    median: Float[np.ndarray, " models"]
    uses_head: Bool[np.ndarray, " models"]

    def __call__(self, features: Float[np.ndarray, "queries features"]) -> Float[np.ndarray, "queries models"]:
        """Expected output tokens."""
        return self.combine(self.head(features))

    def head(self, features: Float[np.ndarray, "queries features"]) -> Float[np.ndarray, "queries models"]:
        """The head's expected output tokens, for all targets."""
        return _tokens(features.astype(np.float64) @ self.weights + self.offset, self.smearing, self.longest)

    def combine(self, head: Float[np.ndarray, "queries models"]) -> Float[np.ndarray, "queries models"]:
        """Expected output tokens, from those of the head."""
        return np.where(self.uses_head, head, self.median)


def choose_lengths(
    features: Float[np.ndarray, "queries features"],
    outcomes: Outcomes,
    train: Int[np.ndarray, " train"],
    folds: Int[np.ndarray, " train"],
    rows: Int[np.ndarray, " rows"],
    p: Float[np.ndarray, "rows models"],
    costs: CostModel,
    n_tokens: Int[np.ndarray, " queries"],
) -> LengthModel | None:
    """The length model of the training queries; None if every target keeps its median.

    The held-out queries `rows` decide which targets use the head; they are the training queries, out of fold, or
    others. `p` are their confidences, `n_tokens` the encoder's token counts of all queries.
    """
    model, out_of_fold = fit_lengths(features, outcomes.output_tokens, train, folds)
    head = out_of_fold if np.array_equal(rows, train) else model.head(features[rows])
    input_tokens = costs.input_tokens(n_tokens[rows], outcomes.input_tokens[rows], outcomes.prompt_bytes[rows])
    model = without_regret(model, head, outcomes.output_tokens[rows], p, outcomes.correct[rows], costs, input_tokens)
    return model if model.uses_head.any() else None


def fit_lengths(
    features: Float[np.ndarray, "queries features"],
    output_tokens: Float[np.ndarray, "queries models"],
    rows: Int[np.ndarray, " rows"],
    folds: Int[np.ndarray, " rows"],
) -> tuple[LengthModel, Float[np.ndarray, "rows models"]]:
    """The length model of the queries `rows`, and the head's out-of-fold tokens [rows, models].

    One ridge regression of log(1 + tokens) per target. Its penalty has the lowest out-of-fold squared error, and
    `smearing` is the mean of exp(residual) out of fold. A missing length (NaN) is left out of its target's regression;
    every target needs a recorded length. A target uses the head if the squared error of its out-of-fold tokens is lower
    than those of the median and of the mean: the expected cost, which utilities are linear in, minimises this error.
    """
    x, tokens = features[rows].astype(np.float64), output_tokens[rows].astype(np.float64)
    logs, targets = np.log1p(tokens), np.arange(tokens.shape[1])
    held_out = np.empty((len(PENALTIES), *tokens.shape))
    for fold in np.unique(folds):
        inside = folds == fold
        for index, (weights, offset) in enumerate(_ridge(x[~inside], logs[~inside])):
            held_out[index, inside] = x[inside] @ weights + offset
    best = np.nanmean(np.square(held_out - logs), axis=1).argmin(axis=0)
    predicted = held_out[best, :, targets].T
    smearing, longest = np.nanmean(np.exp(logs - predicted), axis=0), np.nanmax(tokens, axis=0)
    head, median, mean = _tokens(predicted, smearing, longest), np.nanmedian(tokens, axis=0), np.nanmean(tokens, axis=0)
    errors = [np.nanmean(np.square(estimate - tokens), axis=0) for estimate in (head, median, mean)]
    fits = _ridge(x, logs)
    model = LengthModel(
        weights=np.stack([fits[index][0][:, target] for target, index in enumerate(best)], axis=1),
        offset=np.array([fits[index][1][target] for target, index in enumerate(best)]),
        smearing=smearing,
        longest=longest,
        median=median,
        uses_head=errors[0] < np.minimum(errors[1], errors[2]),
    )
    return model, head


def without_regret(
    model: LengthModel,
    head: Float[np.ndarray, "rows models"],
    output_tokens: Float[np.ndarray, "rows models"],
    p: Float[np.ndarray, "rows models"],
    correct: Float[np.ndarray, "rows models"],
    costs: CostModel,
    input_tokens: Float[np.ndarray, "rows models"],
) -> LengthModel:
    """`model` with the median for targets whose head lowers the utility of decisions on held-out queries.

    `head`: the head's tokens, `p`: confidences, `output_tokens` and `correct`: recorded values of held-out queries. The
    utility (docs/equations.md, Utility) has the cost of the recorded tokens and is averaged over queries with all
    values and over lambda = 0, 0.05, ..., 1. While it is lower than with the medians of all targets, the target whose
    median raises it most loses its head. Without such a query, all targets keep the median.
    """
    known = ~np.isnan(output_tokens + p + correct).any(axis=1)
    if not known.any():
        return replace(model, uses_head=np.zeros_like(model.uses_head))
    head, p, correct, input_tokens = head[known], p[known], correct[known], input_tokens[known]
    true = costs.normalise(costs.of_tokens(input_tokens, output_tokens[known].astype(np.float64)), extrapolate=True)

    def utility(uses: Bool[np.ndarray, " models"]) -> float:
        cost = costs.of_tokens(input_tokens, replace(model, uses_head=uses).combine(head))
        norm = costs.normalise(cost, extrapolate=True)
        return float(
            np.mean([policy.utility(correct, true, policy.choose(p, cost, norm, lam), lam).mean() for lam in LAMBDAS])
        )

    uses, targets = model.uses_head, np.arange(len(model.median))
    medians = utility(np.zeros_like(uses))
    while uses.any() and utility(uses) < medians:
        uses = max((uses & (targets != target) for target in np.flatnonzero(uses)), key=utility)
    return replace(model, uses_head=uses)


def _tokens(
    logs: Float[np.ndarray, "queries models"],
    smearing: Float[np.ndarray, " models"],
    longest: Float[np.ndarray, " models"],
) -> Float[np.ndarray, "queries models"]:
    """Expected tokens from predictions of log(1 + tokens)."""
    with np.errstate(over="ignore"):  # limited below
        return np.clip(np.exp(logs) * smearing - 1, 0, longest)


def _ridge(
    x: Float[np.ndarray, "rows features"], logs: Float[np.ndarray, "rows models"]
) -> list[tuple[Float[np.ndarray, "features models"], Float[np.ndarray, " models"]]]:
    """(weights, offset) of the ridge regressions of all targets, by penalty; the offset is not penalised.

    One eigendecomposition serves all targets and penalties. Missing values are imputed by the prediction until it
    stays the same, which is the solution without them (Dempster, Laird and Rubin 1977).
    """
    missing, centre = np.isnan(logs), x.mean(axis=0)
    counts = np.maximum((~missing).sum(axis=0), 1)
    start = np.where(missing, np.where(missing, 0, logs).sum(axis=0) / counts, logs)
    values, vectors = np.linalg.eigh((x - centre).T @ (x - centre))
    z, fits = (x - centre) @ vectors, []
    for penalty in PENALTIES:
        filled = start
        for _ in range(ROUNDS):
            offset = filled.mean(axis=0)
            coefficients = (z.T @ (filled - offset)) / (np.maximum(values, 0) + penalty)[:, None]
            predicted = np.where(missing, z @ coefficients + offset, logs)
            change = np.abs(predicted - filled).max(initial=0)
            filled = predicted
            if change < TOLERANCE:
                break
        weights = vectors @ coefficients
        fits.append((weights, offset - centre @ weights))
    return fits
