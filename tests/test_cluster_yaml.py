"""cluster.yaml: accepted by Ray's launcher, and consistent with the project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GPU_TYPES = ("gpu", "gpu-other", "gpu-on-demand")


@pytest.fixture
def raw() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_rays_launcher_accepts_it(raw: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(raw)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    for name in GPU_TYPES:
        assert prepared["available_node_types"][name]["max_workers"] <= prepared["max_workers"]


def test_rays_schema_would_catch_a_slip(raw: dict[str, Any]) -> None:
    """The schema refuses unknown keys, so the test above can fail."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    raw["head_start_ray_comands"] = raw.pop("head_start_ray_commands")
    with pytest.raises(jsonschema.ValidationError, match="head_start_ray_comands"):
        validate_config(prepare_config(raw))


def test_gpu_workers_scale_from_none_and_the_head_is_no_worker(raw: dict[str, Any]) -> None:
    nodes = raw["available_node_types"]
    assert set(nodes) == {"head", *GPU_TYPES}
    for name in GPU_TYPES:
        assert nodes[name]["min_workers"] == 0
        assert nodes[name]["max_workers"] > 0
    assert raw["head_node_type"] == "head"
    assert "max_workers" not in nodes["head"]


def test_spot_types_come_before_others_and_the_head_is_no_spot_instance(raw: dict[str, Any]) -> None:
    nodes = raw["available_node_types"]
    spot = {name: "InstanceMarketOptions" in node["node_config"] for name, node in nodes.items()}
    by_priority = sorted(GPU_TYPES, key=lambda name: nodes[name]["priority"], reverse=True)
    assert [spot[name] for name in by_priority] == [True, True, False]
    assert not spot["head"]
    first, second = (nodes[name]["node_config"]["InstanceType"] for name in by_priority[:2])
    assert first != second
    assert len(raw["provider"]["availability_zone"].split(",")) > 1


def test_the_autoscaler_reads_the_priorities(raw: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config

    types = prepare_config(raw)["available_node_types"]
    assert {name: types[name]["priority"] for name in GPU_TYPES} == {"gpu": 2, "gpu-other": 1, "gpu-on-demand": 0}


@pytest.mark.parametrize("start", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_starts_with_a_token_and_without_telemetry(raw: dict[str, Any], start: str) -> None:
    command = raw[start][-1]
    assert "RAY_AUTH_MODE=token" in command
    assert "RAY_USAGE_STATS_ENABLED=0" in command
    assert command.index("PATH=$HOME/venv/bin") < command.index("ray start")
    assert "0.0.0.0" not in json.dumps(raw)


def test_what_it_copies_and_installs_is_in_the_project(raw: dict[str, Any]) -> None:
    assert raw["file_mounts"]["~/prefill-router"] == "."
    (install,) = [command for command in raw["setup_commands"] if "-c ~/prefill-router/" in command]
    constraints = install.split("-c ~/prefill-router/")[1].split()[0]
    assert (ROOT / constraints).is_file()
    pins = (ROOT / constraints).read_text().splitlines()
    (torch,) = [command.split()[-1] for command in raw["setup_commands"] if "torch==" in command]
    assert torch in pins
    (encoder,) = [command for command in raw["setup_commands"] if "--no-deps" in command]
    assert encoder.split("--no-deps ")[1].split()[0] in (ROOT / "Makefile").read_text()
