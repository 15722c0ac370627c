"""report.html: self-contained, complete, escaped, and written for every kind of evaluation."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from evaluation_pool import made_up

from prefill_router.metrics import choices
from prefill_router.metrics.controls import TRUNCATION, chance_figures, truncation_figures
from prefill_router.metrics.curves import area_along
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import RouterPredictions
from prefill_router.metrics.robustness import Perturbed, robustness
from prefill_router.metrics.seeds import across_seeds
from prefill_router.reports import plots_layers
from prefill_router.reports.evaluation import SECTIONS, exact_paths, render, write_report
from prefill_router.reports.format import excerpt, span, usd, without_common_start
from prefill_router.reports.plots_curves import thinned
from prefill_router.routing.policy import TrainingMeans

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
    """Predictions with names that contain markup and matplotlib mathematics."""
    predictions = made_up(200, 4)
    return dataclasses.replace(
        predictions,
        models=(*predictions.models[:3], HOSTILE),
        benchmarks=np.where(predictions.benchmarks == "logic", HOSTILE, predictions.benchmarks),
        routers={**predictions.routers, "r&d <b>": predictions.routers["knn"]},
    )


@pytest.fixture(scope="module")
def metrics(hostile):
    return evaluate(hostile, n_resamples=20)


@pytest.fixture(scope="module")
def everything(hostile, metrics):
    """Metrics with all optional parts."""
    rng = np.random.default_rng(0)
    perturbed = Perturbed(
        np.repeat(hostile.query_ids[:50], 2),
        np.tile([HOSTILE, "upper case"], 50),
        hostile.models,
        {name: np.repeat(router.p[:50], 2, axis=0)[:, rng.permutation(4)] for name, router in hostile.routers.items()},
    )
    found = robustness(hostile, perturbed, n_resamples=20)
    other = evaluate(dataclasses.replace(hostile, correct=hostile.correct[::-1].copy()), n_resamples=20)
    trunks = {f"{kind} {n}": hostile.routers["knn"] for kind in ("shuffled_labels", "random_features") for n in (1, 2)}
    ids = hostile.query_ids.tolist()
    rows = {"encoder": [HOSTILE] * 200, "query_id": ids, "part": ["test"] * 200, "n_tokens": [600] * 200}
    rows |= {"n_dropped": [9] * 20 + [0] * 180, "prompt_digest": ids, "tokens_digest": ["same"] * 2 + ids[2:]}
    return {
        **metrics,
        "controls": {
            **chance_figures(dataclasses.replace(hostile, routers=trunks), n_resamples=20),
            "truncation": truncation_figures(pa.table(rows, schema=TRUNCATION), hostile, n_resamples=20),
        },
        "leave_one_benchmark_out": other,
        "seeds": across_seeds({0: metrics, 1: other}),
        "routers": {name: {**router, "robustness": found[name]} for name, router in metrics["routers"].items()},
    }


@pytest.fixture(scope="module")
def page(hostile, everything):
    return render(
        hostile,
        everything,
        {"command": HOSTILE, "digests": {"outcomes": "abc"}, "notice": HOSTILE},
        {HOSTILE: HOSTILE, "more": [{HOSTILE: HOSTILE}]},
        prompts=dict.fromkeys(hostile.query_ids, HOSTILE + "</blockquote></details>" + "y" * 100_000),
        layers=layer_rows(6, 4, HOSTILE),
    )


@pytest.fixture(scope="module")
def bare(hostile, metrics):
    """A page without optional parts."""
    return render(hostile, metrics, {})


def layer_rows(n_layers, n_models, *encoders, seed=0):
    """Rows of the form of plots_layers; the AUC of the last model is undefined."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "encoder": encoder,
            "pooling": pooling,
            "layer": layer,
            "chosen": [],
            "auc": [*rng.uniform(0.5, 0.9, n_models - 1).tolist(), None],
            "fisher_j": [*rng.uniform(0, 2, n_models - 1).tolist(), None],
        }
        for encoder in encoders or ("f6",)
        for pooling in ("last", "mean")
        for layer in range(n_layers)
    ]
    for model in range(n_models - 1):
        rows[rng.integers(len(rows))]["chosen"].append(model)
    return rows


def figures(page, label=""):
    found = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    return [figure for figure in found if label in figure[: figure.index(">")]]


def section_ids(page):
    return re.findall(r'<section id="([^"]+)">', page)


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


def test_ids_are_unique_and_every_internal_reference_resolves(page):
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    references = re.findall(r"url\(#([^)]+)\)", page) + [
        value[1:] for name, value in parsed.attributes if name == "href"
    ]
    assert references
    assert set(references) <= set(parsed.ids)


def test_every_colour_of_the_figures_is_a_css_variable_or_of_the_model_ramp(page):
    ramped = figures(page, "along lambda") + figures(page, "Share of each model")
    plain = [figure for figure in figures(page) if figure not in ramped]
    assert len(ramped) == 2 + 2
    assert len(plain) == 2 + 2 + 4 + 2 * 2
    for figure in plain:
        drawn = re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", figure)
        assert not drawn, set(drawn)


