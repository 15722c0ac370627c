"""sweep.html: the page on a hyperparameter sweep.

In: the trials, the sweep's record (sweep.json) and the commands that reproduce it. Out: one self-contained HTML file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prefill_router.locations import location
from prefill_router.reports.html import write_page
from prefill_router.reports.plots_sweep import best_so_far, importance_bars, parallel_coordinates
from prefill_router.sweeps.objective import LOWER_IS_BETTER, SHOWN, Objective
from prefill_router.sweeps.trials import Trial, best_trial, importance, varied

TOP = 10
WIDE, HALF, NARROW = (1080, 430), (520, 330), (350, 300)


def write_sweep_page(
    folder: Path, trials: Sequence[Trial], sweep: Mapping[str, Any], commands: Mapping[str, str]
) -> Path:
    """Writes FOLDER/sweep.html atomically and returns its path. `commands` maps each result to its command."""
    objective: Objective = sweep["objective"]
    best = best_trial(trials, objective)
    default = next((trial for trial in trials if trial.number == 0 and trial.state == "finished"), None)
    shares = importance(trials, objective)
    return write_page(
        location(folder) / "sweep.html",
        "sweep.html.j2",
        sweep=sweep,
        objective=objective,
        shown=SHOWN[objective],
        lower=objective in LOWER_IS_BETTER,
        best=best,
        default=default,
        n={
            state: sum(trial.state == state for trial in trials)
            for state in ("finished", "stopped", "failed", "running")
        },
        hours=sum(trial.seconds for trial in trials) / 3600,
        epochs=sum(len(trial.epochs) for trial in trials),
        parallel=Markup(parallel_coordinates(trials, objective, best, WIDE)) if best else "",
        curves=[Markup(best_so_far(trials, objective, size)) for size in (HALF, NARROW)],
        bars=[Markup(importance_bars(shares, size)) for size in (HALF, NARROW)],
        top=_ranked(trials, objective)[:TOP],
        columns=list(varied([trial for trial in trials if trial.ended])),
        commands=commands,
    )


def _ranked(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    """Finished trials whose objective is defined, best first."""
    finished = [(trial.value(objective), trial) for trial in trials if trial.state == "finished"]
    known = [(value, trial) for value, trial in finished if value is not None]
    sign = 1 if objective in LOWER_IS_BETTER else -1
    return [trial for _, trial in sorted(known, key=lambda pair: (sign * pair[0], pair[1].number))]
