"""Online ranks: each novelty as a p-value among the reference and all decisions before it.

In: novelties in the order of the decisions, and reference values. Out: one p-value per decision, small for a novel
query. Without drift the p-values are independent and uniform, however long the stream is (Vovk, Nouretdinov and
Gammerman 2003). Ranks among the reference alone are not independent: they share the chance of one reference, and a test
over many more decisions than it has values would find that chance.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

BLOCK = 256  # decisions that are ranked at once


def held_out_values(queries: int) -> Float[np.ndarray, " queries"]:
    """Reference values of `queries` held-out training queries, on the scale of novelty.

    Novelty is the share of held-out queries with a smaller distance, so that a query with novelty g / n is between
    the g-th and the next of n held-out queries: above the first g values (i + 1/2) / n, below the others.
    """
    return (np.arange(queries) + 0.5) / queries


def online_p_values(
    novelty: Float[np.ndarray, " decisions"], reference: Float[np.ndarray, " reference"], seed: int = 0
) -> Float[np.ndarray, " decisions"]:
    """For decision i, (number of higher earlier values + u (1 + number of equal ones)) / (reference + i + 1).

    Earlier values are those of the reference and of the decisions before i; u is uniform. Equal values are in random
    order: two decisions with the same rank among the reference are not ordered by it.
    """
    u = np.random.default_rng(seed).random(len(novelty))
    earlier, p = np.sort(reference), np.empty(len(novelty))
    for start in range(0, len(novelty), BLOCK):
        block = novelty[start : start + BLOCK]
        n = np.arange(len(block))
        before = n[:, None] > n  # [decision, earlier decision of the block]
        higher = len(earlier) - np.searchsorted(earlier, block, side="right")
        higher = higher + (before & (block[:, None] < block)).sum(axis=1)
        equal = np.searchsorted(earlier, block, side="right") - np.searchsorted(earlier, block, side="left")
        equal = equal + (before & (block[:, None] == block)).sum(axis=1)
        p[start : start + BLOCK] = (higher + u[start : start + BLOCK] * (1 + equal)) / (len(earlier) + n + 1)
        earlier = np.sort(np.concatenate([earlier, block]), kind="stable")
    return p
