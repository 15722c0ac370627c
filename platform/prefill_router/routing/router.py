"""The router: from activations to calibrated confidences, uncertainties, costs and decisions.

In: pooled states of the router's layer keys, [queries, hidden] each, or rows of activations datasets. Out:
confidences and uncertainties [queries, models], costs in USD [queries, models], `Decision`s. Evaluation and serving
make the same calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float
from scipy.special import expit

from prefill_router.errors import InputError
from prefill_router.pool import Pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import unknown_share
from prefill_router.routing import policy
from prefill_router.routing.added import ChangedPool
from prefill_router.routing.calibration import Calibrator
from prefill_router.routing.cost import CostModel
from prefill_router.routing.eligibility import Excluded, Requirements, eligibility
from prefill_router.routing.ensemble import Ensemble
from prefill_router.routing.lengths import LengthModel
from prefill_router.routing.policy import Margin
from prefill_router.routing.stack import Stack, context_of
from prefill_router.signals.layer_key import LayerKey, LayerStates
from prefill_router.signals.novelty import Novelty
from prefill_router.signals.projection import Projection, concatenate_features

Reason = Literal["score", "margin", "novelty"]


@dataclass(frozen=True)
class Candidate:
    """One model in a decision.

    `confidence` is the probability of a correct answer, `uncertainty` its standard deviation over the ensemble members,
    `cost_usd` the estimated cost of the query with `expected_output_tokens`, `score` the policy's score (Eq. 3), with
    the margin if the model is the best static choice.
    """

    model: str
    confidence: float
    uncertainty: float
    cost_usd: float
    score: float
    expected_output_tokens: float


@dataclass(frozen=True)
class Decision:
    """The chosen model, lambda, and the candidates: the chosen one first, the others by descending score.

    `excluded`: the other models of the pool. `reason`: `score`, the highest score (Eq. 5); `margin`, the best static
    choice, because no score is higher by its margin (docs/equations.md, Margin); `novelty`, the fallback for a novel
    query. `novelty`: the share of held-out training queries whose states are closer to the training states,
    in [0, 1]; None for a checkpoint without it. `unknown_share`: the share of the prompt's text that is unknown to the
    encoder's tokenizer; None if not recorded. `extrapolated`: whether a candidate's cost exceeds the training range.
    """

    model: str
    lam: float
    candidates: tuple[Candidate, ...]
    excluded: tuple[Excluded, ...] = ()
    reason: Reason = "score"
    novelty: float | None = None
    unknown_share: float | None = None
    extrapolated: bool = False

    @property
    def chosen(self) -> Candidate:
        """The candidate of the chosen model."""
        return self.candidates[0]


@dataclass(frozen=True)
class NoveltyFallback:
    """Queries with a novelty above `novelty_above` go to `fallback_model`, if it is a candidate.

    Raises InputError for a bound outside [0, 1).
    """

    novelty_above: float
    fallback_model: str

    def __post_init__(self) -> None:
        if not 0 <= self.novelty_above < 1:
            raise InputError(f"novelty_above: got {self.novelty_above}, allowed is at least 0 and less than 1")


@dataclass(frozen=True)
class Choice:
    """The chosen model of every query by its position in the pool, the reasons, and the scores with the margin."""

    chosen: list[int]
    reasons: list[Reason]
    scores: Float[np.ndarray, "queries models"]


@dataclass(frozen=True)
class Router:
    """Everything that routing needs after the encoder.

    `projections` are in the order of `layer_keys`. `encoders` maps each fingerprint to the encoder's configuration,
    with the layers and poolings that the router reads. `manifest` is the lineage. `stack`, `margin`, `novelty` and
    `lengths` are None in checkpoints of an earlier release; the first two also if they are switched off, `lengths` also
    if every target keeps its median. With `changed`, models were added or removed after the training: ensemble, stack,
    calibrator and lengths have a column for each trained target, costs and margin one for each model of the pool. `id`
    is the digest of the checkpoint (16 hex digits), empty before saving.
    """

    pool: Pool
    encoders: Mapping[str, EncoderConfig]
    layer_keys: tuple[LayerKey, ...]
    projections: tuple[Projection, ...]
    ensemble: Ensemble
    calibrator: Calibrator
    costs: CostModel
    chosen_lambda: float
    manifest: Mapping[str, Any]
    novelty: Novelty | None = None
    stack: Stack | None = None
    margin: Margin | None = None
    lengths: LengthModel | None = None
    changed: ChangedPool | None = None
    id: str = ""

    @property
    def counting_encoder(self) -> str:
        """Fingerprint of the encoder that counts the tokens for the cost model."""
        return self.layer_keys[0].encoder

    def check_fallback(self, fallback: NoveltyFallback) -> None:
        """Raises InputError for a fallback model that is not in the pool, or if the checkpoint has no novelty."""
        if fallback.fallback_model not in self.pool.names:
            raise InputError(
                f"fallback_model: {fallback.fallback_model!r} is not in the pool; known: {', '.join(self.pool.names)}"
            )
        if self.novelty is None:
            raise InputError(
                "novelty_above: the checkpoint has no novelty, because an earlier release trained it; train it again, "
                "or leave novelty_above out"
            )

    def features(self, states: LayerStates) -> Float[np.ndarray, "queries features"]:
        """Paper Eq. 1: the projected states of all layer keys, concatenated, float32."""
        pairs = zip(self.layer_keys, self.projections, strict=True)
        return concatenate_features([projection(states(key)) for key, projection in pairs])

    def confidences(
        self, features: Float[np.ndarray, "queries features"]
    ) -> tuple[Float[np.ndarray, "queries models"], Float[np.ndarray, "queries models"]]:
        """Confidence (calibrated probability of a correct answer) and uncertainty.

        The confidence is the mean of the members' probabilities, stacked and calibrated. The uncertainty is the
        standard deviation of the members' stacked and calibrated probabilities.
        """
        hidden = self.ensemble.hidden(features)
        confidence, uncertainty = self.trained_confidences(hidden, features)
        if self.changed is None:
            return confidence, uncertainty
        return self.changed.confidences(confidence, uncertainty, hidden)

    def trained_confidences(
        self, hidden: Float[np.ndarray, "members queries units"], features: Float[np.ndarray, "queries features"]
    ) -> tuple[Float[np.ndarray, "queries trained"], Float[np.ndarray, "queries trained"]]:
        """As `confidences`, of the targets of the training, from the last hidden layer of the trunk's members."""
        members = expit(self.ensemble.output(hidden).astype(np.float64))
        p = np.concatenate([members.mean(axis=0, keepdims=True), members])
        if self.stack is not None:
            p = self.stack(p, context_of(self.stack.parts, features))
        p = self.calibrator(p)
        return p[0], p[1:].std(axis=0)

    def output_tokens(
        self, features: Float[np.ndarray, "queries features"]
    ) -> Float[np.ndarray, "queries models"] | None:
        """Expected output tokens; None: the medians of the cost model."""
        if self.lengths is None:
            return None
        trained = self.lengths(features)
        return trained if self.changed is None else self.changed.output_tokens(trained, self.costs.median_output)

    def decide(
        self,
        rows: Mapping[str, pa.Table],
        lam: float | None = None,
        requirements: Requirements | None = None,
        fallback: NoveltyFallback | None = None,
    ) -> list[Decision]:
        """Decides every query. `rows` maps each encoder's fingerprint to activations rows of the same queries.

        `lam` defaults to the chosen lambda of the checkpoint. Raises InputError for a lambda outside [0, 1], an unknown
        model, a row without states, missing activations, or a query without a candidate.
        """
        lam = policy.check_lambda(self.chosen_lambda if lam is None else lam)
        requirements = requirements or Requirements()
        states = _states_of(rows)
        features = self.features(states)
        p, uncertainty = self.confidences(features)
        counted = rows[self.counting_encoder]
        input_tokens = requirements.added_tokens + self.costs.input_tokens(
            counted.column("n_tokens").to_numpy(), n_bytes=_bytes_of(counted)
        )
        lengths = self.output_tokens(features)
        expected_output = np.broadcast_to(self.costs.median_output, p.shape) if lengths is None else lengths
        cost = self.costs.of_tokens(input_tokens, lengths) - self._cached_usd(requirements, input_tokens)
        eligible = eligibility(self.pool, requirements, input_tokens, expected_output, cost)
        eligible.check()
        novelty = self._novelty(states, len(p))
        choice = self.choose(p, cost, lam, eligible.allowed, novelty, fallback)
        unknown = unknown_share(counted)
        extrapolated = np.any(eligible.allowed & (cost > self.costs.c_max), axis=1).tolist()
        return [
            Decision(
                self.pool.names[choice.chosen[row]],
                lam,
                _candidates(
                    self.pool.names,
                    choice.chosen[row],
                    eligible.allowed[row],
                    p[row],
                    uncertainty[row],
                    cost[row],
                    choice.scores[row],
                    expected_output[row],
                ),
                eligible.excluded(row),
                choice.reasons[row],
                None if np.isnan(novelty[row]) else float(novelty[row]),
                None if np.isnan(unknown[row]) else float(unknown[row]),
                extrapolated[row],
            )
            for row in range(len(p))
        ]

    def choose(
        self,
        p: Float[np.ndarray, "queries models"],
        cost: Float[np.ndarray, "queries models"],
        lam: float,
        allowed: Bool[np.ndarray, "queries models"],
        novelty: Float[np.ndarray, " queries"],
        fallback: NoveltyFallback | None = None,
    ) -> Choice:
        """Chooses a model for every query from confidences `p`, costs (USD), the allowed models, and novelties (NaN:
        unknown). Raises InputError as `policy.choose`."""
        cost_norm = self.costs.normalise(cost, extrapolate=True)
        raised = p if self.margin is None else self.margin(p, lam, allowed)
        by_score = policy.choose(p, cost, cost_norm, lam, allowed)
        with_margin = by_score if self.margin is None else policy.choose(raised, cost, cost_norm, lam, allowed)
        chosen = with_margin.tolist()
        reasons: list[Reason] = ["margin" if moved else "score" for moved in with_margin != by_score]
        if fallback is not None:
            (to,) = self.pool.indices([fallback.fallback_model])
            for row in np.flatnonzero((novelty > fallback.novelty_above) & allowed[:, to]).tolist():
                chosen[row], reasons[row] = to, "novelty"
        return Choice(chosen, reasons, policy.scores(raised, cost_norm, lam))

    def _cached_usd(
        self, requirements: Requirements, input_tokens: Float[np.ndarray, "queries models"]
    ) -> Float[np.ndarray, "queries models"]:
        """What cached input tokens cost less, in USD; 0 without a price of cached input."""
        saved = np.zeros_like(input_tokens)
        name, tokens = requirements.cached or ("", 0)
        for index, model in enumerate(self.pool.models):
            if model.name == name and model.cached_input_usd_per_mtok is not None and model.self_hosted is None:
                usd = self.costs.per_input_token[index] - model.cached_input_usd_per_mtok / 1e6
                saved[:, index] = max(usd, 0.0) * np.minimum(tokens, input_tokens[:, index])
        return saved

    def _novelty(self, states: LayerStates, queries: int) -> Float[np.ndarray, " queries"]:
        """The novelty of every query; NaN if the checkpoint has none."""
        if self.novelty is None:
            return np.full(queries, np.nan)
        return self.novelty([states(key) for key in self.layer_keys], self.projections)


