"""`make clean` frees what make made and nothing else; results and caches of the user need YES=1."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEPT = (
    "runs/my/checkpoint/manifest.json",
    "runs/mlflow.db",
    "platform/prefill_router/cli.py",
    "tests/test_cli.py",
    "data/outcomes.parquet",
    "cache/prefill-router/gguf/model",
    "docs/index.md",
)
MADE = (
    ".venv/bin/python",
    "site/index.html",
    ".pytest_cache/x",
    ".mypy_cache/x",
    "platform/prefill_router.egg-info/PKG-INFO",
    "platform/prefill_router/__pycache__/cli.pyc",
    "jobs/__pycache__/x.pyc",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, files that make makes, and files of the user."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed; install it, such as Debian's package make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (*KEPT, *MADE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def make(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder / "home")}
    done = subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"Makefile"}


def test_clean_removes_what_make_made_and_keeps_the_rest(checkout: Path):
    make(checkout, "clean")
    assert files(checkout) == set(KEPT)


@pytest.mark.parametrize(("target", "folder"), [("clean-runs", "runs"), ("clean-cache", "cache/prefill-router")])
def test_results_and_caches_are_listed_and_deleted_only_on_request(checkout: Path, target: str, folder: str):
    before = files(checkout)
    said = make(checkout, target)
    assert "nothing was deleted; YES=1 deletes what is listed" in said
    assert files(checkout) == before
    make(checkout, target, "YES=1")
    assert files(checkout) == {name for name in before if not name.startswith(f"{folder}/")}
    assert "does not exist" in make(checkout, target)
