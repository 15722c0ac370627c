"""Faults of batch jobs, without a cluster: locks, prompts that end a process, full disks and damaged shards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_models import save_model

from jobs import features, prefill, shards
from jobs.shards import check_space, run_on_sample
from prefill_router.cli import main
from prefill_router.errors import InputError, UnavailableError
from prefill_router.files import disk_full, free_bytes, is_full, temporary_suffix, write_atomically
from prefill_router.locks import LOCK, locked
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import read_shards
from prefill_router.prefill.isolation import (
    CONSTANT_S,
    Attempts,
    Deadline,
    Part,
    encode_in_parts,
    parts_of,
    sample_parts,
)
from prefill_router.prefill.shards import PARQUET
from tune import semantic, sweep

ROOT = Path(__file__).parents[1]
HOLDER = """
import os, sys
from pathlib import Path
from prefill_router.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock of tmp_path / "out"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "platform")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_locked_folder_is_refused_naming_its_owner_until_the_owner_is_killed(
    tmp_path: Path, holder: subprocess.Popen[bytes]
) -> None:
    message = rf"out: locked by process {holder.pid} on \S+ since 2\S+ \S+ UTC \(python -c .*; wait until it ends"
    with pytest.raises(InputError, match=message), locked(tmp_path / "out"):
        pass
    holder.kill()
    holder.wait()
    own, of_another_host = f".best.yaml{temporary_suffix(os.getpid())}", f".best.yaml.elsewhere.{holder.pid}.tmp"
    for name in (own, of_another_host, f".best.yaml{temporary_suffix(holder.pid)}"):
        (tmp_path / "out" / name).touch()
    (tmp_path / "out" / f".checkpoint{temporary_suffix(holder.pid)}" / "a").mkdir(parents=True)
    with locked(tmp_path / "out"):
        assert {path.name for path in (tmp_path / "out").iterdir()} == {own, of_another_host, LOCK}


def test_a_lock_leaves_nothing_behind_and_can_be_held_again(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    for _ in range(2):
        with pytest.raises(KeyError), locked(out):
            raise KeyError
        assert not list(tmp_path.iterdir())
    with locked(out):
        (out / "kept").touch()
    assert [path.name for path in out.iterdir()] == ["kept"]


def test_a_second_lock_waits_for_the_first(tmp_path: Path) -> None:
    with ExitStack() as first:
        first.enter_context(locked(tmp_path))
        with pytest.raises(InputError, match="locked by"), locked(tmp_path, 0.3):
            pass
    with locked(tmp_path, 0.3):
        pass


@settings(deadline=None)
@given(st.integers(1, 200), st.sets(st.integers(0, 199), max_size=3))
def test_exactly_the_prompts_at_fault_are_refused(rows: int, faulty: set[int]) -> None:
    record, ends = Attempts(), 0
    while any(crashes(part, faulty) for part in record.parts("s", rows)):
        for part in record.parts("s", rows):
            if not part.refused:
                record.begin("s", part)
                if crashes(part, faulty):
                    ends += 1
                    break
                record.end("s", part)
    parts = record.parts("s", rows)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    assert {part.start for part in parts if part.refused} == {row for row in faulty if row < rows}
    assert ends <= 2 + len(faulty) * (2 + rows.bit_length())


def crashes(part: Part, faulty: set[int]) -> bool:
    return not part.refused and any(part.start <= row < part.stop for row in faulty)


def test_a_shard_is_tried_twice_before_it_is_halved() -> None:
    whole = {(0, 4): 1}
    assert parts_of(4, whole) == [Part(0, 4)]
    whole[0, 4] += 1
    assert parts_of(4, whole) == [Part(0, 2), Part(2, 4)]
    assert parts_of(4, whole | {(0, 2): 1, (1, 2): 2}) == [Part(0, 1), Part(1, 2, refused=True), Part(2, 4)]
    assert parts_of(1, {(0, 1): 1}) == [Part(0, 1)]


def test_a_refused_prompt_has_an_error_row_between_its_neighbours() -> None:
    record = Attempts()
    for part in (Part(0, 2), Part(0, 2), Part(1, 2), Part(1, 2)):
        record.begin("a", part)
    prompts = pa.table({"query_id": ["a", "b"], "prompt": ["one", "two"]})
    rows = encode_in_parts(encode, prompts, record, Deadline(0.0, 3.0, fixed=60.0)).to_pylist()
    assert rows[0] == {"query_id": "a", "prompt_digest": "digest of one", "error": None}
    assert rows[1]["query_id"] == "b"
    assert rows[1]["error"] == "the encoder's process crashed on this prompt, or took longer than 60 s, twice"
    assert rows[1]["prompt_digest"] == "3fc4ccfe745870e2"  # sha256 of "two"


def encode(prompts: pa.Table) -> pa.Table:
    texts = prompts.column("prompt").to_pylist()
    assert "two" not in texts
    return pa.table(
        {
            "query_id": prompts.column("query_id"),
            "prompt_digest": pa.array([text and f"digest of {text}" for text in texts], pa.string()),
            "error": pa.array([None if text else "prompt is null" for text in texts], pa.string()),
        }
    )


def test_a_deadline_grows_with_the_length_of_the_prompts() -> None:
    def seconds(*texts: str | None) -> float:
        table = pa.table({"query_id": [str(row) for row in range(len(texts))], "prompt": pa.array(texts, pa.string())})
        return Deadline(0.5, 10.0).seconds(table)

    assert seconds("x" * 10) == seconds("x") == seconds(None) == CONSTANT_S + 10
    assert seconds("x" * 30) == CONSTANT_S + 30
    assert seconds("x" * 30, "x" * 10) == CONSTANT_S + 40


def test_a_process_that_exceeds_its_deadline_ends_though_a_call_never_returns() -> None:
    script = (
        "import ctypes; from prefill_router.prefill.isolation import ends_after\n"
        "with ends_after(0.2): ctypes.PyDLL(None).sleep(60)"  # keeps the interpreter's lock
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT / "platform")},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr


