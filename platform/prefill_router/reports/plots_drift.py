"""Plots of the page on drift: novelty, confidences, the alarms over time, the feature test, and calibration.

In: results of `drift.check`. Out: SVG (`svg.to_svg`). Series 0 is the live traffic; the reference is grey.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prefill_router.drift.alerts import minute
from prefill_router.drift.betting import Wealth
from prefill_router.drift.calibration import Calibration
from prefill_router.drift.check import ConfidenceDrift, Window
from prefill_router.drift.energy import EnergyTest
from prefill_router.drift.psi import LARGE, MODERATE, Stability
from prefill_router.reports.svg import (
    INK,
    LABEL,
    MUTED,
    Size,
    draw_markers,
    new_axes,
    new_figure,
    series,
    shortened,
    styled,
    to_svg,
)

POINTS = 800  # of a process, each the highest value of its stretch
ROW, EDGE = 26.0, 54.0  # pixels: one model, and the axis below all of them


@styled
def bins(found: Stability, name: str, label: str, size: Size) -> str:
    """Share of recent decisions per bin of the reference (bars), and the reference's share (line)."""
    fig, ax = new_axes(size)
    places = np.arange(len(found.observed))
    ax.bar(places, found.observed, width=0.86, color=series(0), alpha=0.8, linewidth=0)
    ax.step(np.arange(len(places) + 1) - 0.5, [*found.expected, found.expected[-1]], where="post", color=INK, lw=1.4)
    ax.set_xticks(np.arange(len(found.edges)) + 0.5, [f"{edge:.2f}".removeprefix("0") for edge in found.edges])
    ax.tick_params(axis="x", length=0)
    ax.set(xlim=(-0.5, len(places) - 0.5), xlabel=label, ylabel="share of decisions")
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(False, axis="x")
    return to_svg(fig, f"bins-{name}-{size[0]}", {}, f"Shares per bin of {label}, live and reference")


