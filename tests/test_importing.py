"""Import of outcomes: round trips through every layout, a real log of inspect_ai, mappings, and refused files."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import foreign_layouts as layouts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefill_router.cli import parse
from prefill_router.errors import InputError
from prefill_router.importing import inspect_logs, lm_eval, router_bench
from prefill_router.importing.answers import Answer, outcomes_of
from prefill_router.importing.formats import files_of
from prefill_router.outcomes.sample import make_sample
from prefill_router.outcomes.table import read_note, read_outcomes

job = importlib.import_module("jobs.import")
OF_QUERY = ("query_id", "benchmark", "prompt", "model", "correct")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Rows of the built-in sample; every query has a label of every model or none."""
    return make_sample(0, 60)[0].to_pylist()


def imported(output: Path, **settings: Any) -> pa.Table:
    job.run(job.ImportConfig(output=output, **settings))
    read_outcomes(output)  # is a valid outcomes table
    return pq.read_table(output)


def check_equal(found: pa.Table, rows: list[dict[str, Any]], *columns: str, prefix: str = "") -> None:
    """The columns of the import are those of `rows`, in any order. `prefix`: of the ids, with {benchmark}."""

    def keyed(values: list[dict[str, Any]], prefix: str) -> dict[tuple[str, str], Mapping[str, Any]]:
        return {(prefix.format(**row) + row["query_id"], row["model"]): row for row in values}

    ours, theirs = keyed(found.to_pylist(), ""), keyed(rows, prefix)
    assert ours.keys() == theirs.keys()
    for key, row in theirs.items():
        for name in columns:
            assert ours[key][name] == (row[name] if name != "cost_usd" else pytest.approx(row[name])), (key, name)


