"""Robustness: flips and their cost, counted by hand; router and baselines on perturbed prompts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import QUICK, MadeStates, make_outcomes, make_pool, make_table
from scipy.special import logit
from sklearn.neighbors import NearestNeighbors
from tiny_models import prompts, save_model

from prefill_router.errors import InputError
from prefill_router.experiments import predict
from prefill_router.experiments.perturb import perturb
from prefill_router.experiments.predict import PREFILL, encoders_to_run, predict_perturbed, predict_test
from prefill_router.metrics.predictions import Predictions, RouterPredictions, read_predictions, write_predictions
from prefill_router.metrics.robustness import Perturbed, read_perturbed, robustness, write_perturbed
from prefill_router.outcomes.splits import make_folds, split_queries
from prefill_router.outcomes.table import pivot, validate_outcomes
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import Activations, read_activations
from prefill_router.prefill.shards import PARQUET, ActivationsHeader, finish, open_dataset
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_router
from prefill_router.semantic import baselines
from prefill_router.semantic.classifiers import KNNRouter
from prefill_router.semantic.router import Features
from prefill_router.signals.join import join

QUICK_GRID = ({"widths": (8,), "max_epochs": 3},)
SECOND, FIRST = [0.2, 0.8], [0.8, 0.2]  # confidences for which the second or the first model is chosen


def hand_made() -> tuple[Predictions, Perturbed]:
    """Four queries, the last with a missing label; the second model costs 3 USD more than the first."""
    predictions = Predictions(
        np.array(["a", "b", "c", "d"], dtype=object),
        np.array(["x"] * 4, dtype=object),
        np.array(["a", "b", "c", "d"], dtype=object),
        ("small", "large"),
        np.array([[1, 0], [0, 1], [1, 1], [np.nan, 1]]),
        np.array([[1.0, 4.0]] * 4),
        np.array([[0.0, 0.1]] * 4),
        {
            "moves": RouterPredictions(np.array([FIRST, SECOND, FIRST, FIRST]), 0.5),
            "stays": RouterPredictions(np.array([SECOND, SECOND, FIRST, SECOND]), 0.0),
        },
    )
    rows = [("a", "typos"), ("b", "typos"), ("c", "typos"), ("d", "typos"), ("a", "case"), ("b", "case")]
    moved = np.array([SECOND, [0.3, 0.7], FIRST, SECOND, FIRST, FIRST])
    source = ["abcd".index(query) for query, _ in rows]
    return predictions, Perturbed(
        np.array([query for query, _ in rows], dtype=object),
        np.array([name for _, name in rows], dtype=object),
        ("small", "large"),
        {"moves": moved, "stays": predictions.routers["stays"].p[source]},
    )


def estimates(report, router, perturbation):
    return {
        name: value["estimate"] if isinstance(value, dict) else value
        for name, value in report[router][perturbation].items()
    }


def test_figures_are_those_counted_by_hand():
    report = robustness(*hand_made(), n_resamples=50)
    # typos: a moves from small (right) to large (wrong), d from small to large (no label), b and c stay.
    assert estimates(report, "moves", "typos") == pytest.approx(
        {
            "n": 4,
            "n_complete": 3,
            "n_same_tokens": 0,
            "flip_rate": 2 / 4,
            "accuracy_change": -1 / 3,
            "cost_change": (3 + 3) / 4,
            "confidence_shift": (0.6 + 0.1 + 0 + 0.6) / 4,
        }
    )
    # case: a stays, b moves from large (right) to small (wrong).
    assert estimates(report, "moves", "case") == pytest.approx(
        {
            "n": 2,
            "n_complete": 2,
            "n_same_tokens": 0,
            "flip_rate": 1 / 2,
            "accuracy_change": -1 / 2,
            "cost_change": -3 / 2,
            "confidence_shift": 0.6 / 2,
        }
    )
    assert estimates(report, "moves", "all") == pytest.approx(
        {
            "n": 6,
            "n_complete": 5,
            "n_same_tokens": 0,
            "flip_rate": 3 / 6,
            "accuracy_change": -2 / 5,
            "cost_change": 3 / 6,
            "confidence_shift": 1.9 / 6,
        }
    )
    assert list(report["moves"]) == ["typos", "case", "all"]
    json.dumps(report, allow_nan=False)


def test_a_router_that_ignores_the_text_never_flips():
    report = robustness(*hand_made(), n_resamples=50)
    for name in ("typos", "case", "all"):
        for figure in ("flip_rate", "accuracy_change", "cost_change", "confidence_shift"):
            value = report["stays"][name][figure]
            assert (value["estimate"], value["lower"], value["upper"]) == (0, 0, 0)


def test_decisions_are_made_at_each_router_s_own_lambda():
    predictions, perturbed = hand_made()
    cheapest = {name: RouterPredictions(router.p, 1.0) for name, router in predictions.routers.items()}
    report = robustness(dataclasses.replace(predictions, routers=cheapest), perturbed, n_resamples=0)
    assert estimates(report, "moves", "typos")["flip_rate"] == 0
    assert estimates(report, "moves", "typos")["confidence_shift"] > 0


def test_without_complete_labels_the_accuracy_is_null_with_its_reason():
    predictions, perturbed = hand_made()
    correct = predictions.correct.copy()
    correct[:, 0] = np.nan
    value = robustness(dataclasses.replace(predictions, correct=correct), perturbed)["moves"]["all"]
    assert value["accuracy_change"] == {
        "estimate": None,
        "lower": None,
        "upper": None,
        "reason": "no query has a label for every model",
    }
    assert value["flip_rate"]["estimate"] == 0.5


def test_an_interval_has_the_binomial_width_and_grows_with_groups():
    n, rng = 900, np.random.default_rng(0)
    ids = np.array([f"q{i:04d}" for i in range(n)], dtype=object)
    flips = rng.random(n // 3).repeat(3) < 0.2
    p = np.tile(FIRST, (n, 1))
    perturbed = Perturbed(
        ids, np.array(["case"] * n, dtype=object), ("small", "large"), {"r": np.where(flips[:, None], SECOND, FIRST)}
    )
    width = {}
    for size in (1, 3):
        predictions = Predictions(
            ids,
            ids,
            np.array([f"g{i // size}" for i in range(n)]),
            ("small", "large"),
            np.ones((n, 2)),
            np.ones((n, 2)),
            np.zeros((n, 2)),
            {"r": RouterPredictions(p, 0.0)},
        )
        value = robustness(predictions, perturbed, n_resamples=2000)["r"]["case"]["flip_rate"]
        width[size] = value["upper"] - value["lower"]
    rate = flips.mean()
    assert width[1] == pytest.approx(2 * 1.96 * np.sqrt(rate * (1 - rate) / n), rel=0.1)
    assert width[3] == pytest.approx(width[1] * np.sqrt(3), rel=0.1)


def test_figures_recomputed_from_the_two_files_are_the_same_in_any_row_order(tmp_path):
    predictions, perturbed = hand_made()
    write_predictions(predictions, tmp_path / "predictions.parquet")
    write_perturbed(perturbed, tmp_path / "perturbed.parquet")
    table = pq.read_table(tmp_path / "perturbed.parquet")
    assert table.schema.names == ["router", "query_id", "perturbation", "model", "p"]
    report = robustness(predictions, perturbed, n_resamples=100, seed=4)
    again = robustness(
        read_predictions(tmp_path / "predictions.parquet"),
        read_perturbed(tmp_path / "perturbed.parquet"),
        n_resamples=100,
        seed=4,
    )
    assert again == report
    order = np.random.default_rng(0).permutation(table.num_rows)
    models_first = np.argsort(np.array(table.column("model").to_pylist())[order] != "small", kind="stable")
    pq.write_table(table.take(order[models_first]), tmp_path / "perturbed.parquet")
    shuffled = robustness(predictions, read_perturbed(tmp_path / "perturbed.parquet"), n_resamples=100, seed=4)
    for router, parts in report.items():
        for name in parts:
            assert estimates(shuffled, router, name) == pytest.approx(estimates(report, router, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns("p"), "columns p are missing"),
        (lambda table: table.slice(1), "each must occur exactly once"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "each must occur exactly once"),
    ],
)
def test_a_broken_file_is_refused_with_its_fault(tmp_path, change, message):
    path = tmp_path / "perturbed.parquet"
    write_perturbed(hand_made()[1], path)
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(InputError, match=message):
        read_perturbed(path)
    with pytest.raises(InputError, match="no such file"):
        read_perturbed(tmp_path / "none.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_ids": np.array(list("abczab"), dtype=object)}, "'z' is not in the predictions"),
        ({"models": ("large", "small")}, "models are large, small"),
        ({"query_ids": np.array(list("aacdab"), dtype=object)}, "occurs twice"),
        ({"p": {"other": np.full((6, 2), 0.5)}}, "router 'other' is not in the predictions"),
        ({"p": {"moves": np.full((5, 2), 0.5)}}, "has shape"),
        ({"p": {"moves": np.full((6, 2), np.nan)}}, "a probability"),
        ({"p": {}}, "at least one of each"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    predictions, perturbed = hand_made()
    with pytest.raises(InputError, match=message):
        robustness(predictions, dataclasses.replace(perturbed, **change))


@pytest.fixture
def quick_grid(monkeypatch):
    monkeypatch.setattr(predict, "UNIFIED_GRID", QUICK_GRID)


def fit_baselines(n: int = 150):
    outcomes, difficulty = make_outcomes(n=n, missing=0.05)
    states = MadeStates(difficulty)(MadeStates.layer_keys[3])
    train = split_queries(outcomes, 0, "85/15").train
    folds = make_folds(outcomes, train, 0, 5)
    fitted = (
        baselines.category_prior(outcomes, train, folds),
        baselines.knn_vote(outcomes, train, folds, states),
        baselines.unified_mlp(outcomes, train, folds, states, 0, grid=QUICK_GRID),
    )
    return outcomes, states, train, fitted


def test_a_baseline_predicts_the_same_for_the_queries_it_was_given():
    outcomes, states, _, every = fit_baselines()
    before = states.copy()
    for fitted in every:
        np.testing.assert_array_equal(fitted.predict(outcomes.benchmarks, states), fitted.p)
        some = np.array([140, 3, 77])
        np.testing.assert_allclose(fitted.predict(outcomes.benchmarks[some], states[some]), fitted.p[some], atol=1e-5)
        assert fitted.predict(outcomes.benchmarks[:0], states[:0]).shape == (0, 3)
    np.testing.assert_array_equal(states, before)


def test_a_saved_baseline_router_predicts_the_same(tmp_path):
    outcomes, states, _, every = fit_baselines()
    for fitted in every:
        fitted.router.save(tmp_path / fitted.router.kind)
        loaded = type(fitted.router).load(tmp_path / fitted.router.kind)
        assert loaded == fitted.router
        reloaded = dataclasses.replace(fitted, router=loaded)
        np.testing.assert_array_equal(reloaded.predict(outcomes.benchmarks, states), fitted.p)


def test_the_baseline_kNN_vote_is_the_uniform_kNN_router():
    outcomes, states, train, (_, fitted, _) = fit_baselines()
    features = Features(states, np.empty((len(states), 3, 0), dtype=np.float32))
    router = KNNRouter(k=fitted.settings["k"])
    router.fit(features.take(train), outcomes.correct[train], np.zeros(len(train), dtype=bool))
    np.testing.assert_allclose(fitted.platt(router.predict(features)), fitted.p, atol=1e-6)


def test_a_fitted_unified_mlp_is_the_first_part_of_its_stack():
    outcomes, states, train, (_, _, fitted) = fit_baselines()
    features = Features(states, np.empty((len(states), 3, 0), dtype=np.float32))
    validation = make_folds(outcomes, train, 1, 10) == 0
    router = baselines.UnifiedMLPRouter(**QUICK_GRID[0])
    router.fit(features.take(train), outcomes.correct[train], validation, seed=0)
    np.testing.assert_allclose(router.predict(features), fitted.router.predict(features), atol=1e-5)


def test_the_category_prior_needs_benchmarks():
    with pytest.raises(InputError, match="category_prior reads benchmarks"):
        baselines.CategoryPriorRouter().fit(
            Features(np.empty((4, 0), np.float32), np.empty((4, 2, 0), np.float32)),
            np.ones((4, 2)),
            np.zeros(4, dtype=bool),
        )


def test_votes_on_new_queries_equal_those_of_scikit_learn_s_neighbours():
    outcomes, difficulty = make_outcomes(n=200)
    states, train = MadeStates(difficulty)(MadeStates.layer_keys[3]), np.arange(150)
    fitted = baselines.knn_vote(outcomes, train, train % 5, states)
    centred = states - states[train].mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    nearest = NearestNeighbors(n_neighbors=fitted.settings["k"]).fit(unit[train]).kneighbors(unit[150:])[1]
    votes = outcomes.correct[train][nearest].mean(axis=1)
    p = fitted.predict(outcomes.benchmarks[150:], states[150:])
    for model in range(3):
        inside = (votes[:, model] > 0) & (votes[:, model] < 1)
        x, y = logit(votes[inside, model]), logit(p[inside, model])
        slope, offset = np.polyfit(x, y, 1)
        np.testing.assert_allclose(slope * x + offset, y, atol=1e-5)
        assert not np.allclose((slope, offset), (1, 0), atol=1e-3)


def test_the_category_prior_gives_an_unseen_benchmark_the_overall_accuracy():
    outcomes, _ = make_outcomes(n=60)
    train = np.arange(50)
    prior = baselines.category_prior(outcomes, train, np.arange(50) % 5, grid=[0.0])
    p = prior.predict(np.array(["bench1", "never seen"], dtype=object), np.zeros((2, 4), dtype=np.float32))
    np.testing.assert_allclose(p[1], outcomes.correct[train].mean(axis=0))
    np.testing.assert_allclose(p[0], outcomes.correct[train][outcomes.benchmarks[train] == "bench1"].mean(axis=0))


def encode(folder: Path, config: EncoderConfig, rows: pa.Table) -> Activations:
    encoder = TransformersEncoder(config)
    pin = ActivationsHeader(
        encoder=encoder.info, columns=encoder.columns, config={"encoder": config.model_dump(mode="json")}
    )
    open_dataset(folder, pin, rows)
    pq.write_table(encoder(rows), folder / "part.parquet", **PARQUET)
    finish(folder, pin)
    return read_activations(folder)


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A router fitted on 120 queries' states of a tiny model: layer 1 of three, last token."""
    folder = tmp_path_factory.mktemp("robustness")
    model = save_model("gpt2", folder / "model")
    table, _ = make_table(n=120)
    texts = [f"The {text}" for text in prompts(120)]
    table = table.set_column(
        table.column_names.index("prompt"),
        "prompt",
        pa.array([texts[int(query[1:])] for query in table.column("query_id").to_pylist()]),
    )
    outcomes = pivot(validate_outcomes(table), ("small", "medium", "large"))
    config = EncoderConfig(model=str(model), layers="all", device="cpu")
    rows = pa.table({"query_id": list(outcomes.query_ids), "prompt": list(outcomes.prompts)})
    signals = join(outcomes, [encode(folder / "activations", config, rows)])
    fit = FitConfig(strategy="fixed", fixed="last_L1", components=4, trunk=QUICK)
    split = split_queries(outcomes, fit.seed, fit.scheme)
    router = fit_router(signals, make_pool(), split, fit, {}).router
    return SimpleNamespace(router=router, signals=signals, split=split, folder=folder)


