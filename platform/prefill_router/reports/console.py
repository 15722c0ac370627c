"""The headline figures of an evaluation as text tables for the console.

In: metrics.json. Out: lines of ASCII text. Intervals are in brackets; costs are in USD per 1,000 queries.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefill_router.reports.format import DASH, MINUS, PERCENT, Json, percent, say, span

COLUMNS = (
    ("auc", "AUC", "number"),
    ("brier", "Brier", "number"),
    ("p_auccc_exact", "exact area", "number"),
    ("accuracy_at_chosen_lambda", "accuracy", "percent"),
    ("cost_at_chosen_lambda", "cost per 1,000", "usd"),
    ("headroom_captured_at_chosen_lambda", "headroom", "percent"),
)
ASCII = {ord(DASH): "-", ord(MINUS): "-", ord(PERCENT[0]): " "}


def console_tables(metrics: Json) -> str:
    """Routers and baselines; their utility minus that of the best static choice; controls."""
    pool, routers = metrics["pool"], metrics["routers"]
    rows = [["router", *(heading for _, heading, _ in COLUMNS)]]
    rows += [[name, *(_cell(router[path], kind) for path, _, kind in COLUMNS)] for name, router in routers.items()]
    rows += [
        [
            "best on test",
            "",
            "",
            "",
            _cell(pool["best_single_accuracy"], "percent"),
            _cell(pool["best_single_cost"], "usd"),
            "",
        ],
        ["mixtures of two", "", "", _cell(pool["mixture_hull"]["p_auccc"], "number"), "", "", ""],
        ["oracle", "", "", "", _cell(pool["oracle_accuracy"], "percent"), _cell(pool["oracle_cost"], "usd"), ""],
    ]
    parts = [_aligned(rows)]
    if static := pool.get("best_static"):
        rows = [["utility minus best static", *(f"lambda {lam}" for lam in static)]]
        rows += [
            [name, *(_cell(figure, "number") for figure in router["utility_over_best_static"].values())]
            for name, router in routers.items()
        ]
        rows.append(
            [
                "best static choice",
                *(f"{_cell(choice['utility'], 'number', False)} {choice['model']}" for choice in static.values()),
            ]
        )
        parts.append(_aligned(rows))
    if controls := metrics.get("controls"):
        parts.append(_controls(controls))
    return "\n\n".join(parts).translate(ASCII)


def _controls(controls: Json) -> str:
    chance = ", ".join(
        f"{kind.replace('_', ' ')} {_cell(control['auc'], 'number')}"
        for kind, control in controls.items()
        if kind != "truncation"
    )
    lines = [f"controls: AUC with {chance}"]
    for encoder, parts in controls["truncation"]["encoders"].items():
        counts = ", ".join(
            f"{part} {found['n_truncated']:,} of {found['n']:,} ({percent(found['share_truncated'])})"
            for part, found in parts.items()
            if found["n"] and part != "all"
        )
        equal = parts["all"]["n_equal_after_truncation"]
        lines.append(f"truncated by encoder {encoder}: {counts}; {equal:,} prompts equal after truncation")
    return "\n".join(lines)


def _cell(figure: Json, kind: str, bounds: bool = True) -> str:
    value = say(figure["estimate"], kind)
    if figure["lower"] is None or not bounds:
        return value
    return f"{value} [{span(figure, kind)}]"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
