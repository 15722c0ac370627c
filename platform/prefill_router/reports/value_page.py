"""The value of policies by a decision log: a table, value.json and value.html.

In: the figures of jobs.value (docs/data-formats.md, value.json). Out: text, JSON, and one self-contained HTML file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from prefill_router.files import write_json
from prefill_router.reports.format import DASH, Json, includes_zero, number, percent, signed, usd_per_thousand
from prefill_router.reports.html import render_page, write_page
from prefill_router.reports.plots_value import FULL, colour, differences_plot, value_plot
from prefill_router.reports.svg import VARIABLES

TEMPLATE = "value.html.j2"
WIDE, NARROW = (1060, 430), (350, 340)  # pixels
SMALL_SAMPLE = 100  # effective sample size below which intervals are too narrow (docs/results/off-policy.md)


def write_value(folder: Path, found: Json) -> Path:
    """Writes FOLDER/value.json and FOLDER/value.html, each atomically; returns the page's path."""
    write_json(folder / "value.json", found)
    return write_page(folder / "value.html", TEMPLATE, **_values(found))


def render(found: Json) -> str:
    """The page as text."""
    return render_page(TEMPLATE, **_values(found))


def summary(found: Json) -> str:
    """Decisions, feedback, and the supported shares."""
    partial = [one for one in found["policies"] if one["supported"] < FULL]
    said = "all policies are supported by the log"
    if partial:
        said = f"{len(partial)} of {len(found['policies']) - 1} policies are not fully supported by the log"
    return f"{found['decisions']:,} decisions, {found['feedback']:,} with feedback; {said}"


def as_text(found: Json) -> str:
    """A row per policy: support, effective sample size, DR values with intervals, differences in score."""
    columns = ["", "supported", "eff. n", "score (DR)", "worst case", "USD per 1,000", "utility", "score, difference"]
    rows = [columns]
    for one in found["policies"]:
        difference = one["difference"]["score"]["dr"] if "difference" in one else None
        rows.append(
            [
                one["policy"],
                f"{100 * one['supported']:.0f} %",
                f"{one['effective_sample_size']:.0f}",
                _figure(one["score"]["dr"]),
                _worst(one) if one["supported"] < FULL else "",
                _figure(one["cost_usd"]["dr"], money=True),
                _figure(one["utility"]["dr"]),
                "" if difference is None else f"{_figure(difference, sign=True)}{_mark(difference)}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join([*lines, *notices(found)])


def notices(found: Json) -> list[str]:
    """What a reader must know before the figures are used."""
    said = []
    if not found["drawn"]:
        said.append(
            "Every logged choice had a propensity of 1: no other choice has support, and DR is the outcome model there."
        )
    partial = [one for one in found["policies"] if one["supported"] < FULL]
    if partial:
        names = ", ".join(f"{one['policy']} ({percent(1 - one['supported'])})" for one in partial)
        said.append(
            f"Choices that the logging policy could not have made: {names}. For these DR is the outcome model alone, "
            "SNIPS and IPS leave them out, and only the worst case needs no model. Intervals leave out the error of "
            "the model there; costs are estimates and have no worst case."
        )
    small = [one["policy"] for one in found["policies"] if one["effective_sample_size"] < SMALL_SAMPLE]
    if small:
        said.append(
            f"Effective sample size below {SMALL_SAMPLE}, so that intervals tend to be too narrow: {', '.join(small)}."
        )
    if not found["conversations"]:
        said.append(
            "The log does not name conversations: decisions count as independent, and intervals are too narrow if many "
            "belong to one conversation."
        )
    if found["costs"] == "estimated":
        said.append("The log has no recorded costs: costs are the estimates of the checkpoint.")
    return said


def _values(found: Json) -> dict[str, Any]:
    policies = found["policies"]
    return {
        "found": found,
        "policies": policies,
        "reference": policies[0],
        "others": policies[1:],
        "full": FULL,
        "notices": notices(found),
        "summary": summary(found),
        "colours": [f"var(--{VARIABLES[colour(index)]})" for index in range(len(policies))],
        "value_plot": [Markup(value_plot(policies, size)) for size in (WIDE, NARROW)],
        "differences": [Markup(differences_plot(policies, width)) for width in (WIDE[0], NARROW[0])],
        "usd": usd_per_thousand,
        "worst": _worst,
    }


def _figure(figure: Json, money: bool = False, sign: bool = False) -> str:
    def say(value: float) -> str:
        return usd_per_thousand(value) if money else signed(value) if sign else number(value)

    if figure["estimate"] is None:
        return DASH
    interval = "" if figure["lower"] is None else f" [{say(figure['lower'])}, {say(figure['upper'])}]"
    return f"{say(figure['estimate'])}{interval}"


def _worst(one: Json, outcome: str = "score") -> str:
    """The lower end of the lower bound's interval, and the upper end of the upper bound's."""
    low, high = one[outcome]["lower_bound"], one[outcome]["upper_bound"]
    ends = [low["estimate"] if low["lower"] is None else low["lower"]]
    ends.append(high["estimate"] if high["upper"] is None else high["upper"])
    return f"[{number(ends[0])}, {number(ends[1])}]"


def _mark(figure: Json) -> str:
    return "  " if includes_zero(figure) else " *"