def _candidates(
    names: Sequence[str],
    chosen: int,
    allowed: np.ndarray,
    p: np.ndarray,
    uncertainty: np.ndarray,
    cost: np.ndarray,
    score: np.ndarray,
    output_tokens: np.ndarray,
) -> tuple[Candidate, ...]:
    order = sorted(np.flatnonzero(allowed).tolist(), key=lambda m: (m != chosen, -score[m], cost[m], -p[m], m))
    return tuple(
        Candidate(
            names[m], float(p[m]), float(uncertainty[m]), float(cost[m]), float(score[m]), float(output_tokens[m])
        )
        for m in order
    )


def _bytes_of(rows: pa.Table) -> np.ndarray | None:
    """UTF-8 bytes of each prompt; 0 for rows that do not record them, None if no row does."""
    if "n_bytes" not in rows.column_names:
        return None
    return np.nan_to_num(rows.column("n_bytes").to_numpy()).astype(np.int64)  # a null is NaN


def _states_of(rows: Mapping[str, pa.Table]) -> LayerStates:
    for table in rows.values():
        errors = [reason for reason in table.column("error").to_pylist() if reason is not None]
        if errors:
            raise InputError(f"prompt: the encoder has no states for it: {errors[0]}; change the prompt")

    @cache  # features and novelty read the same states
    def states(key: LayerKey) -> np.ndarray:
        if key.encoder not in rows:
            raise InputError(
                f"activations: the router reads encoder {key.encoder}, got {', '.join(rows) or 'none'}; "
                "run prefill with the encoder in the checkpoint's manifest"
            )
        table = rows[key.encoder]
        if key.column not in table.column_names:
            raise InputError(
                f"activations: column {key.column!r} is missing; run prefill with layer {key.layer} and "
                f"pooling {key.pooling!r}"
            )
        column = table.column(key.column).combine_chunks()
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)

    return states
