"""Jobs submitted with `ray job submit` and configs/runtime_env.yaml, to a head node in a separate process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from builders import TwoEncoders
from tiny_models import prompts, save_model

from prefill_router.prefill.dataset import read_activations
from prefill_router.sweeps.trials import load_trials

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")


def environment() -> dict[str, str]:
    """Environment of the head and its jobs: this Python, without the variables of the test session's cluster."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    return {**kept, "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def dashboard() -> Iterator[str]:
    """The dashboard address of a separate head node with free ports."""
    gcs, board, agent, agent_grpc, export, client, manager, objects = free_ports(8)
    with tempfile.TemporaryDirectory(prefix="ray") as scratch:  # short, since the length of socket paths is limited
        head = subprocess.Popen(
            [
                RAY,
                "start",
                "--head",
                "--block",
                "--num-cpus=4",
                "--node-ip-address=127.0.0.1",
                f"--port={gcs}",
                "--include-dashboard=true",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={board}",
                f"--dashboard-agent-listen-port={agent}",
                f"--dashboard-agent-grpc-port={agent_grpc}",
                f"--metrics-export-port={export}",
                f"--ray-client-server-port={client}",
                f"--node-manager-port={manager}",
                f"--object-manager-port={objects}",
                f"--temp-dir={scratch}",
                "--disable-usage-stats",
            ],
            env=environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address = f"http://127.0.0.1:{board}"
        try:
            _wait_for(f"{address}/api/jobs/", head)
            # The agent of the head node runs the jobs. It starts after the dashboard; earlier jobs are refused.
            _wait_for(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", head)
            yield address
        finally:
            head.send_signal(signal.SIGTERM)  # with --block the head stops its processes
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
                head.wait()


def _wait_for(url: str, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert head.poll() is None, "the head ended"
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no answer from {url}")


def test_prefill_runs_by_ray_job_submit_with_the_shipped_runtime_env(tmp_path: Path, dashboard: str) -> None:
    model = save_model("gpt2", tmp_path / "model")
    pq.write_table(pa.table({"query_id": [f"q{i}" for i in range(40)], "prompt": prompts(40)}), tmp_path / "in.parquet")
    work = tmp_path / "repository"  # a copy, since a folder must not change during its upload
    for name in ("jobs", "platform", "configs"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("data", "models", "runs", "mlartifacts"):  # Ray refuses uploads above 100 MiB
        (work / name).mkdir()
        with (work / name / "large").open("wb") as file:
            file.truncate(101 * 2**20)
    submitted = subprocess.run(
        [
            RAY,
            "job",
            "submit",
            "--address",
            dashboard,
            "--working-dir",
            ".",
            "--runtime-env",
            "configs/runtime_env.yaml",
            "--",
            "python",
            "-m",
            "jobs.prefill",
            "--input",
            str(tmp_path / "in.parquet"),
            "--output",
            str(tmp_path / "out"),
            "--encoder.model",
            str(model),
            "--rows-per-shard",
            "16",
            "--actors",
            "2",
        ],
        cwd=work,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "40 prompts encoded in" in submitted.stdout
    activations = read_activations(tmp_path / "out")
    assert activations.manifest.counts.rows == 40
    assert activations.manifest.counts.errors == 0


def test_rayignore_and_the_runtime_env_exclude_the_same_data() -> None:
    lines = (ROOT / ".rayignore").read_text().splitlines()
    ignored = {line for line in lines if not line.startswith("#")}
    excluded = yaml.safe_load((ROOT / "configs/runtime_env.yaml").read_text())["excludes"]
    assert ignored == {line for line in excluded if line.startswith("/")} - {"/.venv/", "/.git/"}


def test_a_sweep_runs_by_ray_job_submit_with_the_shipped_runtime_env(tmp_path: Path, dashboard: str) -> None:
    inputs = TwoEncoders(n=200).write(tmp_path / "inputs")
    (tmp_path / "space.yaml").write_text("widths: [[8]]\nmax_epochs: [4]\ncomponents: [4]\nmembers: [2]\nkept: [2]\n")
    work = tmp_path / "repository"
    for name in ("jobs", "tune", "platform", "configs"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    submitted = subprocess.run(
        [
            RAY,
            "job",
            "submit",
            "--address",
            dashboard,
            "--working-dir",
            ".",
            "--runtime-env",
            "configs/runtime_env.yaml",
            "--",
            "env",
            f"MLFLOW_TRACKING_URI=sqlite:///{tmp_path / 'mlflow.db'}",
            "python",
            "-m",
            "tune.sweep",
            "--outcomes",
            str(inputs["outcomes"]),
            "--pool",
            str(inputs["pool"]),
            "--activations",
            f"[{', '.join(map(str, inputs['activations']))}]",
            "--output",
            str(tmp_path / "out"),
            "--space",
            str(tmp_path / "space.yaml"),
            "--trials",
            "3",
            "--concurrent",
            "2",
            "--baselines",
            "false",
            "--resamples",
            "5",
        ],
        cwd=work,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "is version 1 of prefill-router" in submitted.stdout
    assert [trial.ended for trial in load_trials(tmp_path / "out/trials")] == [True] * 3
