"""The files of jobs.drift: a page with plots, every figure as JSON, and the alerts as JSON.

In: `drift.check.Drift`, its alerts and verdict, and provenance. Out: drift.html, which is self-contained, drift.json
and alerts.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from prefill_router.drift.alerts import Alert, Verdict, iso, minute, to_json
from prefill_router.drift.betting import Wealth
from prefill_router.drift.calibration import Calibration
from prefill_router.drift.check import Drift, Window
from prefill_router.files import write_json
from prefill_router.locations import location
from prefill_router.reports import plots_drift as plots
from prefill_router.reports.format import Json
from prefill_router.reports.html import render_page, write_page

TEMPLATE = "drift.html.j2"
WIDE, HALF, NARROW = 1060, 520, 350  # pixels
SERIES = 8  # alarms of models in one plot, those with the highest wealth


def write_drift(folder: Path, drift: Drift, found: Sequence[Alert], decided: Verdict, provenance: Json) -> Path:
    """Writes drift.json, alerts.json and drift.html to the folder, each atomically; returns the page's path."""
    folder = location(folder)
    write_json(folder / "drift.json", {**figures(drift), "provenance": dict(provenance)})
    write_json(folder / "alerts.json", to_json(found, decided, drift.traffic.decisions.checkpoint))
    return write_page(folder / "drift.html", TEMPLATE, **_values(drift, found, decided, provenance))


def render(drift: Drift, found: Sequence[Alert], decided: Verdict, provenance: Json) -> str:
    """The page as text."""
    return render_page(TEMPLATE, **_values(drift, found, decided, provenance))


def figures(drift: Drift) -> dict[str, Any]:
    """The content of drift.json without provenance (docs/data-formats.md)."""
    traffic, novelty, feature = drift.traffic, drift.novelty, drift.features
    return {
        "checkpoint": traffic.decisions.checkpoint,
        "decisions": len(traffic),
        "other_checkpoints": traffic.others,
        "feedback": len(traffic.feedback),
        "from": iso(float(traffic.time[0])),
        "to": iso(float(traffic.time[-1])),
        "untested": dict(drift.untested),
        "novelty": None
        if novelty is None
        else {
            "recent": novelty.recent.to_json(),
            "alarm": _alarm(novelty.alarm, novelty.time),
            "since_alarm": None if novelty.since_alarm is None else novelty.since_alarm.to_json(),
            "windows": [_window(one, novelty.alarm) for one in novelty.windows],
        },
        "confidences": {
            one.model: {
                "stability": one.stability.to_json(),
                "deciles": {"reference": one.reference.tolist(), "live": one.live.tolist()},
            }
            for one in drift.confidences
        },
        "features": None
        if feature is None
        else {name: getattr(feature, name) for name in ("coefficient", "p_value", "reference", "live")},
        "calibration": [_calibration(one) for one in drift.calibration],
        "calibration_alarms": {
            one.model: {
                side: _alarm(alarm, _feedback_times(drift, one.model))
                for side, alarm in (("low", one.low), ("high", one.high))
            }
            for one in drift.calibration_alarms
        },
    }


def _alarm(one: Wealth, time: np.ndarray) -> dict[str, Any]:
    return {
        "observations": len(one.log_wealth),
        "log10_wealth": float(one.log_wealth[-1] / np.log(10)),
        "highest": float(one.log_wealth.max() / np.log(10)),
        "bound": one.bound / np.log(10),
        "alarm_at": None if one.alarm_at is None else one.alarm_at + 1,
        "alarm_time": None if one.alarm_at is None else iso(float(time[one.alarm_at])),
        "since": None if one.since is None else iso(float(time[one.since])),
    }


def _window(one: Window, alarm: Wealth) -> dict[str, Any]:
    wealth = float(alarm.log_wealth[one.first + one.decisions - 1] / np.log(10))
    return {**asdict(one), "stability": one.stability.to_json(), "time": iso(one.time), "log10_wealth": wealth}


def _feedback_times(drift: Drift, model: str) -> np.ndarray:
    feedback = drift.traffic.feedback
    return feedback.time[feedback.model == drift.traffic.models.index(model)]


def _calibration(one: Calibration) -> dict[str, Any]:
    named = {name: getattr(one, name) for name in ("score", "confidence", "gap", "weighted_gap", "brier", "ece")}
    return {
        "model": one.model,
        "domain": one.domain,
        "feedback": one.feedback,
        **{name: None if value is None else value.to_json() for name, value in named.items()},
    }


def _values(drift: Drift, found: Sequence[Alert], decided: Verdict, provenance: Json) -> dict[str, Any]:
    """The values of the page's template."""
    novelty, feature = drift.novelty, drift.features
    overall = [one for one in drift.calibration if one.domain is None]
    lowest = sorted(drift.calibration_alarms, key=lambda one: -one.low.log_wealth.max())[:SERIES]
    longest = [(one.model, one.low) for one in lowest]
    sizes, wide = ((HALF, 300), (NARROW, 270)), ((WIDE, 300), (NARROW, 270))
    return {
        "drift": drift,
        "span": [minute(float(drift.traffic.time[end])) for end in (0, -1)],
        "figures": figures(drift),
        "alerts": found,
        "verdict": decided,
        "provenance": {name: str(value) for name, value in provenance.items()},
        "reference": f"the first {drift.settings.baseline:,} decisions" if drift.settings.baseline else "the training",
        "by_domain": [one for one in drift.calibration if one.domain is not None],
        "overall": overall,
        "plots": {
            "novelty": None if novelty is None else _both(plots.bins, sizes, novelty.recent, "novelty", "novelty"),
            "process": None
            if novelty is None
            else _both(plots.process, wide, [("novelty", novelty.alarm)], "decisions", "novelty"),
            "windows": None if novelty is None else _both(plots.windows, sizes, novelty.windows),
            "quantiles": [Markup(plots.quantiles(drift.confidences, width)) for width in (HALF, NARROW)]
            if drift.confidences
            else None,
            "energy": None if feature is None else _both(plots.permutations, sizes, feature),
            "gaps": [Markup(plots.gaps(overall, drift.settings.tolerance, width)) for width in (HALF, NARROW)]
            if overall
            else None,
            "calibration": _both(plots.process, sizes, longest, "feedbacks on the model", "calibration")
            if longest
            else None,
        },
        "legend": [(name, index) for index, (name, _) in enumerate(longest)],
    }


def _both(draw: Callable[..., str], sizes: Sequence[tuple[int, int]], *values: Any) -> list[Markup]:
    """The plot at full and at narrow width."""
    return [Markup(draw(*values, size)) for size in sizes]
