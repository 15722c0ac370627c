"""labels.html: the page on the quality of labels.

In: `outcomes.quality.check.LabelQuality` and its provenance. Out: labels.json with every figure, suspects.parquet with
a row per suspicious label, and one self-contained HTML file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from prefill_router.files import write_json, write_parquet
from prefill_router.locations import location
from prefill_router.outcomes.quality.check import LabelQuality
from prefill_router.outcomes.quality.findings import Finding, Matrix, Share, Table
from prefill_router.reports.format import PERCENT, Json, number, percent, significant, without_common_start
from prefill_router.reports.html import render_page, write_page
from prefill_router.reports.labels_text import SECTIONS, figures_text
from prefill_router.reports.plots_labels import cells, rate_bars
from prefill_router.reports.svg import N_LEVELS

TEMPLATE = "labels.html.j2"
WIDE, HALF, NARROW = 1060, 520, 350  # pixels
ROWS = 10  # of a table; labels.json has all
MODELS, BENCHMARKS = 32, 24  # in a plot
EXAMPLES = 4
ALWAYS = ("implausible", "sources")  # checks whose tables are shown without a finding


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, small print below it, and whether it is a number."""

    text: str
    small: str
    is_number: bool


@dataclass(frozen=True)
class Example:
    """A suspicious label with its texts; None if there is none."""

    row: Json
    prompt: str
    other_prompt: str | None
    answer: str | None


def write_labels(folder: Path, quality: LabelQuality, provenance: Json) -> Path:
    """Writes labels.json, suspects.parquet and labels.html to the folder, each atomically; returns the page's path.

    `provenance` is shown as given; its optional key `notice` becomes a banner at the top of the page.
    """
    folder = location(folder)
    write_json(folder / "labels.json", {**quality.to_json(), "provenance": dict(provenance)})
    write_parquet(folder / "suspects.parquet", quality.suspects)
    return write_page(folder / "labels.html", TEMPLATE, **_values(quality, provenance))


def render(quality: LabelQuality, provenance: Json) -> str:
    """The page as text."""
    return render_page(TEMPLATE, **_values(quality, provenance))


def summary(quality: LabelQuality) -> str:
    """The findings with their counts, in one line."""
    outcomes = quality.labels.outcomes
    found = [
        f"{SECTIONS[name].short} {share.count:,} of {share.of:,} {quality.findings[name].unit}"
        for name in quality.with_findings
        if (share := quality.findings[name].share) is not None
    ]
    skipped = [SECTIONS[name].short for name, finding in quality.findings.items() if finding.share is None]
    return (
        f"{len(outcomes):,} queries, {len(outcomes.models):,} models, {int(outcomes.labelled.sum()):,} labels; "
        f"{'; '.join(found) or 'nothing found'}" + (f"; not checked: {', '.join(skipped)}" if skipped else "")
    )


def _values(quality: LabelQuality, provenance: Json) -> dict[str, Any]:
    """The values of the page's template."""
    labels, outcomes, record = quality.labels, quality.labels.outcomes, dict(provenance)
    return {
        "notice": record.pop("notice", None),
        "provenance": {name: str(value) for name, value in record.items()},
        "n": {
            "queries": len(outcomes),
            "models": len(labels.models),
            "benchmarks": len(labels.benchmarks),
            "labels": int(outcomes.labelled.sum()),
            "suspects": quality.suspects.num_rows,
            "found": len(quality.with_findings),
            "checked": sum(finding.share is not None for finding in quality.findings.values()),
            "checks": len(quality.findings),
        },
        "columns": labels.columns,
        "sections": [_section(quality, name, finding) for name, finding in quality.findings.items()],
        "steps": [f"var(--h{step})" for step in range(N_LEVELS)],
    }


def _section(quality: LabelQuality, name: str, finding: Finding) -> dict[str, Any]:
    found = finding.status == "found"
    matrix = _drawn_matrix(quality, finding) if found or name == "alike" else None
    bars = _bars(finding.by_model) if found else {}
    return {
        "name": name,
        "text": SECTIONS[name],
        "finding": finding,
        "share": None if finding.share is None else _cell(finding.share),
        "figures": figures_text(name, finding.figures) if finding.share is not None else [],
        "bars": [Markup(rate_bars(bars, width, name)) for width in (HALF, NARROW)] if bars else None,
        "benchmarks": _benchmarks(finding) if found else None,
        "matrix": Markup(cells(matrix, WIDE, name)) if matrix is not None else None,
        "scale": _scale(matrix, name) if matrix is not None else None,
        "tables": [_shown(table) for table in finding.tables] if found or name in ALWAYS else [],
        "examples": _examples(quality, finding),
    }


