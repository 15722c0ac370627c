"""A comparison for people: the headline, the tables as text, and comparison.html, which loads nothing.

In: what `compare` returns. Out: text, or one HTML page in the report's look; light, dark, phone and print. Figures
are shown where the comparison has them; all of them stand in comparison.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prefill_router.files import write_atomically, write_json
from prefill_router.reports import plots
from prefill_router.reports.evaluation import DASH, MINUS, NARROW, number, percent, points, span

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """How a figure is shown: shares as per cent, their differences as points. `sign` is -1 where lower is better."""

    label: str
    share: bool = False
    sign: int = 1

    def value(self, figure: Json) -> str:
        return percent(figure["estimate"]) if self.share else number(figure["estimate"], 4)

    def around(self, figure: Json) -> str:
        """The value's own interval."""
        return span(figure, "percent" if self.share else "number")

    def difference(self, value: float | None) -> str:
        if value is None:
            return DASH
        return points(value) if self.share else f"{value:+.4f}".replace("-", MINUS)

    def interval(self, figure: Json) -> str:
        """`+0.001 to +0.020`; the reason where the figure is undefined; '' without resamples."""
        return (
            span(figure)
            if figure["lower"] is None
            else f"{self.difference(figure['lower'])} to {self.difference(figure['upper'])}"
        )


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
    path, page = folder / "comparison.html", render(comparison)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def headline(comparison: Json) -> str:
    """Which run leads in AUC, by how much, and whether the interval of the difference includes zero."""
    return "; ".join(part for part in _headline(comparison) if part)


def includes_zero(figure: Json) -> bool:
    """Whether the interval includes zero; so does one that is not there."""
    return figure["lower"] is None or figure["lower"] <= 0 <= figure["upper"]


def as_text(comparison: Json) -> str:
    """Two aligned tables: every router's figures, and the runs' paired differences from the reference.

    `*` stands beside a difference whose interval leaves out zero.
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
            f"minus {reference}, paired; {_level(comparison)} intervals, * leaves out zero; shares in points",
            *_aligned(differences),
        ]
    )


def render(comparison: Json) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("prefill_router.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    routers, drawn = _ordered(comparison), _drawn(comparison)
    curves = {"pool": comparison["pool"], "routers": {name: routers[name] for name in drawn}}
    return environment.get_template("compare.html.j2").render(
        headline=_headline(comparison),
        runs=comparison["runs"],
        reference=comparison["reference"],
        routers=routers,
        pool=comparison["pool"],
        level=_level(comparison),
        shown={name: SHOWN[name] for name in _shown(comparison)},
        compared={name: SHOWN[name] for name in _shown(comparison, differences=True)},
        includes_zero=includes_zero,
        colours={name: f"var(--s{index % plots.N_SERIES})" for index, name in enumerate(drawn)},
        drawn=drawn,
        differences=[Markup(differences_plot(comparison, width)) for width in (1060, NARROW[0])],
        cost_curve=[Markup(plots.cost_curve(curves, size)) for size in ((1060, 460), NARROW)],
    )


@plots._styled
def differences_plot(comparison: Json, width: int) -> str:
    """A strip per figure: each run's paired difference from the reference with its interval, better to the right."""
    names = [name for name in _drawn(comparison) if name != comparison["reference"]]
    figures = _shown(comparison, differences=True)
    columns = 2 if width > 600 else 1
    n_rows = -(-len(figures) // columns)
    fig = Figure(figsize=(width / 72, n_rows * (66 + 20 * len(names)) / 72), layout="constrained")
    tips: dict[str, str] = {}
    for place, figure in enumerate(figures):
        shown = SHOWN[figure]
        # Down the first column, then the next.
        ax = fig.add_subplot(n_rows, columns, place % n_rows * columns + place // n_rows + 1)
        reach = 0.0
        for row, name in enumerate(names):
            value = comparison["routers"][name]["differences"][figure]
            if value["estimate"] is None:
                ax.text(0, row, value["reason"], color=plots.MUTED, fontsize=plots.LABEL, ha="center", va="center")
                continue
            ends = [end for end in (value["lower"], value["upper"]) if end is not None]
            colour = plots.series(row + 1)
            ax.plot(ends, [row] * len(ends), color=colour, linewidth=2.2, zorder=3)
            said = f"{name}: {shown.label} {shown.difference(value['estimate'])} {shown.interval(value)}".rstrip()
            tips |= plots._tips(
                ax,
                [(value["estimate"], float(row), said)],
                f"{place}-{row}",
                color=colour,
                s=46,
                edgecolor=plots.SURFACE,
                linewidth=1.2,
                zorder=4,
            )
            reach = max(reach, *map(abs, [value["estimate"], *ends]))
        reach = 1.12 * reach or 1.0
        ax.axvline(0, color=plots.INK, linewidth=1, zorder=2)
        ax.set(xlim=(-shown.sign * reach, shown.sign * reach), ylim=(len(names) - 0.35, -0.65), yticks=[])
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _, share=shown.share: _tick(100 * v if share else v)))
        ax.set_title(shown.label + (", points" if shown.share else ""), loc="left", fontsize=12.5, pad=4)
    return plots._svg(fig, f"differences-{width}", tips, "Paired differences from the reference, with intervals")


def _headline(comparison: Json) -> tuple[str, str]:
    """The headline in two parts: who leads by how much, and what that rests on."""
    lead = comparison["lead"]
    if lead is None:
        return "AUC is undefined for all runs but one, so none leads", ""
    if lead["auc"]["estimate"] == 0:
        return f"{lead['run']} and {lead['over']} are level in AUC", ""
    said = f"{lead['run']} leads {lead['over']} in AUC by {lead['auc']['estimate']:.4f}"
    first, second = (
        comparison["routers"][comparison["runs"][lead[place]]["main"]]["auc"]["estimate"] for place in ("run", "over")
    )
    against = f"{number(first, 4)} against {number(second, 4)}"
    if lead["auc"]["lower"] is None:
        return said, f"{against}, without resamples and so without an interval"
    interval = f"the difference's {_level(comparison)} interval, {SHOWN['auc'].interval(lead['auc'])},"
    if includes_zero(lead["auc"]):
        return f"{said}, which is not established", f"{against}; {interval} includes zero"
    return said, f"{against}; {interval} leaves out zero"


def _tick(value: float) -> str:
    return "0" if np.isclose(value, 0) else f"{value:+g}".replace("-", MINUS)


def _drawn(comparison: Json) -> list[str]:
    """The routers in the plots: the reference first, then each run's main router."""
    return list(dict.fromkeys([comparison["reference"], *(run["main"] for run in comparison["runs"].values())]))


def _ordered(comparison: Json) -> dict[str, Json]:
    """The routers, those in the plots first."""
    return {name: comparison["routers"][name] for name in dict.fromkeys([*_drawn(comparison), *comparison["routers"]])}


def _shown(comparison: Json, differences: bool = False) -> list[str]:
    """The figures of SHOWN that every router has, or every difference: there MDP-AUCCC is P-AUCCC over again."""
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
    """Rows as lines: columns two spaces apart, names to the left and figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
