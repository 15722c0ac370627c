"""Outcomes tables as other tools write them: read, or refused in one line that names column, type and way out."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_pool, make_table

from prefill_router.errors import InputError
from prefill_router.outcomes.table import (
    Outcomes,
    load_outcomes,
    pivot,
    read_of_queries,
    read_outcomes,
    validate_outcomes,
)
from prefill_router.prefill.prompts import read_prompts

POOL = make_pool()
TABLE = make_table(n=8)[0]


def replaced(**columns: pa.Array) -> pa.Table:
    table = TABLE
    for name, values in columns.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, values)
        else:
            table = table.append_column(name, values)
    return table


def cast(name: str, kind: pa.DataType) -> pa.Table:
    return replaced(**{name: TABLE[name].cast(kind)})


TEXT = ("query_id", "benchmark", "prompt", "model", "group")
VARIANTS = {
    "decimal numbers": replaced(
        **{n: TABLE[n].cast(pa.decimal128(38, 2)) for n in ("correct", "input_tokens", "output_tokens")}
    ),
    "256-bit decimals": cast("output_tokens", pa.decimal256(60, 3)),
    "small decimals": cast("output_tokens", pa.decimal128(22, 1)),
    "boolean labels": cast("correct", pa.bool_()),
    "float labels": cast("correct", pa.float64()),
    "half-precision labels": replaced(correct=pa.array(np.asarray(TABLE["correct"], dtype=np.float16))),
    "unsigned counts": cast("input_tokens", pa.uint64()),
    "categories of numbers": replaced(output_tokens=TABLE["output_tokens"].dictionary_encode()),
    "bytes": replaced(**{name: TABLE[name].cast(pa.binary()) for name in TEXT}),
    "large strings": replaced(**{name: TABLE[name].cast(pa.large_string()) for name in TEXT}),
    "string views": replaced(**{name: TABLE[name].cast(pa.string_view()) for name in TEXT}),
    "categories": replaced(
        **{n: TABLE[n].dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())) for n in TEXT}
    ),
    "categories of bytes": replaced(**{name: TABLE[name].cast(pa.binary()).dictionary_encode() for name in TEXT}),
    "JSON strings": replaced(
        prompt=pa.ExtensionArray.from_storage(pa.json_(pa.string()), TABLE["prompt"].combine_chunks())
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_columns_of_other_types_with_the_same_values_are_read(variant: str, tmp_path: Path):
    expected = pivot(validate_outcomes(TABLE), POOL.names).digest()
    assert pivot(validate_outcomes(VARIANTS[variant]), POOL.names).digest() == expected
    for stored in (True, False):
        pq.write_table(VARIANTS[variant], tmp_path / "o.parquet", store_schema=stored)
        assert load_outcomes(tmp_path / "o.parquet", POOL).digest() == expected
        assert read_prompts(tmp_path / "o.parquet").column("prompt").to_pylist() == TABLE["prompt"].to_pylist()[::3]


def test_a_column_of_nulls_without_a_type_is_a_column_of_nulls(tmp_path: Path):
    table = replaced(group=pa.nulls(24), input_tokens=pa.nulls(24), output_tokens=pa.nulls(24))
    pq.write_table(table, tmp_path / "o.parquet")
    outcomes = load_outcomes(tmp_path / "o.parquet", POOL)
    assert outcomes.groups.tolist() == outcomes.query_ids.tolist()
    assert np.isnan(outcomes.output_tokens).all()
    pq.write_table(replaced(prompt=pa.nulls(24)), tmp_path / "o.parquet")
    with pytest.raises(InputError, match="column 'prompt', row 0: null is not allowed here"):
        read_outcomes(tmp_path / "o.parquet")
    assert read_prompts(tmp_path / "o.parquet").column("prompt").null_count == 8


def test_columns_that_nobody_reads_may_hold_anything(tmp_path: Path):
    nan, bad = pa.array([float("nan")] * 24), pa.array([b"\xff"] * 24).view(pa.string())
    table = replaced(cost_usd=nan, latency_s=nan, score=pa.array(["n/a"] * 24), note=bad, when=pa.array([[1]] * 24))
    expected = pivot(validate_outcomes(TABLE), POOL.names).digest()
    assert pivot(validate_outcomes(table), POOL.names).digest() == expected
    pq.write_table(table, tmp_path / "o.parquet")
    assert load_outcomes(tmp_path / "o.parquet", POOL).digest() == expected
    assert set(read_outcomes(tmp_path / "o.parquet").column_names) == set(TABLE.column_names)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            replaced(correct=pa.array([0] * 24, pa.timestamp("us"))),
            "'correct' must hold numbers, it holds timestamp",
        ),
        (replaced(correct=pa.array([[1]] * 24)), "column 'correct' must hold numbers, it holds list<.*; convert it"),
        (replaced(correct=pa.array(["1"] * 24)), "column 'correct' must hold numbers, it holds string; convert it"),
        (replaced(correct=pa.array([b"1"] * 24)), "column 'correct' must hold numbers, it holds binary; convert it"),
        (
            replaced(correct=pa.array([Decimal("1.5")] * 24)),
            r"row 0: got 1.5, allowed is a number from 0 \(wrong\) to 1 \(right\), or null",
        ),
        (replaced(output_tokens=pa.array([2.5] * 24)), "column 'output_tokens' does not fit int32"),
        (replaced(output_tokens=pa.array([2**60] * 24)), "column 'output_tokens' does not fit int32"),
        (replaced(query_id=pa.array(range(24))), "column 'query_id' must hold strings, it holds int64; convert it to"),
        (replaced(prompt=pa.array([["a"]] * 24)), "column 'prompt' must hold strings, it holds list<"),
        (replaced(prompt=pa.array([{"content": "a"}] * 24)), "column 'prompt' must hold strings, it holds struct<"),
        (replaced(benchmark=pa.array([1] * 24).dictionary_encode()), "column 'benchmark' must hold strings"),
        (TABLE.append_column("prompt", TABLE["prompt"]), "column 'prompt' occurs 2 times; keep one of them"),
        (TABLE.slice(0, 0), "the table has no rows"),
    ],
)
def test_other_types_are_refused_in_one_line_with_column_and_type(bad: pa.Table, message: str, tmp_path: Path):
    pq.write_table(bad, tmp_path / "o.parquet")
    for check in (lambda: validate_outcomes(bad), lambda: read_outcomes(tmp_path / "o.parquet")):
        with pytest.raises(InputError, match=message) as refused:
            check()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("column", ["query_id", "prompt"])
@pytest.mark.parametrize("values", [[["a"]] * 2, [{"content": "a"}] * 2, [1, 2]], ids=["list", "struct", "number"])
def test_a_prompts_file_without_text_is_refused_in_one_line(column: str, values: list[Any], tmp_path: Path):
    texts = pa.array(["a", "b"])
    pq.write_table(pa.table({"query_id": texts, "prompt": texts} | {column: values}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=f"column '{column}' must hold strings, it holds .*; convert it to text"):
        read_prompts(tmp_path / "p.parquet")


def test_a_file_without_row_groups_has_no_rows(tmp_path: Path):
    pq.ParquetWriter(tmp_path / "o.parquet", TABLE.schema).close()
    assert pq.ParquetFile(tmp_path / "o.parquet").num_row_groups == 0
    for read in (read_outcomes, read_prompts):
        with pytest.raises(InputError, match="the table has no rows"):
            read(tmp_path / "o.parquet")


def test_a_column_per_query_may_hold_decimals(tmp_path: Path):
    pq.write_table(replaced(judge=pa.array([Decimal("0.10")] * 24)), tmp_path / "o.parquet")
    np.testing.assert_array_equal(read_of_queries(tmp_path / "o.parquet", "judge", ["q0001", "none"]), [0.1, np.nan])
    pq.write_table(replaced(judge=pa.array(["NaN"] * 24)), tmp_path / "o.parquet")
    with pytest.raises(InputError, match="column 'judge', query_id 'q0000': got 'NaN', allowed is a number in"):
        read_of_queries(tmp_path / "o.parquet", "judge", ["q0001"])


def test_a_frame_is_read_without_its_other_columns():
    frame = TABLE.to_pandas()
    expected = pivot(validate_outcomes(TABLE), POOL.names).digest()
    frame["mixed"] = [1, "a", None] * 8  # Arrow has no type for it
    frame["correct"] = [Decimal(value) for value in frame["correct"]]
    assert Outcomes.from_frame(frame, POOL).digest() == expected
    for column, value, message in (
        ("prompt", "\ud800", "frame: .*surrogate"),
        ("prompt", 3.5, "frame: .*prompt"),
    ):
        bad = frame.copy()
        bad[column] = pd.Series([value, *bad[column][1:]], dtype=object)
        with pytest.raises(InputError, match=message):
            Outcomes.from_frame(bad, POOL)
    with pytest.raises(InputError, match="column 'prompt' occurs 2 times"):
        Outcomes.from_frame(pd.concat([frame, frame[["prompt"]]], axis=1), POOL)
