"""Geometry of hidden states: effective dimension, anisotropy, Fisher separability (paper section 7, Eq. 11-13).

In: arrays [queries, hidden]. Out: scalars. Everything is linear in the number of queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from prefill_router.signals.projection import Moments, standardised_covariance

CHUNK = 1024  # rows at work at once: they fit a cache


@dataclass(frozen=True)
class Geometry:
    """Label-free geometry of one block on the training split; `_raw` before standardising."""

    d_eff: float
    d_eff_raw: float
    anisotropy: float
    anisotropy_raw: float


def measure_geometry(states: Float[np.ndarray, "queries hidden"], moments: Moments | None = None) -> Geometry:
    """Eq. 11 and 12 on standardised and on raw states; `moments` are those of the states, where they are known."""
    moments = moments or Moments.of(states, states.mean(axis=0, dtype=np.float64))
    correlation, scale = standardised_covariance(moments)
    return Geometry(
        effective_dimension(correlation),
        effective_dimension(moments.covariance),
        anisotropy(states, moments.mean, scale),
        anisotropy(states),
    )


def effective_dimension(covariance: Float[np.ndarray, "hidden hidden"]) -> float:
    """Eq. 11: (sum e)^2 / sum e^2 over the eigenvalues e, between 1 and their number; NaN without variance.

    The sums are the trace and the squared Frobenius norm: no eigenvalue is computed.
    """
    square = float(np.vdot(covariance, covariance))
    return float(np.trace(covariance)) ** 2 / square if square > 0 else float("nan")


def anisotropy(
    states: Float[np.ndarray, "queries hidden"],
    mean: Float[np.ndarray, " hidden"] | None = None,
    scale: Float[np.ndarray, " hidden"] | None = None,
) -> float:
    """Eq. 12: mean cosine over all pairs of different rows of (states - mean) / scale; NaN for fewer than two rows.

    Zero rows have no direction and are left out.
    """
    n, total = 0, np.zeros(states.shape[1])
    for start in range(0, len(states), CHUNK):
        rows = states[start : start + CHUNK]
        rows = rows if mean is None else rows - mean.astype(states.dtype)
        rows = rows if scale is None else rows / scale.astype(states.dtype)
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        n += int((norms > 0).sum())
        total += np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0) @ rows
    return float((total @ total - n) / (n * (n - 1))) if n > 1 else float("nan")


def fisher_separability(
    z: Float[np.ndarray, "queries components"], correct: Float[np.ndarray, " queries"], ridge: float = 1e-9
) -> float:
    """Eq. 13: J = d' S_w^-1 d, d the difference of the class means, S_w the pooled within-class covariance.

    Rows whose label is NaN are left out; NaN when a class is empty. `ridge`, relative to the mean variance, keeps
    directions without variance from deciding.
    """
    right, wrong = z[correct == 1].astype(np.float64), z[correct == 0].astype(np.float64)
    if not len(right) or not len(wrong):
        return float("nan")
    difference = right.mean(axis=0) - wrong.mean(axis=0)
    right, wrong = right - right.mean(axis=0), wrong - wrong.mean(axis=0)
    within = (right.T @ right + wrong.T @ wrong) / (len(right) + len(wrong))
    scale = float(np.trace(within)) / len(within)
    if scale <= 0:
        return 0.0
    within[np.diag_indices_from(within)] += ridge * scale
    return float(difference @ np.linalg.solve(within, difference))


def labelled_both(correct: Float[np.ndarray, "queries models"]) -> Bool[np.ndarray, " models"]:
    """Models that have at least one right and one wrong labelled answer."""
    return (correct == 1).any(axis=0) & (correct == 0).any(axis=0)
