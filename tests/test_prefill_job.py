"""The prefill job: every prompt once, whatever interrupts it; nothing where there is nothing to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import prompts, save_model

import jobs.prefill
from jobs.cli import main, parse
from jobs.prefill import PrefillConfig, run
from prefill_router.errors import InputError
from prefill_router.files import prompt_digest
from prefill_router.prefill.dataset import MANIFEST, read_activations
from prefill_router.prefill.encoder import EncoderConfig
from prefill_router.prefill.transformers_backend import TransformersEncoder

ROOT = Path(__file__).parents[1]
TEXTS = prompts(60)
IDS = [f"q{row}" for row in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("model"))


def write_prompts(path: Path, ids: list[str] = IDS, texts: list[str | None] | None = None) -> Path:
    pq.write_table(pa.table({"query_id": ids, "prompt": pa.array(TEXTS if texts is None else texts, pa.string())}),
                   path)
    return path


def config(tmp_path: Path, model: Path, *options: str) -> PrefillConfig:
    return parse(PrefillConfig, "", ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out"),
                                     "--encoder.model", str(model), "--rows-per-shard", "16", "--actors", "1",
                                     *options])


@pytest.mark.usefixtures("ray_cluster")
def test_the_job_writes_every_prompt_once_and_equal_to_the_encoder(
        tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path / "in.parquet", [*IDS, "bad"], [*TEXTS, None])
    summary = run(config(tmp_path, model))
    out = capsys.readouterr().out
    assert "61 prompts to read: 0.0 MiB to write, about" in out
    assert "with 1 encoders of 1 CPUs and 0 GPUs" in out
    assert "61 prompts read in" in summary
    assert "61 rows, 1 without states" in summary
    activations = read_activations(tmp_path / "out")
    assert len(activations.manifest.shards) == 4
    assert activations.manifest.config["encoder"]["model"] == str(model)
    direct = TransformersEncoder(EncoderConfig(model=str(model)))(pq.read_table(tmp_path / "in.parquet"))
    rows = activations.rows([*IDS, "bad"])
    assert rows.schema.equals(direct.schema)
    assert rows.drop_columns(list(activations.columns)).equals(direct.drop_columns(list(activations.columns)))
    for column in activations.columns:
        want = np.asarray(direct.column(column).to_pylist()[:60], dtype=np.float32)
        got = activations.states(column, IDS, [prompt_digest(text) for text in TEXTS])
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("ray_cluster")
def test_a_second_run_does_nothing_and_one_with_more_rows_adds_them(
        tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [], jobs.prefill._encode

    def counting(config: PrefillConfig, prompts: pa.Table, *rest: object) -> None:
        encoded.append(prompts.num_rows)
        encode(config, prompts, *rest)

    monkeypatch.setattr(jobs.prefill, "_encode", counting)
    write_prompts(tmp_path / "in.parquet", IDS[:40], TEXTS[:40])
    run(config(tmp_path, model))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(config(tmp_path, model, "--encoder.batch-tokens", "99")).startswith("nothing to do: all 40 prompts are")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    write_prompts(tmp_path / "in.parquet")
    capsys.readouterr()
    assert "20 prompts read" in run(config(tmp_path, model))
    assert "40 of 60 prompts are there already" in capsys.readouterr().out
    assert read_activations(tmp_path / "out").manifest.counts.rows == 60
    assert encoded == [40, 20]


@pytest.mark.usefixtures("ray_cluster")
def test_another_encoder_or_prompt_in_the_same_folder_exits_2_and_changes_nothing(
        tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path / "in.parquet", IDS[:5], TEXTS[:5])
    run(config(tmp_path, model))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    argv = ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out"), "--encoder.model", str(model)]
    for extra, message in ((["--encoder.max-length", "8"], "max_length was 256, is now 8; choose another output"),
                           (["--encoder.layers", "[1]"], "holds the columns last_L2")):
        with pytest.raises(SystemExit) as exit_:
            main(PrefillConfig, run, [*argv, *extra])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    write_prompts(tmp_path / "in.parquet", IDS[:5], [*TEXTS[:4], "another"])
    with pytest.raises(InputError, match="query_id 'q4' was encoded from another prompt than the input has now"):
        run(config(tmp_path, model))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.usefixtures("ray_cluster")
def test_an_outcomes_table_is_read_by_query_and_truncation_that_merges_prompts_is_warned_of(
        tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = " ba do gi ta ba do gi ta"
    texts = [f"ka{end}", f"lo{end}"]
    rows = [{"query_id": f"q{q}", "benchmark": "b", "prompt": texts[q], "model": m, "correct": 1}
            for q in range(2) for m in ("x", "y")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    summary = run(config(tmp_path, model, "--encoder.max-length", "4"))
    assert "2 rows, 0 without states, 2 truncated" in summary
    assert "warning: truncation to 4 tokens made 2 different prompts equal to another" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "message"), [
    (["--encoder.model", "./nowhere"], "no such folder"),
    (["--encoder.layers", "[77]"], r"layers: got \[77\]"),
])
def test_a_bad_configuration_is_refused_before_anything_starts(options: list[str], message: str, tmp_path: Path,
                                                               model: Path) -> None:
    write_prompts(tmp_path / "in.parquet")
    with pytest.raises(InputError, match=message):
        run(config(tmp_path, model, *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_what_the_encoder_refuses_in_its_actor_arrives_as_one_line(tmp_path: Path, model: Path) -> None:
    write_prompts(tmp_path / "in.parquet")
    with pytest.raises(InputError, match=r"^max_length: got 999, the model takes 256 tokens at most$"):
        run(config(tmp_path, model, "--encoder.max-length", "999"))
    assert not (tmp_path / "out").exists()


def test_killed_with_9_and_started_again_every_row_is_there_once(tmp_path: Path, model: Path) -> None:
    ids, texts = [f"k{row}" for row in range(600)], prompts(600, seed=3)
    write_prompts(tmp_path / "in.parquet", ids, texts)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jobs.prefill", "--input", str(tmp_path / "in.parquet"), "--output", str(out),
               "--encoder.model", str(model), "--rows-per-shard", "4", "--actors", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.parquet"))) < 5:
        assert job.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (out / MANIFEST).exists()
    written = len(list(out.glob("*.parquet")))
    assert written < 150
    # What a writer leaves behind when it dies halfway through a file:
    shard = sorted(out.glob("*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert "was cut off while it was written; removed, its rows are read again" in again.stdout
    assert "of 600 prompts are there already" in again.stdout
    rows = read_activations(out).rows(ids)
    assert read_activations(out).manifest.counts.rows == 600
    direct = TransformersEncoder(EncoderConfig(model=str(model)))(pq.read_table(tmp_path / "in.parquet"))
    for column in read_activations(out).columns:
        got, want = (np.asarray(t.column(column).to_pylist(), dtype=np.float32) for t in (rows, direct))
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
