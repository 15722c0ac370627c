"""sweep.html: one self-contained page on a sweep, for people; light, dark, phone and print.

In: the trials, the sweep's record (sweep.json) and the commands that make it again. Out: one HTML file that loads
nothing. Every text from data is escaped by the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefill_router.files import write_atomically
from prefill_router.reports.evaluation import DASH, number
from prefill_router.reports.plots_sweep import best_so_far, importance_bars, parallel_coordinates
from prefill_router.sweeps.objective import LOWER_IS_BETTER, SHOWN, Objective
from prefill_router.sweeps.trials import Trial, best_trial, importance, varied

TOP = 10
WIDE, HALF, NARROW = (1080, 430), (520, 330), (350, 300)


def write_sweep_page(
    folder: Path, trials: Sequence[Trial], sweep: Mapping[str, Any], commands: Mapping[str, str]
) -> Path:
    """Writes FOLDER/sweep.html atomically and returns its path. `commands`: what it makes, and the command."""
    path = Path(folder) / "sweep.html"
    text = render(trials, sweep, commands)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def render(trials: Sequence[Trial], sweep: Mapping[str, Any], commands: Mapping[str, str]) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("prefill_router.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "value": _value}
    objective: Objective = sweep["objective"]
    best = best_trial(trials, objective)
    default = next((trial for trial in trials if trial.number == 0 and trial.state == "finished"), None)
    shares = importance(trials, objective)
    return environment.get_template("sweep.html.j2").render(
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
    """Finished trials, the best first."""
    finished = [(trial.value(objective), trial) for trial in trials if trial.state == "finished"]
    known = [(value, trial) for value, trial in finished if value is not None]
    sign = 1 if objective in LOWER_IS_BETTER else -1
    return [trial for _, trial in sorted(known, key=lambda pair: (sign * pair[0], pair[1].number))]


def _value(value: Any) -> str:
    if value is None:
        return DASH
    return f"{value:.3g}" if isinstance(value, float) else str(value)