@styled
def process(alarms: Sequence[tuple[str, Wealth]], xlabel: str, name: str, size: Size) -> str:
    """Wealth of sequential alarms on a logarithmic scale, with the bound, and a ring at each alarm."""
    fig, ax = new_axes(size)
    tips: dict[str, str] = {}
    for index, (label, one) in enumerate(alarms):
        x, y = thinned(one.log_wealth / np.log(10))
        ax.plot(x, y, color=series(index), linewidth=1.6, label=label)
        if one.alarm_at is not None:
            at = float(one.alarm_at)
            point = [(at + 1, one.bound / np.log(10), f"{label}: alarm at {one.alarm_at + 1:,}")]
            style = {"s": 70, "facecolor": "none", "edgecolor": series(index), "linewidth": 1.8, "zorder": 5}
            tips |= draw_markers(ax, point, f"alarm-{index}", **style)
    bound = alarms[0][1].bound / np.log(10)
    ax.axhline(bound, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    ax.annotate("bound", (0, bound), xytext=(4, 3), textcoords="offset points", color=INK, fontsize=LABEL)
    top = max(float(one.log_wealth.max()) / np.log(10) for _, one in alarms)
    ax.set_ylim(-2, min(1.15 * max(top, bound), 6 * bound))
    ax.set(xlim=(0, max(len(one.log_wealth) for _, one in alarms)), xlabel=xlabel, ylabel="wealth, power of 10")
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return to_svg(fig, f"process-{name}-{size[0]}", tips, f"Sequential alarm: {name}")


@styled
def windows(found: Sequence[Window], size: Size) -> str:
    """Above, the median novelty of each window; below, its stability index with interval and the customary bounds."""
    fig = new_figure(size)
    above, below = fig.subplots(2, 1, sharex=True)
    places = np.array([one.first + one.decisions / 2 for one in found])
    above.axhline(0.5, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    above.plot(places, [one.median for one in found], color=series(0), linewidth=1.6, marker="o", markersize=4)
    above.set(ylim=(0, 1), ylabel="median novelty")
    for place, one in zip(places, found, strict=True):
        index = one.stability
        below.plot([place, place], [index.lower, index.upper], color=series(0), linewidth=1.6, alpha=0.5)
    tips = draw_markers(
        below,
        [(float(x), one.stability.estimate, _tip(one)) for x, one in zip(places, found, strict=True)],
        "window",
        s=22,
        color=series(0),
        linewidth=0,
        zorder=4,
    )
    for bound in (MODERATE, LARGE):
        below.axhline(bound, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    below.set(ylabel="stability index", xlabel="decisions", xlim=(0, found[-1].first + found[-1].decisions))
    below.set_ylim(0, max(1.1 * max(one.stability.upper for one in found), 0.3))
    fig.align_ylabels()
    return to_svg(fig, f"windows-{size[0]}", tips, "Novelty by window of decisions")


@styled
def permutations(found: EnergyTest, size: Size) -> str:
    """The energy coefficients of the permutations, and the coefficient of the traffic as a line."""
    fig, ax = new_axes(size)
    ax.hist(found.permuted, bins=30, color=MUTED, alpha=0.45, linewidth=0)
    ax.axvline(found.coefficient, color=series(0), linewidth=2.2)
    ax.margins(x=0.08)
    ax.set(xlabel="energy coefficient", ylabel="permutations")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return to_svg(fig, f"energy-{size[0]}", {}, "Energy coefficient of the traffic and of permutations")


@styled
def quantiles(found: Sequence[ConfidenceDrift], width: int) -> str:
    """Per model: deciles 1 to 9 of the confidences as a line, the quartiles thick, the median as a marker."""
    fig, ax = _rows([one.model for one in found], width)
    for place, one in enumerate(found):
        for values, offset, colour in ((one.reference, -0.16, MUTED), (one.live, 0.16, series(0))):
            y = place + offset
            ax.plot([values[1], values[9]], [y, y], color=colour, linewidth=1.2)
            ax.plot(_quartiles(values), [y, y], color=colour, linewidth=4, alpha=0.55)
            ax.scatter([values[5]], [y], s=24, color=colour, linewidth=0, zorder=4)
    ax.set(xlim=(0, 1), xlabel="confidence")
    return to_svg(fig, f"quantiles-{width}", {}, "Confidences by model, reference and live")


@styled
def gaps(found: Sequence[Calibration], tolerance: float, width: int) -> str:
    """Per model: mean score - mean confidence with its interval; the band is the tolerance."""
    fig, ax = _rows([one.model for one in found], width)
    ax.axvspan(-tolerance, tolerance, color=MUTED, alpha=0.14, linewidth=0)
    ax.axvline(0, color=INK, linewidth=1)
    points = []
    for place, one in enumerate(found):
        ends = [one.gap.lower or 0.0, one.gap.upper or 0.0]
        ax.plot(ends, [place, place], color=series(0), linewidth=2, alpha=0.6)
        said = f"{one.model}: {one.gap.estimate:+.3f} on {one.feedback:,} feedbacks"
        points.append((float(one.gap.estimate or 0.0), float(place), said))
    tips = draw_markers(ax, points, "gap", s=34, color=series(0), linewidth=0, zorder=4)
    furthest = max(max(abs(one.gap.lower or 0.0), abs(one.gap.upper or 0.0)) for one in found)
    reach = 1.15 * max(furthest, tolerance, 0.05)
    ax.set(xlim=(-reach, reach), xlabel="mean score \N{MINUS SIGN} mean confidence")
    return to_svg(fig, f"gaps-{width}", tips, "Feedback against confidence by model")


def thinned(values: Float[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Positions from 1 and values; of a long series the highest value of each of POINTS stretches."""
    stretch = -(-len(values) // POINTS)
    starts = np.arange(0, len(values), stretch)
    ends = np.minimum(starts + stretch, len(values))
    return ends, np.maximum.reduceat(values, starts)


def _tip(one: Window) -> str:
    said = f"{one.stability.estimate:.3f} ({one.stability.lower:.3f} to {one.stability.upper:.3f})"
    return f"{one.decisions:,} decisions from {minute(one.time)}: index {said}"


def _rows(names: Sequence[str], width: int) -> tuple[Figure, Axes]:
    """A figure with one row per name, the first at the top."""
    fig, ax = new_axes((width, EDGE + ROW * len(names)))
    ax.set_yticks(np.arange(len(names)), [shortened(name, 26 if width > 400 else 16) for name in names], fontsize=LABEL)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.spines["left"].set_visible(False)
    return fig, ax


def _quartiles(deciles: Float[np.ndarray, " quantiles"]) -> list[float]:
    return [float(np.interp(q, np.linspace(0, 1, len(deciles)), deciles)) for q in (0.25, 0.75)]
