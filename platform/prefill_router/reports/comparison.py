"""A comparison of evaluations: headline, tables as text, and comparison.html.

In: the value of `metrics.compare.compare`. Out: text, comparison.json with every figure, and one self-contained HTML
file. A figure that some router lacks is not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prefill_router.files import write_json
from prefill_router.reports import svg
from prefill_router.reports.format import DASH, MINUS, Json, includes_zero, number, percent, points, signed, span
from prefill_router.reports.html import render_page, write_page
from prefill_router.reports.plots_curves import cost_curve, models_by_cost

WIDE, NARROW = (1060, 460), (350, 380)  # pixels


@dataclass(frozen=True)
class Shown:
    """How a figure is shown.

    A `share` is in per cent and its differences in percentage points. `sign` is -1 if lower is better.
    """

    label: str
    share: bool = False
    sign: int = 1

    def value(self, figure: Json) -> str:
        """The estimate."""
        return percent(figure["estimate"]) if self.share else number(figure["estimate"], 4)

    def span(self, figure: Json) -> str:
        """The interval of the value."""
        return span(figure, "percent" if self.share else "number")

    def difference(self, value: float | None) -> str:
        """The estimate of a difference, with its sign."""
        if value is None:
            return DASH
        return points(value) if self.share else signed(value)

    def difference_span(self, figure: Json) -> str:
        """The interval of a difference, `+0.001 to +0.020`; without an interval as `format.span`."""
        return (
            span(figure)
            if figure["lower"] is None
            else f"{self.difference(figure['lower'])} to {self.difference(figure['upper'])}"
        )


TEMPLATE = "compare.html.j2"
SHOWN = {
    "auc": Shown("AUC"),
    "brier": Shown("Brier", sign=-1),
    "p_auccc": Shown("P-AUCCC"),
    "p_auccc_exact": Shown("exact area"),
    "ece": Shown("ECE", sign=-1),
    "mdp_auccc": Shown("MDP-AUCCC"),
    "efficacy": Shown("efficacy", sign=-1),
    "routed_to_accuracy": Shown("routed-to accuracy", share=True),
    "accuracy_at_chosen_lambda": Shown("accuracy", share=True),
    "cost_saving_at_chosen_lambda": Shown("cost saving", share=True),
    "headroom_captured_at_chosen_lambda": Shown("headroom captured", share=True),
}


def write_comparison(folder: Path, comparison: Json) -> Path:
    """Writes FOLDER/comparison.json and FOLDER/comparison.html, each atomically; returns the page's path."""
    write_json(folder / "comparison.json", comparison)
    return write_page(folder / "comparison.html", TEMPLATE, **_values(comparison))


def render(comparison: Json) -> str:
    """The page as text."""
    return render_page(TEMPLATE, **_values(comparison))


def headline(comparison: Json) -> str:
    """The run with the highest AUC, its lead, and whether the interval of the lead includes zero."""
    return "; ".join(part for part in _headline(comparison) if part)


def as_text(comparison: Json) -> str:
    """Two aligned tables: the figures of every router, and the paired differences of every run from the reference.

    `*` marks a difference whose interval excludes zero.
    """
    routers, reference = _ordered(comparison), comparison["reference"]
    rows = [["", *(SHOWN[figure].label for figure in _shown(comparison))]]
    rows += [
        [name, *(SHOWN[figure].value(router[figure]) for figure in _shown(comparison))]
        for name, router in routers.items()
    ]
    compared = [name for name in _drawn(comparison) if name != reference]
    differences = [["", *compared]]
    for figure in _shown(comparison, differences=True):
        cells = [routers[name]["differences"][figure] for name in compared]
        differences.append([SHOWN[figure].label, *(_cell(SHOWN[figure], cell) for cell in cells)])
    return "\n".join(
        [
            *_aligned(rows),
            "",
            f"minus {reference}, paired; {_level(comparison)} intervals, * excludes zero; shares in percentage points",
            *_aligned(differences),
        ]
    )


