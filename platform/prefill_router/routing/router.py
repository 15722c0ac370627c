"""The router: from activations to calibrated confidences, uncertainties, costs and decisions.

In: pooled states of the router's layer keys, [queries, hidden] each, or rows of activations datasets. Out:
confidences and uncertainties [queries, models], costs in USD [queries, models], `Decision`s. Evaluation and serving
make the same calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy.special import expit

from prefill_router.errors import InputError
from prefill_router.pool import Pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing import policy
from prefill_router.routing.calibration import Calibrator
from prefill_router.routing.cost import CostModel
from prefill_router.routing.ensemble import Ensemble
from prefill_router.signals.layer_key import LayerKey, LayerStates
from prefill_router.signals.projection import Projection, concatenate_features


@dataclass(frozen=True)
class Candidate:
    """One model in a decision.

    `confidence` is the probability of a correct answer, `uncertainty` its standard deviation over the ensemble members,
    `cost_usd` the estimated cost of the query, `score` the policy's score (Eq. 3).
    """

    model: str
    confidence: float
    uncertainty: float
    cost_usd: float
    score: float


@dataclass(frozen=True)
class Decision:
    """The chosen model, lambda, and the allowed models: the chosen one first, the others by descending score."""

    model: str
    lam: float
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """The candidate of the chosen model."""
        return self.candidates[0]


@dataclass(frozen=True)
class Router:
    """Everything that routing needs after the encoder.

    `projections` are in the order of `layer_keys`. `encoders` maps each fingerprint to the encoder's configuration,
    with the layers and poolings that the router reads. `manifest` is the lineage. `id` is the digest of the checkpoint
    (16 hex digits), empty before saving.
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
    id: str = ""

    @property
    def counting_encoder(self) -> str:
        """Fingerprint of the encoder that counts the tokens for the cost model."""
        return self.layer_keys[0].encoder

    def features(self, states: LayerStates) -> Float[np.ndarray, "queries features"]:
        """Paper Eq. 1: the projected states of all layer keys, concatenated, float32."""
        pairs = zip(self.layer_keys, self.projections, strict=True)
        return concatenate_features([projection(states(key)) for key, projection in pairs])

    def confidences(
        self, features: Float[np.ndarray, "queries features"]
    ) -> tuple[Float[np.ndarray, "queries models"], Float[np.ndarray, "queries models"]]:
        """Confidence (calibrated probability of a correct answer) and uncertainty.

        The confidence is the calibrated mean of the members' probabilities. The uncertainty is the standard deviation
        of the members' calibrated probabilities.
        """
        members = expit(self.ensemble.logits(features).astype(np.float64))
        return self.calibrator(members.mean(axis=0)), self.calibrator(members).std(axis=0)

    def decide(
        self,
        rows: Mapping[str, pa.Table],
        lam: float | None = None,
        models: Sequence[str] | None = None,
        max_cost_usd: float | None = None,
    ) -> list[Decision]:
        """Decides every query. `rows` maps each encoder's fingerprint to activations rows of the same queries.

        `lam` defaults to the chosen lambda of the checkpoint. `models` and `max_cost_usd` (USD per query) restrict the
        choice. Raises InputError for a lambda outside [0, 1], an unknown model, a row without states, missing
        activations, or a query without an allowed model.
        """
        lam = policy.check_lambda(self.chosen_lambda if lam is None else lam)
        listed = np.zeros(len(self.pool.models), dtype=bool)
        listed[self.pool.indices(self.pool.names if models is None else models)] = True
        p, uncertainty = self.confidences(self.features(_states_of(rows)))
        cost = self.costs.estimate(rows[self.counting_encoder].column("n_tokens").to_numpy())
        cost_norm = self.costs.normalise(cost)
        allowed = np.broadcast_to(listed, p.shape)
        if max_cost_usd is not None:
            allowed = allowed & (cost <= max_cost_usd)
            if not allowed.any(axis=1).all():
                cheapest = float(np.where(listed, cost, np.inf).min(axis=1).max())
                raise InputError(
                    f"max_cost_usd: got {max_cost_usd}, the cheapest allowed model has an estimated cost of "
                    f"{cheapest:.3g} USD for this query; allow at least this cost or more models"
                )
        chosen = policy.choose(p, cost, cost_norm, lam, allowed)
        score = policy.scores(p, cost_norm, lam)
        return [
            _decision(
                self.pool.names, lam, int(chosen[row]), allowed[row], p[row], uncertainty[row], cost[row], score[row]
            )
            for row in range(len(p))
        ]


def _states_of(rows: Mapping[str, pa.Table]) -> LayerStates:
    for table in rows.values():
        errors = [reason for reason in table.column("error").to_pylist() if reason is not None]
        if errors:
            raise InputError(f"prompt: the encoder has no states for it: {errors[0]}; change the prompt")

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


def _decision(
    names: Sequence[str],
    lam: float,
    chosen: int,
    allowed: np.ndarray,
    p: np.ndarray,
    uncertainty: np.ndarray,
    cost: np.ndarray,
    score: np.ndarray,
) -> Decision:
    order = sorted(np.flatnonzero(allowed), key=lambda m: (m != chosen, -score[m], cost[m], -p[m], m))
    return Decision(
        names[chosen],
        lam,
        tuple(Candidate(names[m], float(p[m]), float(uncertainty[m]), float(cost[m]), float(score[m])) for m in order),
    )
