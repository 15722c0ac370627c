"""`--log-format json`, lines of progress, and the run.json of an output folder."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pydantic import Field
from tiny_models import CAUSAL, prompts, save_model

from jobs import shards
from prefill_router import progress
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, UnavailableError
from prefill_router.locations import Location
from prefill_router.logs import JsonLines, say, structured
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.isolation import Attempts
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.progress import tqdm, waiting
from prefill_router.run_record import write_record


class Config(FrozenModel):
    output: Location = Path("out")
    input: Location | None = None
    count: int = Field(1, ge=1)


def talk(config: Config) -> str:
    """Talks."""
    print("job: one\n\n  two", end="")
    print("\nwarning: three\nerror: four")
    print("five", file=sys.stderr)
    logging.getLogger("some.library").warning("six %d", 6)
    warnings.warn("seven", stacklevel=1)
    say("eight", done=8)
    if config.count == 2:
        raise InputError("count: 2 is\ntoo few")
    if config.count == 3:
        raise RuntimeError("broken")
    if config.count == 4:
        sys.exit("job: refused: four")
    return f"counted {config.count}"


def called(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[Any, list[Any], list[Any]]:
    """The exit code, and the objects on standard output and standard error."""
    with pytest.raises(SystemExit) as end:
        main(Config, talk, [*argv, "--log-format", "json"])
    said = capsys.readouterr()
    return end.value.code, *([json.loads(line) for line in text.splitlines()] for text in (said.out, said.err))


def test_every_line_is_an_object_with_its_level_and_the_last_is_the_summary(capsys: pytest.CaptureFixture[str]):
    code, out, err = called(capsys)
    assert code == 0
    assert [(one["level"], one["message"]) for one in out] == [
        ("info", "one"),
        ("info", "two"),
        ("warning", "three"),
        ("error", "four"),
        ("info", "eight"),
        ("info", "counted 1"),
    ]
    assert [(one["level"], one["message"]) for one in err] == [
        ("info", "five"),
        ("warning", "six 6"),
        ("warning", "seven"),
    ]
    assert err[1]["logger"] == "some.library"
    assert err[2]["category"] == "UserWarning"
    assert out[-2]["done"] == 8
    assert out[-1]["summary"] is True
    assert all(one["job"] == "job" and one["time"].endswith("Z") for one in (*out, *err))


@pytest.mark.parametrize(
    ("count", "code", "message"),
    [
        ("0", 2, "count: Input should be greater than or equal to 1 (got 0)"),
        ("2", 2, "count: 2 is too few"),
        ("3", 1, "RuntimeError: broken"),
        ("4", 1, "refused: four"),
    ],
)
def test_errors_are_objects_too(capsys: pytest.CaptureFixture[str], count: str, code: int, message: str):
    ended, out, err = called(capsys, "--count", count)
    assert (ended, err[-1]["level"], err[-1]["message"]) == (code, "error", message)
    assert not any(one.get("summary") for one in out)
    assert ("broken" in err[-1].get("traceback", "")) == (count == "3")


def test_the_variable_sets_the_format_and_the_option_wins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for variable, option, first in [
        ("json", [], "{"),
        ("json", ["--log-format", "text"], "o"),
        ("text", ["--log_format=json"], "{"),
    ]:
        monkeypatch.setenv("PREFILL_ROUTER_LOG_FORMAT", variable)
        with pytest.raises(SystemExit):
            main(Config, talk, option)
        assert capsys.readouterr().out.removeprefix("job: ")[0] == first
    monkeypatch.setenv("PREFILL_ROUTER_LOG_FORMAT", "xml")
    with pytest.raises(SystemExit, match="2"):
        main(Config, talk, [])
    assert capsys.readouterr().err == "job: error: PREFILL_ROUTER_LOG_FORMAT: got 'xml', allowed are text, json\n"


def test_the_streams_and_the_root_logger_are_restored():
    before = sys.stdout, sys.stderr, warnings.showwarning, list(logging.getLogger().handlers)
    with structured("job", "json"):
        assert isinstance(sys.stdout, JsonLines)
    assert (sys.stdout, sys.stderr, warnings.showwarning, list(logging.getLogger().handlers)) == before


def test_numbers_that_json_does_not_have_are_null():
    file = io.StringIO()
    JsonLines("job", file).emit("m", rate=float("nan"), path=Path("a"))
    assert json.loads(file.getvalue()).items() >= {"rate": None, "path": "a"}.items()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)


@pytest.mark.usefixtures("soon")
def test_progress_is_a_line_while_nothing_advances(capsys: pytest.CaptureFixture[str]):
    with tqdm(total=1000, desc="prefill", unit=" prompts") as bar:
        wait_for(lambda: bar.said >= 1)
        bar.update(500)
        bar.set_postfix_str("9 tokens/s", refresh=False)
        bar.update(500)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("prefill: 0 of 1,000 prompts, ")
    assert lines[0].endswith(" s since the start")
    assert lines[-1].startswith("prefill: 1,000 of 1,000 prompts, ")
    assert lines[-1].endswith(" prompts/s, 9 tokens/s")
    assert not any("\r" in line for line in lines)


def test_a_bar_that_ends_before_its_first_line_prints_one_only_if_it_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "FIRST_S", 1e9)
    assert list(tqdm(range(3), desc="inner", unit=" layers", leave=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(tqdm(range(3), desc="outer", unit=" layers")) == [0, 1, 2]
    assert capsys.readouterr().err.startswith("outer: 3 of 3 layers, ")
    assert list(tqdm(range(3), disable=None)) == [0, 1, 2]  # a bar for terminals only
    assert capsys.readouterr().err == ""


def test_progress_has_numbers_in_json(capsys: pytest.CaptureFixture[str]):
    with structured("prefill", "json"), tqdm(total=40, initial=10, desc="prefill", unit=" prompts") as bar:
        wait_for(lambda: bar.format_dict["elapsed"] > 0.05)
        bar.update(10)
        bar.say_line()
    found = json.loads(capsys.readouterr().err.splitlines()[0])
    assert (found["done"], found["total"], found["unit"], found["job"]) == (20, 40, "prompts", "prefill")
    assert found["rate"] * found["eta_s"] == pytest.approx(20)
    assert found["message"].startswith("prefill: 20 of 40 prompts, ")


@pytest.mark.usefixtures("soon")
def test_bars_are_listed_though_another_thread_adds_one(monkeypatch: pytest.MonkeyPatch):
    class Changing:
        tries = 0

        def __iter__(self) -> Any:
            self.tries += 1
            if self.tries == 1:
                raise RuntimeError("Set changed size during iteration")
            return iter([])

    changing = Changing()
    monkeypatch.setattr(progress, "_watched", changing)
    assert progress._bars() == []
    assert changing.tries > 1


def test_a_step_that_cannot_count_says_how_long_it_takes(capsys: pytest.CaptureFixture[str]):
    with waiting("prefill: testing"):
        wait_for(lambda: bool(progress._watched) and next(iter(progress._watched)).said > 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("prefill: testing: ")
    assert lines[0].endswith(" s since the start")


def test_an_encoder_tells_the_rows_of_every_batch(tmp_path: Path):
    torch = pytest.importorskip("torch")
    config = EncoderConfig(model=str(save_model(CAUSAL[0], tmp_path)), batch_tokens=40, device="cpu")
    encoder, told = TransformersEncoder(config), []
    encoder.on_rows = told.append
    texts = [*prompts(9), ""]  # the last has no token
    with torch.inference_mode():
        encoder(pa.table({"query_id": [str(n) for n in range(10)], "prompt": texts}))
    assert len(told) > 1
    assert sum(told) == 9


class Actor:
    """An actor in this process: `actor.method.remote(...)` is the result of the method of `wrapped`."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.wrapped, name))


