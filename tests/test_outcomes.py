"""Outcomes: errors name row and column, missing labels stay missing, splits are stratified and grouped."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_outcomes, make_pool, make_table
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router.errors import InputError
from prefill_router.outcomes.splits import make_folds, split_queries
from prefill_router.outcomes.table import load_outcomes, partitions, pivot, unique_prompts, validate_outcomes
from prefill_router.pool import load_pool, save_pool

ROWS = [
    {"query_id": "a", "benchmark": "x", "prompt": "A", "model": "m1", "correct": 1},
    {"query_id": "a", "benchmark": "x", "prompt": "A", "model": "m2", "correct": 0},
    {"query_id": "b", "benchmark": "y", "prompt": "B", "model": "m1", "correct": None},
]


def table(*changes: tuple[int, str, object]) -> pa.Table:
    rows = [dict(row) for row in ROWS]
    for row, column, value in changes:
        rows[row][column] = value
    return pa.Table.from_pylist(rows)


def test_pivot_equals_a_loop_over_the_rows():
    source, _ = make_table(n=50, missing=0.1)
    shuffled = source.take(np.random.default_rng(0).permutation(source.num_rows))
    outcomes = pivot(validate_outcomes(shuffled), ("large", "small"))
    expected = {(row["query_id"], row["model"]): row["correct"] for row in source.to_pylist()}
    for q, query in enumerate(outcomes.query_ids):
        for m, model in enumerate(outcomes.models):
            value = outcomes.correct[q, m]
            assert (None if np.isnan(value) else int(value)) == expected[query, model]


def test_a_missing_row_and_a_null_are_both_unlabelled():
    outcomes = pivot(validate_outcomes(table()), ("m1", "m2"))
    np.testing.assert_array_equal(outcomes.labelled, [[True, True], [False, False]])
    assert outcomes.complete.tolist() == [True, False]


def test_a_fractional_label_counts_as_right_from_one_half():
    source = table((0, "correct", 0.5), (1, "correct", 0.25))
    outcomes = pivot(validate_outcomes(source), ("m1", "m2"))
    np.testing.assert_array_equal(outcomes.correct, [[1, 0], [np.nan, np.nan]])
    np.testing.assert_array_equal(outcomes.shares, [[0.5, 0.25], [np.nan, np.nan]])
    np.testing.assert_array_equal(outcomes.take(np.array([0])).shares, [[0.5, 0.25]])
    whole = pivot(validate_outcomes(table()), ("m1", "m2"))
    assert whole.shares is whole.correct
    assert whole.digest() != outcomes.digest()
    assert validate_outcomes(table())["correct"].type == pa.int8()
    assert validate_outcomes(table((0, "correct", 1.0)))["correct"].type == pa.int8()


def test_dictionary_encoded_strings_and_other_columns_are_accepted():
    source = table().append_column("note", pa.array(["k", "l", "m"]))
    for name in ("query_id", "model", "prompt", "benchmark"):
        source = source.set_column(source.column_names.index(name), name, source[name].dictionary_encode())
    assert validate_outcomes(source)["note"].to_pylist() == ["k", "l", "m"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (table((1, "model", "m1")), r"row 1: the pair \(query_id 'a', model 'm1'\) is repeated"),
        (table((1, "prompt", "other")), r"column 'prompt', row 1: query_id 'a'"),
        (table((1, "benchmark", "z")), r"column 'benchmark', row 1"),
        (table((2, "correct", 2)), r"column 'correct', row 2: got 2, allowed is a number from 0 \(wrong\) to 1"),
        (table((0, "correct", 0.5), (2, "correct", -0.5)), r"column 'correct', row 2: got -0.5, allowed is a number"),
        (table((1, "query_id", None)), r"column 'query_id', row 1: null"),
        (
            table().append_column("input_tokens", pa.array([4, float("nan"), None])),
            r"column 'input_tokens', row 1: got nan, allowed is a finite number of at least 0, or null if",
        ),
        (table().append_column("output_tokens", pa.array([1.0, -1.0, None])), r"column 'output_tokens', row 1: got -1"),
        (table().append_column("input_tokens", pa.array(["4", "5", "6"])), r"column 'input_tokens' must hold numbers"),
        (table().drop_columns(["prompt"]), r"column 'prompt' is missing; the file has query_id"),
        (table().slice(0, 0), r"no rows"),
    ],
)
def test_bad_tables_are_refused_naming_row_and_column(bad: pa.Table, message: str):
    with pytest.raises(InputError, match=message):
        validate_outcomes(bad)


def test_a_model_without_outcomes_is_named(tmp_path):
    path = tmp_path / "outcomes.parquet"
    pq.write_table(table(), path)
    with pytest.raises(InputError, match="'large' has no rows in the outcomes; they have m1, m2"):
        load_outcomes(path, make_pool("large"))


def test_prompts_come_once_in_order_of_appearance():
    assert unique_prompts(validate_outcomes(table())).to_pylist() == [
        {"query_id": "a", "prompt": "A"},
        {"query_id": "b", "prompt": "B"},
    ]


def test_partitions_are_decided_by_known_labels_only():
    nan = np.nan
    correct = np.array([[1, 1], [0, 0], [1, 0], [1, nan], [0, nan], [nan, nan]], dtype=np.float32)
    assert partitions(correct).tolist() == ["all-correct", "all-incorrect", "disagreement", *["undecided"] * 3]
    three = np.array([[1, 0, nan]], dtype=np.float32)
    assert partitions(three).tolist() == ["disagreement"]


def test_the_digest_depends_on_labels():
    base, _ = make_outcomes(n=30)
    other = base.take(np.arange(30))
    assert base.digest() == other.digest()
    other.correct[3, 1] = 1 - other.correct[3, 1]
    assert base.digest() != other.digest()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), group_size=st.sampled_from([1, 3]))
def test_splits_are_disjoint_grouped_and_share_their_test_part(seed: int, group_size: int):
    outcomes, _ = make_outcomes(n=240, group_size=group_size, missing=0.05)
    two, three = split_queries(outcomes, seed), split_queries(outcomes, seed, "75/10/15")
    np.testing.assert_array_equal(two.test, three.test)
    for split in (two, three):
        parts = [split.train, split.calibration, split.test]
        assert sorted(np.concatenate(parts)) == list(range(240))
        groups = [set(outcomes.groups[part]) for part in parts]
        assert len(set.union(*groups)) == sum(map(len, groups))
    assert abs(len(two.test) - 36) <= group_size
    assert abs(len(three.calibration) - 24) <= 2 * group_size


def test_every_stratum_has_its_share_of_the_test_part():
    outcomes, _ = make_outcomes(n=1200)
    test = np.zeros(1200, dtype=bool)
    test[split_queries(outcomes, 3).test] = True
    strata = np.array([f"{b}/{p}" for b, p in zip(outcomes.benchmarks, partitions(outcomes.correct), strict=True)])
    for stratum in np.unique(strata):
        own = strata == stratum
        assert abs(test[own].sum() - 0.15 * own.sum()) <= 1


def test_splits_depend_on_the_seed_and_not_on_row_order():
    outcomes, _ = make_outcomes(n=300)
    order = np.random.default_rng(1).permutation(300)
    shuffled = outcomes.take(order)
    ids = lambda o, seed: set(o.query_ids[split_queries(o, seed).test])  # noqa: E731
    assert ids(outcomes, 5) == ids(shuffled, 5) != ids(outcomes, 6)


def test_folds_are_even_and_do_not_split_groups():
    outcomes, _ = make_outcomes(n=300, group_size=3)
    rows = split_queries(outcomes, 0).train
    folds = make_folds(outcomes, rows, 0)
    assert np.ptp(np.bincount(folds)) <= 3
    for group in np.unique(outcomes.groups[rows].astype(str)):
        assert len(np.unique(folds[outcomes.groups[rows] == group])) == 1


def test_the_pool_round_trips_and_refuses_models_without_prices(tmp_path):
    save_pool(make_pool(), tmp_path / "pool.yaml")
    assert load_pool(tmp_path / "pool.yaml") == make_pool()
    (tmp_path / "bad.yaml").write_text("models:\n  - {name: a, input_usd_per_mtok: -1, output_usd_per_mtok: 2}\n")
    with pytest.raises(InputError, match=r"bad.yaml: models.0.input_usd_per_mtok.*got -1"):
        load_pool(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("models:\n  - {name: a, input_usd_per_mtok: 1}\n")
    with pytest.raises(InputError, match="'a' needs input_usd_per_mtok and output_usd_per_mtok, or self_hosted"):
        load_pool(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text(
        "models:\n  - {name: a, colour: red, engine: {gpu_usd_per_hour: 1, ttft_s_per_1k_tokens: 1, itl_s: 1}}\n"
    )
    with pytest.raises(InputError, match=r"models.0.colour"):
        load_pool(tmp_path / "bad.yaml")
