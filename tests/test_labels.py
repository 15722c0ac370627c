"""Quality of labels: every check finds a planted fault, reports nothing on a clean table, and changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_pool
from scipy.optimize import minimize
from scipy.stats import binom, binomtest
from sklearn.metrics import cohen_kappa_score

from jobs.labels import LabelsConfig, run
from prefill_router.errors import InputError
from prefill_router.files import sha256_file
from prefill_router.outcomes.duplicates import near_duplicates
from prefill_router.outcomes.quality import items
from prefill_router.outcomes.quality.answers import token_limit
from prefill_router.outcomes.quality.check import CHECKS, check_labels
from prefill_router.outcomes.quality.findings import SCHEMA, Finding, Share
from prefill_router.outcomes.quality.models import agreements
from prefill_router.outcomes.quality.table import LabelTable, label_table
from prefill_router.outcomes.splits import split_queries
from prefill_router.outcomes.table import validate_outcomes
from prefill_router.pool import save_pool
from prefill_router.reports.labels_page import render, summary

QUERIES, MODELS = 400, ("tiny", "small", "medium", "large", "huge")
ABILITY = np.array([-1.6, -0.8, 0.0, 0.8, 1.6])
Columns = dict[str, list[Any]]


def clean(seed: int = 3) -> Columns:
    """Columns of a table without faults, queries outside models: two benchmarks, labels that follow a Rasch model."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 1.2, QUERIES)
    right = rng.random((QUERIES, len(MODELS))) < 1 / (1 + np.exp(difficulty[:, None] - ABILITY))
    pairs = [(query, model) for query in range(QUERIES) for model in range(len(MODELS))]
    return {
        "query_id": [f"q{query:03d}" for query, _ in pairs],
        "benchmark": ["algebra" if query % 2 else "law" for query, _ in pairs],
        "prompt": [f"What is the meaning of clause {query}?" for query, _ in pairs],
        "model": [MODELS[model] for _, model in pairs],
        "correct": [float(right[pair]) for pair in pairs],
        "output_tokens": rng.lognormal(5, 0.8, len(pairs)).astype(int).tolist(),
        "parsed": [True] * len(pairs),
        "stop": ["stop"] * len(pairs),
        "answer": [f"Let us think about it. Model {model} says {query + model}." for query, model in pairs],
        "judge_scores": [[float(right[pair])] * 2 for pair in pairs],
        "answers": [1] * len(pairs),
        "scored_by": ["exact_match"] * len(pairs),
        "tokens_from": ["reported"] * len(pairs),
    }


def at(query: int, model: str) -> int:
    """The row of a pair in the columns of `clean`."""
    return query * len(MODELS) + MODELS.index(model)


def read(columns: Columns, without: tuple[str, ...] = ()) -> LabelTable:
    table = pa.table({name: values for name, values in columns.items() if name not in without})
    return label_table(validate_outcomes(table))


def found(check: str, columns: Columns, without: tuple[str, ...] = ()) -> Finding:
    return CHECKS[check](read(columns, without))


def rows(finding: Finding, heading: str) -> tuple[tuple[Any, ...], ...]:
    return next(table.rows for table in finding.tables if table.heading == heading)


def suspected(finding: Finding) -> list[tuple[str, str | None]]:
    return [(row["query_id"], row["model"]) for row in finding.suspects.to_pylist()]


@pytest.mark.parametrize("check", CHECKS)
def test_a_clean_table_has_no_findings(check: str):
    finding = found(check, clean())
    assert finding.status == "none"
    assert finding.suspects.num_rows == 0


def test_checks_without_their_columns_say_what_they_need():
    quality = check_labels(read(clean(), ("parsed", "stop", "answer", "judge_scores", "scored_by", "output_tokens")))
    skipped = {name: finding.needs for name, finding in quality.findings.items() if finding.share is None}
    assert set(skipped) == {"unparsed", "truncated", "refusals", "judges", "sources"}
    assert all(skipped.values())


@pytest.mark.parametrize(("count", "of"), [(0, 7), (3, 10), (10, 10), (250, 1000)])
def test_intervals_of_shares_are_those_of_wilson(count: int, of: int):
    share, wilson = Share(count, of), binomtest(count, of).proportion_ci(method="wilson")
    assert (share.estimate, share.lower, share.upper) == pytest.approx((count / of, wilson.low, wilson.high), abs=1e-6)
    assert Share(0, 0).estimate is None


