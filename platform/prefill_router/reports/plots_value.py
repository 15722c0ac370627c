"""Plots of off-policy values: score against cost, and paired differences from the logging policy.

In: policies of value.json. Out: SVG (`svg.to_svg`). An unfilled marker is a policy whose decisions are not all
supported by the log: its value rests on the outcome model, and a thin line spans the worst-case bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from prefill_router.reports.format import Json, percent, usd
from prefill_router.reports.svg import (
    INK,
    LABEL,
    MUTED,
    SURFACE,
    draw_markers,
    new_axes,
    new_figure,
    series,
    shortened,
    styled,
    to_svg,
)

THOUSAND = 1000.0
FULL = 1 - 1e-9
LETTER, ROW = 6.6, 24.0  # pixels


def colour(index: int) -> str:
    """The colour of the policy at `index`; the logging policy is the first."""
    return INK if index == 0 else series(index - 1)


@styled
def value_plot(policies: Sequence[Json], size: tuple[int, int]) -> str:
    """Mean score against mean cost per 1,000 decisions (DR) with intervals; the dotted lines cross at the logging
    policy."""
    fig, ax = new_axes(size)
    tips: dict[str, str] = {}
    for index, one in reversed(list(enumerate(policies))):
        score, cost = one["score"]["dr"], one["cost_usd"]["dr"]
        x, y, shade = THOUSAND * cost["estimate"], score["estimate"], colour(index)
        if not index:
            ax.axhline(y, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
            ax.axvline(x, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
        if one["supported"] < FULL:
            ends = [one["score"][end]["estimate"] for end in ("lower_bound", "upper_bound")]
            ax.plot([x, x], ends, color=shade, linewidth=0.8, alpha=0.6, zorder=2)
        if score["lower"] is not None:
            ax.plot([x, x], [score["lower"], score["upper"]], color=shade, linewidth=2.2, alpha=0.75, zorder=3)
        if cost["lower"] is not None:
            ends = [THOUSAND * cost["lower"], THOUSAND * cost["upper"]]
            ax.plot(ends, [y, y], color=shade, linewidth=2.2, alpha=0.75, zorder=3)
        said = f"{one['policy']}: score {y:.3f}, {usd(x)} per 1,000 decisions, {percent(one['supported'])} supported"
        face = shade if one["supported"] >= FULL else SURFACE
        tips |= draw_markers(
            ax, [(x, y, said)], f"value{index}", s=62, facecolor=face, edgecolor=shade, linewidth=1.8, zorder=4
        )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: usd(value, 2)))
    ax.margins(0.08)
    ax.set_xlabel("mean cost per 1,000 decisions, USD")
    ax.set_ylabel("mean score")
    return to_svg(fig, f"value-{size[0]}", tips, "Mean score against mean cost of every policy, with intervals")


@styled
def differences_plot(policies: Sequence[Json], width: int) -> str:
    """Differences of score, cost and utility from the logging policy (DR) with intervals and worst-case bounds."""
    others = list(enumerate(policies))[1:]
    longest = 34 if width > 600 else 20
    columns = 3 if width > 600 else 1
    panels = (("score", "score"), ("cost_usd", "cost per 1,000 decisions, USD"), ("utility", "utility"))
    fig = new_figure((width, (3 // columns) * (58 + ROW * len(others))))
    axes = np.atleast_1d(fig.subplots(3 // columns, columns, sharey=True))
    tips: dict[str, str] = {}
    for ax, (outcome, title) in zip(axes, panels, strict=True):
        ax.axvline(0, color=MUTED, linewidth=1, zorder=1)
        for place, (index, one) in enumerate(others):
            tips |= _difference(ax, one, outcome, place, colour(index))
        ax.set_title(title, loc="left", fontsize=12.5, pad=4)
        ax.set(ylim=(len(others) - 0.4, -0.6))
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
    names = [shortened(one["policy"], longest) for _, one in others]
    axes[0].set_yticks(range(len(others)), names, fontsize=LABEL)
    return to_svg(fig, f"differences-{width}", tips, "Differences from the logging policy, with intervals")


def _difference(ax: Axes, one: Json, outcome: str, place: int, shade: str) -> dict[str, str]:
    found = one["difference"][outcome]
    scale = THOUSAND if outcome == "cost_usd" else 1.0
    if one["supported"] < FULL and "lower_bound" in found:
        ends = [found[end]["estimate"] for end in ("lower_bound", "upper_bound")]
        ax.plot(ends, [place, place], color=shade, linewidth=0.8, alpha=0.6, zorder=2)
    value = found["dr"]
    if value["lower"] is not None:
        ends = [scale * value["lower"], scale * value["upper"]]
        ax.plot(ends, [place, place], color=shade, linewidth=2.2, alpha=0.75, zorder=3)
    face = shade if one["supported"] >= FULL else SURFACE
    x = scale * value["estimate"]
    points = [(x, float(place), f"{one['policy']}: {x:+.4f}")]
    return draw_markers(ax, points, f"{outcome}{place}", s=46, facecolor=face, edgecolor=shade, linewidth=1.6, zorder=4)