def test_a_sample_is_tested_in_ever_smaller_parts() -> None:
    assert [(part.start, part.stop) for part in sample_parts(10)] == [
        *[(0, 10), (0, 10)],
        *[(0, 5), (5, 10)],
        *[(0, 2), (2, 5), (5, 7), (7, 10)],
    ]
    assert sample_parts(1) == [Part(0, 1), Part(0, 1)]


def test_a_test_that_hangs_is_not_repeated_and_ends_after_three_timeouts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(_task: int) -> None:
        raise shards.ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(shards.ray, "remote", lambda **_: lambda _test: SimpleNamespace(remote=lambda *_: 0))
    monkeypatch.setattr(shards, "answer", ends)
    sample = pa.table({"query_id": ["a", "b", "c", "d"], "prompt": ["one"] * 4})
    for limit_s, ended, tests in ((0.0, "parts of them after the time limit", 3), (60.0, "each part of them", 8)):
        with pytest.raises(InputError, match=f"tests 4 prompts ended on {ended} "):
            run_on_sample("faults", len, None, sample, {}, limit_s)
        assert capsys.readouterr().out.count("trying again") == tests


def test_an_encoder_whose_process_always_ends_while_it_loads_is_not_loaded_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards.ray, "get", lambda value: value)
    attempts = Attempts()
    methods = {name: SimpleNamespace(remote=getattr(attempts, name)) for name in ("begin_start", "end_start")}
    record = SimpleNamespace(**methods)
    for _ in range(3):
        attempts.begin_start()  # the process ended
    shards._Isolated(Encoder, None, record, None, 4)
    assert attempts.begin_start() == 1
    for _ in range(3):
        attempts.begin_start()
    with pytest.raises(InputError, match="4 processes in a row ended while they loaded the encoder"):
        shards._Isolated(Encoder, None, record, None, 4)
    attempts.begin("s", Part(0, 1))
    attempts.end("s", Part(0, 1))
    assert attempts.begin_start() == 1


