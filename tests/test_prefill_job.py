"""The prefill job: it encodes every prompt once despite interruptions and does nothing for a finished dataset."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import prompts, save_model, scale_mlp

import jobs.prefill
from jobs.prefill import Plan, PrefillConfig, run
from jobs.shards import throughput
from prefill_router.cli import main, parse
from prefill_router.errors import InputError
from prefill_router.files import prompt_digest
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import MANIFEST, PARTIAL, read_activations
from prefill_router.prefill.transformers_backend import TransformersEncoder

ROOT = Path(__file__).parents[1]
TEXTS = prompts(60)
IDS = [f"q{row}" for row in range(60)]
MANY = [f"k{row}" for row in range(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("model"))


def write_prompts(path: Path, ids: list[str] = IDS, texts: list[str | None] | None = None) -> Path:
    pq.write_table(
        pa.table({"query_id": ids, "prompt": pa.array(TEXTS if texts is None else texts, pa.string())}), path
    )
    return path


def config(tmp_path: Path, model: Path, *options: str) -> PrefillConfig:
    return parse(
        PrefillConfig,
        "",
        [
            "--input",
            str(tmp_path / "in.parquet"),
            "--output",
            str(tmp_path / "out"),
            "--encoder.model",
            str(model),
            "--rows-per-shard",
            "16",
            "--actors",
            "1",
            *options,
        ],
    )


@pytest.mark.usefixtures("ray_cluster")
def test_the_job_writes_the_states_of_the_encoder_once_per_prompt(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "in.parquet", [*IDS, "bad"], [*TEXTS, None])
    summary = run(config(tmp_path, model))
    out = capsys.readouterr().out
    assert "61 prompts to encode: 0.0 MiB to write, about" in out
    assert re.search(r"with 1 actors of 1 CPUs and 0 GPUs, [\d,]+ tokens/s each, \d+\.\d\d of the bare forward\n", out)
    assert "61 prompts encoded in" in summary
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
def test_a_second_run_does_nothing_and_new_rows_are_added(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = [], jobs.prefill._encode

    def counting(plan: Plan, prompts: pa.Table) -> None:
        encoded.append(prompts.num_rows)
        encode(plan, prompts)

    monkeypatch.setattr(jobs.prefill, "_encode", counting)
    write_prompts(tmp_path / "in.parquet", IDS[:40], TEXTS[:40])
    run(config(tmp_path, model))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(config(tmp_path, model, "--encoder.batch-tokens", "99")).startswith("nothing to do: all 40 prompts are")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    write_prompts(tmp_path / "in.parquet")
    capsys.readouterr()
    assert "20 prompts encoded" in run(config(tmp_path, model))
    assert "40 of 60 prompts are already encoded" in capsys.readouterr().out
    assert read_activations(tmp_path / "out").manifest.counts.rows == 60
    assert encoded == [40, 20]


@pytest.mark.usefixtures("ray_cluster")
def test_another_encoder_or_prompt_exits_2_and_changes_nothing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "in.parquet", IDS[:5], TEXTS[:5])
    run(config(tmp_path, model))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    argv = ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out"), "--encoder.model", str(model)]
    for extra, message in (
        (["--encoder.max-length", "8"], "max_length was 256, is now 8; choose another output"),
        (["--encoder.layers", "[1]"], "holds the columns last_L2"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(PrefillConfig, run, [*argv, *extra])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    write_prompts(tmp_path / "in.parquet", IDS[:5], [*TEXTS[:4], "another"])
    with pytest.raises(InputError, match="query_id 'q4' was encoded from another prompt than the input has now"):
        run(config(tmp_path, model))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.usefixtures("ray_cluster")
def test_an_outcomes_table_is_read_by_query_and_merged_prompts_give_a_warning(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = " ba do gi ta ba do gi ta"
    texts = [f"ka{end}", f"lo{end}"]
    rows = [
        {"query_id": f"q{q}", "benchmark": "b", "prompt": texts[q], "model": m, "correct": 1}
        for q in range(2)
        for m in ("x", "y")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    summary = run(config(tmp_path, model, "--encoder.max-length", "4"))
    assert "2 rows, 0 without states, 2 truncated" in summary
    assert "warning: truncation to 4 tokens made 2 different prompts equal to another prompt" in capsys.readouterr().out


def assert_close(folder: Path, model: Path, ids: list[str], prompts_file: Path, **options: object) -> None:
    """Asserts that the dataset's states equal those of the encoder up to rounding to float16."""
    rows = read_activations(folder).rows(ids)
    direct = TransformersEncoder(EncoderConfig(model=str(model), **options))(pq.read_table(prompts_file))
    assert read_activations(folder).columns == tuple(name for name in direct.column_names if "_L" in name)
    for column in read_activations(folder).columns:
        got, want = (np.asarray(t.column(column).to_pylist(), dtype=np.float32) for t in (rows, direct))
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("ray_cluster")
def test_several_encoders_write_one_folder_each_and_finished_folders_are_kept(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = [], jobs.prefill._encode

    def counting(plan: Plan, prompts: pa.Table) -> None:
        encoded.append((plan.config.output.name, prompts.num_rows))
        encode(plan, prompts)

    monkeypatch.setattr(jobs.prefill, "_encode", counting)
    write_prompts(tmp_path / "in.parquet", IDS[:20], TEXTS[:20])
    (tmp_path / "job.yaml").write_text(f"""
        input: {tmp_path}/in.parquet
        output: {tmp_path}/out
        rows_per_shard: 16
        actors: 1
        encoders:
          upper: {{model: {model}}}
          lowest: {{model: {model}, layers: [0], poolings: [mean]}}""")
    several = parse(PrefillConfig, "", ["--config", str(tmp_path / "job.yaml")])
    summary = run(several)
    assert "40 prompts encoded by 2 encoders in" in summary
    assert f"into {tmp_path}/out/{{upper,lowest}} (40 rows, 0 without states, 0 truncated" in summary
    assert "prefill lowest: 20 prompts to encode" in capsys.readouterr().out
    assert_close(tmp_path / "out/upper", model, IDS[:20], tmp_path / "in.parquet")
    assert_close(tmp_path / "out/lowest", model, IDS[:20], tmp_path / "in.parquet", layers=(0,), poolings=("mean",))
    assert read_activations(tmp_path / "out/lowest").encoder_config.layers == (0,)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(several).startswith(f"nothing to do: all 20 prompts are in {tmp_path}/out/{{upper,lowest}} (40 rows")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    # The state of one folder after a kill.
    (tmp_path / "out/lowest" / read_activations(tmp_path / "out/lowest").manifest.shards[0]).unlink()
    (tmp_path / "out/lowest" / MANIFEST).rename(tmp_path / "out/lowest" / PARTIAL)
    assert "prompts encoded in" in run(several)
    assert encoded[:2] == [("upper", 20), ("lowest", 20)]
    assert [name for name, _ in encoded[2:]] == ["lowest"]
    assert read_activations(tmp_path / "out/lowest").manifest.counts.rows == 20
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/upper").rglob("*")}.items() <= before.items()
    # A folder of one encoder is refused as output of several.
    with pytest.raises(InputError, match="holds the activations of one encoder; choose another output folder"):
        run(several.model_copy(update={"output": tmp_path / "out/upper"}))


@pytest.mark.usefixtures("ray_cluster")
def test_an_invalid_encoder_is_refused_before_any_encoder_starts(tmp_path: Path, model: Path) -> None:
    write_prompts(tmp_path / "in.parquet")
    encoders = {"good": EncoderConfig(model=str(model)), "long": EncoderConfig(model=str(model), max_length=999)}
    with pytest.raises(InputError, match=r"^max_length: got 999, the model takes 256 tokens at most; set 256 or less$"):
        run(PrefillConfig(input=tmp_path / "in.parquet", output=tmp_path / "out", encoders=encoders))
    assert not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("encoders", "options", "message"),
    [
        ("{a: {}}", ["--encoder.dtype", "bfloat16"], "encoder and encoders are both given"),
        ("{}", [], "encoders: got no encoder"),
        ("{a/b: {}}", [], "'a/b' is not a valid name of an output folder"),
        ("{..: {}}", [], r"'\.\.' is not a valid name of an output folder"),
        ("{a: {modell: x}}", [], "encoders.a.modell: Extra inputs are not permitted"),
    ],
)
def test_invalid_encoders_are_refused(encoders: str, options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        parse(PrefillConfig, "", ["--input", "in", "--output", str(tmp_path), "--encoders", encoders, *options])


def test_throughput_is_compared_with_one_forward_pass_per_actor() -> None:
    assert throughput(3000.0, 4, 1000.0) == "3,000 tokens/s, 0.75 of the bare forward"
    assert throughput(3000.0, 4, None) == "3,000 tokens/s"
    assert throughput(None, 4, 1000.0) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder.model", "./nowhere"], "no such folder"),
        (["--encoder.layers", "[77]"], r"layers: got \[77\]"),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_starts(
    options: list[str], message: str, tmp_path: Path, model: Path
) -> None:
    write_prompts(tmp_path / "in.parquet")
    with pytest.raises(InputError, match=message):
        run(config(tmp_path, model, *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_the_encoder_in_its_actor_is_an_input_error(tmp_path: Path, model: Path) -> None:
    write_prompts(tmp_path / "in.parquet")
    with pytest.raises(InputError, match=r"^max_length: got 999, the model takes 256 tokens at most; set 256 or less$"):
        run(config(tmp_path, model, "--encoder.max-length", "999"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_states_that_overflow_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = scale_mlp(save_model("llama", tmp_path / "model"), 1, 1e6)
    write_prompts(tmp_path / "in.parquet", IDS[:9], [*TEXTS[:8], None])
    message = r"^encoder: 8 of 9 sampled prompts have no states: last_L2 overflows float16 .* use states_dtype float32$"
    with pytest.raises(InputError, match=message):
        run(config(tmp_path, model))
    assert not (tmp_path / "out").exists()


def start(tmp_path: Path, model: Path) -> tuple[subprocess.Popen[bytes], list[str], dict[str, str]]:
    """A running job of 600 prompts on a local Ray with 5 of 150 shards written; its command and environment."""
    write_prompts(tmp_path / "in.parquet", MANY, prompts(600, seed=3))
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "jobs.prefill",
        "--input",
        str(tmp_path / "in.parquet"),
        "--output",
        str(out),
        "--encoder.model",
        str(model),
        "--rows-per-shard",
        "4",
        "--actors",
        "1",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.parquet"))) < 5:
        assert job.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job, command, environment


@pytest.mark.ray
def test_a_killed_encoder_is_replaced_and_every_row_exists_once(tmp_path: Path, model: Path) -> None:
    job, _, _ = start(tmp_path, model)
    encoders = [
        child
        for child in psutil.Process(job.pid).children(recursive=True)
        if "ray::MapWorker" in " ".join(child.cmdline())
    ]
    assert len(encoders) == 1
    encoders[0].kill()
    assert len(list((tmp_path / "out").glob("*.parquet"))) < 140
    assert job.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    assert "600 prompts encoded in" in (tmp_path / "log").read_text()
    assert read_activations(tmp_path / "out").manifest.counts.rows == 600
    assert_close(tmp_path / "out", model, MANY, tmp_path / "in.parquet")


@pytest.mark.ray
def test_a_killed_job_resumes_and_every_row_exists_once(tmp_path: Path, model: Path) -> None:
    job, command, environment = start(tmp_path, model)
    out = tmp_path / "out"
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (out / MANIFEST).exists()
    written = len(list(out.glob("*.parquet")))
    assert written < 150
    # A killed writer leaves an incomplete file.
    shard = sorted(out.glob("*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    resumed = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "is damaged by an interrupted write; deleted, its prompts are encoded again" in resumed.stdout
    assert "of 600 prompts are already encoded" in resumed.stdout
    assert read_activations(out).manifest.counts.rows == 600
    assert_close(out, model, MANY, tmp_path / "in.parquet")
