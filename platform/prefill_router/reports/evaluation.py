"""report.html: the page on an evaluation.

In: the predictions, metrics.json (`metrics.evaluate` and optional parts), and provenance as nested names and values.
Out: one self-contained HTML file. A key of SECTIONS is a section's id and the name of its template under
templates/sections/; a section without data is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from prefill_router.locations import location
from prefill_router.metrics import choices, curves
from prefill_router.metrics.confidences import NARROW as NARROW_CALL
from prefill_router.metrics.evaluate import REFERENCE
from prefill_router.metrics.figures import single_models
from prefill_router.metrics.lambda_path import along
from prefill_router.metrics.predictions import Predictions
from prefill_router.metrics.seeds import HEADINGS
from prefill_router.metrics.split import prepare
from prefill_router.reports import plots_choices, plots_layers
from prefill_router.reports.format import Json, without_common_start
from prefill_router.reports.html import render_page, write_page
from prefill_router.reports.plots_curves import ExactPath, cost_curve, models_by_cost, plane, reliability
from prefill_router.reports.svg import N_LEVELS, N_SERIES

TEMPLATE = "report.html.j2"
WIDE, NARROW = (540, 420), (350, 380)  # pixels, of the curves
DRAWN = 6  # routers in the curves: more lines than that hide each other
NOT_DRAWN = ("best_single",)  # its curve is near the single models
MANY = 24  # benchmarks: a table with more is sorted by gain, and scrolls
ALIKE = 8  # models: a table with more has vertical column headings, a list with more is cut
LIBRARIES = ("numpy", "scipy", "scikit-learn", "torch", "transformers", "pyarrow", "matplotlib")
SECTIONS = {
    "curves": "Accuracy and cost",
    "routers": "Comparison of routers",
    "utility": "Utility and the best static choice",
    "confidences": "Calibration and discrimination",
    "choices": "Model choice",
    "mistakes": "Most confident mistakes",
    "benchmarks": "Results by benchmark",
    "unseen": "Leave-one-benchmark-out",
    "literature": "Metrics of other benchmarks",
    "robustness": "Robustness to perturbed prompts",
    "seeds": "Variation over split seeds",
    "controls": "Controls",
    "overhead": "Break-even cost of routing",
    "pool": "Model pool",
    "layers": "Encoder layers",
    "provenance": "Provenance",
}


def write_report(
    folder: Path,
    predictions: Predictions,
    metrics: Json,
    provenance: Json,
    extra: Json | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
    layers: Sequence[Json] | None = None,
) -> Path:
    """Writes FOLDER/report.html atomically and returns its path.

    `provenance` is shown as given, nested mappings as dotted names; its optional key `notice` becomes a banner at the
    top of the page. `extra` adds sections: heading to a text, or to a list of rows (mappings of column to value).
    `prompts` (by query_id) are quoted among the mistakes; `layers` are the rows of `plots_layers`.
    """
    values = _values(predictions, metrics, provenance, extra or {}, prompts or {}, layers or [])
    return write_page(location(folder) / "report.html", TEMPLATE, **values)


def render(
    predictions: Predictions,
    metrics: Json,
    provenance: Json,
    extra: Json | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
    layers: Sequence[Json] | None = None,
) -> str:
    """The page of `write_report` as text."""
    return render_page(TEMPLATE, **_values(predictions, metrics, provenance, extra or {}, prompts or {}, layers or []))


def exact_paths(predictions: Predictions) -> dict[str, ExactPath]:
    """Every router's exact path in the normalised plane, over the queries whose labels are complete."""
    test = prepare(predictions, parts=False)
    all_queries = np.ones((1, len(test.cost)))
    anchors = single_models(test, all_queries).anchors
    paths = {}
    for name, curve in test.curves.items():
        x, y = curves.normalise(
            along(curve.path, curve.charged, all_queries), along(curve.path, test.correct, all_queries), anchors
        )
        at = np.searchsorted(curve.path.breakpoints, predictions.routers[name].chosen_lambda, side="right") - 1
        paths[name] = ExactPath(x[0], y[0], int(at))
    return paths


