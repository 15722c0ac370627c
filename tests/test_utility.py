"""Utility and static choices, compared with values computed by hand; headline figures of plain arrays."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluation_pool import made_up

from prefill_router.errors import InputError
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import (
    LATER_COLUMNS,
    Predictions,
    RouterPredictions,
    read_predictions,
    write_predictions,
)
from prefill_router.metrics.summary import headline
from prefill_router.reports.console import console_tables
from prefill_router.reports.evaluation import render
from prefill_router.routing.policy import TrainingMeans, training_means, utility


def two_models(training: TrainingMeans | None = None) -> Predictions:
    """Three queries; the second model costs all of the normalised range, the first nothing."""
    numbers = np.array(["a", "b", "c"], dtype=object)
    return Predictions(
        numbers,
        np.array(["x"] * 3, dtype=object),
        numbers,
        ("cheap", "good"),
        np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]),
        np.array([[1.0, 2.0]] * 3),
        np.array([[0.0, 1.0]] * 3),
        {"prefill": RouterPredictions(np.array([[0.9, 0.8], [0.1, 0.9], [0.5, 0.3]]), 0.0)},
        training,
    )


def estimates(figures: dict) -> dict:
    return {lam: figure["estimate"] for lam, figure in figures.items()}


def test_golden_utility_of_the_choices_and_of_the_best_static_choice():
    # At every lambda the router sends b to "good", because 0.6 x 0.9 - 0.4 > 0.6 x 0.1, and the others to "cheap".
    # Training: "good" is best until (1 - lambda) x 0.5 < lambda, that is until lambda = 1/3.
    metrics = evaluate(two_models(TrainingMeans(np.array([0.25, 0.75]), np.array([0.0, 1.0]))), n_resamples=0)
    router, static = metrics["routers"]["prefill"], metrics["pool"]["best_static"]
    own = {"0": 2 / 3, "0.05": (2 * 0.95 - 0.05) / 3, "0.1": 1.7 / 3, "0.2": 1.4 / 3, "0.4": 0.8 / 3}
    good = {lam: (2 * (1 - float(lam)) / 3 - float(lam)) for lam in own}
    best = good | {"0.4": 0.6 / 3}
    assert estimates(router["utility"]) == pytest.approx(own)
    assert {lam: found["model"] for lam, found in static.items()} == dict.fromkeys(own, "good") | {"0.4": "cheap"}
    assert {lam: found["utility"]["estimate"] for lam, found in static.items()} == pytest.approx(best)
    assert static["0"]["accuracy"]["estimate"] == pytest.approx(2 / 3)
    assert static["0.4"]["cost"]["estimate"] == pytest.approx(1)
    over = {lam: own[lam] - best[lam] for lam in own}
    assert estimates(router["utility_over_best_static"]) == pytest.approx(over, abs=1e-12)


def test_utility_is_undefined_without_a_label_and_refuses_a_lambda_out_of_range():
    correct, choices = np.array([[1.0, np.nan], [1.0, np.nan]]), np.array([0, 1])
    found = utility(correct, np.full((2, 2), 0.5), choices, 0.2)
    np.testing.assert_allclose(found, [0.7, np.nan])
    with pytest.raises(InputError, match="lambda"):
        utility(correct, np.zeros((2, 2)), choices, 1.5)


def test_a_tie_between_static_choices_goes_to_the_cheaper_model():
    means = TrainingMeans(np.array([0.6, 0.6, 0.5]), np.array([0.3, 0.1, 0.0]))
    assert means.best_static(0.0) == 1
    assert means.best_static(1.0) == 2


def test_training_means_count_complete_queries_and_otherwise_labelled_pairs():
    correct = np.array([[1.0, 0.0], [0.0, np.nan], [1.0, 1.0]])
    cost_norm = np.array([[0.1, 0.2], [0.9, 0.9], [0.3, 0.4]])
    means = training_means(correct, cost_norm)
    np.testing.assert_allclose(means.accuracy, [1.0, 0.5])
    np.testing.assert_allclose(means.cost_norm, [0.2, 0.3])
    partial = training_means(np.array([[1.0, np.nan], [np.nan, 0.0], [0.0, np.nan]]), cost_norm)
    np.testing.assert_allclose(partial.accuracy, [0.5, 0.0])
    np.testing.assert_allclose(partial.cost_norm, [0.2, 0.9])


def test_without_training_means_figures_of_static_choices_are_left_out():
    predictions = two_models()
    metrics = evaluate(predictions, n_resamples=5)
    assert "best_static" not in metrics["pool"]
    assert "utility_over_best_static" not in metrics["routers"]["prefill"]
    assert "best static" not in console_tables(metrics)
    assert "Utility minus that of the best static choice" not in render(predictions, metrics, {})


def test_a_predictions_file_without_the_newer_columns_has_no_training_means(tmp_path):
    write_predictions(made_up(30, 3), tmp_path / "new.parquet")
    assert read_predictions(tmp_path / "new.parquet").training is not None
    table = pq.read_table(tmp_path / "new.parquet").drop_columns(list(LATER_COLUMNS))
    pq.write_table(table, tmp_path / "old.parquet")
    assert read_predictions(tmp_path / "old.parquet").training is None


@pytest.mark.parametrize("accuracy", [[0.5], [0.5, 1.5], [0.5, np.nan]])
def test_training_means_out_of_range_are_refused(accuracy):
    with pytest.raises(InputError, match=r"training accuracy: got .* one number in \[0, 1\] per model"):
        two_models(TrainingMeans(np.array(accuracy), np.zeros(len(accuracy))))


def test_utility_differences_between_routers_are_paired():
    metrics = evaluate(made_up(80, 4), n_resamples=10)
    one, other = metrics["routers"]["knn"], metrics["routers"]["prefill"]
    for name in ("utility", "utility_over_best_static"):
        expected = {lam: value - estimates(other[name])[lam] for lam, value in estimates(one[name]).items()}
        assert estimates(one["differences"][name]) == pytest.approx(expected)


def test_headline_figures_are_the_estimates_of_an_evaluation():
    predictions = made_up(120, 4, missing=0.02)
    router = dataclasses.replace(predictions.routers["prefill"], margin_bonus=0.1)
    metrics = evaluate(dataclasses.replace(predictions, routers={"prefill": router}), n_resamples=0)
    found = headline(
        router.p,
        predictions.correct,
        predictions.cost,
        predictions.cost_norm,
        router.chosen_lambda,
        predictions.training,
        router.margin_bonus,
    )
    figures = metrics["routers"]["prefill"]
    assert found.pop("mixture_hull_p_auccc") == metrics["pool"]["mixture_hull"]["p_auccc"]["estimate"]
    for name, value in found.items():
        path, _, lam = name.partition(" ")
        assert value == (figures[path][lam] if lam else figures[path])["estimate"], name
    assert {"utility 0.05", "utility_over_best_static 0.4"} <= found.keys()


def test_the_console_shows_every_router_with_intervals_and_the_static_models():
    predictions = made_up(100, 4)
    text = console_tables(evaluate(predictions, n_resamples=20))
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert set(predictions.routers) | {"oracle", "mixtures of two", "best static choice"} <= rows.keys()
    assert rows["prefill"].count("[") == 5  # the last table has a row of the same name and five lambdas
    assert rows["best static choice"].endswith("large-70b")
    text.encode("ascii")


def test_the_report_marks_a_utility_below_the_best_static_choice():
    predictions = two_models(TrainingMeans(np.array([0.25, 0.75]), np.array([0.0, 0.0])))
    wrong = dataclasses.replace(predictions, routers={"prefill": RouterPredictions(np.array([[0.9, 0.1]] * 3), 0.0)})
    assert '<td class="n worse">' not in render(wrong, evaluate(wrong, n_resamples=0), {})
    sure = evaluate(wrong, n_resamples=0)
    for figure in sure["routers"]["prefill"]["utility_over_best_static"].values():
        figure |= {"estimate": -0.2, "lower": -0.3, "upper": -0.1}
    assert render(wrong, sure, {}).count('<td class="n worse">') == 5