def duplicated() -> Columns:
    """Queries 0 and 2 have one prompt and other labels, 4 and 5 near-duplicates in two benchmarks."""
    columns = clean()
    for model in MODELS:
        columns["prompt"][at(0, model)] = columns["prompt"][at(2, model)]
        columns["correct"][at(0, model)] = 1 - columns["correct"][at(2, model)]
        columns["prompt"][at(4, model)], columns["prompt"][at(5, model)] = "Who rules?", "who  rules"
    return columns


def test_duplicates_are_counted_within_and_across_benchmarks():
    kinds = {kind: share.count for kind, share in rows(found("duplicates", duplicated()), "Kinds of duplicates")}
    assert kinds == {
        "equal prompts": 2,
        "near-duplicates that are not equal": 2,
        "within a benchmark": 2,
        "in another benchmark": 2,
    }


def test_duplicates_with_different_labels_are_the_first_suspects():
    finding = found("duplicates", duplicated())
    first = finding.suspects.to_pylist()[0]
    assert (first["query_id"], first["other_query_id"], first["score"]) == ("q002", "q000", 1.0)
    assert finding.suspects.num_rows == 2


def test_label_pairs_of_duplicates_are_those_of_a_loop():
    columns = clean()
    columns["prompt"] = [f"Question {int(name[1:]) % 150}" for name in columns["query_id"]]
    labels = read(columns)
    correct, prompts = labels.outcomes.correct, labels.outcomes.prompts
    pairs = [(one, two) for one in range(QUERIES) for two in range(one) if prompts[one] == prompts[two]]
    figures = CHECKS["duplicates"](labels).figures
    assert figures["label_pairs"] == len(pairs) * len(MODELS)
    assert figures["label_pairs_that_differ"] == sum(int((correct[a] != correct[b]).sum()) for a, b in pairs)


def test_leaked_queries_are_those_of_the_search_for_near_duplicates():
    columns = clean()
    columns["prompt"] = [f"Question {int(name[1:]) % 150}{'!' * int(name[1:])}" for name in columns["query_id"]]
    labels = read(columns)
    split = split_queries(labels.outcomes, 0)
    expected = near_duplicates(labels.outcomes.prompts, (split.train, split.test))
    assert CHECKS["duplicates"](labels).figures["leaked_queries"] == expected > 0


def test_a_model_with_many_unparsed_answers_differs_from_the_others():
    columns = clean()
    for query in range(80):
        columns["parsed"][at(query, "small")] = False
        columns["correct"][at(query, "small")] = 0.0
    columns["parsed"][at(9, "huge")] = False
    finding = found("unparsed", columns)
    assert [row[0] for row in rows(finding, "Models that differ from the others")] == ["small"]
    assert (finding.by_model["small"].count, finding.by_benchmark["law"].count) == (80, 40)


def test_an_unparsed_answer_with_a_right_label_is_the_first_suspect():
    columns = clean()
    for query, right in ((3, 0.0), (9, 1.0)):
        columns["parsed"][at(query, "huge")], columns["correct"][at(query, "huge")] = False, right
    assert suspected(found("unparsed", columns)) == [("q009", "huge"), ("q003", "huge")]


def test_equal_rates_of_unparsed_answers_are_no_difference_between_models():
    columns = clean()
    unlucky = np.random.default_rng(0).random(len(columns["parsed"])) < 0.2
    columns["parsed"] = (~unlucky).tolist()
    finding = found("unparsed", columns)
    assert finding.status == "found"
    assert "Models that differ from the others" not in [table.heading for table in finding.tables]


@pytest.mark.parametrize(("unparsed", "known"), [(17, 400), (6, 60)])
def test_a_small_or_an_uncertain_difference_between_models_is_not_clear(unparsed: int, known: int):
    columns = clean()
    for query in range(QUERIES):
        columns["parsed"][at(query, "small")] = query >= unparsed if query < known else None
    finding = found("unparsed", columns)
    assert finding.by_model["small"] == Share(unparsed, known)
    assert finding.tables == ()


@pytest.mark.parametrize("stop", ["max_tokens", "length", "MAX_TOKENS", "max_tokens, stop"])
def test_an_answer_that_stopped_at_the_limit_is_truncated(stop: str):
    columns = clean()
    columns["stop"][at(7, "medium")] = stop
    assert suspected(found("truncated", columns)) == [("q007", "medium")]


