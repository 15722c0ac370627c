"""Plots of a hyperparameter sweep: parallel coordinates, parameter importance, best value so far.

In: trials and the objective. Out: SVG (`svg.to_svg`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator

from prefill_router.reports.format import DASH
from prefill_router.reports.svg import (
    INK,
    LABEL,
    MUTED,
    SURFACE,
    draw_markers,
    new_axes,
    placeholder,
    series,
    styled,
    to_svg,
)
from prefill_router.sweeps.objective import LOWER_IS_BETTER, SHOWN, Objective, is_better
from prefill_router.sweeps.trials import Parameter, Trial, varied

MANY = 6  # an axis with more distinct numbers than this has evenly spaced ticks; otherwise one tick per number
LOG_SPAN = 20  # an axis of positive numbers is logarithmic if the largest is more than this many times the smallest
CHARACTER = 6.6  # width of a tick label's character in pixels


@styled
def parallel_coordinates(trials: Sequence[Trial], objective: Objective, best: Trial, size: tuple[int, int]) -> str:
    """One line per trial that ended: its parameters and, on the last axis, the objective.

    The better the trial, the more opaque its line; `best` has the second colour.
    """
    ended = [trial for trial in trials if trial.ended and trial.value(objective) is not None and trial.parameters]
    columns: dict[str, Sequence[Parameter]] = {**varied(ended)}
    if len(ended) < 2 or not columns:
        return placeholder(size, "No plot: it needs at least two trials that ended and differ in a parameter.")
    values = np.array([trial.value(objective) for trial in ended], dtype=np.float64)
    columns[objective] = list(values)
    fig, ax = new_axes(size)
    heights, ticks = zip(*(_scale(column) for column in columns.values()), strict=True)
    lines = np.stack(heights, axis=1)
    rank = np.argsort(np.argsort(-values if objective in LOWER_IS_BETTER else values)) / max(len(values) - 1, 1)
    at = np.arange(len(columns))
    order = np.argsort(rank)
    ax.add_collection(
        LineCollection(
            [np.column_stack([at, lines[row]]) for row in order],
            linewidths=1.1,
            colors=series(0),
            alpha=0.08 + 0.6 * rank[order] ** 2,
        )
    )
    if best in ended:
        ax.plot(at, lines[ended.index(best)], color=series(1), linewidth=2.4, zorder=4)
    room = int(size[0] / len(columns) / CHARACTER)
    for place, marks in enumerate(ticks):
        ax.axvline(place, color=MUTED, linewidth=0.8, zorder=1)
        for height, text in marks:
            ax.annotate(
                _cut(text, room),
                (place, height),
                xytext=(5 if place < len(ticks) - 1 else 9, 0),
                va="center",
                ha="left",
                textcoords="offset points",
                fontsize=10.5,
                color=INK,
                gid=f"halo-{place}-{text}",
                zorder=5,
            )
    ax.set_xticks(at, [SHOWN.get(name, name).replace("_", "\n") for name in columns])
    ax.set(xlim=(-0.05, len(columns) - 0.5), ylim=(-0.04, 1.04), yticks=[])
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    tips = draw_markers(
        ax,
        [
            (float(at[-1]), float(lines[row, -1]), f"trial {trial.number}: {objective} {values[row]:.4f}")
            for row, trial in enumerate(ended)
        ],
        "trial",
        s=16,
        color=series(0),
        edgecolor=SURFACE,
        linewidth=0.6,
        zorder=6,
    )
    return to_svg(fig, f"parallel-{size[0]}", tips, "Parameters and objective of every trial")


@styled
def importance_bars(shares: dict[str, float], size: tuple[int, int]) -> str:
    """Importance of each parameter as a share of the total, the largest at the top."""
    if not shares:
        return placeholder(size, "No importance: it needs eight trials that ended and a parameter with an effect.")
    names = list(shares)[::-1]
    fig, ax = new_axes((size[0], 40 + 26 * len(names)))
    ax.barh(names, [shares[name] for name in names], color=series(0), height=0.62)
    for place, name in enumerate(names):
        ax.annotate(
            f"{shares[name]:.0%}",
            (shares[name], place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=LABEL,
        )
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    ax.set(xlim=(0, max(shares.values()) * 1.15), xticks=[])
    ax.grid(False)
    ax.spines[["bottom", "left"]].set_visible(False)
    ax.tick_params(length=0)
    return to_svg(fig, f"importance-{size[0]}", {}, "Importance of each parameter")


@styled
def best_so_far(trials: Sequence[Trial], objective: Objective, size: tuple[int, int]) -> str:
    """The objective of every trial by number (hollow: stopped early), and the best finished trial so far as a line."""
    ended = [trial for trial in trials if trial.ended and trial.value(objective) is not None]
    fig, ax = new_axes(size)
    points: list[tuple[Trial, float]] = []
    steps: list[tuple[int, float]] = []
    for trial in ended:
        value: Any = trial.value(objective)
        points.append((trial, value))
        if trial.state == "finished" and (not steps or is_better(objective, value, steps[-1][1])):
            steps.append((trial.number, value))
    if not steps:
        return placeholder(size, "No curve: no trial has finished.")
    x, y = zip(*steps, (max(trial.number for trial in trials), steps[-1][1]), strict=True)
    ax.step(x, y, where="post", color=series(1), linewidth=2)
    tips: dict[str, str] = {}
    for state, face in (("finished", series(0)), ("stopped", SURFACE)):
        tips |= draw_markers(
            ax,
            [
                (
                    float(trial.number),
                    value,
                    f"trial {trial.number}, {state} after {len(trial.epochs)} epochs: {objective} {value:.4f}",
                )
                for trial, value in points
                if trial.state == state
            ],
            state,
            s=26,
            facecolor=face,
            edgecolor=series(0),
            linewidth=1.1,
            zorder=4,
        )
    # Trials that stopped very early have outlying values: the axis shows the better three quarters.
    low, high = np.quantile([value for _, value in points], [0, 0.75] if objective in LOWER_IS_BETTER else [0.25, 1])
    room = 0.08 * (high - low) or 0.01
    ax.set_ylim(low - room, high + room)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("trial")
    ax.set_ylabel(f"held-out {SHOWN[objective]}")
    return to_svg(fig, f"best-{size[0]}", tips, "Objective by trial and best so far")


def _cut(text: str, room: int) -> str:
    """The text without an organisation prefix (`org/`), cut to `room` characters."""
    text = text.rsplit("/", 1)[-1]
    return text if len(text) <= room else f"{text[: room - 1]}…"


def _scale(values: Sequence[Parameter]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Heights in [0, 1] of a column's values, and its ticks (height, label). None, which does not apply, is at 0."""
    distinct: list[Any] = [value for value in dict.fromkeys(values) if value is not None]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct)
    distinct.sort(key=None if numbers else str)
    if numbers and len(distinct) > MANY:
        floats = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        log = distinct[0] > 0 and distinct[-1] / distinct[0] > LOG_SPAN
        scaled = np.log(floats) if log else floats
        low, high = np.nanmin(scaled), np.nanmax(scaled)
        heights = np.nan_to_num((scaled - low) / (high - low), nan=0.0)
        marks = np.linspace(low, high, 5)
        return heights, [((mark - low) / (high - low), f"{np.exp(mark) if log else mark:.3g}") for mark in marks]
    shown = [*([None] if None in values else []), *distinct]
    places = {value: place / max(len(shown) - 1, 1) for place, value in enumerate(shown)}
    return (
        np.array([places[value] for value in values]),
        [
            (place, DASH if value is None else f"{value:g}" if numbers else str(value))
            for value, place in places.items()
        ],
    )
