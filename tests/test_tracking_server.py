"""A tracking server over http, and jobs whose tracking store does not answer."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from builders import TwoEncoders
from tiny_router import tiny_router

from jobs import promote, register
from prefill_router import registry
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, UnavailableError
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import FittedRouter, fit_router
from prefill_router.workflows import train

SMALL = {
    "trunk": {"widths": [8], "members": 2, "kept": 1, "max_epochs": 2},
    "components": 4,
}


class Settings(FrozenModel):
    seed: int = 3


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)  # the server has child processes
            self.process.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`mlflow server` on a loopback port; its start takes seconds. The last test that uses it stops it."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copy(empty_database, folder / "mlflow.db")
    process = subprocess.Popen(
        [
            Path(sys.executable).with_name("mlflow"),
            "server",
            "--host=127.0.0.1",
            f"--port={port}",
            "--workers=1",
            f"--backend-store-uri=sqlite:///{folder / 'mlflow.db'}",
            f"--artifacts-destination={folder / 'artifacts'}",
        ],
        cwd=folder,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started = Server(f"http://127.0.0.1:{port}", process)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, "the server ended"
            try:
                httpx.get(f"{started.url}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield started
    finally:
        started.stop()


@pytest.fixture
def down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a tracking server that does not run."""
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return uri


def save(folder: Path, favourite: str = "cheap") -> str:
    return save_checkpoint(tiny_router("a" * 16, favourite), folder).id


def test_a_version_travels_over_http_and_its_copy_needs_no_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    checkpoint = save(tmp_path / "run #3? a%20b")
    with registry.track("train", Settings()) as run:
        run.log_artifact(tmp_path / "run #3? a%20b", "checkpoint")
        run.tag(checkpoint_id=checkpoint)
    assert run.complete
    assert registry.register(tmp_path / "run #3? a%20b").number == 1
    assert registry.register(tmp_path / "run #3? a%20b").number == 1
    registry.promote(1)
    assert load_checkpoint(registry.resolve("models:/prefill-router@champion")).id == checkpoint

    with registry.track("evaluate", Settings()) as run:
        server.stop()
        for _ in range(3):
            run.log_metrics({"auc": 0.7})
    assert not run.complete
    assert capsys.readouterr().err.count("The job continues without tracking") == 1
    assert registry.pin_version("models:/prefill-router/1") == "models:/prefill-router/1"
    assert load_checkpoint(registry.resolve("models:/prefill-router/1")).id == checkpoint
    with pytest.raises(UnavailableError, match=r"does not answer .*; without it, give a folder, or models:/"):
        registry.resolve("models:/prefill-router@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UnavailableError):
        registry.resolve("models:/prefill-router/1")  # version 1 of another registry is another checkpoint


@pytest.mark.parametrize(
    ("kind", "run", "arguments"),
    [
        (register.RegisterConfig, register.register, ["--checkpoint", "checkpoint"]),
        (promote.PromoteConfig, promote.promote, ["--version", "1"]),
        (promote.PromoteConfig, promote.promote, ["--undo"]),
    ],
)
def test_a_server_that_is_down_is_one_line_within_seconds(
    down: str,
    kind: type[FrozenModel],
    run: Callable[..., str],
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(Path("checkpoint"))
    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        main(kind, run, arguments)
    assert time.monotonic() - started < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert line.startswith(
        f"job: error: tracking store {down}: does not answer or fails (Connection refused); start it"
    )


def test_a_silent_server_is_given_up_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.store, "PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts connections and never answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(UnavailableError, match=r"tracking store http://127.*\(no answer in time\)"):
            registry.connect()


@pytest.mark.parametrize(
    ("uri", "error", "text"),
    [
        ("localhost:5000", InputError, "got 'localhost:5000', expected http://HOST:PORT"),
        ("ftp://host/x", InputError, "got 'ftp://host/x', expected http://HOST:PORT"),
        ("http://", InputError, "got 'http://', expected http://HOST:PORT"),
        ("http://host:port", InputError, "got 'http://host:port', not a URL"),
        ("postgresql://user:secret@127.0.0.1:1/x", UnavailableError, r"postgresql://127.0.0.1:1/x: does not answer"),
        ("sqlite:////proc/nope/x.db", UnavailableError, r"database /proc/nope/x.db: cannot be opened \(No such file"),
        ("sqlite:///damaged.db", UnavailableError, r"damaged.db: cannot be opened \(file is not a database\)"),
    ],
)
def test_a_store_that_cannot_be_used_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, error: type[Exception], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.db").write_text("not a database\n" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(error, match=text) as raised:
        registry.connect()
    assert "secret" not in str(raised.value)


@pytest.mark.train
def test_training_warns_before_the_fit_and_keeps_the_checkpoint(
    down: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = TwoEncoders(n=200).write(tmp_path / "inputs")
    said: list[str] = []

    def fit(*arguments: object, **options: object) -> FittedRouter:
        said.append(capsys.readouterr().err)
        return fit_router(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "fit_router", fit)
    summary = train.run(
        train.TrainConfig.model_validate({**inputs, "output": tmp_path / "out put", "fit": FitConfig(**SMALL)})
    )
    assert said[0].startswith(f"warning: tracking store {down}: does not answer")
    assert load_checkpoint(tmp_path / "out put/checkpoint").id in summary
    assert summary.endswith(f"; not tracked: python -m jobs.register --checkpoint '{tmp_path}/out put/checkpoint'")
    assert "tracking" not in capsys.readouterr().err


def test_a_sweep_does_not_start_without_the_registry(down: str, tmp_path: Path) -> None:
    from tune import sweep

    inputs = TwoEncoders(n=200).write(tmp_path / "inputs")
    with pytest.raises(UnavailableError, match="does not answer"):
        sweep.run(sweep.SweepConfig.model_validate({**inputs, "output": tmp_path / "out"}))
    assert not (tmp_path / "out").exists()
