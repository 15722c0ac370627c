"""Novelty: how far the states of a query are from the training states, as a rank among held-out training queries.

In: states of the router's layer keys. Out: `Novelty`, a map from distances to [0, 1]: uniform on held-out training
queries by construction, close to 1 for queries that differ from them (docs/equations.md, Novelty).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from prefill_router.signals.projection import Projection, blocks

# Smallest variance of a direction. With fewer training queries than components, smaller ones are rounding errors.
FLOOR = 1e-6


@dataclass(frozen=True)
class Spread:
    """Variances of the training states of one layer key.

    `variances`: of each component of the projection. `residual`: mean squared norm of the standardised state outside
    the components; 0 if the components span all directions.
    """

    variances: Float[np.ndarray, " components"]
    residual: float

    @classmethod
    def of(cls, states: Float[np.ndarray, "queries hidden"], projection: Projection) -> Spread:
        """The spread of training states about their projection."""
        z, residual = _split(states, projection)
        return cls(z.var(axis=0, dtype=np.float64), float(residual.mean()))

    def distance(
        self, states: Float[np.ndarray, "queries hidden"], projection: Projection
    ) -> Float[np.ndarray, " queries"]:
        """Squared Mahalanobis distance of each state to the training states, per dimension: 1 on average over them.

        The variance outside the components is taken as equal in all directions (probabilistic PCA, Tipping and Bishop
        1999). Variances below FLOOR count as FLOOR.
        """
        z, residual = _split(states, projection)
        outside = states.shape[1] - z.shape[1]
        distance = np.square(z) @ (1 / np.maximum(self.variances, FLOOR))
        if outside:
            distance = distance + residual / max(self.residual / outside, FLOOR)
        return np.asarray(distance / states.shape[1], dtype=np.float64)


@dataclass(frozen=True)
class Novelty:
    """Novelty from the mean distance over layer keys.

    `spreads` are in the order of the router's layer keys. `held_out` has the distances of the training queries from
    fits without them, in ascending order.
    """

    spreads: tuple[Spread, ...]
    held_out: Float[np.ndarray, " queries"]

    def __call__(
        self, states: Sequence[Float[np.ndarray, "queries hidden"]], projections: Sequence[Projection]
    ) -> Float[np.ndarray, " queries"]:
        """The share of held-out training queries with a smaller distance. `states` has one array per layer key."""
        distances = [
            spread.distance(own, projection)
            for spread, own, projection in zip(self.spreads, states, projections, strict=True)
        ]
        ranks = np.searchsorted(self.held_out, np.mean(distances, axis=0))
        return np.asarray(ranks / len(self.held_out))


def _split(
    states: Float[np.ndarray, "queries hidden"], projection: Projection
) -> tuple[Float[np.ndarray, "queries components"], Float[np.ndarray, " queries"]]:
    """The projected states, and the squared norm of the standardised states outside the components."""
    parts = [_split_block(states[rows], projection) for rows in blocks(len(states))]
    if len(parts) == 1:
        return parts[0]
    z, residual = zip(*parts, strict=True)
    return np.concatenate(z), np.concatenate(residual)


def _split_block(states: np.ndarray, projection: Projection) -> tuple[np.ndarray, np.ndarray]:
    standardised = (states - projection.mean) / projection.scale
    z = standardised @ projection.components
    norm = float(np.square(projection.components[:, 0]).sum())  # all components have it (`fit_projection`)
    inside = np.square(z).sum(axis=1) / norm if norm > 0 else 0.0
    return z, np.maximum(np.square(standardised).sum(axis=1) - inside, 0.0)