def test_the_encoder_computes_only_the_layers_that_are_read(routed):
    (fingerprint,) = routed.router.encoders
    alone = encoders_to_run(routed.router, routed.signals, baselines=False)[fingerprint]
    assert (alone.layers, alone.poolings) == ((1,), ("last",))
    both = encoders_to_run(routed.router, routed.signals, baselines=True)[fingerprint]
    assert (both.layers, both.poolings) == ((1, 3), ("last", "mean"))
    assert both.model == alone.model


@pytest.mark.usefixtures("quick_grid")
def test_router_and_baselines_judge_perturbed_prompts_and_the_prior_never_flips(routed, tmp_path):
    predictions, fitted = predict_test(routed.router, routed.signals, routed.split)
    test = routed.signals.outcomes.take(routed.split.test)
    table = perturb(test.query_ids, test.prompts, 0)
    (config,) = encoders_to_run(routed.router, routed.signals, baselines=True).values()
    dataset = encode(tmp_path / "perturbed", config, table.select(["query_id", "prompt"]))
    perturbed = predict_perturbed(routed.router, fitted, routed.signals, table, {dataset.fingerprint: dataset})
    assert len(perturbed) == table.num_rows
    report = robustness(predictions, perturbed, n_resamples=20)
    assert set(report) == {PREFILL, "category_prior", "knn", "unified_mlp", "best_single"}
    assert set(report[PREFILL]) == {"case", "whitespace", "typos", "template", "all"}
    assert report["category_prior"]["all"]["confidence_shift"]["upper"] == 0
    assert report[PREFILL]["typos"]["confidence_shift"]["estimate"] > 1e-4
    assert report["knn"]["typos"]["confidence_shift"]["estimate"] > 1e-4


