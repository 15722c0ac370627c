"""jobs.compare: paired comparison of evaluations of one test split; different test sets are refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluation_pool import made_up

from jobs.compare import CompareConfig, run
from prefill_router.cli import main
from prefill_router.errors import InputError
from prefill_router.metrics.compare import compare, merge, read_runs
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import (
    MedianCosts,
    Predictions,
    RouterPredictions,
    read_predictions,
    write_predictions,
)
from prefill_router.metrics.utility import TrainingMeans
from prefill_router.reports.comparison import as_text, headline, render

HOSTILE = "r&d <script>alert('$x$')</script>"


def written(predictions: Predictions, folder: Path) -> Path:
    """The files of an output folder of jobs.evaluate."""
    write_predictions(predictions, folder / "predictions.parquet")
    (folder / "metrics.json").write_text("{}")
    return folder


def blurred(predictions: Predictions, name: str = "prefill", by: float = 0.3) -> Predictions:
    """The same test split, with noise on one router's confidences."""
    router = predictions.routers[name]
    noise = np.random.default_rng(9).normal(0, by, router.p.shape)
    return replace(
        predictions,
        routers={**predictions.routers, name: replace(router, p=np.clip(router.p + noise, 0, 1), chosen_lambda=0.04)},
    )


@pytest.fixture(scope="module")
def a():
    return made_up(120, 4, group_size=2)


@pytest.fixture
def two(tmp_path, a):
    """Two runs that differ in the prefill router and the kNN vote."""
    return [
        written(a, tmp_path / "may" / "evaluation"),
        written(blurred(blurred(a), "knn"), tmp_path / "june" / "evaluation"),
    ]


def test_paired_differences_equal_those_of_one_joint_evaluation(two, a):
    other = blurred(a).routers["prefill"]
    both = evaluate(replace(a, routers={**a.routers, "other": other}), n_resamples=30, seed=2)
    compared = compare(read_runs(two), n_resamples=30, seed=2)
    assert compared["reference"] == "may: prefill"
    assert compared["routers"]["june: prefill"]["differences"] == both["routers"]["other"]["differences"]
    assert compared["routers"]["unified-mlp"]["differences"] == both["routers"]["unified-mlp"]["differences"]
    assert compared["routers"]["june: prefill"]["curve"] == both["routers"]["other"]["curve"]
    assert compared["pool"] == both["pool"]


def test_routers_are_named_for_their_runs_and_identical_ones_merged(two, a):
    merged = merge(read_runs(two))
    assert set(merged.routers) == {
        "may: prefill",
        "june: prefill",
        "may: knn",
        "june: knn",
        "unified-mlp",
        "category-prior",
    }
    twins = merge(read_runs([two[0], written(a, two[0].parents[1] / "july" / "evaluation")]))
    assert {name for name in twins.routers if "prefill" in name} == {"may: prefill", "july: prefill"}


def test_the_overhead_of_a_router_reaches_the_merged_evaluation(tmp_path, two, a):
    costly = replace(a, routers={name: replace(router, overhead_usd=0.002) for name, router in a.routers.items()})
    merged = merge(read_runs([two[0], written(costly, tmp_path / "costly" / "evaluation")]))
    assert {name: router.overhead_usd for name, router in merged.routers.items() if "knn" in name} == {
        "may: knn": 0.0,
        "costly: knn": 0.002,
    }


def test_neither_the_order_of_rows_nor_that_of_models_matters(two):
    straight = compare(read_runs(two), n_resamples=10)
    file = two[1] / "predictions.parquet"
    table = pq.read_table(file)
    turned = table.take(np.random.default_rng(0).permutation(len(table)))
    pq.write_table(turned.sort_by([("router", "descending"), ("model", "ascending")]), file)
    shuffled = compare(read_runs(two), n_resamples=10)
    assert shuffled["routers"] == straight["routers"]
    assert shuffled["runs"]["june"]["predictions_sha256"] != straight["runs"]["june"]["predictions_sha256"]


