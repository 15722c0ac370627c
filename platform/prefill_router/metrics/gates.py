"""Verdicts of gates: whether a candidate may become the champion.

In: numbers (paired figures, shares, milliseconds, or a problem in words) and the bound of each gate. Out: `Gate`, which
is passed, failed or not measured, and `Verdict` over all gates. Knows nothing of the policy file, versions or the
registry. docs/promoting.md gives the reasons for the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from prefill_router.metrics.bootstrap import Interval, Json
from prefill_router.metrics.paired import LOWER_IS_BETTER, PairedBenchmark, PairedFigure

Status = Literal["passed", "failed", "not measured"]
PASSED: Status = "passed"
FAILED: Status = "failed"
NOT_MEASURED: Status = "not measured"


@dataclass(frozen=True)
class Gate:
    """The verdict of one gate.

    `rule` is the condition in words, `figure` the measured value with its interval as text, `reason` says why the gate
    failed or was not measured. `required`: whether the gate refuses if it was not measured. Numbers are None if the
    gate has none.
    """

    name: str
    status: Status
    rule: str
    figure: str = ""
    reason: str = ""
    required: bool = True
    estimate: float | None = None
    lower: float | None = None
    upper: float | None = None
    bound: float | None = None

    @property
    def refuses(self) -> bool:
        """Whether the gate alone refuses the candidate."""
        return self.status == FAILED or (self.status == NOT_MEASURED and self.required)

    @property
    def told(self) -> str:
        """The figure and the reason."""
        return "; ".join(part for part in (self.figure, self.reason) if part) or "holds"

    def __str__(self) -> str:
        """One short line: status, figure, reason and rule."""
        return f"{self.status}: {self.told} ({self.rule})"


@dataclass(frozen=True)
class Verdict:
    """All gates of one candidate. It passes if no gate refuses."""

    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        return not self.refusals

    @property
    def refusals(self) -> tuple[Gate, ...]:
        """The gates that refuse the candidate."""
        return tuple(gate for gate in self.gates if gate.refuses)

    def headline(self) -> str:
        """The gates that refuse, in one line; or the number of gates that passed.

        Gates that were not measured for the same reason share it.
        """
        if self.passed:
            held = sum(gate.status == PASSED for gate in self.gates)
            rest = len(self.gates) - held
            return f"{held} gates passed" + (f", {rest} not measured" if rest else "")
        told: dict[str, list[str]] = {}
        for gate in self.refusals:
            told.setdefault(f"{gate.status}: {gate.told}", []).append(gate.name)
        return "; ".join(f"{', '.join(names)} {said}" for said, names in told.items())

    def to_json(self) -> Json:
        return {"passed": self.passed, "gates": [asdict(gate) | {"refuses": gate.refuses} for gate in self.gates]}


def not_measured(name: str, rule: str, reason: str, required: bool) -> Gate:
    """A gate without a figure."""
    return Gate(name, NOT_MEASURED, rule, reason=reason, required=required)


def non_inferior(name: str, figure: PairedFigure, margin: float, level: float, required: bool) -> Gate:
    """Passes if the interval of the difference excludes that the candidate is worse by `margin` or more.

    The interval's worse end is a bound of level (1 + level) / 2. A negative margin asks for an improvement of at least
    its size. Figures in LOWER_IS_BETTER are worse if they are higher.
    """
    sign = -1 if name in LOWER_IS_BETTER else 1
    difference, bound = figure.difference, -sign * margin
    rule = f"{'upper' if sign < 0 else 'lower'} end of the difference {'below' if sign < 0 else 'above'} {bound:+g}"
    worse = difference.upper if sign < 0 else difference.lower
    if difference.estimate is None or worse is None:
        return not_measured(name, rule, difference.reason or "the difference has no interval", required)
    return Gate(
        name,
        PASSED if sign * (worse - bound) > 0 else FAILED,
        rule,
        _signed(difference, level),
        required=required,
        estimate=difference.estimate,
        lower=difference.lower,
        upper=difference.upper,
        bound=bound,
    )


def no_regression(benchmarks: Sequence[PairedBenchmark], max_regression: float, required: bool) -> Gate:
    """Fails if a benchmark is worse by more than `max_regression` and worse beyond the simultaneous intervals.

    Both conditions are needed: noise of small benchmarks exceeds any useful maximum, and in large ones a negligible
    regression is established. The intervals hold for all benchmarks together, so that more benchmarks do not refuse
    more good candidates.
    """
    name = "benchmarks"
    rule = f"no benchmark established as worse, and by more than {max_regression:g}"
    if not benchmarks:
        return not_measured(name, rule, "no benchmark has enough queries with a label for every model", required)
    worst = min(benchmarks, key=lambda one: one.difference)
    regressed = [one for one in benchmarks if one.difference < -max_regression and one.upper < 0]
    named = sorted(regressed, key=lambda one: one.difference)
    shown = named[0] if named else worst
    return Gate(
        name,
        FAILED if regressed else PASSED,
        rule,
        f"worst of {len(benchmarks)}: {shown.name} {shown.difference:+.3f} ({shown.lower:+.3f} to {shown.upper:+.3f})",
        f"regressed: {', '.join(one.name for one in named)}" if named else "",
        required,
        shown.difference,
        shown.lower,
        shown.upper,
        -max_regression,
    )


def at_least(name: str, figure: Interval, bound: float, required: bool) -> Gate:
    """Passes if the lower end of the figure's interval is above `bound`."""
    return _bounded(name, figure, bound, required, lower=True)


def at_most(name: str, figure: Interval, bound: float, required: bool) -> Gate:
    """Passes if the upper end of the figure's interval is below `bound`."""
    return _bounded(name, figure, bound, required, lower=False)


def holds(name: str, rule: str, problem: str | None) -> Gate:
    """Passes if there is no problem; always required."""
    return Gate(name, PASSED if problem is None else FAILED, rule, reason=problem or "")


def _bounded(name: str, figure: Interval, bound: float, required: bool, lower: bool) -> Gate:
    rule = f"{'lower' if lower else 'upper'} end {'above' if lower else 'below'} {bound:g}"
    end = figure.lower if lower else figure.upper
    if figure.estimate is None or end is None:
        return not_measured(name, rule, figure.reason or "the figure has no interval", required)
    return Gate(
        name,
        PASSED if (end > bound if lower else end < bound) else FAILED,
        rule,
        f"{figure.estimate:.3f} ({figure.lower:.3f} to {figure.upper:.3f})",
        "",
        required,
        figure.estimate,
        figure.lower,
        figure.upper,
        bound,
    )


def _signed(difference: Interval, level: float) -> str:
    return f"{difference.estimate:+.4f} ({100 * level:g} % {difference.lower:+.4f} to {difference.upper:+.4f})"