def test_answers_that_piled_up_at_the_largest_length_are_truncated():
    columns = clean()
    largest = max(columns["output_tokens"])
    limit = 128 * (largest // 128 + 1)
    for query in range(12):
        columns["output_tokens"][at(query, "tiny")] = limit
        columns["correct"][at(query, "tiny")] = 0.0
    finding = found("truncated", columns, without=("stop",))
    assert suspected(finding) == [(f"q{query:03d}", "tiny") for query in range(12)]
    model, limits, truncated, right, _ = rows(finding, "Accuracy of truncated answers")[0]
    assert (model, limits, truncated.count, right.count) == ("tiny", f"{limit:,}", 12, 0)


def test_known_reasons_to_stop_win_over_lengths():
    columns = clean()
    for query in range(12):
        columns["output_tokens"][at(query, "tiny")] = 16384
    assert found("truncated", columns).status == "none"


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [
        ([*range(100, 400), *[512] * 10], 512),
        ([*range(100, 400), *[512] * 9], None),
        ([*range(100, 400), *[999] * 10], 999),
        ([*range(10, 90), *[90] * 10], None),  # neither round nor long
        ([38] * 60 + [37] * 30, None),  # a fixed format
        ([512] * 60, None),
        ([*[200] * 20, *range(400, 500), *[512] * 30], 512),
        ([*[499] * 20, *range(400, 500), *[512] * 30], None),
        ([float("nan")] * 60, None),
    ],
)
def test_a_limit_is_a_pile_of_answers_at_the_largest_length(lengths: list[float], limit: int | None):
    assert token_limit(np.array(lengths, dtype=np.float64)) == limit


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m sorry, I cannot assist with this request.",
        "**I cannot assist** with that request.",
        "I am unable to comply with this request.",
        "Sorry, I can't provide that.",
        "Es tut mir leid, aber dabei kann ich dir nicht helfen.",
        "Désolé, mais je ne peux pas répondre.",
        "Lo siento, no puedo ayudar con eso.",
        "Mi dispiace, ma non posso aiutarti.",
        "Desculpe, mas não posso ajudar.",
        "Извините, но я не могу помочь.",
        "抱歉\N{FULLWIDTH COMMA}我无法回答这个问题。",
        "申し訳ありませんが、お手伝いできません。",
        "",
        " \n",
    ],
)
def test_refusals_and_empty_answers_are_found(text: str):
    columns = clean()
    columns["answer"][at(11, "large")] = text
    assert suspected(found("refusals", columns)) == [("q011", "large")]


@pytest.mark.parametrize(
    "text",
    [
        "I can't directly divide these numbers, so I expand first. The answer is 4.",
        "The sorry state of clause 3 means I cannot assist is not the answer. It is B.",
        "Sorry seems to be the hardest word.",
        "I'm sorry, but I can't see why. " + "Step by step. " * 100,
        "No puedo es un verbo.",
    ],
)
def test_answers_that_only_look_like_refusals_are_not_found(text: str):
    columns = clean()
    columns["answer"][at(11, "large")] = text
    assert found("refusals", columns).status == "none"


def test_an_answer_stopped_by_a_content_filter_is_a_refusal():
    columns = clean()
    columns["stop"][at(11, "large")] = "content_filter"
    finding = found("refusals", columns, without=("answer",))
    assert [row["detail"] for row in finding.suspects.to_pylist()] == ["stopped by a content filter"]


def test_a_model_that_is_always_wrong_where_others_are_right_is_suspicious():
    columns = clean()
    for query in range(0, QUERIES, 2):
        columns["correct"][at(query, "large")] = 0.0
    finding = found("constant", columns)
    benchmark, model, own, _, remark = rows(finding, "Constant labels")[0]
    assert (benchmark, model, own.count, remark) == ("law", "large", 0, "suspicious")
    assert suspected(finding) == [(f"q{query:03d}", "large") for query in range(0, QUERIES, 2)]


def test_a_benchmark_on_which_all_models_agree_has_no_signal():
    columns = clean()
    columns["correct"] = [
        1.0 if name == "law" else own for name, own in zip(columns["benchmark"], columns["correct"], strict=True)
    ]
    finding = found("constant", columns)
    assert [row[0] for row in rows(finding, "Benchmarks without signal")] == ["law"]
    assert finding.share == Share(5, 10)
    assert finding.suspects.num_rows == 0


def test_one_model_under_two_names_is_found_by_its_labels():
    columns = clean()
    for query in range(QUERIES):
        columns["correct"][at(query, "large")] = columns["correct"][at(query, "huge")]
    columns["correct"][at(5, "large")] = 1 - columns["correct"][at(5, "large")]
    finding = found("alike", columns)
    assert [(row[0], row[1], row[-1]) for row in rows(finding, "Pairs of models")] == [("large", "huge", "labels")]


