"""Plots of the page on labels: rates by model as bars, and values by model and benchmark, or by two models, as cells.

In: `Share`s and `Matrix` of `outcomes.quality.findings`. Out: SVG (`svg.to_svg`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prefill_router.outcomes.quality.findings import Matrix, Share
from prefill_router.reports.format import percent
from prefill_router.reports.svg import INK, LABEL, MUTED, N_LEVELS, SURFACE, level, series, shortened, styled, to_svg

ROW, AXIS, LETTER, GAP = 21.0, 30.0, 6.6, 0.7  # pixels; LETTER is the width of a character, GAP half of that of cells
CELL = 24.0  # height of a cell in pixels, and the smallest width of a cell that shows its value
WIDEST = 54.0  # a cell in pixels


@styled
def rate_bars(shares: Mapping[str, Share], width: int, name: str) -> str:
    """A bar per entry with its 95 % interval, in the given order. `width` in pixels; `name` is unique on the page."""
    longest = 30 if width > 400 else 18
    left = 12 + LETTER * max(len(shortened(entry, longest)) for entry in shares)
    height = AXIS + ROW * len(shares)
    fig = Figure(figsize=(width / 72, height / 72))
    ax = fig.add_axes((left / width, AXIS / height, (width - left - 54) / width, 1 - AXIS / height))
    highest = max(share.upper or 0.0 for share in shares.values()) or 1.0
    places = np.arange(len(shares))[::-1]
    for place, share in zip(places, shares.values(), strict=True):
        estimate = share.estimate or 0.0
        ax.barh(place, estimate, height=0.62, color=series(0), alpha=0.8, linewidth=0)
        ax.plot([share.lower or 0.0, share.upper or 0.0], [place, place], color=INK, linewidth=1, alpha=0.6)
        ax.text(
            (share.upper or 0.0) + 0.015 * highest,
            place,
            percent(estimate, 1 if highest >= 0.01 else 2),
            va="center",
            fontsize=10.5,
            color=MUTED,
        )
    ax.set_yticks(places, [shortened(entry, longest) for entry in shares], fontsize=LABEL)
    ax.set(ylim=(-0.6, len(shares) - 0.4), xlim=(0, highest))
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.xaxis.set_major_locator(MaxNLocator(4 if width > 400 else 3))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    return to_svg(fig, f"bars-{name}-{width}", {}, f"Rates by model: {name}")


@styled
def cells(matrix: Matrix, width: int, name: str) -> str:
    """A cell per value, with the colour of its place between the lowest and the highest value; NaN is empty.

    The values, which are at most 1, are printed as hundredths if the cells are wide enough.
    """
    n_rows, n_columns = matrix.values.shape
    left = 12 + LETTER * max(len(shortened(row, 26)) for row in matrix.rows)
    bottom = 10 + LETTER * max(len(shortened(column, 26)) for column in matrix.columns)
    cell = min(WIDEST, (width - left - 4) / n_columns)
    height = CELL * n_rows + bottom + 4
    fig = Figure(figsize=(width / 72, height / 72))
    ax = fig.add_axes((left / width, bottom / height, cell * n_columns / width, CELL * n_rows / height))
    ax.set(xlim=(0, n_columns), ylim=(n_rows, 0))
    ax.grid(False)
    steps = _steps(matrix.values)
    for step in range(N_LEVELS):
        _draw(ax, np.argwhere(steps == step), (GAP / cell, GAP / CELL), level(step))
    if cell >= CELL:
        for row, column in np.argwhere(np.isfinite(matrix.values)):
            dark = steps[row, column] > N_LEVELS // 2
            ax.text(
                column + 0.5,
                row + 0.53,
                f"{100 * matrix.values[row, column]:.0f}".replace("-", "\N{MINUS SIGN}"),
                ha="center",
                va="center",
                fontsize=10,
                color=SURFACE if dark else INK,
            )
    ax.set_yticks(np.arange(n_rows) + 0.5, [shortened(row, 26) for row in matrix.rows], fontsize=LABEL)
    ax.set_xticks(
        np.arange(n_columns) + 0.5,
        [shortened(column, 26) for column in matrix.columns],
        rotation=90,
        fontsize=float(np.clip(cell - 2, 7, LABEL)),
    )
    ax.tick_params(length=0, labelcolor=INK)
    ax.spines[["left", "bottom"]].set_visible(False)
    return to_svg(fig, f"cells-{name}-{width}", {}, f"Values by row and column: {name}")


def _steps(values: np.ndarray) -> np.ndarray:
    """The step of the colour scale of each value; NaN for NaN."""
    low, high = np.nanmin(values), np.nanmax(values)
    if high <= low:
        return np.where(np.isnan(values), np.nan, N_LEVELS // 2)
    return np.asarray(np.floor((values - low) / (high - low) * N_LEVELS).clip(0, N_LEVELS - 1))


def _draw(ax: Axes, places: np.ndarray, gap: tuple[float, float], colour: str) -> None:
    """All cells of one colour as one path: an element per cell would make a large file."""
    outlines = []
    for row, column in places.tolist():
        x, y = (column + gap[0], column + 1 - gap[0]), (row + gap[1], row + 1 - gap[1])
        corners = [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1]), (x[0], y[0])]
        outlines.append(Outline(corners, closed=True))
    if outlines:
        ax.add_patch(PathPatch(Outline.make_compound_path(*outlines), facecolor=colour, linewidth=0))
