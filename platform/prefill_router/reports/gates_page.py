"""The page of a verdict: each gate with its figure, and plots of the differences against their bounds.

In: the mapping that workflows/promote.py writes as verdict.json. Out: one self-contained HTML file. Draws no figure
that verdict.json does not hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prefill_router.reports import svg
from prefill_router.reports.format import MINUS, Json, percent
from prefill_router.reports.html import render_page, write_page

TEMPLATE = "gates.html.j2"
WIDE, NARROW = 1060, 350  # pixels
ROW = 30  # pixels of a benchmark
NAMES = {
    "checkpoint": "checkpoint",
    "canary": "canary",
    "pool": "pool",
    "decision_ms": "time of a decision, ms",
    "request_ms": "time from the prompt, ms",
    "auc_floor": "AUC of the candidate",
    "flip_rate": "flip rate",
    "auc": "AUC",
    "brier": "Brier",
    "p_auccc_exact": "exact area",
    "headroom_captured": "headroom captured",
    "benchmarks": "benchmarks",
}
LOWER_IS_BETTER = ("brier",)


def write_gates_page(path: Path, record: Json) -> Path:
    """Writes the page to `path` atomically and returns `path`."""
    return write_page(path, TEMPLATE, **_values(record))


def render(record: Json) -> str:
    """The page as text."""
    return render_page(TEMPLATE, **_values(record))


@svg.styled
def margins_plot(record: Json, width: int) -> str:
    """Differences candidate minus champion with their intervals, one axis per figure; better to the right.

    The shaded part of an axis is beyond the margin: a gate passes if the interval does not reach it.
    """
    shown = _relative(record)
    columns = 2 if width > 600 else 1
    rows = -(-len(shown) // columns)
    figure = svg.new_figure((width, 104 * rows))
    figure.set_layout_engine("constrained", h_pad=0.14)
    tips: dict[str, str] = {}
    for place, gate in enumerate(shown):
        ax = figure.add_subplot(rows, columns, place + 1)
        sign = -1 if gate["name"] in LOWER_IS_BETTER else 1
        ends = [gate["lower"], gate["upper"], gate["bound"], 0.0]
        reach = 1.15 * max(map(abs, ends))
        colour = svg.series(2 if gate["status"] == "passed" else 1)
        outside = -sign * reach
        ax.axvspan(min(outside, gate["bound"]), max(outside, gate["bound"]), color=svg.level(1), linewidth=0, zorder=1)
        _interval(ax, gate, 0.0, colour, tips, str(place), NAMES[gate["name"]])
        ax.set(xlim=(outside, -outside), ylim=(-0.6, 0.6), yticks=[])
        ax.set_title(f"{NAMES[gate['name']]}: {gate['status']}", loc="left", fontsize=12.5, pad=4)
        _signed_axis(ax)
    return svg.to_svg(figure, f"margins-{width}", tips, "Differences from the champion against their margins")


@svg.styled
def benchmarks_plot(record: Json, width: int) -> str:
    """The difference in accuracy within each benchmark with simultaneous intervals, and the tolerated regression."""
    benchmarks = record["paired"]["benchmarks"]
    gate = next((one for one in record["gates"] if one["name"] == "benchmarks"), None)
    figure, ax = svg.new_axes((width, ROW * len(benchmarks) + 64))
    tips: dict[str, str] = {}
    reach = 1.12 * max(max(abs(one["lower"]), abs(one["upper"])) for one in benchmarks) or 1.0
    if gate is not None and gate["bound"] is not None:
        reach = max(reach, -1.3 * gate["bound"])
        ax.axvspan(-reach, gate["bound"], color=svg.level(1), linewidth=0, zorder=1)
    for row, one in enumerate(benchmarks):
        bound = None if gate is None else gate["bound"]
        regressed = bound is not None and one["difference"] < bound and one["upper"] < 0
        drawn = {"estimate": one["difference"], "lower": one["lower"], "upper": one["upper"]}
        _interval(ax, drawn, float(row), svg.series(1 if regressed else 0), tips, str(row), one["name"])
    names = [f"{svg.shortened(one['name'], 26 if width > 600 else 16)} ({one['queries']})" for one in benchmarks]
    ax.set(xlim=(-reach, reach), ylim=(len(benchmarks) - 0.4, -0.6))
    ax.set_yticks(range(len(benchmarks)), names)
    ax.set_xlabel("difference in accuracy, candidate minus champion")
    _signed_axis(ax)
    return svg.to_svg(figure, f"benchmarks-{width}", tips, "Differences in accuracy within each benchmark")


def _interval(ax: Axes, value: Json, row: float, colour: str, tips: dict[str, str], element: str, name: str) -> None:
    ax.axvline(0, color=svg.INK, linewidth=1, zorder=2)
    ax.plot([value["lower"], value["upper"]], [row, row], color=colour, linewidth=2.4, zorder=3)
    said = f"{name}: {value['estimate']:+.4f} ({value['lower']:+.4f} to {value['upper']:+.4f})".replace("-", MINUS)
    tips |= svg.draw_markers(
        ax,
        [(value["estimate"], row, said)],
        element,
        color=colour,
        s=46,
        edgecolor=svg.SURFACE,
        linewidth=1.2,
        zorder=4,
    )


def _signed_axis(ax: Axes) -> None:
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if abs(v) < 1e-12 else f"{v:+g}".replace("-", MINUS)))


def _relative(record: Json) -> list[Json]:
    """The gates of paired figures that were measured."""
    paired = record["paired"] or {"figures": {}}
    return [gate for gate in record["gates"] if gate["name"] in paired["figures"] and gate["estimate"] is not None]


def _values(record: Json) -> dict[str, Any]:
    """The values of the page's template."""
    paired = record["paired"]
    refused = [gate for gate in record["gates"] if gate["refuses"]]
    widths = (WIDE, NARROW)
    return {
        "record": record,
        "names": NAMES,
        "refused": refused,
        "paired": paired,
        "level": "" if paired is None else percent(paired["level"], 0),
        "one_sided": "" if paired is None else percent((1 + paired["level"]) / 2, 0),
        "margins": [Markup(margins_plot(record, width)) for width in widths] if _relative(record) else None,
        "benchmarks": [Markup(benchmarks_plot(record, width)) for width in widths]
        if paired and paired["benchmarks"]
        else None,
    }