def _values(
    predictions: Predictions,
    metrics: Json,
    provenance: Json,
    extra: Json,
    prompts: Mapping[str, str],
    layers: Sequence[Json],
) -> dict[str, Any]:
    """The values of the page's template."""
    main = REFERENCE if REFERENCE in metrics["routers"] else next(iter(metrics["routers"]))
    routers = {main: metrics["routers"][main], **metrics["routers"]}  # the main router first
    metrics = {**metrics, "routers": routers}
    pool, names, provenance = metrics["pool"], predictions.models, dict(provenance)
    by_cost = models_by_cost(pool)
    costs = [model["cost"]["estimate"] or 0.0 for model in pool["models"]]
    accuracies = [model["accuracy"]["estimate"] or 0.0 for model in pool["models"]]
    order, mistakes = _benchmark_order(pool, routers[main]), choices.most_wrong(predictions, main)
    robustness = {name: router["robustness"] for name, router in routers.items() if "robustness" in router}
    return {
        "sections": _sections(metrics, robustness, layers, extra),
        "main": main,
        "pool": pool,
        "routers": routers,
        "names": names,
        "router": routers[main],
        "alike": ALIKE,
        "narrow": NARROW_CALL,
        "notice": provenance.pop("notice", None),
        "by_cost": by_cost,
        "best_model": names[int(np.argmax(accuracies))] if any(accuracies) else None,
        "most_expensive_model": names[int(np.argmax(costs))],
        "best_auc": {name: _best_auc(routers, name) for name in names},
        "colours": {name: f"var(--s{index % N_SERIES})" for index, name in enumerate(routers)},
        **_plots(predictions, metrics, main, by_cost),
        "many": len(order) > MANY,
        "benchmark_order": order,
        "chosen_by_benchmark": sorted(choices.by_benchmark(predictions, main), key=lambda row: order.index(row[0])),
        "mistakes": mistakes,
        "prompts": without_common_start(
            {mistake.query_id: prompts[mistake.query_id] for mistake in mistakes if mistake.query_id in prompts}
        ),
        "unseen": metrics.get("leave_one_benchmark_out"),
        "controls": metrics.get("controls"),
        "robustness": robustness,
        "seeds": _seeds(metrics["seeds"], main) if "seeds" in metrics else None,
        "layers": _layers(layers, names),
        "provenance": _flat({**provenance, "versions": _versions()}),
    }


def _plots(predictions: Predictions, metrics: Json, main: str, by_cost: list[int]) -> dict[str, Any]:
    """All plots except the layer map. Pairs are for wide and narrow screens."""
    paths, router = exact_paths(predictions), predictions.routers[main]
    names = [name for name in metrics["routers"] if name == main or name not in NOT_DRAWN][:DRAWN]
    drawn = {**metrics, "routers": {name: metrics["routers"][name] for name in names}}
    drawn_paths = {name: paths[name] for name in drawn["routers"]}
    colours = plots_choices.model_colours(len(by_cost))
    share, confident = choices.along_lambda(predictions, main)[:, by_cost], choices.by_confidence(predictions, main)
    return {
        "cost_curve": [Markup(cost_curve(drawn, size)) for size in (WIDE, NARROW)],
        "plane": [Markup(plane(drawn, drawn_paths, size)) for size in (WIDE, NARROW)],
        "drawn": list(drawn["routers"]),
        "reliability": [
            (name, Markup(reliability(router.p[:, index], predictions.correct[:, index], f"{index}")))
            for index, name in enumerate(predictions.models)
        ],
        "shares": [
            Markup(plots_choices.choice_shares(share, choices.DISPLAY_LAMBDAS, colours, router.chosen_lambda, size))
            for size in ((800, 300), (350, 300))
        ],
        "confident": [
            Markup(plots_choices.choice_by_confidence(confident, by_cost, colours, size))
            for size in ((800, 380), (350, 380))
        ],
        "legend": [(predictions.models[model], colour) for model, colour in zip(by_cost, colours, strict=True)],
    }