def test_samples_of_lm_eval_are_read(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    layouts.write_lm_eval(rows, tmp_path / "logs")
    found = imported(tmp_path / "o.parquet", input=(tmp_path / "logs",), tokenizer="smollm2")
    check_equal(found, rows, *OF_QUERY[1:], prefix="{benchmark}/")
    assert set(found["scored_by"].to_pylist()) == {"lm_eval exact_match,strict-match"}
    assert set(found["tokens_from"].to_pylist()) == {"estimated with smollm2"}
    assert set(found["output_tokens"].to_pylist()) == {5}  # "It is 7."
    other = imported(tmp_path / "p.parquet", input=(tmp_path / "logs",), metric="exact_match,flexible-extract")
    assert set(other["correct"].to_pylist()) == {1}
    assert set(other["input_tokens"].to_pylist()) == {None}


def test_files_of_llm_router_bench_are_read(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    layouts.write_llm_router_bench(rows, tmp_path / "bench")
    found = imported(tmp_path / "o.parquet", input=(tmp_path / "bench",))
    columns = (*OF_QUERY[1:], "input_tokens", "output_tokens", "cost_usd")
    check_equal(found, rows, *columns, prefix="{benchmark}/test/")
    assert set(found["tokens_from"].to_pylist()) == {"reported"}


def test_a_wide_table_of_router_bench_is_read(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    layouts.write_router_bench(rows, tmp_path / "routerbench_0shot.csv")
    found = imported(tmp_path / "o.parquet", input=(tmp_path / "routerbench_0shot.csv",))
    present = {(row["query_id"], row["model"]) for row in rows}
    of_row = [(row["query_id"], row["model"]) in present for row in found.to_pylist()]
    check_equal(found.filter(pa.array(of_row)), rows, *OF_QUERY, "cost_usd")
    assert set(found.filter(pa.array([not one for one in of_row]))["correct"].to_pylist()) == {None}


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "routerbench_0shot.pkl"
    path.write_bytes(b"\x80")
    with pytest.raises(InputError, match=r"can run code.*read_pickle"):
        imported(tmp_path / "o.parquet", input=(path,))


def test_router_arena_is_read_for_evaluation_only(
    rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [row | {"query_id": f"{row['benchmark']}_{row['query_id']}"} for row in rows]
    layouts.write_router_arena(named, tmp_path / "arena")
    found = imported(tmp_path / "o.parquet", input=(tmp_path / "arena",))
    check_equal(found, named, *OF_QUERY, "input_tokens", "output_tokens", "cost_usd")
    assert "forbid training" in str(read_note(tmp_path / "o.parquet"))
    assert "forbid training" in capsys.readouterr().err


def test_logs_of_inspect_ai_are_read(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    layouts.write_inspect(rows, tmp_path / "logs")
    found = imported(tmp_path / "o.parquet", input=(tmp_path / "logs",))
    columns = (*OF_QUERY[1:], "input_tokens", "output_tokens", "cost_usd", "latency_s")
    check_equal(found, rows, *columns, prefix="{benchmark}/")
    assert set(found["scored_by"].to_pylist()) == {"inspect_ai match"}


def test_a_log_that_inspect_ai_has_made_is_read(tmp_path: Path) -> None:
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate, system_message

    samples = [Sample(id=f"q/{n}", input=f"What is {n} + {n}?", target=str(2 * n)) for n in range(3)]
    task = inspect_ai.Task(
        MemoryDataset(samples), [system_message("Be short."), generate()], scorer=match(), name="sums", epochs=2
    )
    outputs = [ModelOutput.from_content("mockllm/model", text) for text in ("0", "0", "2", "3", "4", "x")]
    for output in outputs:  # otherwise inspect_ai downloads a tokenizer to count tokens
        output.usage = ModelUsage(input_tokens=9, output_tokens=1, total_tokens=10, reasoning_tokens=0)
    model = get_model("mockllm/model", custom_outputs=itertools.cycle(outputs))
    log = inspect_ai.eval(task, model, log_dir=str(tmp_path), max_samples=1, display="none", reasoning_effort="high")[0]
    assert log.status == "success", log.error
    found = {row["query_id"]: row for row in imported(tmp_path / "o.parquet", input=(tmp_path,)).to_pylist()}
    assert set(found) == {"sums/q/0", "sums/q/1", "sums/q/2"}
    assert {row["model"] for row in found.values()} == {"mockllm/model@high"}
    assert found["sums/q/1"]["prompt"] == "What is 1 + 1?"
    assert sum(row["answers"] for row in found.values()) == 6
    assert {row["score"] for row in found.values()} <= {0.0, 0.5, 1.0}
    assert sum(row["score"] for row in found.values()) == pytest.approx(sum(_right(log)) / 2)


def _right(log: Any) -> list[bool]:
    return [sample.output.completion == sample.target for sample in log.samples]


def test_several_answers_make_one_row_with_their_mean() -> None:
    one = Answer("q", "b", "Why?", "m", 1.0, "s", output_tokens=10, cost_usd=1.0)
    two = Answer("q", "b", "Why?", "m", 0.0, "t", output_tokens=13)
    failed = Answer("q", "b", "Why?", "m", None, "s", error="timeout")
    made = outcomes_of([one, two, two, failed])
    assert (made.answers, made.failed, made.unscored) == (4, 1, 0)
    row = made.table.to_pylist()[0]
    assert (row["score"], row["correct"], row["answers"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3), 3)
    assert (row["scored_by"], row["output_tokens"], row["cost_usd"]) == ("s, t", 12, 1.0)
    assert outcomes_of([one, two, two], correct_from=0.3).table["correct"].to_pylist() == [1]
    assert outcomes_of([one, two, two], correct_from=0.5).table["correct"].type == pa.int8()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([Answer("q", "b", "Why?", "m", 1.5, "s")], "score: got 1.5"),
        ([Answer("q", "b", "Why?", "m", 1.0, "s"), Answer("q", "b", "How?", "n", 1.0, "s")], "two values of prompt"),
        ([Answer("q", "b", "Why?", "m", 1.0, "s"), Answer("q", "c", "Why?", "n", 1.0, "s")], "two values of benchmark"),
        ([Answer("q", "b", "Why?", "m", 1.0, "s", error="x")], "none without an error"),
        ([], "0 answers"),
    ],
)
def test_answers_that_make_no_table_are_refused(answers: list[Answer], message: str) -> None:
    with pytest.raises(InputError, match=message):
        outcomes_of(answers)


LONG = "id,text,llm,points,tokens\n1,Why?,a,10,5\n1,Why?,b,0,\n2,How?,a,5,7\n"
WIDE = "id,text,a,b\n1,Why?,10,0\n2,How?,5,\n"
SCORED = {"models": {"a": {"score": "a"}}}
COUNTED = {"models": {"a": {"score": "a", "input_tokens": "n"}}}
IDS = {"query_id": "id", "prompt": "text", "score_max": 10}


@pytest.mark.parametrize(
    ("text", "mapping", "tokens"),
    [
        (LONG, {"model": "llm", "columns": {"score": "points", "output_tokens": "tokens"}}, [5, None, 7]),
        (WIDE, {"models": {"a": {"score": "a"}, "b": {"score": "b"}}}, [None] * 3),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_any_table_is_read_by_a_mapping(
    text: str, mapping: dict[str, Any], tokens: list[int | None], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"table.{kind}"
    lines = [line.split(",") for line in text.splitlines()]
    values = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    if kind == "csv":
        path.write_text(text)
    elif kind == "jsonl":
        path.write_text("".join(f"{json.dumps({k: v for k, v in one.items() if v})}\n" for one in values))
    else:
        pq.write_table(pa.Table.from_pylist([{k: v or None for k, v in one.items()} for one in values]), path)
    (tmp_path / "mapping.yaml").write_text(json.dumps(IDS | mapping))
    found = imported(tmp_path / "o.parquet", input=(path,), mapping=tmp_path / "mapping.yaml", rename={"a": "model-a"})
    assert found["query_id"].to_pylist() == ["1", "1", "2"]
    assert found["model"].to_pylist() == ["model-a", "b", "model-a"]
    assert found["correct"].to_pylist() == found["score"].to_pylist() == [1.0, 0.0, 0.5]
    assert found["output_tokens"].to_pylist() == tokens
    assert set(found["benchmark"].to_pylist()) == {"imported"}


def test_the_command_line_takes_one_path(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(WIDE)
    (tmp_path / "m.yaml").write_text(json.dumps(IDS | {"models": {"a": {"score": "a"}}}))
    given = f"--input {tmp_path}/t.csv --mapping {tmp_path}/m.yaml --output {tmp_path}/o.parquet".split()
    job.run(parse(job.ImportConfig, "", given))
    assert pq.read_table(tmp_path / "o.parquet")["correct"].to_pylist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("name", "content", "mapping", "message"),
    [
        (
            "t.csv",
            WIDE.encode(),
            {"models": {"a": {"score": "aa"}}},
            "no column 'aa', which the mapping names; it has a, b",
        ),
        ("t.jsonl", b'{"id": 1, "text": "x", "a": 1}', {"models": {"a": {"score": "aa"}}}, "no column 'aa'"),
        ("t.csv", b"id,text,a\n1,\xff,1\n", SCORED, "cannot be read"),
        ("t.parquet", b"PAR1", SCORED, "cannot be read"),
        ("t.csv", b"id,text,a\n1,x,yes\n", SCORED, "line 2: 'a' must be a number"),
        (
            "t.csv",
            b"id,text,a,n\n1,x,1,1e400\n",
            {"models": {"a": {"score": "a", "input_tokens": "n"}}},
            "must be from 0 to",
        ),
        ("t.jsonl", b'{"id": 1, "text": "\\ud800", "a": 1}', SCORED, "no UTF-8 text"),
        (
            "t.jsonl",
            b'{"id": 1, "text": "x", "a": ' + b"9" * 5_000 + b"}",
            {"models": {"a": {"score": "a"}}},
            "not valid JSON",
        ),
        ("none.jsonl", None, SCORED, "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(
    name: str, content: bytes | None, mapping: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "m.yaml").write_text(json.dumps(IDS | {"score_max": 1} | mapping))
    with pytest.raises(InputError, match=message):
        imported(tmp_path / "o.parquet", input=(tmp_path / name,), mapping=tmp_path / "m.yaml")
    assert not (tmp_path / "o.parquet").exists()


def test_other_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "samples_t_2026.jsonl").write_text('{"doc_id": 0, "arguments": [["Why?", {}]], "acc": 1.0}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "latin.csv").write_bytes(b"\xff,b\n")
    assert list(files_of([tmp_path], None).values()) == ["lm_eval"]


def test_the_messages_of_a_chat_are_the_prompt_of_lm_eval(tmp_path: Path) -> None:
    chat = json.dumps([{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}])
    line = {"doc_id": 0, "arguments": {"gen_args_0": {"arg_0": chat}}, "acc": True}
    (tmp_path / "samples_t_2026.jsonl").write_text(json.dumps(line))
    assert [one.prompt for one in lm_eval.read(tmp_path / "samples_t_2026.jsonl")] == ["Why?"]


def test_a_mapping_is_long_or_wide(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(LONG)
    (tmp_path / "m.yaml").write_text(json.dumps(IDS))
    with pytest.raises(InputError, match="models: give either"):
        imported(tmp_path / "o.parquet", input=(tmp_path / "t.csv",), mapping=tmp_path / "m.yaml")


def test_an_unknown_file_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="one of the formats inspect_ai, lm_eval"):
        imported(tmp_path / "o.parquet", input=(tmp_path / "x.json",))
    with pytest.raises(InputError, match="no such file"):
        imported(tmp_path / "o.parquet", input=(tmp_path / "y.json",))
    assert not (tmp_path / "o.parquet").exists()


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples_t_2026.jsonl"
    path.write_text(
        '{"doc_id": 0, "arguments": [["Why?", {}]], "acc": 1.0}\n{"doc_id": 1, "arguments": [], "acc": 1.0}\n'
    )
    with pytest.raises(InputError, match="line 2: 'arguments' has no text"):
        list(lm_eval.read(path))
    with pytest.raises(InputError, match="line 1: no metric 'f1'"):
        list(lm_eval.read(path, "f1"))
    assert files_of([path], None) == {path: "lm_eval"}


def test_texts_of_router_bench_are_lists_or_plain() -> None:
    assert router_bench._turns("['a', 'b']") == "a\nb"
    assert router_bench._turns("[1] is a list") == "[1] is a list"
    assert router_bench._turns("plain") == "plain"


def test_scores_of_inspect_ai() -> None:
    score = inspect_logs._score
    of = lambda value: {"s": type("Score", (), {"value": value})()}  # noqa: E731
    assert [score(of(v), None, "x")[0] for v in ("C", "P", "I", "N", True, 0.25)] == [1, 0.5, 0, 0, 1, 0.25]
    assert score({}, None, "x") == (None, "")
    assert score(of({"a": 1, "b": 0}), "s.b", "x") == (0, "s")
    with pytest.raises(InputError, match=r"choose one as metric: s\.a, s\.b"):
        score(of({"a": 1, "b": 0}), None, "x")
    with pytest.raises(InputError, match="no scorer 't'"):
        score(of(1), "t", "x")
    with pytest.raises(InputError, match="is no number"):
        score(of("maybe"), None, "x")
