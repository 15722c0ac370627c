"""Population stability index: how far the bins of one sample are from those of another.

In: two samples of one number, such as a confidence. Out: `Stability`. The index is positive without any drift, because
two samples always differ; its mean is then about (bins - 1) (1/n + 1/m). The estimate subtracts this bias, and the
p-value says whether the rest is more than chance (docs/drift.md, Population stability index).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import chi2

BINS = 10
MODERATE, LARGE = 0.1, 0.25  # the customary bounds (Siddiqi 2006)
RESAMPLES = 500
LEVEL = 0.95
PRIOR = 0.5  # added to every count, so that an empty bin has a logarithm


@dataclass(frozen=True)
class Stability:
    """The index of a live sample against a reference.

    `plain`: the index as it is usually computed. `bias`: its mean without drift. `estimate`: plain - bias, at least 0,
    with a 95 % bootstrap interval. `p_value`: of no drift. `reference` and `live`: numbers of values; None: the
    reference is a known distribution. `edges`: inner edges of the bins; `expected` and `observed`: shares in the bins.
    """

    plain: float
    bias: float
    estimate: float
    lower: float
    upper: float
    p_value: float
    reference: int | None
    live: int
    edges: tuple[float, ...]
    expected: tuple[float, ...]
    observed: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def stability(
    reference: Float[np.ndarray, " reference"], live: Float[np.ndarray, " live"], seed: int = 0, bins: int = BINS
) -> Stability:
    """The index of `live` with bins that hold equal shares of `reference`; equal values share a bin."""
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, bins + 1)[1:-1], method="inverted_cdf"))
    return of_counts(counts_in(reference, edges), counts_in(live, edges), edges, seed)


def uniform_stability(live: Float[np.ndarray, " live"], reference: int, seed: int = 0, bins: int = BINS) -> Stability:
    """The index of ranks in [0, 1] among `reference` values, which are uniform without drift (signals/novelty.py)."""
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    return of_counts(np.full(len(edges) + 1, reference / (len(edges) + 1)), counts_in(live, edges), edges, seed)


def of_counts(
    reference: Float[np.ndarray, " bins"],
    live: Float[np.ndarray, " bins"],
    edges: Float[np.ndarray, " inner"],
    seed: int = 0,
) -> Stability:
    """The index of counts per bin. Bootstrap: both counts are drawn again from multinomial distributions."""
    n, m = float(reference.sum()), float(live.sum())
    plain, scale = float(index_of(reference, live)), 1 / n + 1 / m
    bias = (len(live) - 1) * scale
    rng = np.random.default_rng(seed)
    drawn = index_of(*(rng.multinomial(round(of), own / of, RESAMPLES) for own, of in ((reference, n), (live, m))))
    # The bootstrap has the bias once more: its draws differ from counts that differ by chance already.
    low, high = np.maximum(np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - 2 * bias, 0)
    return Stability(
        plain,
        bias,
        max(0.0, plain - bias),
        float(low),
        float(high),
        float(chi2.sf(plain / scale, len(live) - 1)) if len(live) > 1 else 1.0,
        round(n),
        round(m),
        tuple(edges.tolist()),
        tuple((reference / n).tolist()),
        tuple((live / m).tolist()),
    )


def index_of(
    reference: Float[np.ndarray, "*draws bins"] | Int[np.ndarray, "*draws bins"],
    live: Float[np.ndarray, "*draws bins"] | Int[np.ndarray, "*draws bins"],
) -> Any:
    """Sum over bins of (q - p) ln(q / p) for the shares p of the reference and q of the live sample."""
    p, q = ((one + PRIOR) / (one + PRIOR).sum(axis=-1, keepdims=True) for one in (reference, live))
    return ((q - p) * np.log(q / p)).sum(axis=-1)


def counts_in(values: Float[np.ndarray, " values"], edges: Float[np.ndarray, " inner"]) -> Float[np.ndarray, " bins"]:
    """The number of values per bin; a value on an edge counts to the bin above it."""
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1).astype(np.float64)
