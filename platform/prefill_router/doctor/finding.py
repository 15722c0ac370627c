"""Findings, and the checks that give them, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of a check. `way_out` says what to do; it is empty if all is well."""

    status: Status
    check: str
    detail: str
    way_out: str = ""

    @property
    def line(self) -> str:
        """`warning  port 8000       in use by ...; give another --port`."""
        return f"{self.status:<8} {self.check:<15} {self.detail}{f'; {self.way_out}' if self.way_out else ''}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(runs: Path) -> Iterator[Finding]:
    """The findings of all checks. `runs` is the folder of outputs. A check that fails itself is an error too."""
    from prefill_router.doctor.machine import disks, gpus, ports
    from prefill_router.doctor.packages import extras, packages, python
    from prefill_router.doctor.services import encoders, model_registry, ray_address

    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", python),
        ("packages", packages),
        ("extras", extras),
        ("gpu", gpus),
        ("ports", ports),
        ("ray", ray_address),
        ("registry", model_registry),
        ("encoders", encoders),
        ("disk", lambda: disks(runs)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001  a broken environment fails in any way; the other checks go on
            reason = " ".join(str(error).split())[:300]
            yield Finding(
                "error", name, f"the check failed: {type(error).__name__}: {reason}", "repair the environment"
            )
