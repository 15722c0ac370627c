"""geometry.html: the page on layer geometry and probes.

In: the report of `layers.report.geometry_report`, with the key `provenance`. Out: the report as geometry.json, and one
self-contained HTML file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from prefill_router.files import write_json
from prefill_router.reports import plots_geometry
from prefill_router.reports.format import Json
from prefill_router.reports.html import write_page
from prefill_router.reports.svg import N_SERIES, shortened

HALF, NARROW, THIRD = (520, 300), (350, 260), (340, 260)  # pixels
WIDE = 720


def write_geometry(folder: Path, report: Json) -> Path:
    """Writes FOLDER/geometry.json and FOLDER/geometry.html, each atomically; returns the page's path."""
    write_json(folder / "geometry.json", report)
    lines = _lines(report["layers"])
    deep = report["deep"]
    encoders = report["encoders"]
    return write_page(
        folder / "geometry.html",
        "geometry.html.j2",
        report=report,
        deep=deep,
        encoders=encoders,
        targets=report["targets"],
        several=len(encoders) > 1,
        overall=report["agreement"].get("all") or next(iter(report["agreement"].values())),
        legend=[
            (
                f"{encoders[encoder]['name']}, {pooling}" if len(encoders) > 1 else f"{pooling} pooling",
                f"var(--s{index % N_SERIES})",
            )
            for index, (encoder, pooling) in enumerate(lines)
        ],
        shown=plots_geometry.SHOWN,
        poolings={encoder: [pooling for own, pooling in lines if own == encoder] for encoder in encoders},
        peak_of={(peak["encoder"], peak["pooling"]): peak for peak in report["peaks"]},
        panels={encoder: _panels(report, lines, encoder) for encoder in encoders},
        scatter=[
            [Markup(plots_geometry.against_auc(_coloured(lines), metric, size)) for size in (THIRD, NARROW)]
            for metric in ("fisher_j", "d_eff", "anisotropy")
        ],
        mlp_plot=_mlp_plot(report, lines) if deep else None,
        concatenation_plot=_concatenation_plot(report) if deep else None,
    )


def _lines(rows: Sequence[Json]) -> dict[tuple[str, str], list[Json]]:
    """Rows by (encoder, pooling), in the order of layers."""
    found: dict[tuple[str, str], list[Json]] = {}
    for row in sorted(rows, key=lambda row: (row["encoder"], row["pooling"], row["layer"])):
        found.setdefault((row["encoder"], row["pooling"]), []).append(row)
    return found


def _coloured(lines: Mapping[tuple[str, str], Sequence[Json]], encoder: str | None = None) -> dict[int, Sequence[Json]]:
    """Rows by colour index, of one encoder if given."""
    return {index: rows for index, (key, rows) in enumerate(lines.items()) if encoder in (None, key[0])}


def _panels(
    report: Json, lines: Mapping[tuple[str, str], Sequence[Json]], encoder: str
) -> list[tuple[str, list[Markup]]]:
    """(metric, plots for wide and narrow screens) of one encoder."""
    mlp: dict[int, list[Json]] = {}
    if report["deep"]:
        probed = report["deep"]["mlp"]["encoders"][encoder]["blocks"]
        mlp = {
            index: [row for row in probed if row["pooling"] == pooling]
            for index, (own, pooling) in enumerate(lines)
            if own == encoder
        }
    return [
        (
            metric,
            [
                Markup(plots_geometry.by_layer(_coloured(lines, encoder), metric, mlp, size, encoder[:8]))
                for size in (HALF, NARROW)
            ],
        )
        for metric in plots_geometry.panels()
    ]


def _mlp_plot(report: Json, lines: Mapping[tuple[str, str], Sequence[Json]]) -> list[Markup]:
    colours = {key: index for index, key in enumerate(lines)}
    rows = [
        (
            f"{_prefix(report, encoder)}{row['pooling']} {row['layer']}",
            row["difference"],
            colours[encoder, row["pooling"]],
        )
        for encoder, part in report["deep"]["mlp"]["encoders"].items()
        for row in part["blocks"]
    ]
    return [
        Markup(plots_geometry.differences(rows, width, "mlp", "AUC of the MLP minus AUC of the logistic probe"))
        for width in (WIDE, NARROW[0])
    ]


def _concatenation_plot(report: Json) -> list[Markup]:
    rows = [
        (f"{_prefix(report, encoder)}{row['pooling']}", row["difference"], 0)
        for encoder, part in report["deep"]["concatenation"].items()
        for row in part
    ]
    return [
        Markup(
            plots_geometry.differences(
                rows, width, "concatenation", "AUC of concatenated layers minus AUC of the best layer"
            )
        )
        for width in (WIDE, NARROW[0])
    ]


def _prefix(report: Json, encoder: str) -> str:
    """The encoder's name with a comma, if there are several encoders."""
    if len(report["encoders"]) == 1:
        return ""
    return f"{shortened(report['encoders'][encoder]['name'], 16)}, "