def test_prompts_with_the_tokens_of_the_original_are_counted_and_left_out(routed, tmp_path):
    predictions, _ = predict_test(routed.router, routed.signals, routed.split, baselines=False)
    test = routed.signals.outcomes.take(routed.split.test)
    kinds = ["none"] * (len(test) - 1) + ["some"]
    worded = pa.table(
        {
            "query_id": [f"{query_id}#x" for query_id in test.query_ids],
            "source": list(test.query_ids),
            "perturbation": kinds,
            "prompt": ["", *test.prompts[1:-1], "The same asked otherwise"],
        }
    )
    (config,) = encoders_to_run(routed.router, routed.signals, baselines=False).values()
    dataset = encode(tmp_path / "worded", config, worded.select(["query_id", "prompt"]))
    perturbed = predict_perturbed(routed.router, {}, routed.signals, worded, {dataset.fingerprint: dataset})
    assert list(perturbed.query_ids) == [test.query_ids[-1]]
    assert perturbed.same_tokens == {"none": len(test) - 2, "some": 0}
    report = robustness(predictions, perturbed, n_resamples=5)[PREFILL]
    assert (report["none"]["n"], report["none"]["n_same_tokens"]) == (0, len(test) - 2)
    assert report["none"]["flip_rate"]["reason"] == "the encoder reads the same tokens"
    assert report["all"]["n"] == 1


def test_missing_activations_and_strange_sources_are_refused_by_name(routed):
    test = routed.signals.outcomes.take(routed.split.test)
    table = perturb(test.query_ids, test.prompts, 0, ("case",))
    with pytest.raises(InputError, match="the checkpoint reads encoder"):
        predict_perturbed(routed.router, {}, routed.signals, table, {})
    with pytest.raises(InputError, match=r"q.*#case"):
        predict_perturbed(routed.router, {}, routed.signals, table, routed.signals.activations)
    ids = routed.signals.outcomes.query_ids
    strange = pa.table(
        {
            "query_id": [ids[0]],
            "source": ["elsewhere"],
            "perturbation": ["case"],
            "prompt": [routed.signals.outcomes.prompts[0]],
        }
    )
    prior = {"category_prior": baselines.category_prior(routed.signals.outcomes, np.arange(50), np.arange(50) % 5)}
    with pytest.raises(InputError, match="'elsewhere' is not a query of the outcomes"):
        predict_perturbed(routed.router, prior, routed.signals, strange, routed.signals.activations)
