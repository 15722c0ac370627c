"""report.html: one self-contained page on an evaluation, for people; light, dark, phone and print.

In: the predictions, the metrics.json of `evaluate` with what was added to it, and provenance as nested names and
values. Out: one HTML file that loads nothing. Every text from data is escaped by the templates. A section is an entry
of SECTIONS, a template of its name under sections/, and stands where its data is there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefill_router.files import write_atomically
from prefill_router.metrics import choices, curves
from prefill_router.metrics.confidences import NARROW as NARROW_CALL
from prefill_router.metrics.evaluate import REFERENCE
from prefill_router.metrics.figures import prepare, single_models
from prefill_router.metrics.lambda_path import along
from prefill_router.metrics.predictions import Predictions
from prefill_router.metrics.seeds import HEADINGS
from prefill_router.reports import plots, plots_choices, plots_layers

WIDE, NARROW = (540, 420), (350, 380)
EXCERPT, REST = 240, 4000  # characters of a prompt: shown, and behind a fold
DRAWN = 6  # routers, the first ones: more lines than that hide each other
ALIKE = 8  # models; with more, a table turns their names upright
LIBRARIES = ("numpy", "scipy", "scikit-learn", "torch", "transformers", "pyarrow", "matplotlib")
SECTIONS = {
    "curves": "Accuracy and cost",
    "routers": "Routers compared",
    "confidences": "How good the confidences are",
    "choices": "Where each model is chosen",
    "mistakes": "Most wrong",
    "benchmarks": "Benchmarks",
    "unseen": "Benchmarks never seen",
    "literature": "As other benchmarks count",
    "robustness": "Robustness",
    "seeds": "Split seeds",
    "overhead": "What a decision may cost",
    "pool": "The pool",
    "layers": "Layers",
    "provenance": "Provenance",
}
Json = Mapping[str, Any]
MINUS, DASH, PERCENT = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NARROW NO-BREAK SPACE}%"


def write_report(
    folder: Path,
    predictions: Predictions,
    metrics: Json,
    provenance: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
    layers: Sequence[Json] | None = None,
) -> Path:
    """Writes FOLDER/report.html atomically and returns its path.

    `provenance` is shown as given, nested mappings as dotted names; its key `notice`, if any, stands as a banner at
    the top. `extra` adds sections: heading to a text, or to a list of rows (mappings of column to value). `prompts`
    (by query_id) are quoted where the router was most wrong; `layers` are the rows of `plots_layers`.
    """
    path = Path(folder) / "report.html"
    page = render(predictions, metrics, provenance, extra, prompts=prompts, layers=layers)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def render(
    predictions: Predictions,
    metrics: Json,
    provenance: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
    layers: Sequence[Json] | None = None,
) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("prefill_router.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "say": say,
        "percent": percent,
        "points": points,
        "number": number,
        "span": span,
        "excerpt": excerpt,
    }
    main = REFERENCE if REFERENCE in metrics["routers"] else next(iter(metrics["routers"]))
    routers = {main: metrics["routers"][main], **metrics["routers"]}  # the main one first
    metrics = {**metrics, "routers": routers}
    costs = [model["cost"]["estimate"] or 0.0 for model in metrics["pool"]["models"]]
    accuracies = [model["accuracy"]["estimate"] or 0.0 for model in metrics["pool"]["models"]]
    by_cost = [int(index) for index in np.argsort(costs, kind="stable")]
    names, provenance = predictions.models, dict(provenance)
    robustness = {name: router["robustness"] for name, router in routers.items() if "robustness" in router}
    return environment.get_template("report.html.j2").render(
        sections=_sections(metrics, robustness, layers, extra or {}),
        main=main,
        pool=metrics["pool"],
        routers=routers,
        names=names,
        router=routers[main],
        alike=ALIKE,
        narrow=NARROW_CALL,
        notice=provenance.pop("notice", None),
        by_cost=by_cost,
        best_model=names[int(np.argmax(accuracies))] if any(accuracies) else None,
        dearest_model=names[int(np.argmax(costs))],
        best_auc={name: _best_auc(routers, name) for name in names},
        colours={name: f"var(--s{index % plots.N_SERIES})" for index, name in enumerate(routers)},
        **_figures(predictions, metrics, main, by_cost),
        chosen_by_benchmark=choices.by_benchmark(predictions, main),
        mistakes=choices.most_wrong(predictions, main),
        prompts=prompts or {},
        unseen=metrics.get("leave_one_benchmark_out"),
        robustness=robustness,
        seeds=_seeds(metrics["seeds"], main) if "seeds" in metrics else None,
        layers=_layers(layers or [], names),
        provenance=_flat({**provenance, "versions": _versions()}),
    )


def say(value: float | None, kind: str = "number") -> str:
    """A figure as its kind is said: `number`, `percent`, `points`, or `usd` for USD per query."""
    return {"number": number, "percent": percent, "points": points, "usd": _usd}[kind](value)


def percent(value: float | None, digits: int = 1) -> str:
    """0.847 as `84.7 %`, with a narrow space that does not break."""
    return DASH if value is None else _signed(f"{100 * value:.{digits}f}{PERCENT}")


def points(value: float | None) -> str:
    """A difference of shares as percentage points with its sign: 0.007 as `+0.7`."""
    return DASH if value is None else _signed(f"{100 * value:+.1f}")


def number(value: float | None, digits: int = 3) -> str:
    """0.78357 as `0.784`."""
    return DASH if value is None else _signed(f"{value:.{digits}f}")


def span(figure: Json, kind: str = "number") -> str:
    """The interval as text, `0.775 to 0.792`; the reason where the figure is undefined; '' without resamples."""
    if figure["lower"] is None:
        return str(figure.get("reason", "")) if figure["estimate"] is None else ""
    return f"{say(figure['lower'], kind).removesuffix(PERCENT)} to {say(figure['upper'], kind).removesuffix(PERCENT)}"


def excerpt(prompt: str) -> tuple[str, str, int]:
    """What of a prompt is shown, what stands behind a fold, and how many characters are left out. One line each."""
    folded = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", " ".join(prompt.split()))
    space = folded.rfind(" ", EXCERPT - 40, EXCERPT + 1)
    end = space if space > 0 and len(folded) > EXCERPT else EXCERPT
    return folded[:end], folded[end : end + REST].strip(), max(0, len(folded) - end - REST)


def _usd(value: float | None) -> str:
    """USD per query as USD per 1,000 queries."""
    return DASH if value is None else _signed(plots.usd(1000 * value + 0.0))  # no minus zero


def _signed(text: str) -> str:
    return text.replace("$-", "-$").replace("-", MINUS)


def _figures(predictions: Predictions, metrics: Json, main: str, by_cost: list[int]) -> dict[str, Any]:
    """Every drawing but the layers'; those of two sizes for wide screens and narrow ones."""
    paths, router = _exact_paths(predictions), predictions.routers[main]
    drawn = {**metrics, "routers": dict(list(metrics["routers"].items())[:DRAWN])}
    colours = plots_choices.model_colours(len(by_cost))
    share, confident = choices.along_lambda(predictions, main)[:, by_cost], choices.by_confidence(predictions, main)
    return {
        "cost_curve": [Markup(plots.cost_curve(drawn, size)) for size in (WIDE, NARROW)],
        "plane": [
            Markup(plots.plane(drawn, {name: paths[name] for name in drawn["routers"]}, size))
            for size in (WIDE, NARROW)
        ],
        "not_drawn": len(metrics["routers"]) - len(drawn["routers"]),
        "reliability": [
            (name, Markup(plots.reliability(router.p[:, index], predictions.correct[:, index], f"{index}")))
            for index, name in enumerate(predictions.models)
        ],
        "shares": [
            Markup(plots_choices.choice_shares(share, choices.LAMBDAS, colours, router.chosen_lambda, size))
            for size in ((800, 300), (350, 300))
        ],
        "confident": [
            Markup(plots_choices.choice_by_confidence(confident, by_cost, colours, size))
            for size in ((800, 380), (350, 380))
        ],
        "legend": [(predictions.models[model], colour) for model, colour in zip(by_cost, colours, strict=True)],
    }


