"""Energy test: whether two samples of vectors have one distribution.

In: two samples [queries features]. Out: `EnergyTest`. Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| is 0 if and
only if the distributions are equal (Székely and Rizzo 2013); the p-value is that of a permutation test, exact for
exchangeable rows whatever the features are. Knows nothing of the router.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from sklearn.metrics import euclidean_distances

PERMUTATIONS = 499


@dataclass(frozen=True)
class EnergyTest:
    """Result of the test.

    `coefficient`: the energy distance over 2 E|X - Y|, 0 without drift and at most 1, estimated without bias (it can be
    slightly negative). `p_value`: share of permutations with at least this distance. `permuted`: their coefficients.
    """

    coefficient: float
    p_value: float
    reference: int
    live: int
    permuted: Float[np.ndarray, " permutations"]


def energy_test(
    reference: Float[np.ndarray, "reference features"],
    live: Float[np.ndarray, "live features"],
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> EnergyTest:
    """Tests whether `live` has the distribution of `reference`. Needs at least two rows of each.

    Memory: (reference + live)^2 distances of 8 bytes.
    """
    n, m = len(reference), len(live)
    pooled = np.concatenate([reference, live]).astype(np.float64)
    distances = euclidean_distances(pooled)
    rng = np.random.default_rng(seed)
    of_live = np.zeros((n + m, 1 + permutations))
    of_live[n:, 0] = 1
    for column in range(1, 1 + permutations):
        of_live[rng.permutation(n + m)[:m], column] = 1
    coefficients = _coefficients(distances, of_live, n, m)
    as_large = int((coefficients[1:] >= coefficients[0] - 1e-12).sum())  # a permutation may be the sample itself
    return EnergyTest(float(coefficients[0]), (1 + as_large) / (1 + permutations), n, m, coefficients[1:])


def _coefficients(
    distances: Float[np.ndarray, "pooled pooled"], of_live: Float[np.ndarray, "pooled labellings"], n: int, m: int
) -> Float[np.ndarray, " labellings"]:
    """The coefficient for every labelling. Sums within and between the samples are products with the labels."""
    to_live = distances @ of_live
    within_live = np.einsum("ij,ij->j", of_live, to_live)
    between = to_live.sum(axis=0) - within_live
    within_reference = distances.sum() - within_live - 2 * between
    cross = 2 * between / (n * m)
    energy = cross - within_reference / (n * (n - 1)) - within_live / (m * (m - 1))
    return np.asarray(np.divide(energy, cross, out=np.zeros_like(energy), where=cross > 0))
