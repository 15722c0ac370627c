"""`prefill-router doctor` in environments that are broken on purpose."""

from __future__ import annotations

import json
import os
import socket
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from prefill_router.doctor import Finding, command, finding, machine, packages, services


def lines(found: Any) -> list[str]:
    return [" ".join(one.line.split()) for one in found]


def test_packages_out_of_range_and_missing_are_errors_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    have = {"numpy": "2.5.0", "ray": "2.1.0", "extra-a": "1.0"}

    def version(name: str) -> str:
        if name not in have:
            raise PackageNotFoundError(name)
        return have[name]

    wanted = [
        "numpy>=2",
        "ray[data]>=2.60",
        "torch>=2",
        'absent>=1; sys_platform == "none"',
        'extra-a>=2; extra == "vllm"',
    ]
    monkeypatch.setattr(packages, "version", version)
    monkeypatch.setattr(packages, "requires", lambda name: wanted)
    assert lines(packages.packages()) == [
        f"error packages ray is 2.1.0, allowed is >=2.60; {packages.INSTALL}",
        f"error packages torch is not installed; {packages.INSTALL}",
    ]
    assert lines(packages.extras())[0] == (
        "warning extras vllm: extra-a is 1.0, allowed is >=2; pip install 'prefill-router[vllm]'"
    )
    have |= {"ray": "2.60.1", "torch": "2.13.0+cpu"}
    assert lines(packages.packages())[0].startswith("ok packages 3 of 3 are in their ranges; torch 2.13.0+cpu")


def test_another_python_than_allowed_is_an_error(monkeypatch: pytest.MonkeyPatch):
    assert [one.status for one in packages.python()] == ["ok"]
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.10.2")
    assert lines(packages.python()) == [
        "error python 3.10.2, allowed is >=3.11; make the environment with another Python"
    ]


def test_a_port_in_use_names_its_process():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        (found,) = machine.ports([(port, "serve", "give another --port")])
        assert (found.status, found.check) == ("warning", f"port {port}")
        assert f"pid {os.getpid()} (" in found.detail
        assert found.way_out == "stop it, or give another --port"
    assert lines(machine.ports([(port, "serve", "")])) == [f"ok port {port} free for serve"]


def test_a_driver_whose_gpus_torch_does_not_see_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lines(machine.gpus()) == ["ok gpu none; encoders run on the CPU"]
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 470.1\n")
    program.chmod(0o755)
    assert lines(machine.gpus())[0].startswith(
        "warning gpu driver 470.1, but torch sees no GPU: it is built for CUDA 13.0"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert lines(machine.gpus()) == ["warning gpu driver 470.1, hidden by CUDA_VISIBLE_DEVICES; unset it"]


def test_a_disk_without_space_or_permission_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    usage = machine.shutil.disk_usage(tmp_path)._replace(free=2**28)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    found = {one.check: one for one in machine.disks(tmp_path / "runs" / "deep")}
    assert found["disk runs"].line.endswith("runs/deep: 0.2 GiB free; free some space")
    assert found["disk runs"].status == "error"
    assert found["disk cache"].status == "error"
    assert "is not a folder" in found["disk cache"].detail
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("address", "status", "part"),
    [
        (None, "ok", "is not set"),
        ("http://127.0.0.1:8265", "error", "only `ray job submit` takes"),
        ("nonsense", "error", "expected HOST:PORT"),
        ("127.0.0.1:9", "error", "does not answer"),
        ("auto", "error", "no cluster runs on this machine"),
    ],
)
def test_ray_address_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str | None, status: str, part: str
):
    monkeypatch.setattr(services, "RUNNING", tmp_path / "none")
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    (found,) = services.ray_address()
    assert found.status == status
    assert part in found.detail


def test_a_registry_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (found,) = services.model_registry()
    assert found.status == "error"
    assert "does not answer" in found.detail
    assert "set MLFLOW_TRACKING_URI" in found.detail


def test_a_registry_that_does_not_exist_yet_is_not_created(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (found,) = services.model_registry()
    assert found.status == "ok"
    assert "does not exist yet" in found.detail
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_the_official_ones_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "weights").write_bytes(b"other")
    monkeypatch.setattr(services, "bundled_weights", lambda name: tmp_path / "weights")
    found = list(services.encoders())
    assert [one.status for one in found] == ["error"] * len(services.BUNDLED)
    assert "has sha256" in found[0].detail
    assert "make install" in found[0].detail


def test_a_check_that_fails_is_an_error_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def broken() -> Any:
        raise OSError("libcuda.so: cannot open shared object file")

    def fine(*_: Any) -> Any:
        yield Finding("ok", "fine", "as it should be")

    monkeypatch.setattr(machine, "gpus", broken)
    for module, name in [(machine, "ports"), (machine, "disks"), (packages, "extras"), (services, "encoders")]:
        monkeypatch.setattr(module, name, fine)
    monkeypatch.setattr(services, "model_registry", fine)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = [one for one in finding.diagnose(tmp_path) if one.status != "ok"]
    assert [(one.status, one.check) for one in found] == [("error", "gpu")]
    assert "libcuda.so" in found[0].detail
    for options, parsed in (([], False), (["--json"], True)):
        with pytest.raises(SystemExit) as end:
            command.main(["doctor", *options])
        assert end.value.code == 1
        said = capsys.readouterr().out
        if parsed:
            report = json.loads(said)
            assert report["ok"] is False
            assert {"status": "error", "check": "gpu"}.items() <= report["findings"][3].items()
        else:
            assert said.splitlines()[-1].startswith("doctor: 1 errors, 0 warnings")
