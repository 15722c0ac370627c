"""Every test of drift on the traffic of one checkpoint.

In: `Traffic`, the reference (held-out training queries, confidences on the test split), and the result of the feature
test. Out: `Drift`, with the reason for every test that was not made. The sequential alarms read all decisions, the
other tests the most recent ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from prefill_router.drift.betting import Wealth, novelty_factors, wealth
from prefill_router.drift.calibration import (
    MIN_FEEDBACK,
    Calibration,
    CalibrationAlarm,
    calibration_alarms,
    calibrations,
)
from prefill_router.drift.energy import EnergyTest
from prefill_router.drift.psi import Stability, stability, uniform_stability
from prefill_router.drift.ranks import held_out_values, online_p_values
from prefill_router.drift.traffic import Traffic

MIN_DECISIONS = 200  # of an index with 10 bins; its bias without drift is 0.045 at this number


@dataclass(frozen=True)
class Settings:
    """Settings of the tests.

    `alpha`: false alarm rate of each test, over all decisions and models. `recent`: decisions that the tests other than
    the sequential alarms read. `window`: decisions per window of the novelty over time. `tolerance`: accepted
    difference of feedback and confidence. `baseline`: number of decisions that are the reference; 0: the training is.
    """

    alpha: float = 0.01
    recent: int = 2_000
    window: int = 500
    tolerance: float = 0.05
    baseline: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Window:
    """Novelty of consecutive decisions; `first` is the position of the first one, `time` its time (Unix, s)."""

    first: int
    time: float
    decisions: int
    median: float
    above_99: float
    stability: Stability


@dataclass(frozen=True)
class NoveltyDrift:
    """The recent novelty, the alarm over all decisions, and the novelty by window.

    `since_alarm`: the novelty since the alarm's `since`, of the last `window` decisions at most; None without an alarm.
    `time`: of each decision with a novelty (Unix, s), the observations of the alarm.
    """

    recent: Stability
    alarm: Wealth
    since_alarm: Stability | None
    windows: tuple[Window, ...]
    time: Float[np.ndarray, " decisions"]


@dataclass(frozen=True)
class ConfidenceDrift:
    """Confidences of one model on its recent candidacies against the reference, with their deciles."""

    model: str
    stability: Stability
    reference: Float[np.ndarray, " quantiles"]
    live: Float[np.ndarray, " quantiles"]


@dataclass(frozen=True)
class Drift:
    """Results of all tests. `untested` has the reason for every test that was not made."""

    traffic: Traffic
    settings: Settings
    novelty: NoveltyDrift | None
    confidences: tuple[ConfidenceDrift, ...]
    features: EnergyTest | None
    calibration: tuple[Calibration, ...]
    calibration_alarms: tuple[CalibrationAlarm, ...]
    untested: Mapping[str, str] = field(default_factory=dict)


def check_drift(
    traffic: Traffic,
    settings: Settings,
    held_out: int | Float[np.ndarray, " reference"] | None = None,
    confidences: Float[np.ndarray, "queries models"] | None = None,
    features: EnergyTest | str = "no activations and prompts were given",
) -> Drift:
    """Tests the traffic.

    `held_out`: the novelty of test queries, or the number of held-out training queries of the checkpoint; None: it has
    no novelty. `confidences`: of the test split. With a baseline, the first decisions of the traffic replace both.
    `features`: the feature test, or the reason why there is none.
    """
    untested: dict[str, str] = {}
    live = max(0, len(traffic) - settings.baseline)
    novelty: NoveltyDrift | None = None
    compared: tuple[ConfidenceDrift, ...] = ()
    if live < MIN_DECISIONS:
        why = f"{live:,} decisions{' after the baseline' if settings.baseline else ''}, {MIN_DECISIONS} are needed"
        untested |= {"novelty": why, "confidences": why}
    else:
        novelty = _novelty(traffic, settings, held_out)
        if novelty is None:
            untested["novelty"] = "the checkpoint has no novelty; train it again"
        reference = traffic.decisions.p[: settings.baseline] if settings.baseline else confidences
        if reference is None:
            untested["confidences"] = "no evaluation of the checkpoint was given"
        else:
            compared = _confidences(traffic, settings, reference)
            if not compared:
                untested["confidences"] = (
                    f"no model has {MIN_DECISIONS} recent confidences and as many in the reference"
                )
    if isinstance(features, str):
        untested["features"] = features
    found = calibrations(traffic.feedback, traffic.models, settings.seed)
    if not found:
        untested["calibration"] = f"no model has {MIN_FEEDBACK} feedbacks"
    alarms = calibration_alarms(traffic.feedback, traffic.models, settings.alpha, settings.tolerance)
    return Drift(
        traffic,
        settings,
        novelty,
        compared,
        None if isinstance(features, str) else features,
        tuple(found),
        tuple(alarms),
        untested,
    )


def _novelty(
    traffic: Traffic, settings: Settings, held_out: int | Float[np.ndarray, " reference"] | None
) -> NoveltyDrift | None:
    known = np.flatnonzero(~np.isnan(traffic.decisions.novelty))
    values, base = traffic.decisions.novelty[known], settings.baseline
    if held_out is None or len(values) - base < MIN_DECISIONS:
        return None
    live, time = values[base:], traffic.time[known[base:]]
    reference = values[:base] if base else held_out

    def of(part: np.ndarray) -> Stability:
        if isinstance(reference, int):
            return uniform_stability(part, reference, settings.seed)
        return stability(reference, part, settings.seed)

    values = held_out_values(reference) if isinstance(reference, int) else reference
    p = online_p_values(live, values, settings.seed)
    windows = []
    for first in range(0, len(live), settings.window):
        part = live[first : first + settings.window]
        above = float((part > 0.99).mean())
        windows.append(Window(first, float(time[first]), len(part), float(np.median(part)), above, of(part)))
    alarm = wealth(novelty_factors(p), settings.alpha)
    since_alarm = None if alarm.since is None else of(live[alarm.since :][-settings.window :])
    return NoveltyDrift(of(live[-settings.recent :]), alarm, since_alarm, tuple(windows), time)


def _confidences(
    traffic: Traffic, settings: Settings, reference: Float[np.ndarray, "queries models"]
) -> tuple[ConfidenceDrift, ...]:
    recent = traffic.decisions.p[settings.baseline :][-settings.recent :]
    deciles = np.linspace(0, 1, 11)
    found = []
    for model, before, now in zip(traffic.models, reference.T, recent.T, strict=True):
        before, now = before[~np.isnan(before)], now[~np.isnan(now)]
        if min(len(before), len(now)) >= MIN_DECISIONS:
            found.append(
                ConfidenceDrift(
                    model,
                    stability(before, now, settings.seed),
                    np.quantile(before, deciles),
                    np.quantile(now, deciles),
                )
            )
    return tuple(found)
