"""Alerts: what the tests of drift found, in words and in JSON, and whether to train again.

In: `Drift`. Out: `Alert`s and a `Verdict`. An alarm means that the router is used outside its training data or that its
confidences are wrong; training again on new labels corrects both. A warning is a shift that may need nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from prefill_router.drift.betting import Wealth
from prefill_router.drift.check import MIN_DECISIONS, Drift
from prefill_router.drift.psi import LARGE, MODERATE, Stability

Severity = Literal["warning", "alarm"]
TRAIN = "label recent queries (feedback with jobs.learn, or jobs.collect) and train again"
WATCH = "read the page; label a sample of recent queries and watch the calibration"


@dataclass(frozen=True)
class Alert:
    """One finding: `value` exceeds `bound` since `since` (ISO 8601, UTC; None: the test does not say)."""

    name: str
    value: float
    bound: float
    since: str | None
    severity: Severity
    text: str
    what_to_do: str


@dataclass(frozen=True)
class Verdict:
    """Whether to train again, and why."""

    train_again: bool
    because: str

    def __str__(self) -> str:
        return f"train again: {'yes' if self.train_again else 'no'}, because {self.because}"


def minute(time: float) -> str:
    """Unix time as date and minute, UTC."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")


def iso(time: float) -> str:
    """Unix time as ISO 8601, UTC, to the second."""
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")


def alerts(drift: Drift) -> list[Alert]:
    """All alerts, alarms first."""
    found = [*_novelty(drift), *_confidences(drift), *_features(drift), *_calibration(drift)]
    return sorted(found, key=lambda alert: alert.severity != "alarm")


def verdict(drift: Drift, found: Sequence[Alert]) -> Verdict:
    """Train again if there is an alarm. The reason says so if there was too little to test."""
    alarms = [alert.text for alert in found if alert.severity == "alarm"]
    if alarms:
        return Verdict(True, "; ".join(alarms))
    n = len(drift.traffic) - drift.settings.baseline
    if n < MIN_DECISIONS:
        return Verdict(False, f"{max(0, n):,} decisions are too few to say ({MIN_DECISIONS} are needed)")
    because = f"{len(found)} warnings but no alarm" if len(found) > 1 else "a warning but no alarm" if found else ""
    tested = f"{n:,} decisions and {len(drift.traffic.feedback):,} feedbacks"
    because = f"{because} in {tested}" if because else f"nothing was found in {tested}"
    if drift.untested:
        because += f" (not tested: {', '.join(drift.untested)})"
    return Verdict(False, because)


def to_json(found: Sequence[Alert], decided: Verdict, checkpoint: str) -> dict[str, Any]:
    """The content of alerts.json."""
    return {"checkpoint": checkpoint, **asdict(decided), "alerts": [asdict(alert) for alert in found]}


def is_shift(one: Stability, alpha: float) -> bool:
    """Whether an index is at least MODERATE without its bias, and more than chance."""
    return one.estimate >= MODERATE and one.p_value < alpha


def _novelty(drift: Drift) -> list[Alert]:
    if drift.novelty is None:
        return []
    found, recent, alarm, since_alarm = [], drift.novelty.recent, drift.novelty.alarm, drift.novelty.since_alarm
    if since_alarm is not None and alarm.since is not None:
        since = float(drift.novelty.time[alarm.since])
        if since_alarm.live < MIN_DECISIONS:  # too few for the index; the alarm itself is the evidence
            confirmed, state = True, f"for {since_alarm.live:,} decisions so far"
        elif is_shift(since_alarm, drift.settings.alpha) and _is_higher(since_alarm):
            confirmed, state = True, f"with a stability index of {since_alarm.estimate:.2f}"
        else:
            confirmed, state = False, "a little, or not any more"
        found.append(
            Alert(
                "novelty",
                *_ratio(alarm),
                iso(since),
                "alarm" if confirmed else "warning",
                f"queries are more novel than the reference since about {minute(since)}, {state}",
                TRAIN if confirmed else WATCH,
            )
        )
    if is_shift(recent, drift.settings.alpha):
        large, higher = recent.estimate >= LARGE, _is_higher(recent)
        found.append(
            Alert(
                "novelty_psi",
                recent.estimate,
                LARGE if large else MODERATE,
                None,
                "alarm" if large and higher else "warning",
                f"the novelty of recent queries is {'higher' if higher else 'lower'} (stability index "
                f"{recent.estimate:.2f})",
                TRAIN if large and higher else WATCH,
            )
        )
    return found


def _confidences(drift: Drift) -> list[Alert]:
    alpha = drift.settings.alpha / max(1, len(drift.confidences))
    return [
        Alert(
            f"confidence_psi/{one.model}",
            one.stability.estimate,
            LARGE if one.stability.estimate >= LARGE else MODERATE,
            None,
            "warning",
            f"the confidences of {one.model} have a stability index of {one.stability.estimate:.2f}",
            WATCH,
        )
        for one in drift.confidences
        if is_shift(one.stability, alpha)
    ]


def _features(drift: Drift) -> list[Alert]:
    test = drift.features
    if test is None or test.p_value > drift.settings.alpha:
        return []
    text = f"the features of recent queries differ from the reference (energy coefficient {test.coefficient:.3f})"
    return [Alert("features", test.p_value, drift.settings.alpha, None, "warning", text, WATCH)]


def _calibration(drift: Drift) -> list[Alert]:
    found = []
    for one in drift.calibration_alarms:
        rows = np.flatnonzero(drift.traffic.feedback.model == drift.traffic.models.index(one.model))
        for side, alarm in (("low", one.low), ("high", one.high)):
            if alarm.alarm_at is None or alarm.since is None:
                continue
            since = float(drift.traffic.feedback.time[rows[alarm.since]])
            found.append(
                Alert(
                    f"calibration_{side}/{one.model}",
                    *_ratio(alarm),
                    iso(since),
                    "alarm" if side == "low" else "warning",
                    f"the feedback on {one.model} is {'below' if side == 'low' else 'above'} its confidences by more "
                    f"than {drift.settings.tolerance:g} since about {minute(since)}",
                    TRAIN if side == "low" else WATCH,
                )
            )
    return found


def _ratio(alarm: Wealth) -> tuple[float, float]:
    """Decimal logarithms of the highest wealth and of its bound."""
    return float(alarm.log_wealth.max() / np.log(10)), float(alarm.bound / np.log(10))


def _is_higher(one: Stability) -> bool:
    """Whether the upper half of the bins has more than its share."""
    half = len(one.observed) // 2
    return sum(one.observed[half:]) > sum(one.expected[half:])
