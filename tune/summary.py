"""Writes a sweep's page, sweep.html, from the files in its folder. The sweep may still be running."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from pydantic import Field

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import read_json
from prefill_router.locations import Location
from prefill_router.reports.sweep import write_sweep_page
from prefill_router.sweeps.trials import load_trials


class SummaryConfig(FrozenModel):
    """The folder of the sweep."""

    sweep: Annotated[Location, Field(description="output folder of tune.sweep")]


def plan(config: SummaryConfig) -> list[str]:
    """What a dry run says. Raises InputError as `run` does if there is no sweep."""
    read_json(config.sweep / "sweep.json")
    trials = load_trials(config.sweep / "trials")
    return [f"writes {config.sweep / 'sweep.html'}: {len(trials)} trials", "costs nothing but the time of this machine"]


def run(config: SummaryConfig) -> str:
    """Write a sweep's page from its trials so far."""
    return f"page: {write_page(config.sweep)}"


def write_page(folder: Path) -> Path:
    """Writes FOLDER/sweep.html, with the commands that reproduce the sweep, and returns its path."""
    sweep = read_json(folder / "sweep.json")
    trials, settings = load_trials(folder / "trials"), sweep["config"]
    settings["trials"] = max(settings["trials"], len(trials))
    options = " ".join(
        f"--{name.replace('_', '-')} {shlex.quote(str(settings[name]))}"
        for name in (
            "trials",
            "objective",
            "seed",
            "scheme",
            "concurrent",
            "cpus_per_trial",
            "grace_epochs",
            "reduction",
            "baselines",
            "resamples",
        )
    )
    threads = f"OMP_NUM_THREADS={shlex.quote(sweep['threads'])} " if sweep.get("threads") else ""
    inputs = (
        f"--outcomes {shlex.quote(settings['outcomes'])} --pool {shlex.quote(settings['pool'])} "
        f"--activations {shlex.quote('[' + ', '.join(settings['activations']) + ']')}"
    )
    train = f"{threads}python -m jobs.train"
    space, best = shlex.quote(str(folder / "space.yaml")), shlex.quote(str(folder / "best.yaml"))
    return write_sweep_page(
        folder,
        trials,
        sweep,
        {
            "the winner's checkpoint, bit for bit": f"{train} --config {best} --output runs/again",
            "the sweep": f"{threads}python -m tune.sweep {inputs} --space {space} {options} --output runs/again",
        },
    )


if __name__ == "__main__":
    main(SummaryConfig, run, plan=plan)
