"""Controls: chance level of trunks that cannot know the labels, truncated prompts, and the new baselines."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from builders import QUICK, TwoEncoders, make_outcomes, make_pool
from evaluation_pool import made_up
from sklearn.metrics import roc_auc_score

from prefill_router.experiments import controls
from prefill_router.experiments.controls import predict_controls, truncation
from prefill_router.experiments.predict import predict_test
from prefill_router.metrics.controls import PARTS, TRUNCATION, chance_figures, truncation_figures
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import RouterPredictions
from prefill_router.outcomes.splits import make_folds, split_queries
from prefill_router.prefill.dataset import read_activations
from prefill_router.reports.console import console_tables
from prefill_router.reports.evaluation import render
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_router
from prefill_router.semantic import baselines
from prefill_router.signals.join import join


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A router on the states of two encoders, read from disk, under 75/10/15."""
    made = TwoEncoders()
    paths = made.write(tmp_path_factory.mktemp("controls"))["activations"]
    signals = join(made.outcomes, [read_activations(path) for path in paths])
    config = FitConfig(scheme="75/10/15", components=4, trunk=QUICK)
    return fit_router(signals, make_pool(), split_queries(made.outcomes, 0, config.scheme), config, {})


@pytest.fixture(scope="module")
def predictions(fitted):
    return predict_test(fitted.router, fitted.signals, fitted.split, baselines=False)[0]


def test_control_trunks_rank_by_chance_where_the_router_does_not(fitted, predictions):
    found = predict_controls(fitted.router, fitted.signals, fitted.split, predictions)
    assert list(found.routers) == [
        f"{kind} {n}" for kind in ("shuffled_labels", "random_features") for n in range(1, 6)
    ]
    figures = chance_figures(found, n_resamples=100)
    for control in figures.values():
        assert control["auc"]["lower"] < 0.5 < control["auc"]["upper"]
        assert len(set(control["by_repeat"])) == 5
    assert evaluate(predictions, n_resamples=0)["routers"]["prefill"]["auc"]["estimate"] > 0.65


def test_controls_train_on_the_router_s_rows_and_a_leaked_test_label_shows(fitted, predictions, monkeypatch):
    outcomes, split = fitted.signals.outcomes, fitted.split
    seen = []
    train = controls.train_ensembles

    def leaky(fits, correct, config, seed, **options):
        seen.append((fits[0], correct, config))
        return train(fits, correct, config, seed, **options)

    monkeypatch.setattr(controls, "train_ensembles", leaky)
    predict_controls(fitted.router, fitted.signals, split, predictions)
    features = fitted.router.features(fitted.signals.states)
    shuffled, correct, config = seen[0]
    assert (config.members, config.kept, config.widths) == (1, 1, QUICK.widths)
    np.testing.assert_array_equal(correct, outcomes.correct[split.train])
    assert sorted([*shuffled.train, *shuffled.validation]) == list(range(len(split.train)))
    assert not np.array_equal(shuffled.features, features[split.train])
    np.testing.assert_array_equal(*(np.sort(x, axis=0) for x in (shuffled.features, features[split.train])))
    random = seen[1][0].features
    assert random.shape == shuffled.features.shape
    np.testing.assert_allclose(random.std(axis=0), features[split.train].std(axis=0), rtol=0.2)


def test_the_chance_interval_covers_the_draw_of_the_repeats():
    made = made_up(300, 3, missing=0)
    rng = np.random.default_rng(0)
    p = [
        np.clip(0.5 + sign * 0.1 * (made.correct - 0.5) + rng.normal(0, 0.1, made.correct.shape), 0, 1)
        for sign in (1, -1)
    ]
    one = dataclasses.replace(made, routers={"shuffled_labels 1": RouterPredictions(p[0], 0.0)})
    both = dataclasses.replace(one, routers=one.routers | {"shuffled_labels 2": RouterPredictions(p[1], 0.0)})
    alone, pair = (chance_figures(found, n_resamples=200)["shuffled_labels"] for found in (one, both))
    assert pair["auc"]["estimate"] == pytest.approx(np.mean(pair["by_repeat"]))
    assert pair["by_repeat"][0] == alone["by_repeat"][0] == alone["auc"]["estimate"]
    width = [found["auc"]["upper"] - found["auc"]["lower"] for found in (alone, pair)]
    assert width[1] > 3 * width[0]


def prompts_table(rows: list[tuple[str, str, int, str, str]]) -> pa.Table:
    columns = zip(*rows, strict=True)
    ids, part, dropped, prompt, tokens = (list(column) for column in columns)
    return pa.table(
        {
            "encoder": ["e"] * len(ids),
            "query_id": ids,
            "part": part,
            "n_tokens": [512 + n for n in dropped],
            "n_dropped": dropped,
            "prompt_digest": prompt,
            "tokens_digest": tokens,
        },
        schema=TRUNCATION,
    )


