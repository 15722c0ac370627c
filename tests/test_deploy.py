"""Files of deploy/ and the Dockerfile: valid by the schemas of tests/data/schemas, and consistent with the project."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import validator_for
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from serve.config import Live, RouterAppConfig

ROOT = Path(__file__).parents[1]
SCHEMAS = ROOT / "tests" / "data" / "schemas"
MANIFESTS = ("raycluster", "rayjob-prefill", "rayservice")


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / f"deploy/kubernetes/{name}.yaml").read_text())
    return found


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


@pytest.fixture(scope="module")
def check() -> Callable[[dict[str, Any]], None]:
    """Validates a manifest."""
    pods = Resource.from_contents(json.loads((SCHEMAS / "kubernetes.json").read_text()), DRAFT202012)
    schema = yaml.safe_load((SCHEMAS / "kuberay.yaml").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, registry=Registry().with_resource("kubernetes.json", pods)).validate


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_schema_accepts_the_manifest(name: str, check: Callable[[dict[str, Any]], None]) -> None:
    check(manifest(name))


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("enableInTreeAutoscaling",), "enableInTreeAutoscaler"),
        (("workerGroupSpecs", 0, "maxReplicas"), "maxReplica"),
        (("headGroupSpec", "template", "spec", "containers", 0, "envFrom"), "envfrom"),
        (("workerGroupSpecs", 0, "template", "spec", "tolerations", 0, "operator"), "operater"),
    ],
)
def test_a_misspelt_key_is_refused(
    name: str, path: tuple[str | int, ...], wrong: str, check: Callable[[dict[str, Any]], None]
) -> None:
    document = manifest(name)
    at: Any = cluster_of(document)
    for step in path[:-1]:
        at = at[step]
    at[wrong] = at.pop(path[-1])
    with pytest.raises(ValidationError, match=wrong):
        check(document)


def test_a_wrong_type_in_a_pod_is_refused(check: Callable[[dict[str, Any]], None]) -> None:
    document = manifest("raycluster")
    container = document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["ports"][0]["containerPort"] = "8080"
    with pytest.raises(ValidationError, match="is not of type 'integer'"):
        check(document)


@pytest.mark.parametrize("name", MANIFESTS)
def test_rays_autoscaler_reads_the_cluster(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    resource = {"metadata": {"name": name, "namespace": "default"}, "spec": cluster_of(manifest(name))}
    found = _derive_autoscaling_config_from_ray_cr(resource)
    validate_config(found)
    types = found["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, 8)
    assert found["idle_timeout_minutes"] == 10


@pytest.mark.parametrize("name", MANIFESTS)
def test_rays_version_is_that_of_the_image_and_tokens_are_on(name: str) -> None:
    cluster = cluster_of(manifest(name))
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert cluster["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_runs_as_the_user_of_the_image(name: str) -> None:
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert user
    cluster = cluster_of(manifest(name))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        security = group["template"]["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert (security["runAsUser"], security["runAsGroup"]) == (int(user[1]), int(user[2]))


def test_the_three_manifests_have_one_cluster() -> None:
    first, *others = (cluster_of(manifest(name)) for name in MANIFESTS)
    assert all(other == first for other in others)


def test_the_service_is_the_projects_configuration() -> None:
    service = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    own = yaml.safe_load((ROOT / "configs/serve.yaml").read_text())
    (application,), (of_file,) = service["applications"], own["applications"]
    RouterAppConfig.model_validate(application["args"])
    assert {each["name"] for each in application["deployments"]} == {each["name"] for each in of_file["deployments"]}
    for deployment in application["deployments"]:
        assert Live.model_validate(deployment["user_config"]).checkpoint == application["args"]["checkpoint"]
    assert {key for key in of_file if key != "runtime_env"} == set(application)  # the image has the environment
    assert set(own) == set(service)


def test_rays_schema_accepts_the_service() -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"]))


def test_the_job_is_a_command_of_the_project() -> None:
    from jobs.prefill import PrefillConfig
    from prefill_router.cli import parse

    spec = manifest("rayjob-prefill")["spec"]
    python, flag, module, *options = spec["entrypoint"].split()
    assert (python, flag, module) == ("python", "-m", "jobs.prefill")
    config = parse(PrefillConfig, "", options)
    workers = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert config.actors == workers["maxReplicas"]
    assert spec["backoffLimit"] > 0


def instructions() -> Iterator[list[str]]:
    """The words of every instruction of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            yield line.split()


def test_the_dockerfile_copies_what_exists_and_is_not_ignored() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*"
    copied = [
        source for words in instructions() if words[0] == "COPY" and "--from" not in words[1] for source in words[1:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in kept, source
    assert not [pattern for pattern in kept if not (ROOT / pattern).exists()]
    assert not any(fnmatch.fnmatch(name, pattern) for name in ("runs", ".git", ".env", "data") for pattern in kept)


def test_the_image_installs_the_versions_of_the_project() -> None:
    text, makefile = (ROOT / "Dockerfile").read_text(), (ROOT / "Makefile").read_text()
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for pin in re.findall(r"\b(\S+==[\d.]+)", text):
        assert pin in pins or pin in makefile, pin
    assert text.count("==") == 3
    assert "-c constraints.txt" in text


def test_the_layout_of_the_image_has_every_package_that_jobs_import() -> None:
    copied = {words[1] for words in instructions() if words[0] == "COPY" and len(words) == 3}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}
    assert packages <= copied


def test_the_compose_schema_accepts_the_file_and_refuses_a_misspelt_key() -> None:
    schema = json.loads((SCHEMAS / "compose.json").read_text())
    validate = validator_for(schema)(schema).validate
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    validate(compose)
    compose["services"]["mlflow"]["depend_on"] = compose["services"]["mlflow"].pop("depends_on")
    with pytest.raises(ValidationError, match="depend_on"):
        validate(compose)


def test_compose_mounts_files_that_exist_and_names_services_and_volumes() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    services = compose["services"]
    for name, service in services.items():
        for mount in service.get("volumes", ()):
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", mount).split(":")[0]
            assert source in compose["volumes"] or (ROOT / "deploy" / source).is_file(), (name, mount)
        assert set(service.get("depends_on", ())) <= set(services), name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), (name, port)
        image = service["image"]
        assert "build" in service or re.search(r":v?\d", image), f"{name}: {image} has no version"


def test_grafana_is_provisioned_with_the_projects_dashboard() -> None:
    folder = ROOT / "deploy/monitoring/grafana"
    (source,) = yaml.safe_load((folder / "datasources.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards.yaml").read_text())["providers"]
    mounts = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"../configs/grafana.json:{provider['options']['path']}/prefill-router.json:ro" in mounts
    (variable,) = json.loads((ROOT / "configs/grafana.json").read_text())["templating"]["list"]
    assert source["type"] == variable["query"]  # the dashboard's variable finds the source


def test_every_metrics_port_that_prometheus_reads_is_named() -> None:
    (endpoint,) = yaml.safe_load((ROOT / "deploy/monitoring/podmonitor.yaml").read_text())["spec"][
        "podMetricsEndpoints"
    ]
    cluster = cluster_of(manifest("raycluster"))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {port["name"]: port["containerPort"] for port in container["ports"]}[endpoint["port"]] == 8080