@svg.styled
def differences_plot(comparison: Json, width: int) -> str:
    """Paired differences of every run from the reference with intervals, one axis per figure; better to the right."""
    names = [name for name in _drawn(comparison) if name != comparison["reference"]]
    figures = _shown(comparison, differences=True)
    columns = 2 if width > 600 else 1
    n_rows = -(-len(figures) // columns)
    fig = svg.new_figure((width, n_rows * (66 + 20 * len(names))))
    tips: dict[str, str] = {}
    for place, figure in enumerate(figures):
        shown = SHOWN[figure]
        # Column by column.
        ax = fig.add_subplot(n_rows, columns, place % n_rows * columns + place // n_rows + 1)
        reach = 0.0
        for row, name in enumerate(names):
            value = comparison["routers"][name]["differences"][figure]
            if value["estimate"] is None:
                ax.text(0, row, value["reason"], color=svg.MUTED, fontsize=svg.LABEL, ha="center", va="center")
                continue
            ends = [end for end in (value["lower"], value["upper"]) if end is not None]
            colour = svg.series(row + 1)
            ax.plot(ends, [row] * len(ends), color=colour, linewidth=2.2, zorder=3)
            said = (
                f"{name}: {shown.label} {shown.difference(value['estimate'])} {shown.difference_span(value)}".rstrip()
            )
            tips |= svg.draw_markers(
                ax,
                [(value["estimate"], float(row), said)],
                f"{place}-{row}",
                color=colour,
                s=46,
                edgecolor=svg.SURFACE,
                linewidth=1.2,
                zorder=4,
            )
            reach = max(reach, *map(abs, [value["estimate"], *ends]))
        reach = 1.12 * reach or 1.0
        ax.axvline(0, color=svg.INK, linewidth=1, zorder=2)
        ax.set(xlim=(-shown.sign * reach, shown.sign * reach), ylim=(len(names) - 0.35, -0.65), yticks=[])
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _, share=shown.share: _tick(100 * v if share else v)))
        ax.set_title(shown.label + (", points" if shown.share else ""), loc="left", fontsize=12.5, pad=4)
    return svg.to_svg(fig, f"differences-{width}", tips, "Paired differences from the reference, with intervals")


def _headline(comparison: Json) -> tuple[str, str]:
    """The headline in two parts: the lead in AUC, and the values and interval it is based on."""
    lead = comparison["lead"]
    if lead is None:
        return "No run leads: AUC is undefined for all runs but one", ""
    if lead["auc"]["estimate"] == 0:
        return f"{lead['run']} and {lead['over']} have equal AUC", ""
    said = f"{lead['run']} leads {lead['over']} in AUC by {lead['auc']['estimate']:.4f}"
    first, second = (
        comparison["routers"][comparison["runs"][lead[place]]["main"]]["auc"]["estimate"] for place in ("run", "over")
    )
    against = f"{number(first, 4)} against {number(second, 4)}"
    if lead["auc"]["lower"] is None:
        return said, f"{against}; without an interval, because there are no resamples"
    interval = f"the difference's {_level(comparison)} interval, {SHOWN['auc'].difference_span(lead['auc'])},"
    if includes_zero(lead["auc"]):
        return f"{said}, which is not established", f"{against}; {interval} includes zero"
    return said, f"{against}; {interval} leaves out zero"


def _values(comparison: Json) -> dict[str, Any]:
    """The values of the page's template."""
    routers, drawn, pool = _ordered(comparison), _drawn(comparison), comparison["pool"]
    curves = {"pool": pool, "routers": {name: routers[name] for name in drawn}}
    return {
        "headline": _headline(comparison),
        "runs": comparison["runs"],
        "reference": comparison["reference"],
        "routers": routers,
        "pool": pool,
        "level": _level(comparison),
        "shown": {name: SHOWN[name] for name in _shown(comparison)},
        "compared": {name: SHOWN[name] for name in _shown(comparison, differences=True)},
        "colours": {name: f"var(--s{index % svg.N_SERIES})" for index, name in enumerate(drawn)},
        "drawn": drawn,
        "by_cost": models_by_cost(pool),
        "differences": [Markup(differences_plot(comparison, width)) for width in (WIDE[0], NARROW[0])],
        "cost_curve": [Markup(cost_curve(curves, size)) for size in (WIDE, NARROW)],
    }


def _tick(value: float) -> str:
    return "0" if np.isclose(value, 0) else f"{value:+g}".replace("-", MINUS)


def _drawn(comparison: Json) -> list[str]:
    """The routers in the plots: the reference first, then each run's main router."""
    return list(dict.fromkeys([comparison["reference"], *(run["main"] for run in comparison["runs"].values())]))


def _ordered(comparison: Json) -> dict[str, Json]:
    """The routers, those in the plots first."""
    return {name: comparison["routers"][name] for name in dict.fromkeys([*_drawn(comparison), *comparison["routers"]])}


def _shown(comparison: Json, differences: bool = False) -> list[str]:
    """The figures of SHOWN that every router has, or that every difference has.

    Differences in MDP-AUCCC equal those in P-AUCCC and are left out.
    """
    parts = list(comparison["routers"].values())
    if differences:
        parts = [router["differences"] for router in parts if "differences" in router]
    return [name for name in SHOWN if all(name in part for part in parts) and not (differences and name == "mdp_auccc")]


def _level(comparison: Json) -> str:
    return percent(comparison["pool"]["bootstrap"]["level"], 0)


def _cell(shown: Shown, figure: Json) -> str:
    if figure["lower"] is None:
        return f"{shown.difference(figure['estimate'])} {span(figure)}".rstrip()
    estimate, lower, upper = (shown.difference(figure[end]) for end in ("estimate", "lower", "upper"))
    return f"{estimate:>7} {' ' if includes_zero(figure) else '*'} {lower:>7} to {upper:>7}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column left-aligned, the others right-aligned, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