class Counting:
    """An encoder of two batches per call, which tells their rows."""

    def __init__(self, config: Any) -> None:
        self.on_rows: Any = None

    def __call__(self, rows: pa.Table) -> pa.Table:
        for part in (rows.num_rows // 2, rows.num_rows - rows.num_rows // 2):
            self.on_rows(part)
        return rows


@pytest.mark.usefixtures("soon")
def test_prefill_shows_the_rows_within_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards.ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(shards, "POLL_S", 0.01)
    attempts = Attempts()
    record: Any = Actor(attempts)
    table = pa.table({"query_id": [f"q{n}" for n in range(10)], "prompt": ["a"] * 10})
    isolated = shards._Isolated(Counting, None, record, None, 1)
    with shards._progress("prefill", tmp_path, 100, 1, None, record):
        assert isolated(table).num_rows == 10
        assert attempts.rows() == 5  # the second batch followed within a second
        wait_for(lambda: any(bar.n == 5 and bar.postfix for bar in progress._watched))
        wait_for(lambda: "5 of 100 prompts" in capsys.readouterr().err)
    assert ", 0 on disk" in capsys.readouterr().err.splitlines()[-1]


def wait_for(reached: Any) -> None:
    for _ in range(500):
        if reached():
            return
        time.sleep(0.02)
    raise AssertionError("not reached")


def write(config: Config) -> str:
    """Writes."""
    config.output.mkdir(exist_ok=True)
    (config.output / "metrics.json").write_text("{}")
    return f"counted {config.count}"


def recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_a_job_leaves_its_command_inputs_and_next_command(tmp_path: Path):
    (tmp_path / "in.txt").write_text("data")
    argv = ["--output", str(tmp_path / "a b"), "--input", str(tmp_path / "in.txt"), "--count", "3"]
    with pytest.raises(SystemExit, match="0"):
        main(Config, write, argv, then="open {output}/metrics.json")
    found = recorded(tmp_path / "a b")
    run = found["runs"]["job"]
    assert found["files"] == {"metrics.json": "figures with intervals (docs/metrics.md)"}
    assert run["config"] == {"output": str(tmp_path / "a b"), "input": str(tmp_path / "in.txt"), "count": 3}
    assert f"--output '{tmp_path / 'a b'}' --input" in run["command"]
    assert run["summary"] == "counted 3"
    assert run["next"] == f"open '{tmp_path / 'a b'}'/metrics.json"
    assert run["inputs"][str(tmp_path / "in.txt")]["bytes"] == 4
    assert len(run["inputs"][str(tmp_path / "in.txt")]["sha256"]) == 64


def test_a_folder_keeps_the_last_run_of_each_job(tmp_path: Path):
    for job, count in [("train", 1), ("probe", 2), ("train", 3)]:
        write_record(tmp_path, job, f"python -m jobs.{job}", [], Config(count=count), "done", 0.0)
    runs = recorded(tmp_path)["runs"]
    assert {job: run["config"]["count"] for job, run in runs.items()} == {"train": 3, "probe": 2}


@pytest.mark.parametrize("name", ["manifest.json", "manifest.partial.json"])
def test_a_folder_with_a_manifest_of_its_own_gets_no_other_file(tmp_path: Path, name: str):
    (tmp_path / name).write_text("{}")
    write_record(tmp_path, "prefill", "python -m jobs.prefill", [], Config(), "done", 0.0)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(SystemExit, match="0"):
        main(Config, write, ["--output", str(tmp_path)])
    said = capsys.readouterr()
    assert "job: warning: " in said.err
    assert said.out == "job: counted 1\n"


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (UnavailableError("traceback\nno answer"), "UnavailableError: no answer", 1),
        (KeyError("x"), "KeyError: 'x'", None),
        (KeyboardInterrupt(), "KeyboardInterrupt", None),
        (SystemExit(15), "ended with 15", 15),  # Ray after SIGTERM
    ],
)
def test_a_failed_run_is_recorded_beside_the_last_success_until_the_next(
    tmp_path: Path, error: BaseException, said: str, code: int | None, capsys: pytest.CaptureFixture[str]
):
    def fail(config: Config) -> str:
        """Fails."""
        raise error

    argv = ["--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="0"):
        main(Config, write, argv)
    with pytest.raises(type(error) if code is None else SystemExit) as ended:
        main(Config, fail, [*argv, "--count", "7"], then="open it")
    assert code is None or ended.value.code == code
    assert "warning" not in capsys.readouterr().err
    found = recorded(tmp_path)
    assert found["runs"]["job"]["summary"] == "counted 1"
    assert found["failed"]["job"]["config"]["count"] == 7
    assert found["failed"]["job"]["summary"] == said
    assert "next" not in found["failed"]["job"]
    with pytest.raises(SystemExit, match="0"):
        main(Config, write, argv)
    assert recorded(tmp_path)["failed"] == {}


@pytest.mark.parametrize("verdict", [1, "job: refused: worse"])
def test_a_verdict_is_recorded_as_a_run(tmp_path: Path, verdict: int | str):
    def judge(config: Config) -> str:
        """Judges."""
        write(config)
        raise SystemExit(verdict)

    with pytest.raises(SystemExit):
        main(Config, judge, ["--output", str(tmp_path)])
    found = recorded(tmp_path)
    assert (list(found["runs"]), found["failed"]) == (["job"], {})


@pytest.mark.parametrize("error", [InputError("no"), UnavailableError("no")])
def test_an_empty_folder_stays_empty_if_a_run_is_refused_or_fails(
    tmp_path: Path, error: Exception, capsys: pytest.CaptureFixture[str]
):
    def fail(config: Config) -> str:
        """Fails."""
        raise error

    with pytest.raises(SystemExit):
        main(Config, fail, ["--output", str(tmp_path)])
    assert capsys.readouterr().err == "job: error: no\n"
    assert not list(tmp_path.iterdir())


def test_a_refused_run_is_not_recorded(tmp_path: Path):
    def refuse(config: Config) -> str:
        """Refuses."""
        raise InputError("no")

    (tmp_path / "metrics.json").touch()
    with pytest.raises(SystemExit, match="2"):
        main(Config, refuse, ["--output", str(tmp_path)])
    assert not (tmp_path / "run.json").exists()


def test_a_failure_that_cannot_be_recorded_prints_its_error_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def fail(config: Config) -> str:
        """Fails."""
        (tmp_path / "run.json").mkdir()
        raise UnavailableError("no answer")

    with pytest.raises(SystemExit, match="1"):
        main(Config, fail, ["--output", str(tmp_path)])
    assert capsys.readouterr().err == "job: error: no answer\n"


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"runs": null}', '{"failed": [1], "runs": {}}'])
def test_a_damaged_record_is_replaced(tmp_path: Path, content: str):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit, match="0"):
        main(Config, write, ["--output", str(tmp_path)])
    assert list(recorded(tmp_path)["runs"]) == ["job"]
