"""Fixtures of all tests: the process environment, a small Ray cluster, real data and the bundled encoder."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefill_router.cluster import set_environment

# Before Ray, MLflow or torch are imported anywhere.
set_environment()
for _name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # otherwise the tests of another process leave workers little time
# For the object store of the tests. Workers of Ray inherit them.
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test that uses `ray_cluster`, directly or through another fixture, as `ray`."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """An evaluation of inspect_ai changes the root logger; later tests read its messages."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [one for one in root.handlers if type(one).__module__.startswith("inspect_ai")]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of four logical CPUs, without a dashboard, for the whole session."""
    import ray

    from prefill_router.cluster import connect

    connect(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking database with empty tables, which tests copy: creating it takes seconds."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def store(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty registry and an empty cache for one test, which is the working directory."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # shows files that are written to the working directory
    return tmp_path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real outcomes (PREFILL_ROUTER_DATA). Without it the test is skipped."""
    folder = Path(os.environ.get("PREFILL_ROUTER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        # The data is not part of the project.
        pytest.skip(f"no real data at {folder}; set PREFILL_ROUTER_DATA")
    return folder


@pytest.fixture(scope="session")
def minilm() -> str:
    """The minilm encoder's name. Without its package the test is skipped."""
    return _bundled("minilm")


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The smollm2 encoder's name. Without its package the test is skipped."""
    return _bundled("smollm2")


def _bundled(name: str) -> str:
    from prefill_router.errors import InputError
    from prefill_router.prefill.bundled import bundled_weights

    try:
        bundled_weights(name)
    except InputError as error:
        pytest.skip(f"{error}; `make install` installs it")
    return name