def test_every_section_with_data_is_on_the_page_and_in_the_contents(page):
    ids = section_ids(page)
    assert ids == [*[name for name in SECTIONS if name != "provenance"], "extra-0", "extra-1", "provenance"]
    contents = page[page.index("<nav") : page.index("</nav>")]
    assert re.findall('href="#([^"]+)"', contents) == ids


def test_a_section_without_data_is_left_out(bare):
    absent = {"unseen", "controls", "robustness", "seeds", "layers"}
    assert section_ids(bare) == [name for name in SECTIONS if name not in absent]


def test_the_area_of_the_drawn_path_is_the_reported_area(hostile, metrics):
    for name, path in exact_paths(hostile).items():
        router = metrics["routers"][name]
        assert area_along(path.x[None], path.y[None])[0] == pytest.approx(router["p_auccc_exact"]["estimate"])
        assert len(path.x) == router["path_points"]
        cheapest, oracle = metrics["pool"]["models"][0]["accuracy"], metrics["pool"]["oracle_accuracy"]
        low, high = cheapest["estimate"], oracle["estimate"]
        assert low + path.y[path.chosen] * (high - low) == pytest.approx(
            router["accuracy_at_chosen_lambda"]["estimate"]
        )
        drawn = thinned(path.x, path.y, 0.004)
        assert {0, len(path.x) - 1} <= set(drawn)
        nearest = np.abs(path.x[:, None] - path.x[drawn]) + np.abs(path.y[:, None] - path.y[drawn])
        assert nearest.min(axis=1).max() < 0.008


def test_the_most_confident_mistakes_are_avoidable_ones_by_confidence(hostile):
    router, mistakes = hostile.routers["prefill"], []
    for query, query_id in enumerate(hostile.query_ids):
        score = (1 - router.chosen_lambda) * router.p[query] - router.chosen_lambda * hostile.cost_norm[query]
        chosen, right = int(score.argmax()), np.flatnonzero(hostile.correct[query] == 1)
        if hostile.correct[query, chosen] == 0 and len(right):
            by_p = sorted(right, key=lambda model: -router.p[query, model])
            mistakes.append(
                (-router.p[query, chosen], query_id, hostile.models[chosen], [hostile.models[model] for model in by_p])
            )
    found = choices.most_wrong(hostile, "prefill", 7)
    assert [
        (-mistake.p, mistake.query_id, mistake.chosen, [name for name, _ in mistake.right]) for mistake in found
    ] == sorted(mistakes)[:7]


def test_tenths_by_confidence_hold_every_query_once_in_rising_order(hostile):
    found = choices.by_confidence(hostile, "prefill")
    assert np.allclose(found.share.sum(axis=1), 1)
    assert (np.diff(found.highest) >= 0).all()
    chosen = choices.at_chosen_lambda(hostile, "prefill")
    answers = hostile.correct[np.arange(len(hostile)), chosen]
    assert found.n_right.sum() == (answers == 1).sum()
    assert found.n_labelled.sum() == (~np.isnan(answers)).sum()


@pytest.mark.parametrize(
    ("prompt", "shown", "rest", "left_out"),
    [
        ("a\n\n  b\tc ", "a b c", "", 0),
        ("x" * 100_000, "x" * 240, "x" * 4000, 95_760),
        ("\0a\ud800", "\ufffda\ufffd", "", 0),
        ("ما هي", "ما هي", "", 0),
        ("four " * 100, ("four " * 48).strip(), ("four " * 52).strip(), 0),
        ("seven77 " * 31, ("seven77 " * 30).strip(), "seven77", 0),
    ],
)
def test_an_excerpt_is_one_line_and_cuts_a_long_prompt(prompt, shown, rest, left_out):
    assert excerpt(prompt) == (shown, rest, left_out)


def test_markup_in_prompts_is_escaped(page):
    parsed = Page(page)
    assert parsed.tags.count("blockquote") == parsed.tags.count("details") == choices.WORST
    assert sum(HOSTILE + "</blockquote>" in text for text in parsed.text) == choices.WORST
    assert page.count("y" * 1000) < choices.WORST * 5


def test_mistakes_without_a_prompt_have_no_quotation(bare):
    mistakes = bare.split('<ol class="mistakes">')[1].split("</ol>")[0]
    assert mistakes.count("<li>") == choices.WORST
    assert "blockquote" not in mistakes


def test_a_router_without_avoidable_mistakes_has_no_list_of_them(hostile):
    sure = np.nan_to_num(hostile.correct)
    predictions = dataclasses.replace(hostile, routers={"sure": RouterPredictions(sure, 0.0)})
    assert choices.most_wrong(predictions, "sure") == []
    assert "never chose a wrong model for a query that another model answers correctly" in render(
        predictions, evaluate(predictions, n_resamples=0), {}
    )


