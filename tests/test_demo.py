"""The demo, as `make demo` runs it, on fewer questions and with the sentence encoder, which reads them in seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefill_router.files import read_json
from prefill_router.metrics.predictions import read_predictions

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("smollm2", "minilm")
def test_the_demo_runs_every_step_and_routes_a_request_over_http(tmp_path: Path):
    command = [sys.executable, "-m", "jobs.demo", "--output", str(tmp_path / "demo"), "--queries", "500"]
    command += ["--encoder", "minilm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=590)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert "SmolLM2 answers in place of every simulated model" in done.stdout
    chat = re.search(r"^selected (\S+), decision [0-9a-f]{32}$", done.stdout, re.MULTILINE)
    model = re.fullmatch(r"demo: done in \d+ s; at lambda \d\.\d\d the question goes to (\S+)", summary)
    assert model, summary
    assert chat, done.stdout[-2000:]
    assert chat[1] == model[1]
    predictions = read_predictions(tmp_path / "demo/evaluation/predictions.parquet")
    assert model[1] in predictions.models
    assert set(read_json(tmp_path / "demo/evaluation/metrics.json")["routers"]) == set(predictions.routers)
    report = tmp_path / "demo/evaluation/report.html"
    assert f"report: {report.resolve()}" in done.stdout
    assert "SIMULATED DATA" in report.read_text(encoding="utf-8")
