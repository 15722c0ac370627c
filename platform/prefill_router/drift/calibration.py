"""Calibration on feedback: whether the answers are as good as the confidences say, per model and per domain.

In: `Feedback`. Out: a `Calibration` per model and per (model, domain), with intervals, and for each model a sequential
alarm (betting.py). Only the model that answered or was chosen has feedback, and only on the queries that users judge:
nothing is known of the other queries. A router asks the model whose confidence is high, also where it is high by
mistake, so that scores a little below the confidences are usual; the alarm has a tolerance for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from prefill_router.drift.betting import Wealth, mean_factors, wealth
from prefill_router.drift.traffic import Feedback
from prefill_router.metrics.bootstrap import Interval, interval, resample
from prefill_router.metrics.confidences import brier_per_model, ece_per_model

MIN_FEEDBACK = 50  # fewer have intervals that are too wide to be of use
RESAMPLES = 500


@dataclass(frozen=True)
class Calibration:
    """Feedback on one model, in one domain or in all (None).

    `gap`: mean score - mean confidence. `weighted_gap`: the same, with weights 1 / propensity that sum to 1; None if a
    propensity is unknown or all are equal. Intervals are of 95 %, from the bootstrap over decisions.
    """

    model: str
    domain: str | None
    feedback: int
    score: Interval
    confidence: Interval
    gap: Interval
    weighted_gap: Interval | None
    brier: Interval
    ece: Interval


@dataclass(frozen=True)
class CalibrationAlarm:
    """Sequential alarms of one model: `low`: scores below the confidences by more than the tolerance; `high`: above."""

    model: str
    low: Wealth
    high: Wealth


def calibrations(feedback: Feedback, models: Sequence[str], seed: int = 0) -> list[Calibration]:
    """Every model, then every model in every domain if there are several, with at least MIN_FEEDBACK feedbacks."""
    domains = sorted(set(feedback.domain))
    in_domain = np.array(feedback.domain, dtype=object)
    groups: list[tuple[int, str | None]] = [(model, None) for model in range(len(models))]
    if len(domains) > 1:
        groups += [(model, domain) for model in range(len(models)) for domain in domains]
    found = []
    for model, domain in groups:
        rows = (feedback.model == model) & (True if domain is None else in_domain == domain)
        if rows.sum() >= MIN_FEEDBACK:
            figures = feedback.confidence[rows], feedback.score[rows], feedback.propensity[rows]
            found.append(_calibration(models[model], domain, *figures, seed))
    return found


def calibration_alarms(
    feedback: Feedback, models: Sequence[str], alpha: float, tolerance: float
) -> list[CalibrationAlarm]:
    """The alarms of the models with feedback. The false alarm rate of all models together is `alpha`, for each side.

    `tolerance`: difference of score and confidence that is accepted, on average, given the past.
    """
    alarms = []
    for model, name in enumerate(models):
        rows = feedback.model == model
        if rows.any():
            below = feedback.confidence[rows] - feedback.score[rows]
            low, high = (wealth(mean_factors(sign * below - tolerance), alpha / len(models)) for sign in (1, -1))
            alarms.append(CalibrationAlarm(name, low, high))
    return alarms


def _calibration(
    model: str,
    domain: str | None,
    confidence: Float[np.ndarray, " feedback"],
    score: Float[np.ndarray, " feedback"],
    propensity: Float[np.ndarray, " feedback"],
    seed: int,
) -> Calibration:
    of_use = bool(np.isfinite(propensity).all() and (propensity > 0).all() and len(np.unique(propensity)) > 1)
    inverse = 1 / propensity if of_use else np.ones(len(score))

    def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
        n, again = weights.sum(axis=1), weights * inverse
        return {
            "score": weights @ score / n,
            "confidence": weights @ confidence / n,
            "gap": weights @ (score - confidence) / n,
            "weighted": again @ (score - confidence) / again.sum(axis=1),
            "brier": brier_per_model(confidence[:, None], score[:, None], weights)[:, 0],
            "ece": ece_per_model(confidence[:, None], score[:, None], weights)[:, 0],
        }

    draws = resample(figures, np.arange(len(score)), RESAMPLES, seed)
    found = {name: interval(values, centred=name == "ece") for name, values in draws.items()}
    weighted = found.pop("weighted")
    return Calibration(model, domain, len(score), weighted_gap=weighted if of_use else None, **found)
