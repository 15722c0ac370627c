"""The Grafana dashboard reads metrics that the gateway exports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prefill_router.files import read_json
from serve import telemetry

DASHBOARD = Path(__file__).parents[1] / "configs" / "grafana.json"


def test_every_panel_reads_exported_metrics_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: dict[str, set[str]] = {}

    def counter(name: str, _: str, *tags: str) -> Any:
        exported[f"ray_{name}_total"] = set(tags)

    def histogram(name: str, _: str, boundaries: list[float], *tags: str) -> Any:
        exported[f"ray_{name}_bucket"] = {*tags, "le"}
        exported[f"ray_{name}_sum"] = exported[f"ray_{name}_count"] = set(tags)

    monkeypatch.setattr(telemetry, "_counter", counter)
    monkeypatch.setattr(telemetry, "_histogram", histogram)
    telemetry.Telemetry()
    used: set[str] = set()
    for panel in read_json(DASHBOARD)["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"ray_\w+", target["expr"]))
            assert names
            assert names <= exported.keys(), panel["title"]
            labels = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
            labels |= set(re.findall(r"{(\w+)=", target["expr"])) | set(
                re.findall(r"{{(\w+)}}", target["legendFormat"])
            )
            assert labels <= set().union(*(exported[name] for name in names)), panel["title"]
            used |= {re.sub("_(total|bucket|sum|count)$", "", name) for name in names}
    assert used == {re.sub("_(total|bucket|sum|count)$", "", name) for name in exported}  # no metric is missing