@pytest.mark.parametrize(
    ("ends", "names"),
    [
        (["x/may/evaluation", "x/june/evaluation"], ["may", "june"]),
        (["x/may", "y/june"], ["may", "june"]),
        (["x/may/evaluation", "y/may/evaluation", "x/june/evaluation"], ["x/may", "y/may", "june"]),
        (["x/evaluation", "x/y/evaluation"], ["x", "y"]),
    ],
)
def test_a_run_is_named_by_the_shortest_unique_suffix_of_its_path(tmp_path, a, ends, names):
    assert [run.name for run in read_runs([written(a, tmp_path / end) for end in ends])] == names


def changed(values: np.ndarray, to: object) -> np.ndarray:
    values = values.copy()
    values.flat[0] = to
    return values


DIFFERENT = {
    "queries": (lambda p: p.take(np.arange(1, 120)), r"in queries: 1 in may alone, such as 'q00000'; .*fit\.seed"),
    "other queries": (
        lambda p: replace(p, query_ids=changed(p.query_ids, "new")),
        "in queries: 1 in may alone, such as 'q00000' and 1 in june alone, such as 'new'; ",
    ),
    "models": (
        lambda p: replace(p, models=("other", *p.models[1:])),
        r"in models: 1 in may alone, such as 'tiny-1b' and 1 in june alone, such as 'other'; .*pool\.yaml",
    ),
    "benchmark": (
        lambda p: replace(p, benchmarks=changed(p.benchmarks, "x")),
        r"in the benchmark of 1 queries, such as 'q00000': '\w[\w ]+' and 'x'; ",
    ),
    "group": (
        lambda p: replace(p, groups=changed(p.groups, "x")),
        "in the group of 1 queries, such as 'q00000': 'g0' and 'x'; ",
    ),
    "label": (
        lambda p: replace(p, correct=changed(p.correct, np.nan)),
        r"in the label of 1 pairs, such as \('q00000', 'tiny-1b'\): [01] and unlabelled; .*same outcomes",
    ),
    "cost": (
        lambda p: replace(p, cost=p.cost * 1.01),
        r"in the est_cost_usd of 480 pairs, such as \('q00000', 'tiny-1b'\): .*the cost models differ.*pool",
    ),
    "cost_norm": (
        lambda p: replace(p, cost_norm=p.cost_norm * 0.9),
        "in the cost_norm of .* pairs, such as .*the cost models differ",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_different_test_sets_are_refused_with_an_example_and_a_remedy(tmp_path, a, what):
    change, message = DIFFERENT[what]
    folders = [written(a, tmp_path / "may"), written(change(a), tmp_path / "june")]
    with pytest.raises(InputError, match=f"^runs may and june: their test sets differ {message}"):
        read_runs(folders)


def test_costs_that_differ_by_rounding_alone_are_the_same(tmp_path, a):
    near = replace(a, cost=a.cost * (1 + 1e-14), cost_norm=np.clip(a.cost_norm * (1 + 1e-14), 0, 1))
    assert len(read_runs([written(a, tmp_path / "may"), written(near, tmp_path / "june")])) == 2


def with_expected_output(predictions: Predictions, factor: float) -> Predictions:
    """The same test split with costs of expected output tokens, `factor` times those of the medians."""
    training = TrainingMeans(np.full(4, 0.5), np.full(4, 0.2))
    return replace(
        predictions,
        cost=predictions.cost * factor,
        cost_norm=np.clip(predictions.cost_norm * factor, 0, 1),
        training=replace(training, cost_norm=factor * training.cost_norm),
        medians=MedianCosts(predictions.cost, predictions.cost_norm, training.cost_norm),
    )


def test_costs_of_expected_output_tokens_survive_the_file_and_a_subset(tmp_path, a):
    write_predictions(with_expected_output(a, 1.5), tmp_path / "predictions.parquet")
    back = read_predictions(tmp_path / "predictions.parquet")
    np.testing.assert_array_equal(back.cost, a.cost * 1.5)
    part = back.take(np.array([5, 3])).with_median_costs()
    np.testing.assert_array_equal(part.cost, a.cost[[5, 3]])
    np.testing.assert_array_equal(part.cost_norm, a.cost_norm[[5, 3]])
    np.testing.assert_array_equal(part.training.cost_norm, np.full(4, 0.2))
    assert part.medians is None


@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_runs_with_other_expected_output_tokens_are_compared_at_the_medians(tmp_path, a, factor):
    second = with_expected_output(blurred(a), 0.9) if factor < 1 else blurred(a)  # a run without expected tokens
    folders = [written(with_expected_output(a, 1.5), tmp_path / "may"), written(second, tmp_path / "june")]
    plain = [written(a, tmp_path / "plain" / "may"), written(blurred(a), tmp_path / "plain" / "june")]
    assert [run.predictions.cost.tolist() for run in read_runs(folders)] == [a.cost.tolist()] * 2
    ours, theirs = (compare(read_runs(runs), n_resamples=0)["routers"] for runs in (folders, plain))
    for name in ("may", "june"):
        assert ours[f"{name}: prefill"]["p_auccc"] == theirs[f"{name}: prefill"]["p_auccc"]


def test_a_margin_is_compared_with_a_run_without_training_means_but_not_with_other_means(tmp_path, a):
    means = TrainingMeans(np.linspace(0.2, 0.6, len(a.models)), np.linspace(0.1, 0.9, len(a.models)))
    router = replace(a.routers["prefill"], margin_bonus=0.1)
    new = replace(a, training=means, routers=a.routers | {"prefill": router})
    old = replace(blurred(a), training=None)
    for order in ((old, new), (new, old)):
        folders = [written(one, tmp_path / f"{id(one)}") for one in order]
        merged = merge(read_runs(folders))
        assert sorted(one.margin_bonus for one in merged.routers.values())[-1] == 0.1
        assert merged.training is not None
    other = replace(blurred(new), training=replace(means, accuracy=means.accuracy[::-1].copy()))
    with pytest.raises(InputError, match="training means, which determine the margin"):
        read_runs([written(new, tmp_path / "new"), written(other, tmp_path / "other")])


def test_runs_that_cannot_be_read_as_two_are_refused(tmp_path, two):
    with pytest.raises(InputError, match="runs: got 1, a comparison takes two or more"):
        read_runs(two[:1])
    with pytest.raises(InputError, match="are the same folder"):
        read_runs([*two, two[0] / ".." / "evaluation"])
    with pytest.raises(InputError, match=r"may holds no predictions\.parquet; did you mean .*may/evaluation\?"):
        read_runs([two[0].parent, two[1]])
    (two[1] / "metrics.json").unlink()
    with pytest.raises(InputError, match=r"june/evaluation holds no metrics\.json; give .* a finished jobs\.evaluate"):
        read_runs(two)


def test_the_reference_is_a_run_or_a_router(two):
    runs = read_runs(two)
    assert compare(runs, n_resamples=0, reference="june")["reference"] == "june: prefill"
    by_knn = compare(runs, n_resamples=0, reference="may: knn")
    assert "differences" not in by_knn["routers"]["may: knn"]
    assert "may: knn" in as_text(by_knn)
    with pytest.raises(InputError, match="reference: 'april' is none of the runs and routers; allowed are may, june"):
        compare(runs, n_resamples=0, reference="april")


def test_the_headline_names_the_leader_and_whether_it_is_established(tmp_path, two, a):
    runs = read_runs(two)
    for reference in ("may", "june"):
        compared = compare(runs, n_resamples=100, reference=reference)
        assert (compared["lead"]["run"], compared["lead"]["over"]) == ("may", "june")
        assert compared["lead"]["auc"]["lower"] > 0
        assert re.match(r"may leads june in AUC by 0\.\d{4}; .* leaves out zero$", headline(compared))
    near = written(blurred(a, by=0.005), tmp_path / "near" / "evaluation")
    assert re.search(
        r"which is not established; .* includes zero$", headline(compare(read_runs([two[0], near]), n_resamples=100))
    )
    assert "without an interval" in headline(compare(runs, n_resamples=0))


def test_three_runs_are_ranked_whatever_the_reference(tmp_path, two, a):
    worst = written(blurred(a, by=0.8), tmp_path / "worst" / "evaluation")
    compared = compare(read_runs([worst, *two]), n_resamples=20)
    assert compared["reference"] == "worst: prefill"
    assert compared["lead"]["auc"] == compare(read_runs(two[::-1]), n_resamples=20)["lead"]["auc"]
    assert (compared["lead"]["run"], compared["lead"]["over"]) == ("may", "june")


def test_the_page_loads_nothing_and_escapes_names(tmp_path, two, a):
    hostile = replace(a, routers={**a.routers, HOSTILE: a.routers["knn"]})
    page = render(compare(read_runs([*two, written(hostile, tmp_path / "<i>" / "evaluation")]), n_resamples=10))
    assert "http" not in page
    assert "<script" not in page
    assert "<i>" not in page
    assert not re.search(r"<(link|img|iframe|object)|\bsrc=|@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawn) == 4
    assert not re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", " ".join(drawn))


@pytest.mark.parametrize("case", ["no complete labels", "one class", "no resamples"])
def test_undefined_figures_are_reported_as_text(tmp_path, a, case):
    correct = a.correct.copy()
    if case == "no complete labels":
        correct[np.arange(120), np.arange(120) % 4] = np.nan
    elif case == "one class":
        correct[:] = 1
    a = replace(a, correct=correct)
    folders = [written(a, tmp_path / "may"), written(blurred(a), tmp_path / "june")]
    compared = compare(read_runs(folders), n_resamples=0 if case == "no resamples" else 5)
    text = re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", (render(compared) + as_text(compared)).lower())
    assert "nan" not in text
    assert (compared["lead"] is None) == (case == "one class")


def test_a_run_without_a_prefill_router_enters_with_its_first(tmp_path, a):
    only = replace(a, routers={"mine": RouterPredictions(a.routers["knn"].p, 0.1)})
    compared = compare(read_runs([written(only, tmp_path / "may"), written(a, tmp_path / "june")]), n_resamples=0)
    assert compared["reference"] == "may: mine"


def test_the_table_is_aligned_and_the_files_are_written(tmp_path, two, capsys):
    summary = run(CompareConfig(runs=tuple(two), output=tmp_path / "out", resamples=20))
    figures, differences = capsys.readouterr().out.rstrip().split("\n\n")
    assert len({len(line) for line in figures.splitlines()}) == 1
    assert differences.startswith("minus may: prefill, paired; ")
    assert summary.endswith(f"; page: {tmp_path / 'out' / 'comparison.html'}")
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())
    auc = compared["routers"]["june: prefill"]["auc"]["estimate"]
    assert f"{auc:.4f}" in next(line for line in figures.splitlines() if line.startswith("june: prefill"))
    assert compared["runs"]["may"]["folder"] == str(two[0])


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["{0}", "{1}"], 0),
        (["{0}"], 2),
        (["{0}", "/nowhere"], 2),
        (["{0}", "{1}", "--reference", "april"], 2),
        (["--colour", "red"], 2),
    ],
)
def test_exit_codes(tmp_path, two, argv, code):
    rest = ["--output", str(tmp_path / "out"), "--resamples", "0"]
    with pytest.raises(SystemExit) as ended:
        main(CompareConfig, run, [arg.format(*two) for arg in argv] + rest)
    assert ended.value.code == code
    assert (tmp_path / "out").is_dir() == (code == 0)
