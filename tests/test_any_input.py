"""Any input gives a result or one line that names the fault: mutated outcomes tables, pools and configurations.

Each test runs 100 examples; PREFILL_ROUTER_EXAMPLES sets another number (`make test-inputs` runs 2,000). Mutated HTTP
requests are in test_any_request.py.
"""

from __future__ import annotations

import datetime
import decimal
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from builders import make_pool, make_table
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jobs.features import FeaturesConfig
from jobs.prefill import PrefillConfig
from jobs.probe import ProbeConfig
from prefill_router.cli import parse
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.outcomes.splits import make_folds, split_queries
from prefill_router.outcomes.table import load_outcomes, read_of_queries, read_outcomes, unique_prompts
from prefill_router.pool import load_pool, save_pool
from prefill_router.prefill.prompts import read_prompts
from prefill_router.workflows.evaluate import EvaluateConfig
from prefill_router.workflows.train import TrainConfig
from serve.config import RouterAppConfig
from tune.sweep import SweepConfig

EXAMPLES = int(os.environ.get("PREFILL_ROUTER_EXAMPLES", "100"))
any_input = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)

VALID, _ = make_table(n=24)
TEXTS = st.one_of(
    st.sampled_from(["", " ", "null", "NaN", "\x00", "q0001", "small", "ไทย", "a" * 5_000, "#", "%20", "models:/x"]),
    st.text(max_size=8),
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63 - 1, -(2**63)]), st.floats()
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    TEXTS,
    NUMBERS,
    st.binary(max_size=6),
    st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**6), max_value=10**6),
    st.just(datetime.datetime(2026, 1, 1)),
    st.lists(st.integers(0, 9), max_size=2),
    st.just({"a": 1}),
)
TYPES = st.sampled_from(
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.null(), pa.bool_(),
        pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.decimal128(12, 3), pa.timestamp("ns"),
        pa.date32(), pa.duration("s"), pa.list_(pa.string()), pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()), pa.dictionary(pa.int32(), pa.int64()),
    ]
)  # fmt: skip
COLUMNS = st.sampled_from(VALID.column_names)


def answered(call: Callable[[], object]) -> object:
    """The result of the call, or None for an InputError of one line. Every other exception fails the test."""
    try:
        return call()
    except InputError as error:
        message = str(error)
    assert message.strip()
    assert "\n" not in message
    return None


def changed_value(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    """One value of a column is replaced. A value of another type gives a column of that type."""
    values = table.column(name).to_pylist()
    values[row % len(values)] = value
    try:
        column = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, decimal.InvalidOperation, OverflowError):
        column = pa.array([value] * len(values))
    return table.set_column(table.column_names.index(name), name, column)


