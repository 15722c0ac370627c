"""The layer map: probe AUC by layer and target model, and Fisher's J by layer.

In: rows {encoder, pooling, layer, auc [per model], fisher_j [per model], chosen [positions of the models whose router
input is this layer]}; None is undefined. Out: SVG (`svg.to_svg`), one panel per encoder and pooling. A panel has layers
from the embedding output (bottom) upwards, target models from left to right, AUC as colour on one scale for all panels,
and J on its right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefill_router.reports.format import Json
from prefill_router.reports.svg import (
    GRID,
    INK,
    MUTED,
    N_LEVELS,
    SURFACE,
    level,
    series,
    shortened,
    styled,
    to_svg,
)

Rows = Sequence[Json]
LEFT, TOP, GAP, LETTER = 40.0, 24.0, 14.0, 6.4  # pixels; LETTER is the width of a character
TALLEST, LOWEST, PANEL = 24.0, 8.5, 320.0  # heights in pixels: largest and smallest cell, all cells together
READABLE = (32, 17)  # width and height in pixels from which on a cell shows its AUC


def panels(rows: Rows) -> dict[tuple[str, str], Rows]:
    """Rows by (encoder, pooling)."""
    found: dict[tuple[str, str], list[Json]] = {}
    for row in rows:
        found.setdefault((row["encoder"], row["pooling"]), []).append(row)
    return dict(found)


def scale(rows: Rows, figure: str = "auc") -> tuple[float, float] | None:
    """Lower and upper end of the colour scale (`auc`) or of J's axis (`fisher_j`); None if every value is undefined.

    The lower end is the 0.1 quantile: a single uninformative layer would otherwise compress the scale of all others.
    """
    known = [value for row in rows for value in row[figure] if value is not None]
    return (float(np.quantile(known, 0.1)), max(known)) if known else None


@styled
def layer_map(rows: Rows, models: Sequence[str], every: Rows, width: int, name: str) -> str:
    """One panel of `width` pixels. `every` holds the rows of all panels, which share their scales.

    The layout is computed in pixels, because a row of cells is a line whose width is the height of a cell.
    """
    rows = sorted(rows, key=lambda row: row["layer"])
    auc, fisher = (np.array([row[key] for row in rows], dtype=float) for key in ("auc", "fisher_j"))
    n_layers, n_models = auc.shape
    side = 84.0 if width > 400 else 58.0
    cell = (width - LEFT - GAP - side - 6) / n_models, float(np.clip(PANEL / n_layers, LOWEST, TALLEST))
    longest = 22 if width > 400 else 18
    bottom = 10 + LETTER * max(len(shortened(model, longest)) for model in models)
    height = TOP + cell[1] * n_layers + bottom
    fig = Figure(figsize=(width / 72, height / 72))

    def axes(left: float, wide: float) -> Axes:
        ax = fig.add_axes((left / width, bottom / height, wide / width, cell[1] * n_layers / height))
        ax.set(ylim=(-0.5, n_layers - 0.5))
        ax.grid(False)
        return ax

    ax = axes(LEFT, cell[0] * n_models)
    ax.set_xlim(0, n_models)
    _draw_cells(ax, auc, scale(every), cell)
    _draw_frames(ax, [(place, model) for place, row in enumerate(rows) for model in row["chosen"]], cell)
    size = float(np.clip(cell[0] - 2, 8, 11.5))
    ax.set_xticks(
        np.arange(n_models) + 0.5, [shortened(model, longest) for model in models], rotation=90, fontsize=size
    )
    apart = max(1, round(13 / cell[1]))
    labelled = [place for place in range(n_layers) if (n_layers - 1 - place) % apart == 0]
    ax.set_yticks(labelled, [str(rows[place]["layer"]) for place in labelled], fontsize=min(11.5, cell[1] * apart))
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_title("layer", loc="left", fontsize=11.5, color=MUTED, pad=7, x=-LEFT / (cell[0] * n_models))
    _draw_fisher(axes(LEFT + cell[0] * n_models + GAP, side), fisher, scale(every, "fisher_j"))
    return to_svg(fig, f"layers-{name}-{width}", {}, f"Probe AUC by layer and target, {name}")


def _draw_cells(
    ax: Axes, auc: Float[np.ndarray, "layers models"], of: tuple[float, float] | None, cell: tuple[float, float]
) -> None:
    """One path per step of the scale, since one element per cell would make a large file. A dash marks undefined."""
    low, high = of or (0.0, 0.0)
    steps = (
        np.floor((auc - low) / (high - low) * N_LEVELS).clip(0, N_LEVELS - 1)
        if high > low
        else np.where(np.isnan(auc), np.nan, N_LEVELS // 2)
    )
    for step in range(N_LEVELS):
        _draw_lines(
            ax,
            (([start, end], [place, place]) for place, row in enumerate(steps == step) for start, end in _runs(row)),
            color=level(step),
            linewidth=cell[1],
            solid_capstyle="butt",
            zorder=1,
        )
    _draw_lines(
        ax,
        (([model + 0.4, model + 0.6], [place, place]) for place, model in np.argwhere(np.isnan(auc))),
        color=MUTED,
        linewidth=1,
        zorder=1,
    )
    gap = min(1.2, cell[1] / 12)
    _draw_lines(
        ax,
        (([model, model], [-0.5, len(auc) - 0.5]) for model in range(1, auc.shape[1])),
        color=SURFACE,
        linewidth=gap,
        zorder=2,
    )
    _draw_lines(
        ax,
        (([0, auc.shape[1]], [place - 0.5] * 2) for place in range(1, len(auc))),
        color=SURFACE,
        linewidth=gap,
        zorder=2,
    )
    if cell[0] >= READABLE[0] and cell[1] >= READABLE[1]:
        for place, model in np.argwhere(~np.isnan(auc)):
            ax.text(
                model + 0.5,
                place - 0.02,
                f"{auc[place, model]:.3f}".removeprefix("0"),
                ha="center",
                va="center",
                fontsize=10.5,
                color=SURFACE if steps[place, model] > N_LEVELS // 2 else INK,
                zorder=3,
            )


def _draw_frames(ax: Axes, layer_keys: Sequence[tuple[int, int]], cell: tuple[float, float]) -> None:
    """A frame inside the cell of each (row, model), with an outline in the background colour."""
    for width, colour in ((3.6, SURFACE), (1.7, INK)):
        inset = 1.8 / cell[0], min(1.8, cell[1] / 6) / cell[1]
        _draw_lines(
            ax,
            (
                (
                    [model + inset[0], model + 1 - inset[0], model + 1 - inset[0], model + inset[0], model + inset[0]],
                    [place - 0.5 + inset[1]] * 2 + [place + 0.5 - inset[1]] * 2 + [place - 0.5 + inset[1]],
                )
                for place, model in layer_keys
            ),
            color=colour,
            linewidth=width,
            solid_joinstyle="miter",
            zorder=4,
        )


def _draw_fisher(ax: Axes, fisher: Float[np.ndarray, "layers models"], of: tuple[float, float] | None) -> None:
    """J by layer: the mean over targets as a line, their range as a band."""
    known = ~np.isnan(fisher).all(axis=1)
    place = np.flatnonzero(known)
    ax.set_title("Fisher J", loc="left", fontsize=11.5, color=MUTED, pad=7)
    ax.set_yticks([])
    ax.tick_params(length=0)
    if of is None:
        ax.set_xticks([])
        return
    j = fisher[known]
    ax.fill_betweenx(place, np.nanmin(j, axis=1), np.nanmax(j, axis=1), color=GRID, linewidth=0, zorder=1)
    ax.plot(np.nanmean(j, axis=1), place, color=series(0), linewidth=1.8, marker="o", markersize=3.2, zorder=3)
    top = of[1] or 1.0
    ax.set_xlim(0, 1.08 * top)
    ax.set_xticks([0, top], ["0", f"{top:.2g}"])


def _draw_lines(ax: Axes, lines: Iterable[tuple[Sequence[float], Sequence[float]]], **style: Any) -> None:
    """Unconnected lines as one SVG element."""
    x: list[float] = []
    y: list[float] = []
    for line_x, line_y in lines:
        x += [*line_x, np.nan]
        y += [*line_y, np.nan]
    if x:
        ax.plot(x, y, clip_on=False, **style)


def _runs(inside: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of each run of True; `end` is exclusive."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
