"""report.html: one self-contained page on an evaluation, for people; light, dark, phone and print.

In: the predictions, the metrics.json of `evaluate`, and provenance as nested names and values. Out: one HTML file that
loads nothing. Every text from data is escaped by the template. A section is an entry of `_sections`: a heading, a note
and what stands under it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefill_router.evaluation import curves, plots
from prefill_router.evaluation.evaluate import REFERENCE
from prefill_router.evaluation.predictions import Predictions
from prefill_router.files import write_atomically

WIDE, NARROW = (540, 420), (350, 380)
Json = Mapping[str, Any]
MINUS, DASH, PERCENT = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NARROW NO-BREAK SPACE}%"


def write_report(folder: Path, predictions: Predictions, metrics: Json, provenance: Mapping[str, Any],
                 extra: Mapping[str, Any] | None = None) -> Path:
    """Writes FOLDER/report.html atomically and returns its path.

    `provenance` is shown as given, nested mappings as dotted names; its key `notice`, if any, stands as a banner at
    the top. `extra` adds sections: heading to a text, or to a list of rows (mappings of column to value).
    """
    path = Path(folder) / "report.html"
    write_atomically(path, lambda temporary: temporary.write_text(render(predictions, metrics, provenance, extra),
                                                                  encoding="utf-8"))
    return path


def render(predictions: Predictions, metrics: Json, provenance: Mapping[str, Any],
           extra: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    environment = Environment(loader=PackageLoader("prefill_router.evaluation", "."), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "points": points, "number": number, "span": span, "usd": _usd}
    main = REFERENCE if REFERENCE in metrics["routers"] else next(iter(metrics["routers"]))
    metrics = {**metrics, "routers": {main: metrics["routers"][main], **metrics["routers"]}}  # the main one first
    costs = [model["cost"]["estimate"] or 0.0 for model in metrics["pool"]["models"]]
    accuracies = [model["accuracy"]["estimate"] or 0.0 for model in metrics["pool"]["models"]]
    names = predictions.models
    provenance = dict(provenance)
    return environment.get_template("report.html.j2").render(
        main=main, pool=metrics["pool"], routers=metrics["routers"], names=names,
        router=metrics["routers"][main], notice=provenance.pop("notice", None),
        best_model=names[int(np.argmax(accuracies))], dearest_model=names[int(np.argmax(costs))],
        best_auc={name: _best_auc(metrics["routers"], name) for name in names},
        by_cost=[int(index) for index in np.argsort(costs, kind="stable")],
        colours={name: f"var(--s{index % plots.N_SERIES})" for index, name in enumerate(metrics["routers"])},
        cost_curve=[Markup(plots.cost_curve(metrics, size)) for size in (WIDE, NARROW)],
        plane=[Markup(plots.plane(metrics, size)) for size in (WIDE, NARROW)],
        reliability=_reliability(predictions, main), shares=_shares(predictions, main, costs),
        chosen_by_benchmark=_chosen_by_benchmark(predictions, main),
        provenance=_flat(provenance), extra=_extra_sections(extra or {}))


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
    say = {"number": number, "percent": lambda value: percent(value).removesuffix(PERCENT), "points": points,
           "usd": _usd}[kind]
    return f"{say(figure['lower'])} to {say(figure['upper'])}"


def _usd(value: float | None) -> str:
    """USD per query as USD per 1,000 queries."""
    return DASH if value is None else _signed(plots.usd(1000 * value))


def _signed(text: str) -> str:
    return text.replace("-", MINUS)


def _reliability(predictions: Predictions, main: str) -> list[tuple[str, Markup]]:
    p = predictions.routers[main].p
    return [(name, Markup(plots.reliability(p[:, index], predictions.correct[:, index], f"{index}")))
            for index, name in enumerate(predictions.models)]


def _best_auc(routers: Json, model: str) -> float | None:
    """The highest AUC that a router has for the model; None where every one is undefined."""
    estimates = [router["auc"]["per_model"][model]["estimate"] for router in routers.values()]
    return max((estimate for estimate in estimates if estimate is not None), default=None)


def _shares(predictions: Predictions, main: str, costs: Sequence[float]) -> dict[str, Any]:
    router = predictions.routers[main]
    lambdas = np.concatenate([np.linspace(0, 0.1, 101), np.linspace(0.11, 1, 90)])
    choices = curves.sweep(router.p, predictions.cost, predictions.chat, lambdas)
    order = np.argsort(costs, kind="stable")
    share = (choices[:, :, None] == order).mean(axis=1)
    colours = plots.model_colours(len(order))
    figures = [Markup(plots.choice_shares(share, lambdas, colours, router.chosen_lambda, size))
               for size in ((800, 300), (350, 300))]
    return {"figures": figures, "legend": [(predictions.models[m], colour) for m, colour in
                                           zip(order, colours, strict=True)]}


def _chosen_by_benchmark(predictions: Predictions, main: str) -> list[tuple[str, int, list[float]]]:
    """(benchmark, number of queries, share of each model at the chosen lambda), all queries."""
    router = predictions.routers[main]
    choices = curves.sweep(router.p, predictions.cost, predictions.chat, np.array([router.chosen_lambda]))[0]
    rows = []
    for benchmark in sorted(set(predictions.benchmarks)):
        inside = choices[predictions.benchmarks == benchmark]
        rows.append((benchmark, len(inside), [float((inside == model).mean()) for model in
                                              range(len(predictions.models))]))
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list | tuple)
                         else str(value)))
    return rows


def _extra_sections(extra: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"heading": heading, "text": value if isinstance(value, str) else None,
             "rows": [] if isinstance(value, str) else list(value)} for heading, value in extra.items()]