def changed_type(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    column = table.column(name)
    try:
        if pa.types.is_dictionary(kind):
            column = column.cast(kind.value_type).dictionary_encode()
        column = column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        column = pa.nulls(table.num_rows, kind)
    return table.set_column(table.column_names.index(name), name, column)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """The valid table after one to four mutations."""
    table = VALID
    for _ in range(draw(st.integers(1, 4))):
        name = draw(COLUMNS)
        if table.column_names.count(name) != 1:
            continue
        match draw(st.integers(0, 8)):
            case 0:
                table = table.drop_columns([name])
            case 1:
                table = table.rename_columns([draw(TEXTS) if one == name else one for one in table.column_names])
            case 2:
                table = changed_type(table, name, draw(TYPES))
            case 3 | 4 | 5:
                assume(table.num_rows)
                table = changed_value(table, name, draw(st.integers(0, 1_000)), draw(VALUES))
            case 6:
                table = table.slice(draw(st.integers(0, 80)), draw(st.integers(0, 80)))
            case 7:
                table = pa.concat_tables([table, table.slice(0, draw(st.integers(0, 3)))])
            case 8:
                table = table.append_column(draw(st.sampled_from([name, "notes", ""])), pa.nulls(table.num_rows))
    return table


@any_input
@given(tables(), st.sampled_from([1, 7, 1_000]))
def test_any_outcomes_table_is_read_or_refused_in_one_line(table: pa.Table, row_group: int):
    pool = make_pool()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.parquet"
        try:
            pq.write_table(table, path, row_group_size=row_group)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            assume(False)  # no Parquet file holds this table
        validated = answered(lambda: read_outcomes(path))
        if validated is not None:
            assert answered(lambda: unique_prompts(validated)) is not None
        answered(lambda: read_prompts(path))
        answered(lambda: read_of_queries(path, "score", ["q0001"]))
        outcomes = answered(lambda: load_outcomes(path, pool))
        if outcomes is None:
            return
        for scheme in ("85/15", "75/10/15"):
            split = answered(lambda scheme=scheme: split_queries(outcomes, 0, scheme))
            if split is not None:
                answered(lambda split=split: make_folds(outcomes, split.train, 0))
        assert len(outcomes.digest()) == 64


@any_input
@given(st.integers(0, 10_000), st.binary(max_size=40))
def test_a_damaged_outcomes_file_is_refused_in_one_line(at: int, inserted: bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.parquet"
        pq.write_table(VALID, path)
        content = path.read_bytes()
        path.write_bytes(content[: at % len(content)] + inserted)
        assert answered(lambda: read_outcomes(path)) is None
        assert answered(lambda: read_prompts(path)) is None


def mutated(draw: st.DrawFn, value: Any) -> Any:
    """`value` (a YAML document) after one to three mutations at random places."""
    document = yaml.safe_load(yaml.safe_dump(value))
    for _ in range(draw(st.integers(1, 3))):
        parents: list[Any] = []

        def collect(node: Any, parents: list[Any] = parents) -> None:
            if isinstance(node, dict | list) and node:
                parents.append(node)
                for child in node.values() if isinstance(node, dict) else node:
                    collect(child)

        collect(document)
        if not parents:
            return draw(DOCUMENTS)
        parent = draw(st.sampled_from(parents))
        key = draw(st.sampled_from(sorted(parent, key=str) if isinstance(parent, dict) else range(len(parent))))
        match draw(st.integers(0, 3)):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw(TEXTS)] = parent[key]
            case _:
                parent[key] = draw(DOCUMENTS)
    return document


DOCUMENTS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.sampled_from(["auto", "last_L1", "s3://b/x"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


@any_input
@given(st.data())
def test_any_pool_file_is_read_or_refused_in_one_line(data: st.DataObject):
    valid = make_pool().model_dump(mode="json", exclude_unset=True)
    valid["models"][0] |= {"context_tokens": 8192, "capabilities": ["tools"], "endpoint": {"base_url": "http://x/v1"}}
    valid["models"][1]["self_hosted"] = {"gpu_usd_per_hour": 2.5, "ttft_s_per_1k_tokens": 0.1, "itl_s": 0.01}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.yaml"
        path.write_text(yaml.safe_dump(mutated(data.draw, valid), allow_unicode=True), encoding="utf-8")
        pool = answered(lambda: load_pool(path))
        if pool is not None:
            save_pool(pool, path)
            assert load_pool(path) == pool


INPUTS = {"outcomes": "o.parquet", "pool": "p.yaml", "activations": ["a"], "output": "out"}
FIT = {"seed": 1, "components": 8, "strategy": "fixed", "fixed": "last_L4", "trunk": {"hidden": [16], "members": 2}}
CONFIGURATIONS: list[tuple[type[FrozenModel], dict[str, Any]]] = [
    (PrefillConfig, {"input": "o", "output": "x", "encoder": {"layers": [1, 2], "batch_tokens": 64, "vllm": {}}}),
    (PrefillConfig, {"input": "o", "output": "x", "encoders": {"a": {"model": "minilm"}, "b": {"dtype": "float32"}}}),
    (FeaturesConfig, {"input": "o.parquet", "output": "x"}),
    (ProbeConfig, INPUTS),
    (TrainConfig, INPUTS | {"fit": FIT}),
    (EvaluateConfig, INPUTS | {"checkpoint": "c"}),
    (SweepConfig, INPUTS | {"fit": FIT}),
    (
        RouterAppConfig,
        {"checkpoint": "c", "gateway": {"timeout_s": 3.0}, "encoder": {"overrides": {"minilm": {"device": "cpu"}}}},
    ),
]


@any_input
@given(st.data())
def test_any_configuration_is_read_or_refused_in_one_line(data: st.DataObject):
    kind, valid = data.draw(st.sampled_from(CONFIGURATIONS))
    options = data.draw(st.lists(st.one_of(TEXTS, st.sampled_from(OPTIONS)), max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(mutated(data.draw, valid), allow_unicode=True), encoding="utf-8")
        answered(lambda: parse(kind, "", ["--config", str(path)]))
        answered(lambda: parse(kind, "", [*options, "--config", str(path)]))


OPTIONS = [
    "--output", "--pool=", "--fit.seed", "-1", "1", "--no-resume", "--encoder.batch_tokens", "--encoder.layers", "[1",
    "{a: 1}", "--activations", "[a, b]", "--fit.trunk.hidden", "--checkpoint", "--", "-", "--=", "--config", "true",
]  # fmt: skip