@pytest.mark.parametrize(("column", "alike_in"), [("output_tokens", "output tokens"), ("answer", "texts")])
def test_one_model_under_two_names_is_found_by_its_answers(column: str, alike_in: str):
    columns = clean()
    for query in range(0, QUERIES, 5):
        for copied in range(query, query + 3):
            columns[column][at(copied, "large")] = columns[column][at(copied, "tiny")]
    assert [(*row[:2], row[-1]) for row in rows(found("alike", columns), "Pairs of models")] == [
        ("tiny", "large", alike_in)
    ]


def test_kappa_is_that_of_scikit_learn():
    columns = clean()
    columns["correct"] = [None if row % 7 == 0 else value for row, value in enumerate(columns["correct"])]
    labels = read(columns)
    kappa, agreement, n = agreements(labels)
    one, other = labels.outcomes.correct[:, 1], labels.outcomes.correct[:, 3]
    both = np.isfinite(one) & np.isfinite(other)
    assert kappa[1, 3] == pytest.approx(cohen_kappa_score(one[both], other[both]))
    assert (agreement[1, 3], n[1, 3]) == ((one[both] == other[both]).sum(), both.sum())
    np.testing.assert_allclose(kappa, kappa.T)


def test_judges_that_disagree_are_found():
    columns = clean()
    columns["judge_scores"][at(2, "tiny")] = [1.0, 0.0, 1.0]
    columns["judge_scores"][at(4, "tiny")] = [0.6, 0.9]
    finding = found("judges", columns)
    assert suspected(finding) == [("q002", "tiny")]
    assert finding.figures["judged_by_several"] == QUERIES * len(MODELS)


def test_fractional_labels_are_found_with_their_entropy():
    columns = clean()
    columns["correct"][at(2, "tiny")], columns["correct"][at(3, "tiny")] = 0.25, 0.5
    finding = found("judges", columns, without=("judge_scores", "answers"))
    assert suspected(finding) == [("q003", "tiny"), ("q002", "tiny")]
    assert finding.figures["mean_entropy_bits"] == pytest.approx((1 + 0.8112781) / (QUERIES * len(MODELS)))


def test_the_noise_floor_is_the_variance_of_the_label_of_one_answer():
    k, p, columns = 4, 0.3, clean()
    counts = np.rint(binom.pmf(np.arange(k + 1), k, p) * 10000).astype(int)  # rows with 0 to k right answers
    n = counts.sum()
    columns = {
        "query_id": [f"q{row}" for row in range(n)],
        "benchmark": ["law"] * n,
        "prompt": [f"Question {row}" for row in range(n)],
        "model": ["tiny"] * n,
        "correct": (np.repeat(np.arange(k + 1), counts) / k).tolist(),
        "answers": [k] * n,
    }
    assert found("judges", columns).figures["brier_floor"] == pytest.approx(p * (1 - p), abs=1e-3)


def test_a_query_with_strong_models_wrong_and_weak_models_right_is_suspected():
    columns = with_twelve_models()
    for place, value in enumerate([1.0] * 6 + [0.0] * 6):
        columns["correct"][100 * 12 + place] = value
    finding = found("implausible", columns)
    assert suspected(finding) == [("q100", None)]
    assert "right, weakest first: m00" in finding.suspects["detail"][0].as_py()
    assert "wrong, strongest first: m11" in finding.suspects["detail"][0].as_py()


def with_twelve_models(easy: bool = False) -> Columns:
    rng = np.random.default_rng(5)
    ability = np.linspace(-2, 2, 12) + (4 if easy else 0)
    right = rng.random((300, 12)) < 1 / (1 + np.exp(rng.normal(size=(300, 1)) - ability))
    return {
        "query_id": np.repeat([f"q{query:03d}" for query in range(300)], 12).tolist(),
        "benchmark": ["law"] * 3600,
        "prompt": np.repeat([f"Question {query}" for query in range(300)], 12).tolist(),
        "model": [f"m{model:02d}" for model in range(12)] * 300,
        "correct": right.astype(np.float64).ravel().tolist(),
    }


