"""What a grid of semantic routers says, in rows and in Markdown: every configuration, the best of each architecture,
the top and the bottom three, and benchmarks never seen beside the same benchmarks seen.

In: results by configuration and the metrics.json of all of them on one test split. Out: plain rows and tables. Test
figures stand in the rows for the reader; the order in which configurations are taken is that of the calibration
queries' AUC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefill_router.metrics.evaluate import REFERENCE
from prefill_router.semantic.grid import Configuration, Result

Json = Mapping[str, Any]
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
RANKED_BY = "p_auccc"
ENDS = 3


def grid_rows(
    configurations: Sequence[Configuration], results: Mapping[str, Result], metrics: Json
) -> list[dict[str, Any]]:
    """A row for every configuration that was fitted, best calibration AUC first: what it is, what it was selected by,
    and its point estimates on the test split."""
    rows = []
    for configuration in configurations:
        if (result := results.get(configuration.name)) is None:
            continue
        figures = metrics["routers"][configuration.name]
        rows.append(
            {
                "name": configuration.name,
                "architecture": configuration.architecture,
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
    """The first row, which is the best by calibration AUC, of every `architecture` or `family`."""
    found: dict[str, Json] = {}
    for row in rows:
        found.setdefault(row[what], row)
    return list(found.values())


def ends(rows: Sequence[Json], n: int = ENDS) -> tuple[list[Json], list[Json]]:
    """The `n` highest and the `n` lowest P-AUCCC on the test split, as the paper lists them; those without one left
    out."""
    known = [row for row in rows if row["test"][RANKED_BY] is not None]
    ranked = sorted(known, key=lambda row: -row["test"][RANKED_BY])
    return ranked[:n], ranked[max(n, len(ranked) - n) :]


def grid_markdown(rows: Sequence[Json], references: Mapping[str, Json]) -> str:
    """Tables of the grid: the best of each architecture and family, and both ends; `references` stand above them."""
    top, bottom = ends(rows)
    parts = [
        ("Best of each architecture, by calibration AUC", best_of(rows, "architecture")),
        ("Best of each family, by calibration AUC", best_of(rows, "family")),
        ("Highest P-AUCCC on the test split", top),
        ("Lowest P-AUCCC on the test split", bottom),
    ]
    return "\n".join(
        f"{heading}:\n\n{_table(part, references if place == 0 else {})}" for place, (heading, part) in enumerate(parts)
    )


def shown_rows(rows: Sequence[Json]) -> list[dict[str, str]]:
    """The rows as a report shows them: texts only."""
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
    """AUC inside benchmarks (mean over them) and over all, with the benchmark in training and without."""
    lines = [
        "| router | AUC in benchmarks, seen | never seen | AUC over all, seen | never seen | Brier, seen | "
        "never seen |",
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
            lines.append(f"| {REFERENCE} less {name} | " + " | ".join(f"| {lead}" for lead in leads) + " |")
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
