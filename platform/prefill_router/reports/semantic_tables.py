"""Rows and Markdown tables of a grid of semantic routers.

In: results by configuration, and metrics.json of all of them on one test split. Out: rows for grid.json and tables for
grid.md. Configurations are ranked by AUC on the calibration queries; the test figures are reported and never rank them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefill_router.metrics.evaluate import REFERENCE
from prefill_router.reports.format import Json
from prefill_router.semantic.grid import Configuration, Result

FIGURES = {
    "auc": "AUC",
    "brier": "Brier",
    "routed_to_accuracy": "routed-to accuracy",
    "accuracy_gain_at_chosen_lambda": "accuracy gain",
    "headroom_captured_at_chosen_lambda": "headroom captured",
    "cost_saving_at_chosen_lambda": "cost saving",
    "p_auccc": "P-AUCCC",
    "mdp_auccc": "MDP-AUCCC",
    "efficacy": "efficacy",
}
RANKED_BY = "p_auccc"  # in `ends`
ENDS = 3


def grid_rows(
    configurations: Sequence[Configuration], results: Mapping[str, Result], metrics: Json
) -> list[dict[str, Any]]:
    """A row per fitted configuration, highest calibration AUC first.

    A row holds the configuration, its calibration figures and calibrator, and its estimates on the test split.
    """
    rows = []
    for configuration in configurations:
        if (result := results.get(configuration.name)) is None:
            continue
        figures = metrics["routers"][configuration.name]
        rows.append(
            {
                "name": configuration.name,
                "architecture": configuration.architecture,
                "features": configuration.features,
                **configuration.model_dump(mode="json"),
                "calibrator": result.calibrator,
                "seconds": result.seconds,
                "calibration": {"auc": result.auc, "brier": result.figures[result.calibrator]["brier"]},
                "calibrators": {name: dict(value) for name, value in result.figures.items()},
                "test": {name: figures[name]["estimate"] for name in FIGURES},
            }
        )
    return sorted(rows, key=lambda row: -row["calibration"]["auc"])


def best_of(rows: Sequence[Json], what: str) -> list[Json]:
    """The row of highest calibration AUC for every value of `what`, a key such as `architecture` or `features`."""
    found: dict[str, Json] = {}
    for row in rows:
        found.setdefault(row[what], row)
    return list(found.values())


def ends(rows: Sequence[Json], n: int = ENDS) -> tuple[list[Json], list[Json]]:
    """The `n` rows of highest and the `n` rows of lowest P-AUCCC on the test split, in descending order.

    Rows whose P-AUCCC is undefined are left out; no row is in both lists.
    """
    known = [row for row in rows if row["test"][RANKED_BY] is not None]
    ranked = sorted(known, key=lambda row: -row["test"][RANKED_BY])
    return ranked[:n], ranked[max(n, len(ranked) - n) :]


def grid_markdown(rows: Sequence[Json], references: Mapping[str, Json]) -> str:
    """Tables of the best row of each architecture and family, and of both ends. `references` head the first table."""
    top, bottom = ends(rows)
    encoders = best_of([row for row in rows if row["encoder"] is not None], "encoder")
    parts = [
        ("Best of each architecture, by calibration AUC", best_of(rows, "architecture")),
        ("Best of each family, by calibration AUC", best_of(rows, "features")),
        *([("Best of each encoder's embedding, by calibration AUC", encoders)] if len(encoders) > 1 else []),
        ("Highest P-AUCCC on the test split", top),
        ("Lowest P-AUCCC on the test split", bottom),
    ]
    return "\n".join(
        f"{heading}:\n\n{_table(part, references if place == 0 else {})}" for place, (heading, part) in enumerate(parts)
    )


def shown_rows(rows: Sequence[Json]) -> list[dict[str, str]]:
    """The rows as texts by column heading."""
    return [
        {
            "configuration": row["name"],
            "calibrator": row["calibrator"],
            "calibration AUC": _number(row["calibration"]["auc"]),
            **{heading: _number(row["test"][name]) for name, heading in FIGURES.items()},
        }
        for row in rows
    ]


def unseen_markdown(seen: Json, unseen: Json) -> str:
    """AUC within benchmarks (mean over them), AUC of all queries and Brier: benchmark in training, and left out."""
    lines = [
        "| router | AUC within benchmarks, seen | unseen | AUC of all queries, seen | unseen | Brier, seen | unseen |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in unseen["routers"]:
        before, after = seen["routers"][name], unseen["routers"][name]
        cells = [
            figure
            for path in (("macro", "auc"), ("auc",), ("brier",))
            for figure in (_at(before, path), _at(after, path))
        ]
        lines.append(f"| {name} | " + " | ".join(_interval(figure) for figure in cells) + " |")
    for name in unseen["routers"]:
        if name != REFERENCE:
            leads = [
                _interval(_negative(_at(unseen["routers"][name]["differences"], path)), "+")
                for path in (("macro", "auc"), ("auc",), ("brier",))
            ]
            lines.append(f"| {REFERENCE} minus {name} | " + " | ".join(f"| {lead}" for lead in leads) + " |")
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Json], references: Mapping[str, Json]) -> str:
    lines = [
        "| configuration | calibrator | calibration AUC | " + " | ".join(FIGURES.values()) + " |",
        "|---" * (len(FIGURES) + 3) + "|",
    ]
    for name, figures in references.items():
        lines.append(f"| {name} | | | " + " | ".join(_number(figures[figure]["estimate"]) for figure in FIGURES) + " |")
    for row in shown_rows(rows):
        lines.append("| " + " | ".join(row.values()) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _at(tree: Json, path: Sequence[str]) -> Json:
    for step in path:
        tree = tree[step]
    return tree


def _negative(figure: Json) -> dict[str, Any]:
    return {
        "estimate": None if figure["estimate"] is None else -figure["estimate"],
        "lower": None if figure["upper"] is None else -figure["upper"],
        "upper": None if figure["lower"] is None else -figure["lower"],
    }


def _interval(figure: Json, sign: str = "") -> str:
    if figure["estimate"] is None:
        return "undefined"
    around = "" if figure["lower"] is None else f" [{figure['lower']:{sign}.4f}, {figure['upper']:{sign}.4f}]"
    return f"{figure['estimate']:{sign}.4f}{around}"
