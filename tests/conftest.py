"""What tests share: the process environment, a small Ray cluster, real data and the bundled encoder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before Ray, MLflow or torch are imported anywhere.
for _name, _value in {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of four logical CPUs, without a dashboard, for the whole session."""
    import ray

    from jobs.cluster import connect

    connect(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real outcomes (PREFILL_ROUTER_DATA); skips where there is none."""
    folder = Path(os.environ.get("PREFILL_ROUTER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        # Whoever has the data runs these: it is not the project's to ship.
        pytest.skip(f"no real data at {folder}; set PREFILL_ROUTER_DATA")
    return folder


@pytest.fixture(scope="session")
def minilm() -> str:
    """The minilm encoder's name; skips where its package is not installed."""
    from prefill_router.errors import InputError
    from prefill_router.prefill.bundled import minilm_folder
    from prefill_router.prefill.config import MINILM

    try:
        minilm_folder()
    except InputError as error:
        pytest.skip(f"{error}; make install brings it, so that make test never skips this")
    return MINILM