def _bars(shares: Mapping[str, Share]) -> dict[str, Share]:
    """The models with a count above 0, the highest rates first; none if there is only one."""
    some = sorted((pair for pair in shares.items() if pair[1].count), key=lambda pair: -(pair[1].estimate or 0.0))
    return dict(some[:MODELS]) if len(some) > 1 else {}


def _benchmarks(finding: Finding) -> dict[str, Any] | None:
    """The benchmarks with a count above 0 as a table, the highest rates first; None if there are none."""
    some = sorted(finding.by_benchmark.items(), key=lambda pair: -(pair[1].estimate or 0.0))
    rows = tuple(pair for pair in some if pair[1].count)
    return _shown(Table("By benchmark", ("benchmark", finding.unit), rows)) if rows and len(some) > 1 else None


def _drawn_matrix(quality: LabelQuality, finding: Finding) -> Matrix | None:
    """The matrix to draw: rows and columns with values above 0, at most MODELS and BENCHMARKS of the highest."""
    if finding.name == "constant":
        return quality.accuracy if len(quality.accuracy.columns) in range(2, BENCHMARKS + 1) else None
    matrix = finding.matrix
    if matrix is None or finding.name == "alike":
        return matrix if matrix is not None and len(matrix.rows) > 2 else None
    filled = np.nan_to_num(matrix.values)
    rows, columns = (
        np.sort(np.argsort(-filled.max(axis=axis), kind="stable")[: min(most, int((filled.max(axis=axis) > 0).sum()))])
        for axis, most in ((1, MODELS), (0, BENCHMARKS))
    )
    if len(rows) < 2 or len(columns) < 2:
        return None
    names = [
        tuple(every[place] for place in places) for every, places in ((matrix.rows, rows), (matrix.columns, columns))
    ]
    return Matrix(matrix.values[np.ix_(rows, columns)], *names)


def _scale(matrix: Matrix, name: str) -> tuple[str, str, str]:
    """What the colours show, and the ends of the scale."""
    low, high = float(np.nanmin(matrix.values)), float(np.nanmax(matrix.values))
    if name == "alike":
        return "kappa, in hundredths", number(low, 2), number(high, 2)
    return ("accuracy" if name == "constant" else "rate") + ", in per cent", percent(low), percent(high)


def _shown(table: Table) -> dict[str, Any]:
    """The first ROWS rows of a table as cells, and the number of the others."""
    rows = [
        [_cell(value, name in table.fractions) for name, value in zip(table.columns, row, strict=True)]
        for row in table.rows[:ROWS]
    ]
    is_number = [any(row[place].is_number for row in rows) for place in range(len(table.columns))]
    return {
        "heading": table.heading,
        "columns": list(zip(table.columns, is_number, strict=True)),
        "rows": rows,
        "rest": len(table.rows) - len(rows),
    }


def _cell(value: Any, is_fraction: bool = False) -> Cell:
    if isinstance(value, Share):
        digits = 1 if (value.upper or 0.0) >= 0.01 else 2
        lower, upper = (percent(end, digits) for end in (value.lower, value.upper))
        interval = f"; {lower.removesuffix(PERCENT)} to {upper.removesuffix(PERCENT)}" if value.of else ""
        return Cell(percent(value.estimate, digits), f"{value.count:,} of {value.of:,}{interval}", True)
    if isinstance(value, str):
        return Cell(value, "", False)
    if isinstance(value, int):
        return Cell(f"{value:,}", "", True)
    return Cell(percent(value) if is_fraction else significant(value), "", True)


def _examples(quality: LabelQuality, finding: Finding) -> list[Example]:
    """The first suspects if they are ranked by a score, otherwise some that are evenly spaced."""
    rows, labels, outcomes = finding.suspects, quality.labels, quality.labels.outcomes
    ranked = rows.num_rows > 0 and rows.column("score").null_count < rows.num_rows
    last = min(EXAMPLES, rows.num_rows)
    places = range(last) if ranked else np.linspace(0, rows.num_rows - 1, last).astype(int).tolist()
    place_of = {query_id: place for place, query_id in enumerate(outcomes.query_ids)} if last else {}
    answer = quality.labels.answer
    shown = [rows.slice(place, 1).to_pylist()[0] for place in places]
    ids = dict.fromkeys(row[key] for row in shown for key in ("query_id", "other_query_id") if row[key] is not None)
    prompts = without_common_start({query_id: outcomes.prompts[place_of[query_id]] for query_id in ids})
    found = []
    for row in shown:
        query, other, model = row["query_id"], row["other_query_id"], row["model"]
        text = None if answer is None or model is None else answer.at(place_of[query], labels.models.index(model))
        found.append(Example(row, prompts[query], None if other is None else prompts[other], text))
    return found