@pytest.mark.parametrize(("n_layers", "n_models"), [(37, 20), (4, 20), (37, 6), (4, 6), (1, 1), (2, 2)])
def test_a_layer_map_of_any_size_is_a_small_figure(n_layers, n_models):
    rows = layer_rows(n_layers, n_models, "one", "two")
    parts = plots_layers.panels(rows)
    assert list(parts) == [("one", "last"), ("one", "mean"), ("two", "last"), ("two", "mean")]
    names = [f"model-{index}" for index in range(n_models)]
    for part in parts.values():
        drawn = plots_layers.layer_map(part, names, rows, 540, "last")
        assert len(drawn) < 60_000
        assert all(name in drawn for name in names)
        readable = re.findall(r">(\.\d{3})<", drawn)
        assert len(readable) == (n_layers * (n_models - 1) if n_models < 20 and n_layers < 37 else 0)
        rings = re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--ink\)', drawn)
        assert sum(ring.count("M") for ring in rings) == sum(len(row["chosen"]) for row in part)


def test_every_figure_of_a_page_is_small(page):
    assert max(map(len, figures(page))) < 60_000
    assert not re.search(r' (?:d|x|y)="[^"]*\.\d{3}', page)


def test_the_report_is_the_only_file_written(tmp_path, hostile, metrics):
    path = write_report(tmp_path / "new", hostile, metrics, {})
    assert path == tmp_path / "new" / "report.html"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_model_names_with_dots_are_names_not_paths():
    predictions = made_up(200, 4)
    names = ("gemini-1.5-pro-002", "v0.1", "llama.3.1", "7")
    predictions = dataclasses.replace(predictions, models=names)
    metrics = evaluate(predictions, n_resamples=0)
    page = render(predictions, metrics, {})
    best = [
        max(router["auc"]["per_model"][name]["estimate"] for router in metrics["routers"].values()) for name in names
    ]
    bold = re.findall(r'<td class="n best"[^>]*>([0-9.]+)', page)
    assert set(bold) == {f"{auc:.3f}" for auc in best}


@pytest.mark.parametrize("case", ["no complete labels", "equal costs", "free", "one class", "one router", "one model"])
def test_undefined_figures_show_their_reason(case):
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
        predictions,
        models=predictions.models[:models],
        correct=correct[:, :models],
        cost=cost[:, :models],
        cost_norm=predictions.cost_norm[:, :models],
        routers={name: RouterPredictions(r.p[:, :models], r.chosen_lambda) for name, r in routers.items()},
        training=TrainingMeans(*(values[:models] for values in vars(predictions.training).values())),
    )
    metrics = evaluate(predictions, n_resamples=10)
    page = render(predictions, metrics, {}, layers=layer_rows(3, models))
    for router in metrics["routers"].values():
        for figure in ("auc", "p_auccc", "headroom_captured_at_chosen_lambda"):
            if router[figure]["estimate"] is None:
                assert f"undefined: {router[figure]['reason']}" in page
    assert ("Best single model: " in page) == (case != "no complete labels")
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", page.lower())


def test_excerpts_leave_out_a_long_common_start_of_the_prompts():
    start = "You are careful and think about every step. " * 4
    prompts = {"a": start + "What is 2 + 2?", "b": start + "When did it rain?"}
    # "Wh" is common too, but the cut is between words.
    assert without_common_start(prompts) == {"a": "… What is 2 + 2?", "b": "… When did it rain?"}
    for kept in ({"a": prompts["a"]}, {"a": start, "b": start}, {"a": "Is it so?", "b": "Is it not?"}):
        assert without_common_start(kept) == kept


def test_more_benchmarks_than_fit_a_page_are_sorted_by_gain_and_scroll():
    predictions = made_up(400, 3)
    many = dataclasses.replace(predictions, benchmarks=np.array([f"b{q % 25:02d}" for q in range(400)], dtype=object))
    few, more = (evaluate(given, n_resamples=0) for given in (predictions, many))
    assert 'class="scroll tall"' not in render(predictions, few, {})
    page, pool = render(many, more, {}), more["pool"]["benchmarks"]
    assert page.count('class="scroll tall"') == 2
    own = more["routers"]["prefill"]["benchmarks"]
    gain = {
        name: own[name]["accuracy_at_chosen_lambda"]["estimate"] - found["best_single_accuracy"]["estimate"]
        for name, found in pool.items()
    }
    shown = re.findall(r"<tr><th>(b\d\d)</th>", page[page.index('<section id="benchmarks">') :])
    assert len(shown) == 25
    assert [gain[name] for name in shown] == sorted(gain.values(), reverse=True)


def test_dollars_have_three_significant_digits():
    said = {0.0: "$0", 0.00412: "$0.00412", 0.25: "$0.250", 12.34: "$12.3", 1234.4: "$1,234"}
    assert {value: usd(value) for value in said} == said


def test_intervals_have_a_typographic_minus_sign():
    assert span({"estimate": 0.0, "lower": -0.0123, "upper": 0.02}, "points") == "\N{MINUS SIGN}1.2 to +2.0"
    assert span({"estimate": None, "lower": None, "upper": None, "reason": "because"}) == "because"
