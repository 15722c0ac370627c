"""Plots of the geometry report: metrics by layer, metrics against AUC, differences in AUC with intervals.

In: parts of geometry.json. Out: SVG (`svg.to_svg`). Each (encoder, pooling) has one colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prefill_router.layers.peaks import LOWEST, METRICS
from prefill_router.reports.format import MINUS, Json
from prefill_router.reports.svg import (
    INK,
    MUTED,
    SURFACE,
    draw_markers,
    new_axes,
    placeholder,
    series,
    styled,
    to_svg,
)

SHOWN = {"auc": "probe AUC", "fisher_j": "Fisher J", "d_eff": "effective dimension", "anisotropy": "anisotropy"}
ROW, EDGE = 26.0, 64.0  # heights in pixels: one difference, and the axis below all of them
BY_TARGET = {"auc", "fisher_j"}


@styled
def by_layer(
    lines: Mapping[int, Sequence[Json]],
    metric: str,
    mlp: Mapping[int, Sequence[Json]],
    size: tuple[int, int],
    name: str,
) -> str:
    """A metric by layer: means over targets as thick lines, single targets as thin ones, a ring at the peak.

    `lines` holds the rows by colour index, `mlp` the MLP probes by colour index, drawn as diamonds in the AUC plot.
    """
    if all(row[metric] is None for rows in lines.values() for row in rows):
        return placeholder(size, f"{SHOWN[metric]} is undefined at every layer.")
    fig, ax = new_axes(size)
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
        tips |= draw_markers(
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
            tips |= draw_markers(
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
        _clip_lowest(
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
    return to_svg(fig, f"{metric}-{name}-{size[0]}", tips, f"{SHOWN[metric]} by layer")


@styled
def against_auc(lines: Mapping[int, Sequence[Json]], metric: str, size: tuple[int, int]) -> str:
    """Mean AUC (y) against the metric (x), one point per layer and pooling."""
    fig, ax = new_axes(size)
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
        tips |= draw_markers(ax, points, f"key-{colour}", s=30, color=series(colour), linewidth=0, alpha=0.85, zorder=3)
    if not tips:
        return placeholder(size, f"{SHOWN[metric]} is undefined at every layer.")
    ax.margins(0.08)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel(SHOWN[metric])
    ax.set_ylabel("mean AUC")
    return to_svg(fig, f"against-{metric}-{size[0]}", tips, f"Mean AUC against {SHOWN[metric]}")


@styled
def differences(rows: Sequence[tuple[str, Json, int]], width: int, name: str, label: str) -> str:
    """Rows of (name, difference in AUC, colour index): the estimate as a dot, its interval as a line, zero marked.

    Undefined differences are left out.
    """
    drawn = [(text, figure, colour) for text, figure, colour in rows if figure["estimate"] is not None]
    height = ROW * max(len(drawn), 1) + EDGE
    if not drawn:
        return placeholder((width, 60), "Every difference is undefined.")
    fig, ax = new_axes((width, height))
    ax.axvline(0, color=MUTED, linewidth=1, zorder=1)
    tips: dict[str, str] = {}
    for place, (text, figure, colour) in enumerate(drawn):
        at = len(drawn) - 1 - place
        if figure["lower"] is not None:
            ax.plot([figure["lower"], figure["upper"]], [at, at], color=series(colour), linewidth=2, zorder=3)
        tips |= draw_markers(
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
        FuncFormatter(lambda value, _: f"{value:+.4g}".replace("-", MINUS) if abs(value) > 1e-12 else "0")
    )
    ax.set_xlabel(label)
    return to_svg(fig, f"differences-{name}-{width}", tips, label)


def _clip_lowest(ax: Axes, values: Sequence[float]) -> None:
    """Cuts the axis below the lowest tenth of the values if they would compress the others."""
    if not values:
        return
    low, high = float(np.quantile(values, 0.1)), max(values)
    bottom = low - 0.6 * (high - low)
    if min(values) < bottom:
        ax.set_ylim(bottom, high + 0.1 * (high - low))


def panels() -> tuple[str, ...]:
    """The metrics in drawing order: AUC, then those that are compared with it."""
    return METRICS[::-1]
