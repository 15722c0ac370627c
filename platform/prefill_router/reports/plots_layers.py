"""The report's layer map: where in the encoder each target's correctness shows.

In: rows {encoder, pooling, layer, auc [per model], fisher_j [per model], chosen [positions of the models that read the
block]}; None is undefined. Out: SVG markup, as `plots` says: a panel per encoder and pooling, layers from the embedding
output (below) upwards, targets across, colour by the probe's AUC on one scale for all panels, J beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefill_router.reports.plots import GRID, INK, MUTED, N_LEVELS, SURFACE, _short, _styled, _svg, level, series

Rows = Sequence[Mapping[str, Any]]
LEFT, TOP, GAP, LETTER = 40.0, 24.0, 14.0, 6.4  # pixels
TALLEST, LOWEST, PANEL = 24.0, 8.5, 320.0  # of a cell, and of all of them
READABLE = (32, 17)  # a cell that its figure fits into


def panels(rows: Rows) -> dict[tuple[str, str], Rows]:
    """Rows by (encoder, pooling)."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["encoder"], row["pooling"]), []).append(row)
    return dict(found)


def scale(rows: Rows, figure: str = "auc") -> tuple[float, float] | None:
    """Where the colours, or J's axis, begin and end; None where every value is undefined.

    A tenth of the values may lie below the beginning: one layer that knows nothing would leave the others one colour.
    """
    known = [value for row in rows for value in row[figure] if value is not None]
    return (float(np.quantile(known, 0.1)), max(known)) if known else None


@_styled
def layer_map(rows: Rows, models: Sequence[str], every: Rows, width: int, name: str) -> str:
    """One panel, on the scales of `every` row. Positions are reckoned here: cells are lines of a width in pixels."""
    rows = sorted(rows, key=lambda row: row["layer"])
    auc, fisher = (np.array([row[key] for row in rows], dtype=float) for key in ("auc", "fisher_j"))
    n_layers, n_models = auc.shape
    concatenate_features = 84.0 if width > 400 else 58.0
    cell = (width - LEFT - GAP - concatenate_features - 6) / n_models, float(np.clip(PANEL / n_layers, LOWEST, TALLEST))
    longest = 22 if width > 400 else 18
    bottom = 10 + LETTER * max(len(_short(model, longest)) for model in models)
    height = TOP + cell[1] * n_layers + bottom
    fig = Figure(figsize=(width / 72, height / 72))

    def axes(left: float, wide: float) -> Axes:
        ax = fig.add_axes((left / width, bottom / height, wide / width, cell[1] * n_layers / height))
        ax.set(ylim=(-0.5, n_layers - 0.5))
        ax.grid(False)
        return ax

    ax = axes(LEFT, cell[0] * n_models)
    ax.set_xlim(0, n_models)
    _cells(ax, auc, scale(every), cell)
    _rings(ax, [(place, model) for place, row in enumerate(rows) for model in row["chosen"]], cell)
    size = float(np.clip(cell[0] - 2, 8, 11.5))
    ax.set_xticks(np.arange(n_models) + 0.5, [_short(model, longest) for model in models], rotation=90, fontsize=size)
    apart = max(1, round(13 / cell[1]))
    labelled = [place for place in range(n_layers) if (n_layers - 1 - place) % apart == 0]
    ax.set_yticks(labelled, [str(rows[place]["layer"]) for place in labelled], fontsize=min(11.5, cell[1] * apart))
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_title("layer", loc="left", fontsize=11.5, color=MUTED, pad=7, x=-LEFT / (cell[0] * n_models))
    _beside(axes(LEFT + cell[0] * n_models + GAP, concatenate_features), fisher, scale(every, "fisher_j"))
    return _svg(fig, f"layers-{name}-{width}", {}, f"Probe AUC by layer and target, {name}")


def _cells(
    ax: Axes, auc: Float[np.ndarray, "layers models"], of: tuple[float, float] | None, cell: tuple[float, float]
) -> None:
    """A path per step of the scale, made of lines as wide as a row is high: an element per cell makes a large file."""
    low, high = of or (0.0, 0.0)
    steps = (
        np.floor((auc - low) / (high - low) * N_LEVELS).clip(0, N_LEVELS - 1)
        if high > low
        else np.where(np.isnan(auc), np.nan, N_LEVELS // 2)
    )
    for step in range(N_LEVELS):
        _path(
            ax,
            (([start, end], [place, place]) for place, row in enumerate(steps == step) for start, end in _runs(row)),
            color=level(step),
            linewidth=cell[1],
            solid_capstyle="butt",
            zorder=1,
        )
    _path(
        ax,
        (([model + 0.4, model + 0.6], [place, place]) for place, model in np.argwhere(np.isnan(auc))),
        color=MUTED,
        linewidth=1,
        zorder=1,
    )
    gap = min(1.2, cell[1] / 12)
    _path(
        ax,
        (([model, model], [-0.5, len(auc) - 0.5]) for model in range(1, auc.shape[1])),
        color=SURFACE,
        linewidth=gap,
        zorder=2,
    )
    _path(
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


def _rings(ax: Axes, layer_keys: Sequence[tuple[int, int]], cell: tuple[float, float]) -> None:
    """A frame around each (row, model), inside its cell, with the page's colour around it."""
    for width, colour in ((3.6, SURFACE), (1.7, INK)):
        inset = 1.8 / cell[0], min(1.8, cell[1] / 6) / cell[1]
        _path(
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


def _beside(ax: Axes, fisher: Float[np.ndarray, "layers models"], of: tuple[float, float] | None) -> None:
    """J by layer: the mean over targets as a line, from the lowest to the highest as a band."""
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


def _path(ax: Axes, lines: Iterable[tuple[Sequence[float], Sequence[float]]], **style: Any) -> None:
    """Lines that have nothing to do with each other, as one element."""
    x: list[float] = []
    y: list[float] = []
    for line_x, line_y in lines:
        x += [*line_x, np.nan]
        y += [*line_y, np.nan]
    if x:
        ax.plot(x, y, clip_on=False, **style)


def _runs(inside: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
