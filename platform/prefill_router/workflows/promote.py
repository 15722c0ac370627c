"""Promotion through gates: a version becomes the champion only if the gate policy lets it.

In: a registered version, the policy (configs/gates.yaml), and evaluations of candidate and champion: folders, tracked
runs, or outcomes and activations on which both predict here. Out: aliases, the verdict as tags of the version, and
verdict.json with its page, locally and among the artefacts of the version's run. `gating` measures, metrics/gates.py
judges.
"""

from __future__ import annotations

import getpass
import shlex
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from prefill_router import registry
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.files import write_json
from prefill_router.locations import Location
from prefill_router.metrics.gates import NOT_MEASURED, Verdict
from prefill_router.reports.gates_page import write_gates_page
from prefill_router.version import code_version
from prefill_router.workflows.gate_policy import GatePolicy
from prefill_router.workflows.gating import FIGURES, Measured, Sources, measure, trial_gate

PREFIX = "gate"  # of the tags of a verdict
VERDICT, PAGE = "verdict.json", "gates.html"
QUALITY = ("auc_floor", *FIGURES, "benchmarks")  # gates of the quality of decisions
Alias = Literal["champion", "candidate", "shadow"]


class PromoteConfig(FrozenModel):
    """The version, its new alias, and where the figures of candidate and champion come from."""

    version: Annotated[int | None, Field(ge=1, description="number of the version that gets the alias")] = None
    candidate: Annotated[bool, Field(description="take the version that has the alias `candidate`")] = False
    undo: Annotated[bool, Field(description="restore the previous champion; no gates")] = False
    alias: Annotated[
        Alias,
        Field(description="champion: through the gates; candidate, shadow: any version whose checkpoint routes"),
    ] = "champion"
    clear: Annotated[bool, Field(description="remove the alias `candidate` or `shadow` from its version")] = False
    policy: Annotated[
        Location | None, Field(description="gate policy, a YAML file; null: configs/gates.yaml of this checkout")
    ] = None
    evaluation: Annotated[
        Location | None,
        Field(description="output folder of jobs.evaluate for the version; null: its latest tracked evaluation"),
    ] = None
    champion_evaluation: Annotated[
        Location | None, Field(description="the same for the champion, on the same test queries")
    ] = None
    outcomes: Annotated[
        Location | None,
        Field(description="outcomes on which both versions predict here, without queries of their training"),
    ] = None
    activations: Annotated[
        tuple[Location, ...], Field(description="activations of these outcomes, for the encoders of both versions")
    ] = ()
    trained_on: Annotated[
        tuple[Location, ...], Field(description="outcomes that a version was trained on, if they are other ones")
    ] = ()
    force: Annotated[bool, Field(description="promote although a gate refuses; needs a reason, which is recorded")] = (
        False
    )
    reason: Annotated[str | None, Field(min_length=1, description="why the promotion is forced")] = None
    output: Annotated[Location, Field(description="folder for verdict.json and gates.html")] = Path("runs/promote")

    @field_validator("activations", "trained_on", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _consistent(self) -> PromoteConfig:
        trial = self.alias != registry.CHAMPION
        if self.clear:
            if not trial or self.version is not None or self.candidate or self.undo:
                raise ValueError("clear: give it with --alias candidate or --alias shadow, and no version")
        elif (self.version is not None) + self.candidate + self.undo != 1:
            raise ValueError("give one of --version N, --candidate and --undo")
        if self.force != (self.reason is not None):
            raise ValueError("give --force and --reason TEXT together, or neither")
        if self.force and (trial or self.undo):
            raise ValueError("force: it only applies to gates; --undo and the aliases candidate and shadow have none")
        if (self.outcomes is None) != (not self.activations):
            raise ValueError("give --outcomes and --activations together, or neither")
        if self.outcomes is not None and self.champion_evaluation is not None:
            raise ValueError("champion_evaluation: the champion predicts on --outcomes here; give one of the two")
        return self


@dataclass(frozen=True)
class Promotion:
    """`summary` is one line. `refused`: the gates refused the version, and no alias changed."""

    summary: str
    refused: bool = False
    verdict: Verdict | None = None


def run(config: PromoteConfig, policy: GatePolicy) -> Promotion:
    """Sets or removes the alias, through the gates if it is `champion`.

    Raises InputError for an unknown version, nothing to undo, an alias that no version has, or a broken checkpoint for
    the aliases `candidate` and `shadow`.
    """
    if config.undo:
        now, before = registry.undo()
        return Promotion(f"champion is version {now.number}, previous is {_number(before)}")
    if config.clear:
        removed = registry.remove_alias(config.alias)
        return Promotion(f"no version is {config.alias}; it was {'none' if removed is None else f'version {removed}'}")
    aliases = registry.aliases()
    number = config.version
    if number is None:
        if registry.CANDIDATE not in aliases:
            raise InputError("candidate: no version has the alias `candidate`; set it with --alias candidate")
        number = aliases[registry.CANDIDATE]
    checkpoint = registry.checkpoint_of(number)
    if config.alias != registry.CHAMPION:
        gate, _ = trial_gate(number)
        if gate.refuses:
            return Promotion(f"version {number} is not set as {config.alias}: {gate.name} {gate}", refused=True)
        replaced = registry.set_alias(config.alias, number)
        was = "" if replaced in (None, number) else f", before it was version {replaced}"
        return Promotion(f"{config.alias} is version {number}{was}")
    champion = aliases.get(registry.CHAMPION)
    if champion == number:
        return Promotion(f"champion is version {number}, previous is {aliases.get(registry.PREVIOUS, 'none')}")
    sources = Sources(
        config.evaluation, config.champion_evaluation, config.outcomes, config.activations, config.trained_on
    )
    measured = measure(number, checkpoint, champion, sources, policy)
    return _decide(config, policy, number, checkpoint, champion, measured)


def _decide(
    config: PromoteConfig, policy: GatePolicy, number: int, checkpoint: str, champion: int | None, measured: Measured
) -> Promotion:
    """Records the verdict with the version, and promotes it if the verdict or --force lets it."""
    verdict = measured.verdict
    forced = config.force and not verdict.passed and measured.routes
    unmeasured = all(gate.status == NOT_MEASURED for gate in verdict.gates if gate.name in QUALITY)
    passed = "unmeasured" if unmeasured else "passed"
    state = passed if verdict.passed else "forced" if forced else "failed"
    _check_champion(champion)
    now = datetime.now(UTC).replace(microsecond=0)
    uploaded = f"gates/{now:%Y%m%dT%H%M%SZ}"
    tags = {
        PREFIX: state,
        "gate_policy": policy.digest,
        "gate_against": "none" if champion is None else str(champion),
        "gate_time": now.isoformat(),
        "gate_who": _user(),
        "gate_page": f"{uploaded}/{PAGE}",
        **({"gate_reason": config.reason} if forced and config.reason else {}),
        **{f"gate.{gate.name}": str(gate) for gate in verdict.gates},
    }
    record = {
        "version": number,
        "checkpoint": checkpoint,
        "champion": champion,
        "state": state,
        "reason": tags.get("gate_reason"),
        "time": tags["gate_time"],
        "who": tags["gate_who"],
        "code_version": code_version(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "policy": policy.model_dump(mode="json"),
        "policy_digest": policy.digest,
        **measured.to_json(),
    }
    folder = config.output / f"version-{number}"
    write_json(folder / VERDICT, record)
    page = write_gates_page(folder / PAGE, record)
    print("\n".join(f"  {gate.name:<18} {gate}" for gate in verdict.gates), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, name) for name in (VERDICT, PAGE)]
        for file in files:
            file.write_bytes((folder / file.name).read_bytes())
        registry.record_verdict(number, tags, PREFIX, files, uploaded)
    if state == "failed":
        kept = "no champion is set" if champion is None else f"version {champion} stays champion"
        hint = "; a checkpoint that does not route cannot be forced" if config.force else ""
        told = f"version {number}, {kept}: {verdict.headline()}{hint}; page: {page}"
        return Promotion(told, refused=True, verdict=verdict)
    _check_champion(champion)  # the upload takes time
    previous = registry.promote(number)
    if registry.aliases().get(registry.CANDIDATE) == number:
        registry.remove_alias(registry.CANDIDATE)
    told = f"forced ({config.reason}) over: {verdict.headline()}" if forced else verdict.headline()
    if state == "unmeasured":
        told += "; the quality of its decisions is unmeasured"
    summary = f"champion is version {number}, previous is {_number(previous)}; {told}; page: {page}"
    return Promotion(summary, verdict=verdict)


def _check_champion(expected: int | None) -> None:
    """Raises InputError if another version has become the champion."""
    if registry.aliases().get(registry.CHAMPION) != expected:
        raise InputError("champion: it changed while the gates ran; run the command again")


def _number(version: registry.Version | None) -> str:
    return "none" if version is None else str(version.number)


def _user() -> str:
    """The name of the user, `unknown` in a container without one."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
