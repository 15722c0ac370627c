"""Figures of the geometry report as inline SVG, in the manner of plots.py: metrics by layer, against AUC, differences.

In: parts of geometry.json. Out: SVG markup. A line or point has the colour of its (encoder, pooling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prefill_router.layers.peaks import LOWEST, METRICS
from prefill_router.reports.plots import INK, MUTED, SURFACE, _axes, _nothing, _styled, _svg, _tips, series

Json = Mapping[str, Any]
SHOWN = {"auc": "probe AUC", "fisher_j": "Fisher J", "d_eff": "effective dimension", "anisotropy": "anisotropy"}
ROW, EDGE = 26.0, 64.0  # pixels: of a line of differences, and of the axis below them
BY_TARGET = {"auc", "fisher_j"}


@_styled
def by_layer(
    lines: Mapping[int, Sequence[Json]],
    metric: str,
    mlp: Mapping[int, Sequence[Json]],
    size: tuple[int, int],
    name: str,
) -> str:
    """A metric by layer, one line for each colour's rows: means over targets, targets thin; the peak has a ring.

    `mlp` holds the same colours' MLP probes, drawn as diamonds over the AUC.
    """
    if all(row[metric] is None for rows in lines.values() for row in rows):
        return _nothing(size, f"No {SHOWN[metric]}: it is undefined at every layer.")
    fig, ax = _axes(size)
    tips: dict[str, str] = {}
    for colour, rows in lines.items():
        layers = [row["layer"] for row in rows]
        y = np.array([row[metric] for row in rows], dtype=float)
        if metric in BY_TARGET:
            ax.plot(
                layers,
                np.array([row[f"{metric}_by_target"] for row in rows], dtype=float),
                color=series(colour),
                linewidth=0.7,
                alpha=0.3,
                zorder=2,
            )
        ax.plot(layers, y, color=series(colour), linewidth=2, zorder=3)
        tips |= _tips(
            ax,
            [
                (float(layer), float(value), f"layer {layer}, {rows[0]['pooling']}: {value:.4g}")
                for layer, value in zip(layers, y, strict=True)
                if not np.isnan(value)
            ],
            f"layer-{colour}",
            s=15,
            color=series(colour),
            linewidth=0,
            zorder=4,
        )
        if not np.isnan(y).all():
            place = int(np.nanargmin(y) if metric in LOWEST else np.nanargmax(y))
            ax.scatter(
                [layers[place]], [y[place]], s=90, facecolor="none", edgecolor=series(colour), linewidth=1.6, zorder=5
            )
        if metric == "auc":
            known = [row for row in mlp.get(colour, ()) if row["mlp"]["estimate"] is not None]
            tips |= _tips(
                ax,
                [
                    (float(row["layer"]), row["mlp"]["estimate"], f"MLP, {row['column']}: {row['mlp']['estimate']:.4g}")
                    for row in known
                ],
                f"mlp-{colour}",
                marker="D",
                s=26,
                facecolor=SURFACE,
                edgecolor=series(colour),
                linewidth=1.3,
                zorder=6,
            )
    if metric in BY_TARGET:
        _leave_out_the_lowest(
            ax,
            [
                value
                for rows in lines.values()
                for row in rows
                for value in row[f"{metric}_by_target"]
                if value is not None
            ],
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("layer")
    return _svg(fig, f"{metric}-{name}-{size[0]}", tips, f"{SHOWN[metric]} by layer")


@_styled
def against_auc(lines: Mapping[int, Sequence[Json]], metric: str, size: tuple[int, int]) -> str:
    """Every block: the metric across, mean AUC upwards."""
    fig, ax = _axes(size)
    tips: dict[str, str] = {}
    for colour, rows in lines.items():
        points = [
            (
                row[metric],
                row["auc"],
                f"layer {row['layer']}, {row['pooling']}: {row[metric]:.4g}, AUC {row['auc']:.4f}",
            )
            for row in rows
            if row[metric] is not None and row["auc"] is not None
        ]
        tips |= _tips(ax, points, f"block-{colour}", s=30, color=series(colour), linewidth=0, alpha=0.85, zorder=3)
    if not tips:
        return _nothing(size, f"No {SHOWN[metric]} is defined.")
    ax.margins(0.08)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel(SHOWN[metric])
    ax.set_ylabel("mean AUC")
    return _svg(fig, f"against-{metric}-{size[0]}", tips, f"Mean AUC against {SHOWN[metric]}")


@_styled
def differences(rows: Sequence[tuple[str, Json, int]], width: int, name: str, label: str) -> str:
    """(text, difference in AUC, colour) one above the other: a dot and its interval around an upright zero."""
    drawn = [(text, figure, colour) for text, figure, colour in rows if figure["estimate"] is not None]
    height = ROW * max(len(drawn), 1) + EDGE
    if not drawn:
        return _nothing((width, 60), "No difference is defined.")
    fig = Figure(figsize=(width / 72, height / 72), layout="constrained")
    ax: Axes = fig.add_subplot()
    ax.axvline(0, color=MUTED, linewidth=1, zorder=1)
    tips: dict[str, str] = {}
    for place, (text, figure, colour) in enumerate(drawn):
        at = len(drawn) - 1 - place
        if figure["lower"] is not None:
            ax.plot([figure["lower"], figure["upper"]], [at, at], color=series(colour), linewidth=2, zorder=3)
        tips |= _tips(
            ax,
            [(figure["estimate"], float(at), f"{text}: {figure['estimate']:+.4f}")],
            f"difference-{place}",
            s=36,
            color=series(colour),
            edgecolor=SURFACE,
            linewidth=1,
            zorder=4,
        )
    ax.set_yticks(range(len(drawn)), [text for text, *_ in drawn][::-1])
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.set_ylim(-0.6, len(drawn) - 0.4)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(4 if width < 400 else 7))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+.4g}".replace("-", "\N{MINUS SIGN}") if abs(value) > 1e-12 else "0")
    )
    ax.set_xlabel(label)
    return _svg(fig, f"differences-{name}-{width}", tips, label)


def _leave_out_the_lowest(ax: Axes, values: Sequence[float]) -> None:
    """Lets less than a tenth of the values run off the axis below, where they would leave the others no room."""
    if not values:
        return
    low, high = float(np.quantile(values, 0.1)), max(values)
    bottom = low - 0.6 * (high - low)
    if min(values) < bottom:
        ax.set_ylim(bottom, high + 0.1 * (high - low))


def panels() -> tuple[str, ...]:
    """The metrics in the order in which they are drawn: what is wanted first, what is to explain it after."""
    return METRICS[::-1]
