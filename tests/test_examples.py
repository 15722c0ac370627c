"""The examples run: the scripts as a user starts them, the notebook cell by cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import prefill_router as pr
from jobs.demo import run_server

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.train, pytest.mark.usefixtures("minilm")]


def run_example(name: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which train_your_own.py ran, and its output."""
    folder = tmp_path_factory.mktemp("example")
    return folder, run_example("train_your_own.py", folder)


def test_the_trained_router_decides_as_the_script_printed(trained: tuple[Path, str]):
    folder, printed = trained
    with pr.load(folder / "runs/example/checkpoint") as router:
        decision = router.route("Why is the sky blue?", lam=0.3)
    assert printed == f"{decision.model} {decision.chosen.confidence:.6f}\n"


@pytest.mark.ray
def test_a_server_of_the_trained_router_decides_as_the_script(trained: tuple[Path, str]):
    folder, printed = trained
    request = {"prompt": "Why is the sky blue?", "lambda": 0.3}
    with run_server(str(folder / "runs/example/checkpoint")) as url:
        reply = httpx.post(f"{url}/v1/route", json=request, timeout=60).raise_for_status().json()
    model, confidence = printed.split()
    assert reply["model"] == model
    assert reply["candidates"][0]["model"] == model
    assert reply["candidates"][0]["confidence"] == pytest.approx(float(confidence), abs=1e-3)  # other thread counts


def test_route_prints_the_decision_of_every_prompt_at_three_lambdas(trained: tuple[Path, str]):
    printed = run_example("route.py", trained[0], "runs/example/checkpoint", "Why is the sky blue?", "What is 2 + 2?")
    assert printed.count("lambda ") == 3
    assert sum(line.strip().startswith("sim-") for line in printed.splitlines()) == 6


def test_the_notebook_runs_from_top_to_bottom():
    notebook = json.loads((ROOT / "examples" / "explore.ipynb").read_text(encoding="utf-8"))
    namespace: dict[str, object] = {}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, source in enumerate(cells):
        exec(compile(source, f"explore.ipynb, code cell {number}", "exec"), namespace)
    assert len(namespace["decisions"]) == 2
    assert namespace["figure"].axes
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "clear the outputs before committing"
