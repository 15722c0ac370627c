"""geometry.html: one self-contained page on what the layers tell, for people; light, dark, phone and print.

In: the report of geometry.py, with `provenance`. Out: geometry.json, which is the report, and one HTML file that loads
nothing. Every text from data is escaped by the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefill_router.files import write_atomically, write_json
from prefill_router.reports import plots_geometry
from prefill_router.reports.comparison import includes_zero
from prefill_router.reports.evaluation import DASH, MINUS, number, span
from prefill_router.reports.plots import N_SERIES

Json = Mapping[str, Any]
HALF, NARROW, THIRD = (520, 300), (350, 260), (340, 260)
WIDE = 720


def write_geometry(folder: Path, report: Json) -> Path:
    """Writes FOLDER/geometry.json and FOLDER/geometry.html, each atomically; returns the page's path."""
    write_json(folder / "geometry.json", report)
    path, page = folder / "geometry.html", render(report)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def render(report: Json) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("prefill_router.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "around": around, "significant": significant}
    lines = _lines(report["layers"])
    deep = report["deep"]
    encoders = report["encoders"]
    return environment.get_template("geometry.html.j2").render(
        report=report,
        deep=deep,
        encoders=encoders,
        targets=report["targets"],
        includes_zero=includes_zero,
        several=len(encoders) > 1,
        whole=report["agreement"].get("all") or next(iter(report["agreement"].values())),
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


def signed(value: float | None) -> str:
    """A difference in AUC with its sign: 0.0012 as `+0.0012`."""
    return DASH if value is None else f"{value:+.4f}".replace("-", MINUS)


def around(figure: Json) -> str:
    """A difference's interval, signed; the reason where there is none."""
    return span(figure) if figure["lower"] is None else f"{signed(figure['lower'])} to {signed(figure['upper'])}"


def significant(value: float | None) -> str:
    """Three digits that count: 1284.2 as `1284`, 0.03127 as `0.0313`."""
    if value is None:
        return DASH
    return (f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}").replace("-", MINUS)


def _lines(rows: Sequence[Json]) -> dict[tuple[str, str], list[Json]]:
    """Rows by (encoder, pooling), by layer."""
    found: dict[tuple[str, str], list[Json]] = {}
    for row in sorted(rows, key=lambda row: (row["encoder"], row["pooling"], row["layer"])):
        found.setdefault((row["encoder"], row["pooling"]), []).append(row)
    return found


def _coloured(lines: Mapping[tuple[str, str], Sequence[Json]], encoder: str | None = None) -> dict[int, Sequence[Json]]:
    return {index: rows for index, (key, rows) in enumerate(lines.items()) if encoder in (None, key[0])}


def _panels(
    report: Json, lines: Mapping[tuple[str, str], Sequence[Json]], encoder: str
) -> list[tuple[str, list[Markup]]]:
    """A panel per metric, each for wide screens and narrow ones."""
    mlp: dict[int, list[Json]] = {}
    if report["deep"]:
        layer_keys = report["deep"]["mlp"]["encoders"][encoder]["blocks"]
        mlp = {
            index: [row for row in layer_keys if row["pooling"] == pooling]
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
            f"{_short(report, encoder)}{row['pooling']} {row['layer']}",
            row["difference"],
            colours[encoder, row["pooling"]],
        )
        for encoder, part in report["deep"]["mlp"]["encoders"].items()
        for row in part["blocks"]
    ]
    return [
        Markup(plots_geometry.differences(rows, width, "mlp", "AUC of the MLP less that of the logistic probe"))
        for width in (WIDE, NARROW[0])
    ]


def _concatenation_plot(report: Json) -> list[Markup]:
    rows = [
        (f"{_short(report, encoder)}{row['pooling']}", row["difference"], 0)
        for encoder, part in report["deep"]["concatenation"].items()
        for row in part
    ]
    return [
        Markup(
            plots_geometry.differences(
                rows, width, "concatenation", "AUC of layers side by side less that of the best one"
            )
        )
        for width in (WIDE, NARROW[0])
    ]


def _short(report: Json, encoder: str) -> str:
    if len(report["encoders"]) == 1:
        return ""
    name = report["encoders"][encoder]["name"]
    return f"{name if len(name) <= 16 else name[:15] + '…'}, "
