"""Layering: light modules import no heavy library, and imports have no side effects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "ray", "mlflow", "matplotlib", "sklearn", "fastapi")


def loaded_by(statement: str, cwd: Path) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", "PATH": ""},
    )
    return set(done.stdout.split()) & set(HEAVY)


@pytest.mark.parametrize(
    "module",
    [
        "pool",
        "outcomes.table",
        "outcomes.splits",
        "outcomes.sample",
        "prefill.encoder",
        "prefill.dataset",
        "signals.selection",
        "routing.policy",
        "routing.cost",
        "routing.checkpoint",
        "metrics.confidences",
        "metrics.curves",
        "metrics.evaluate",
        "registry",
    ],
)
def test_the_light_modules_load_no_heavy_library_and_write_nothing(module: str, tmp_path: Path):
    assert loaded_by(f"import prefill_router.{module}", tmp_path) == set()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_loads_and_routes_without_torch_ray_or_mlflow(tmp_path: Path):
    from builders import make_router

    from prefill_router.routing.checkpoint import save_checkpoint

    save_checkpoint(make_router()[0].router, tmp_path / "checkpoint")
    statement = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
import numpy as np
from prefill_router.routing.checkpoint import load_checkpoint
router = load_checkpoint({str(tmp_path / "checkpoint")!r})
router.confidences(np.zeros((1, 4), dtype=np.float32))"""
    assert loaded_by(statement, tmp_path) == set()


def test_platform_shadows_nothing():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "platform" / "platform.py").exists()
