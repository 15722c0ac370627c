"""report.html: self-contained, complete, escaped, and written for every kind of evaluation."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from evaluation_pool import made_up

from prefill_router.evaluation.evaluate import evaluate
from prefill_router.evaluation.plots import usd
from prefill_router.evaluation.predictions import RouterPredictions
from prefill_router.evaluation.report import render, span, write_report

HOSTILE = "<script>alert('$x$')</script>"


class Page(HTMLParser):
    """Collects elements, attributes and ids."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def hostile():
    """Names that would be markup, or mathematics to matplotlib."""
    predictions = made_up(200, 4)
    return dataclasses.replace(
        predictions, models=(*predictions.models[:3], HOSTILE),
        benchmarks=np.where(predictions.benchmarks == "logic", HOSTILE, predictions.benchmarks),
        routers={**predictions.routers, "r&d <b>": predictions.routers["knn"]})


@pytest.fixture(scope="module")
def page(hostile):
    metrics = evaluate(hostile, n_resamples=20)
    return render(hostile, metrics, {"command": HOSTILE, "digests": {"outcomes": "abc"}, "notice": HOSTILE},
                  {HOSTILE: HOSTILE, "layers": [{HOSTILE: HOSTILE}]})


def test_the_report_loads_nothing(page):
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#"), (name, value)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "http" not in page


def test_the_report_names_every_router_model_and_benchmark_and_escapes_them(page, hostile):
    text = " ".join(Page(page).text)
    assert "<script" not in page
    for name in (*hostile.routers, *hostile.models, *set(hostile.benchmarks), "digests.outcomes", "abc"):
        assert name in text, name


def test_ids_are_unique_and_every_reference_inside_the_page_is_met(page):
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    references = re.findall(r"url\(#([^)]+)\)", page) + [value[1:] for name, value in parsed.attributes
                                                          if name == "href"]
    assert references
    assert set(references) <= set(parsed.ids)


def test_every_colour_of_the_figures_is_a_css_variable_or_of_the_model_ramp(page):
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    plain = [figure for figure in figures if "along lambda" not in figure]
    assert len(plain) == 2 + 2 + 4
    for figure in plain:
        drawn = re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", figure)
        assert not drawn, set(drawn)


def test_the_report_is_written_whole_under_its_name(tmp_path, hostile):
    path = write_report(tmp_path / "new", hostile, evaluate(hostile, n_resamples=0), {})
    assert path == tmp_path / "new" / "report.html"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_model_names_with_dots_are_names_not_paths():
    predictions = made_up(200, 4)
    names = ("gemini-1.5-pro-002", "v0.1", "llama.3.1", "7")
    predictions = dataclasses.replace(predictions, models=names)
    metrics = evaluate(predictions, n_resamples=0)
    page = render(predictions, metrics, {})
    best = [max(router["auc"]["per_model"][name]["estimate"] for router in metrics["routers"].values())
            for name in names]
    bold = re.findall(r'<td class="n best"[^>]*>([0-9.]+)', page)
    assert set(bold) == {f"{auc:.3f}" for auc in best}


@pytest.mark.parametrize("case", ["no complete labels", "equal costs", "free", "one class", "one router", "one model"])
def test_undefined_figures_are_said_not_drawn(case):
    predictions = made_up(60, 3)
    correct, cost, routers, models = predictions.correct.copy(), predictions.cost, predictions.routers, 3
    if case == "no complete labels":
        correct[np.arange(60), np.arange(60) % 3] = np.nan
    elif case == "equal costs":
        cost = np.ones_like(cost)
    elif case == "free":
        cost = np.zeros_like(cost)
    elif case == "one class":
        correct[:, 1] = 1
    elif case == "one router":
        routers = {"only": routers["knn"]}
    elif case == "one model":
        models = 1
    predictions = dataclasses.replace(
        predictions, models=predictions.models[:models], correct=correct[:, :models], cost=cost[:, :models],
        chat=predictions.chat[:, :models],
        routers={name: RouterPredictions(r.p[:, :models], r.chosen_lambda) for name, r in routers.items()})
    page = render(predictions, evaluate(predictions, n_resamples=10), {})
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", page.lower())


def test_dollars_have_three_significant_digits():
    said = {0.0: "$0", 0.00412: "$0.00412", 0.25: "$0.250", 12.34: "$12.3", 1234.4: "$1,234"}
    assert {value: usd(value) for value in said} == said


def test_intervals_are_said_with_a_real_minus_sign():
    assert span({"estimate": 0.0, "lower": -0.0123, "upper": 0.02}, "points") == "\N{MINUS SIGN}1.2 to +2.0"
    assert span({"estimate": None, "lower": None, "upper": None, "reason": "because"}) == "because"