def test_golden_counts_of_truncated_and_equal_prompts():
    made = made_up(4, 2, missing=0)
    q = made.query_ids
    table = prompts_table(
        [
            (q[0], "test", 3, "p0", "same"),
            ("a", "train", 0, "p1", "same"),  # equal to q0 because q0 was truncated
            (q[1], "test", 9, "p2", "t2"),
            (q[2], "test", 5, "p2", "t2"),  # the same prompt twice is not a collision
            (q[3], "test", 0, "P4", "uncased"),
            ("b", "train", 0, "p4", "uncased"),  # equal without truncation
        ]
    )
    found = truncation_figures(table, made, n_resamples=0)
    counts = {part: tuple(values.values()) for part, values in found["encoders"]["e"].items()}
    assert counts == {
        "train": (2, 0, 0.0, 0),
        "calibration": (0, 0, None, 0),
        "test": (4, 3, 0.75, 0),
        "all": (6, 3, 0.5, 2),
    }
    assert found["n_truncated_test"] == 3


def test_auc_on_truncated_prompts_equals_that_of_scikit_learn():
    made = made_up(200, 3, missing=0)
    cut = np.arange(200) % 4 == 0
    table = prompts_table([(name, "test", int(own), name, name) for name, own in zip(made.query_ids, cut, strict=True)])
    found = truncation_figures(table, made, n_resamples=20)
    for name, figures in found["routers"].items():
        p = made.routers[name].p
        expected = [
            np.mean([roc_auc_score(made.correct[part, model], p[part, model]) for model in range(3)])
            for part in (cut, ~cut)
        ]
        found_auc = [figures[key]["estimate"] for key in ("auc_truncated", "auc_not_truncated")]
        assert found_auc == pytest.approx(expected)
        assert figures["difference"]["estimate"] == pytest.approx(expected[0] - expected[1])
        assert figures["difference"]["lower"] < figures["difference"]["upper"]


def test_auc_on_truncated_prompts_of_one_class_is_undefined_with_the_reason():
    made = made_up(30, 2, missing=0)
    cut = np.arange(30) == 0
    table = prompts_table([(name, "test", int(own), name, name) for name, own in zip(made.query_ids, cut, strict=True)])
    figure = truncation_figures(table, made, n_resamples=0)["routers"]["prefill"]["auc_truncated"]
    assert figure["estimate"] is None
    assert figure["reason"] == "the labels of these queries do not hold both classes"


def test_the_truncation_record_has_a_row_per_encoder_and_query(fitted, predictions):
    table = truncation(fitted.router, fitted.signals, fitted.split)
    outcomes = fitted.signals.outcomes
    assert len(table) == len(fitted.router.encoders) * len(outcomes)
    part = dict(zip(table.column("query_id").to_pylist(), table.column("part").to_pylist(), strict=True))
    for name, rows in zip(PARTS, (fitted.split.train, fitted.split.calibration, fitted.split.test), strict=True):
        assert {part[outcomes.query_ids[row]] for row in rows} == {name}
    assert "routers" not in truncation_figures(table, predictions, n_resamples=0)


def test_the_controls_are_on_the_page_and_on_the_console():
    made = made_up(60, 3)
    routers = {f"{kind} {n}": made.routers["knn"] for kind in ("shuffled_labels", "random_features") for n in (1, 2)}
    table = prompts_table([(name, "test", int(name < "q00020"), name, name) for name in made.query_ids])
    metrics = evaluate(made, n_resamples=5)
    metrics["controls"] = {
        **chance_figures(dataclasses.replace(made, routers=routers), n_resamples=5),
        "truncation": truncation_figures(table, made, n_resamples=5),
    }
    page, text = render(made, metrics, {}), console_tables(metrics)
    assert '<section id="controls">' in page
    assert "AUC on the 20 truncated test prompts" in page
    assert "truncated by encoder e: test 20 of 60 (33.3 %); 0 prompts equal after truncation" in text
    assert "AUC with shuffled labels 0." in text


def test_the_best_single_baseline_always_chooses_the_best_model_of_the_training_queries():
    outcomes, _ = make_outcomes(n=120, missing=0.1)
    train = split_queries(outcomes, 0, "85/15").train
    folds = make_folds(outcomes, train, 0, 5)
    fitted = baselines.best_single(outcomes, train, folds)
    complete = train[outcomes.complete[train]]
    np.testing.assert_allclose(fitted.p, np.tile(outcomes.correct[complete].mean(axis=0), (120, 1)))
    assert len(np.unique(fitted.held_out_p[train], axis=0)) == 5
    assert np.isnan(np.delete(fitted.held_out_p, train, axis=0)).all()


def test_the_category_prior_is_shrunk_where_benchmarks_have_few_labels():
    outcomes, _ = make_outcomes(n=300)
    noise = dataclasses.replace(outcomes, benchmarks=np.array([f"b{q % 60}" for q in range(300)], dtype=object))
    train, folds = np.arange(240), np.arange(240) // 60
    plain = baselines.category_prior(noise, train, folds, grid=[0.0])
    shrunk = baselines.category_prior(noise, train, folds)
    assert shrunk.settings["strength"] >= 10
    error = [np.square(found.p - noise.correct)[240:].mean() for found in (plain, shrunk)]
    assert error[1] < error[0] - 0.005
    own = noise.correct[train][noise.benchmarks[train] == "b0"]
    strength, overall = shrunk.settings["strength"], noise.correct[train].mean(axis=0)
    np.testing.assert_allclose(shrunk.p[0], (own.sum(axis=0) + strength * overall) / (len(own) + strength))