def _exact_paths(predictions: Predictions) -> dict[str, plots.ExactPath]:
    test = prepare(predictions, parts=False)
    all_queries = np.ones((1, len(test.cost)))
    anchors = single_models(test, all_queries).anchors
    paths = {}
    for name, curve in test.curves.items():
        x, y = curves.normalise(
            along(curve.path, curve.charged, all_queries), along(curve.path, test.correct, all_queries), anchors
        )
        at = np.searchsorted(curve.path.breakpoints, predictions.routers[name].chosen_lambda, side="right") - 1
        paths[name] = plots.ExactPath(x[0], y[0], int(at))
    return paths


def _best_auc(routers: Json, model: str) -> float | None:
    """The highest AUC that a router has for the model; None where every one is undefined."""
    estimates = [router["auc"]["per_model"][model]["estimate"] for router in routers.values()]
    return max((estimate for estimate in estimates if estimate is not None), default=None)


def _layers(rows: Sequence[Json], names: Sequence[str]) -> dict[str, Any]:
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
        "steps": [f"var(--h{step})" for step in range(plots.N_LEVELS)],
    }


def _seeds(seeds: Json, main: str) -> dict[str, Any]:
    """Per figure that every router has: means, differences from the main router, and what the main one varies by."""
    routers = {main: seeds["routers"][main], **seeds["routers"]}
    means: dict[str, Any] = {}
    varies: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for path, heading in HEADINGS.items():
        found = {name: _mean(router, path) for name, router in routers.items()}
        if None in found.values():
            continue
        means[heading], varies[heading] = found, found[main]
        apart = {
            name: _mean(router["differences"], path) for name, router in routers.items() if "differences" in router
        }
        if apart and None not in apart.values():
            differences[heading] = apart
    return {"seeds": seeds["seeds"], "means": means, "differences": differences, "varies": varies}


def _mean(tree: Json, path: Sequence[str]) -> dict[str, Any] | None:
    """A summary over seeds in the shape of a figure."""
    for step in path:
        tree = tree.get(step, {})
    return {**tree, "estimate": tree["mean"]} if "mean" in tree else None


def _sections(metrics: Json, robustness: Json, layers: Any, extra: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those whose data is there, in order: id, heading, template, and a section of `extra` its own content."""
    absent = {
        name
        for name, there in {
            "unseen": "leave_one_benchmark_out" in metrics,
            "robustness": robustness,
            "seeds": "seeds" in metrics,
            "layers": layers,
        }.items()
        if not there
    }
    sections = [
        {"id": name, "heading": heading, "template": name} for name, heading in SECTIONS.items() if name not in absent
    ]
    own: list[dict[str, Any]] = [
        {
            "id": f"extra-{index}",
            "heading": heading,
            "template": "extra",
            "text": value if isinstance(value, str) else None,
            "rows": [] if isinstance(value, str) else list(value),
        }
        for index, (heading, value) in enumerate(extra.items())
    ]
    return [*sections[:-1], *own, sections[-1]]


def _versions() -> dict[str, str]:
    """Of Python and of those libraries that are installed; none is imported."""
    versions = {"python": sys.version.split()[0]}
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append(
                (f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
            )
    return rows
