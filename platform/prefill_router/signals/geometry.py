"""Geometry of hidden states: effective dimension, anisotropy, Fisher separability (paper section 7, Eq. 11-13).

In: arrays [queries, hidden]. Out: scalars. Time is linear in the number of queries; scikit-learn's cosine_similarity
takes quadratic time and memory for the mean cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from prefill_router.signals.projection import Moments, standardised_covariance

CHUNK = 1024  # rows processed at a time, small enough for the CPU cache


@dataclass(frozen=True)
class Geometry:
    """Label-free geometry of one layer key on the training split, of standardised and (`_raw`) of raw states."""

    d_eff: float
    d_eff_raw: float
    anisotropy: float
    anisotropy_raw: float


def measure_geometry(states: Float[np.ndarray, "queries hidden"], moments: Moments | None = None) -> Geometry:
    """Eq. 11 and 12 of standardised and of raw states. `moments` are the moments of the states, if already computed."""
    moments = moments or Moments.of(states, states.mean(axis=0, dtype=np.float64))
    correlation, scale = standardised_covariance(moments)
    return Geometry(
        effective_dimension(correlation),
        effective_dimension(moments.covariance),
        anisotropy(states, moments.mean, scale),
        anisotropy(states),
    )


def effective_dimension(covariance: Float[np.ndarray, "hidden hidden"]) -> float:
    """Eq. 11: (sum e)^2 / sum e^2 over the eigenvalues e, from 1 to their number; NaN without variance.

    The sums are the trace and the squared Frobenius norm, so no eigenvalue is computed.
    """
    square = float(np.vdot(covariance, covariance))
    return float(np.trace(covariance)) ** 2 / square if square > 0 else float("nan")


def anisotropy(
    states: Float[np.ndarray, "queries hidden"],
    mean: Float[np.ndarray, " hidden"] | None = None,
    scale: Float[np.ndarray, " hidden"] | None = None,
) -> float:
    """Eq. 12: mean cosine over all pairs of distinct rows of (states - mean) / scale.

    Zero rows are left out. NaN if fewer than two rows are left.
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
    """Eq. 13: J = d' S_w^-1 d, with d the difference of the class means and S_w the pooled within-class covariance.

    Rows with a NaN label are left out. NaN if a class is empty. `ridge`, relative to the mean variance, limits the
    weight of directions without variance.
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
    """Whether a model has at least one correct and one wrong answer."""
    return (correct == 1).any(axis=0) & (correct == 0).any(axis=0)