class Encoder:
    def __init__(self, _config: None) -> None:
        pass


def test_the_limit_of_a_shard_is_a_finite_time_and_does_not_shorten_the_loading() -> None:
    for value in (float("inf"), float("nan"), 1e12, 0.0):
        with pytest.raises(ValidationError, match="shard_timeout_s"):
            features.FeaturesConfig(input=Path("a"), output=Path("b"), shard_timeout_s=value)
    assert [shards.load_limit(limit) for limit in (None, 60.0, 7200.0)] == [1800.0, 1800.0, 7200.0]


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    for write in (
        lambda temporary: (temporary.touch(), Path("/dev/full").write_text("x")),
        lambda temporary: fail('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
    ):
        with pytest.raises(UnavailableError, match=r"file: the disk is full: [\d,.]+ MiB are free; free space and run"):
            write_atomically(tmp_path / "file", write)
        assert not list(tmp_path.iterdir())
    assert not is_full(OSError(13, "Permission denied"))


def fail(message: str) -> None:
    raise RuntimeError(message)


def test_a_run_that_does_not_fit_on_the_disk_is_refused_with_both_numbers(tmp_path: Path) -> None:
    part = free_bytes(tmp_path) * 2 // 3
    check_space({tmp_path / "a" / "b": part})
    with pytest.raises(UnavailableError, match=r"c: the disk is full: [\d,.]+ MiB are free, about [\d,.]+ MiB are"):
        check_space({tmp_path / "a": part, tmp_path / "c": part})
    assert "needed" not in str(disk_full(tmp_path))


def test_a_changed_bit_of_a_shard_is_found_and_its_shard_named(tmp_path: Path) -> None:
    rows = pa.table({"query_id": ["a", "b"], "x": [1.5, 2.5]})
    for name in ("good.parquet", "bad.parquet"):
        pq.write_table(rows, tmp_path / name, **PARQUET)
    content = bytearray((tmp_path / "bad.parquet").read_bytes())
    place = bytes(content).index(rows["x"].chunk(0).buffers()[1].to_pybytes()[:16])
    content[place] ^= 1
    (tmp_path / "bad.parquet").write_bytes(content)
    names = ["good.parquet", "bad.parquet"]
    assert pq.read_table(tmp_path / "bad.parquet")["x"].to_pylist()[0] != 1.5  # a plain reader sees a number
    assert read_shards(tmp_path, names, ["query_id"]).num_rows == 4
    with pytest.raises(InputError, match=r"bad.parquet cannot be read .*delete it and run the job that wrote it again"):
        read_shards(tmp_path, names, ["x"])


def test_every_job_that_resumes_an_output_refuses_a_locked_one(tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.parquet", tmp_path / "out"
    pq.write_table(pa.table({"query_id": ["a"], "prompt": ["one"]}), prompts)
    inputs = {"outcomes": tmp_path / "o", "pool": tmp_path / "p", "activations": (tmp_path / "a",), "output": out}
    model = save_model("gpt2", tmp_path / "model")
    with locked(out):
        for run, config in (
            (prefill.run, prefill.PrefillConfig(input=prompts, output=out, encoder=EncoderConfig(model=str(model)))),
            (features.run, features.FeaturesConfig(input=prompts, output=out, complexity_only=True)),
            (sweep.run, sweep.SweepConfig.model_validate(inputs)),
            (semantic.run, semantic.SemanticConfig.model_validate(inputs)),
        ):
            with pytest.raises(InputError, match=f"{out}: locked by process {os.getpid()} on "):
                run(config)  # type: ignore[operator]


def test_a_program_that_meets_a_full_disk_in_a_library_ends_with_one_line_and_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(_config: features.FeaturesConfig) -> str:
        return str(Path("/dev/full").write_text("x"))

    with pytest.raises(SystemExit) as ended:
        main(features.FeaturesConfig, run, ["--input", "a.parquet", "--output", "b"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "job: error: a disk is full ([Errno 28] No space left on device); free space and run the same command again\n"
    )