def _benchmark_order(pool: Json, router: Json) -> list[str]:
    """The benchmarks by name; if there are more than MANY, by the router's gain over the best single model."""
    names = list(pool["benchmarks"])
    if len(names) <= MANY:
        return names

    def loss(name: str) -> float:
        own = router["benchmarks"][name]["accuracy_at_chosen_lambda"]["estimate"]
        best = pool["benchmarks"][name]["best_single_accuracy"]["estimate"]
        return np.inf if own is None or best is None else best - own

    return sorted(names, key=loss)


def _best_auc(routers: Json, model: str) -> float | None:
    """The highest AUC of any router for the model; None if it is undefined for all routers."""
    estimates = [router["auc"]["per_model"][model]["estimate"] for router in routers.values()]
    return max((estimate for estimate in estimates if estimate is not None), default=None)


def _layers(rows: Sequence[Json], names: Sequence[str]) -> dict[str, Any]:
    """Colour scale and (caption, plots for wide and narrow screens) of the layer map."""
    found = []
    several = len({row["encoder"] for row in rows}) > 1
    for index, ((encoder, pooling), panel) in enumerate(plots_layers.panels(rows).items()):
        figures = [
            Markup(plots_layers.layer_map(panel, names, rows, width, f"{pooling}-{index}"))
            for width in (WIDE[0], NARROW[0])
        ]
        found.append((f"{pooling} pooling" + (f", encoder {encoder}" if several else ""), figures))
    return {
        "scale": plots_layers.scale(rows),
        "panels": found,
        "steps": [f"var(--h{step})" for step in range(N_LEVELS)],
    }


def _seeds(seeds: Json, main: str) -> dict[str, Any]:
    """By heading of every figure that all routers have: means by router, differences from the main router by router,
    and the main router's standard deviations."""
    routers = {main: seeds["routers"][main], **seeds["routers"]}
    means: dict[str, Any] = {}
    deviations: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for path, heading in HEADINGS.items():
        found = {name: _mean(router, path) for name, router in routers.items()}
        if None in found.values():
            continue
        means[heading], deviations[heading] = found, found[main]
        paired = {
            name: _mean(router["differences"], path) for name, router in routers.items() if "differences" in router
        }
        if paired and None not in paired.values():
            differences[heading] = paired
    return {"seeds": seeds["seeds"], "means": means, "differences": differences, "deviations": deviations}


def _mean(tree: Json, path: Sequence[str]) -> dict[str, Any] | None:
    """A summary over seeds as a figure whose estimate is the mean; None if the router has no such figure."""
    for step in path:
        tree = tree.get(step, {})
    return {**tree, "estimate": tree["mean"]} if "mean" in tree else None


def _sections(metrics: Json, robustness: Json, layers: Sequence[Json], extra: Json) -> list[dict[str, Any]]:
    """Id, heading and template of each section that has data, and the content of those from `extra`."""
    optional = {
        "unseen": "leave_one_benchmark_out" in metrics,
        "controls": "controls" in metrics,
        "robustness": bool(robustness),
        "seeds": "seeds" in metrics,
        "layers": bool(layers),
    }
    sections: list[dict[str, Any]] = [
        {"id": name, "heading": heading, "template": name}
        for name, heading in SECTIONS.items()
        if optional.get(name, True)
    ]
    added = [
        {
            "id": f"extra-{index}",
            "heading": heading,
            "template": "extra",
            "text": value if isinstance(value, str) else None,
            "rows": [] if isinstance(value, str) else list(value),
        }
        for index, (heading, value) in enumerate(extra.items())
    ]
    return [*sections[:-1], *added, sections[-1]]


def _versions() -> dict[str, str]:
    """Versions of Python and of the installed LIBRARIES, read without importing them."""
    versions = {"python": sys.version.split()[0]}
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions


def _flat(values: Json, prefix: str = "") -> list[tuple[str, str]]:
    """Rows (dotted name, text) of a nested mapping."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append(
                (f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
            )
    return rows