def test_a_query_that_all_models_get_wrong_is_suspected_in_an_easy_benchmark_only():
    for easy in (True, False):
        columns = with_twelve_models(easy)
        columns["correct"][1200:1212] = [0.0] * 12
        finding = found("implausible", columns)
        assert suspected(finding) == ([("q100", None)] if easy else [])
        assert finding.figures["all_wrong"] >= 1


def test_the_rasch_fit_is_the_maximum_of_the_posterior():
    correct = np.array([[1, 0, 1, 1], [0, 0, 1, np.nan], [1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]], dtype=np.float64)

    def loss(x: np.ndarray) -> float:
        logit = x[:4] - x[4:, None]
        likelihood = np.nansum(np.where(np.isnan(correct), 0, correct * logit - np.logaddexp(0, logit)))
        return float((x[:4] ** 2).sum() / 18 + (x[4:] ** 2).sum() / 8 - likelihood)

    best = minimize(loss, np.zeros(9), tol=1e-12).x
    np.testing.assert_allclose(np.concatenate(items.fit_rasch(correct)), best, atol=1e-4)


def test_scores_are_log_likelihood_ratios():
    ability = np.array([-1.0, 0.0, 1.0, 2.0])
    correct = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, np.nan]], dtype=np.float64)
    scores = items.misfits(correct, ability)
    assert scores[0] > 0 > scores[1]
    assert np.isnan(scores[2:]).all()  # equal labels, too few labels


def test_missing_rows_and_null_labels_are_counted_by_model():
    columns = clean()
    columns["correct"][at(8, "large")] = None
    gone = [at(query, "medium") for query in range(60)]
    kept = {name: [value for row, value in enumerate(values) if row not in gone] for name, values in columns.items()}
    finding = found("missing", kept)
    assert {name: share.count for name, share in finding.by_model.items() if share.count} == {"medium": 60, "large": 1}
    assert [row[0] for row in rows(finding, "Models that differ from the others")] == ["medium"]
    assert [(row[0], row[1].count) for row in rows(finding, "Kinds")] == [
        ("no row", 60),
        ("row with the label null", 1),
    ]


def test_several_scorers_of_one_benchmark_are_found():
    columns = clean()
    for query in range(0, QUERIES, 2):
        columns["scored_by"][at(query, "huge")] = "judge"
    finding = found("sources", columns)
    assert (finding.share, finding.figures["queries_with_several_scorers"]) == (Share(1, 2), 200)
    assert [(row[0], row[1], row[3]) for row in rows(finding, "Benchmarks with several scorers")] == [
        ("law", "exact_match", 4),
        ("law", "judge", 1),
    ]


def test_scorers_that_differ_between_the_models_of_a_query_are_found():
    columns = clean()
    for query in range(0, QUERIES, 2):  # every model has labels of both scorers
        columns["scored_by"][at(query, "huge" if query % 4 else "tiny")] = "judge"
        for model in ("small", "medium", "large"):
            columns["scored_by"][at(query, model)] = "judge" if query % 8 < 4 else "exact_match"
    assert found("sources", columns).share == Share(1, 2)


def test_models_with_other_scorers_on_other_queries_are_found():
    columns = clean()
    for query in range(QUERIES):
        for model in MODELS:
            first = query % 4 < 2
            columns["correct"][at(query, model)] = 1.0 if first == (model != "huge") else None
            columns["scored_by"][at(query, model)] = None if first == (model == "huge") else f"{first}"
    finding = found("sources", columns)
    assert (finding.share, finding.figures["queries_with_several_scorers"]) == (Share(2, 2), 0)


def test_two_scorers_that_every_model_has_on_the_same_queries_are_no_finding():
    columns = clean()
    columns["scored_by"] = ["judge" if int(name[1:]) % 4 < 2 else "exact_match" for name in columns["query_id"]]
    assert found("sources", columns).status == "none"


def test_one_scorer_for_each_benchmark_is_no_finding():
    columns = clean()
    columns["scored_by"] = list(columns["benchmark"])
    assert found("sources", columns).status == "none"


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("parsed", "yes", "column 'parsed' must hold numbers or booleans, it holds string"),
        ("parsed", 0.5, "column 'parsed' has values other than 0 and 1"),
        ("stop", 3, "column 'stop' must hold strings"),
        ("judge_scores", 1.0, "column 'judge_scores' must hold lists of numbers"),
        ("judge_scores", [7.0], "column 'judge_scores', row 0: got 7, allowed are numbers from 0 to 1"),
    ],
)
def test_a_wrong_optional_column_is_refused_with_its_name(column: str, values: Any, message: str):
    columns = clean()
    columns[column] = [values] * len(columns["model"])
    with pytest.raises(InputError, match=message):
        read(columns)


def test_unknown_values_of_optional_columns_are_left_out():
    columns = clean()
    for name in ("parsed", "stop", "answer", "judge_scores", "scored_by"):
        columns[name] = [None if row % 2 else value for row, value in enumerate(columns[name])]
    labels = read(columns)
    for check in ("unparsed", "refusals"):
        assert CHECKS[check](labels).share == Share(0, 1000)
    assert CHECKS["sources"](labels).status == "none"


def test_the_order_of_rows_changes_no_count():
    columns = duplicated()
    order = np.random.default_rng(1).permutation(len(columns["model"]))
    turned = {name: [values[row] for row in order] for name, values in columns.items()}
    straight, shuffled = (check_labels(read(one)) for one in (columns, turned))
    for name in ("duplicates", "constant", "missing", "judges"):
        assert straight.findings[name].share == shuffled.findings[name].share
        assert straight.findings[name].by_benchmark == shuffled.findings[name].by_benchmark


def faulty() -> Columns:
    """Most faults at once."""
    columns = duplicated()
    for query in range(120):
        columns["parsed"][at(query, "small")] = False
        columns["stop"][at(query, "tiny")] = "max_tokens"
        columns["answer"][at(query, "medium")] = "I'm sorry, but I can't help with that."
        columns["scored_by"][at(query, "huge")] = "judge"
        columns["judge_scores"][at(query, "huge")] = [0.0, 1.0]
    for query in range(QUERIES):
        columns["correct"][at(query, "large")] = columns["correct"][at(query, "huge")]
        columns["correct"][at(query, "tiny")] = 0.0
    columns["correct"][at(200, "small")] = None
    return columns


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Columns], Path]:
    def write(columns: Columns) -> Path:
        path = tmp_path / "outcomes.parquet"
        pq.write_table(pa.table(columns).replace_schema_metadata({"note": "a notice"}), path)
        return path

    return write


def test_the_job_writes_page_figures_and_suspects_and_changes_nothing(tmp_path: Path, written: Callable[..., Path]):
    path = written(faulty())
    before = sha256_file(path)
    line = run(LabelsConfig(outcomes=path, output=tmp_path / "out"))
    assert sha256_file(path) == before
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "labels.html",
        "labels.json",
        "suspects.parquet",
    ]
    figures = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert figures["findings"]["unparsed"]["share"]["count"] == 120
    assert figures["provenance"]["outcomes_sha256"] == before
    suspects = pq.read_table(tmp_path / "out" / "suspects.parquet")
    assert suspects.schema.equals(SCHEMA)
    assert suspects.num_rows == sum(one["suspects"] for one in figures["findings"].values())
    assert "unparsed 120 of 2,000 answers" in line


def test_the_models_of_a_pool_are_checked_and_no_others(tmp_path: Path, written: Callable[..., Path]):
    save_pool(make_pool("large", "huge"), tmp_path / "pool.yaml")
    run(LabelsConfig(outcomes=written(faulty()), output=tmp_path / "out", pool=tmp_path / "pool.yaml"))
    figures = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert figures["models"] == ["large", "huge"]
    assert figures["findings"]["unparsed"]["status"] == "none"
    assert figures["findings"]["alike"]["share"]["count"] == 1


def test_the_same_table_gives_the_same_page():
    pages = [render(check_labels(read(faulty())), {"seed": 0}) for _ in range(2)]
    assert pages[0] == pages[1]


def test_the_page_loads_nothing_and_escapes_text_of_the_data():
    columns, hostile = faulty(), "<script>alert('$x$')</script>"
    columns["model"] = [hostile if name == "small" else name for name in columns["model"]]
    columns["prompt"] = [f"{hostile} {prompt}" for prompt in columns["prompt"]]
    page = render(check_labels(read(columns)), {"notice": hostile})
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    assert "alert(" in page


def test_every_section_of_a_faulty_table_is_on_the_page():
    quality = check_labels(read(faulty()))
    page = render(quality, {})
    assert all(f'<section id="{name}">' in page for name in CHECKS)
    assert set(quality.with_findings) >= set(CHECKS) - {"implausible"}


def test_a_table_of_one_model_and_one_query_has_a_page():
    columns = {name: values[:1] for name, values in clean().items()}
    quality = check_labels(read(columns))
    assert "nothing found" in summary(quality)
    assert "No check reports suspicious labels." in render(quality, {})
