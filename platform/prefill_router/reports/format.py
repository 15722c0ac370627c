"""Figures and prompts as text: signs, units, intervals and excerpts.

In: numbers and figures as metrics.json holds them, {estimate, lower, upper} with an optional `reason`. Out: text. An
undefined number is shown as DASH. Accuracies, shares and AUC are given as fractions, costs as USD per query.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Json = Mapping[str, Any]
MINUS, DASH, PERCENT = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NARROW NO-BREAK SPACE}%"
EXCERPT, REST = 240, 4000  # characters of a prompt: always visible, and in the expandable part


def say(value: float | None, kind: str = "number") -> str:
    """The value as `number`, `percent`, `points` (percentage points) or `usd` (USD per 1,000 queries)."""
    return {"number": number, "percent": percent, "points": points, "usd": usd_per_thousand}[kind](value)


def percent(value: float | None, digits: int = 1) -> str:
    """0.847 as `84.7 %`, with a narrow no-break space."""
    return DASH if value is None else _signed(f"{100 * value:.{digits}f}{PERCENT}")


def points(value: float | None) -> str:
    """A difference of fractions as signed percentage points: 0.007 as `+0.7`."""
    return DASH if value is None else _signed(f"{100 * value:+.1f}")


def number(value: float | None, digits: int = 3) -> str:
    """0.78357 as `0.784`."""
    return DASH if value is None else _signed(f"{value:.{digits}f}")


def signed(value: float | None) -> str:
    """A difference with its sign: 0.0012 as `+0.0012`."""
    return DASH if value is None else _signed(f"{value:+.4f}")


def significant(value: float | None) -> str:
    """Three significant digits, and integers from 100 on: 1284.2 as `1284`, 0.03127 as `0.0313`."""
    if value is None:
        return DASH
    return _signed(f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}")


def usd(value: float, digits: int = 3) -> str:
    """US dollars with `digits` significant digits: $0.00412, $0.250, $12.3, $1,230."""
    decimals = digits - 1 - int(np.floor(np.log10(abs(value)))) if value else 0
    return f"${value:,.{max(0, decimals)}f}"


def usd_per_thousand(value: float | None) -> str:
    """USD per query as USD per 1,000 queries."""
    return DASH if value is None else _signed(usd(1000 * value + 0.0))  # + 0.0 turns -0.0 into 0.0


def setting(value: Any) -> str:
    """The value of a hyperparameter; None, which marks one that does not apply, as a dash."""
    if value is None:
        return DASH
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def span(figure: Json, kind: str = "number") -> str:
    """The interval as text, `0.775 to 0.792`.

    The reason if the figure is undefined; an empty string if it has an estimate and no interval.
    """
    if figure["lower"] is None:
        return str(figure.get("reason", "")) if figure["estimate"] is None else ""
    return f"{say(figure['lower'], kind).removesuffix(PERCENT)} to {say(figure['upper'], kind).removesuffix(PERCENT)}"


def signed_span(figure: Json) -> str:
    """The interval of a difference with signs, `+0.0012 to +0.0103`; without an interval as `span`."""
    return span(figure) if figure["lower"] is None else f"{signed(figure['lower'])} to {signed(figure['upper'])}"


def includes_zero(figure: Json) -> bool:
    """Whether the interval includes zero. A figure without an interval counts as including it."""
    return figure["lower"] is None or figure["lower"] <= 0 <= figure["upper"]


def excerpt(prompt: str) -> tuple[str, str, int]:
    """The visible beginning of a prompt, the expandable rest, and the number of characters left out.

    White space collapses to single spaces; control characters become replacement characters.
    """
    folded = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", " ".join(prompt.split()))
    space = folded.rfind(" ", EXCERPT - 40, EXCERPT + 1)
    end = space if space > 0 and len(folded) > EXCERPT else EXCERPT
    return folded[:end], folded[end : end + REST].strip(), max(0, len(folded) - end - REST)


def without_common_start(prompts: Mapping[str, str]) -> dict[str, str]:
    """The prompts, by any key, without the words with which all of them begin, such as a system prompt.

    A start of up to half an excerpt stays; otherwise an ellipsis replaces it.
    """
    if len(prompts) < 2:
        return dict(prompts)
    first, last = min(prompts.values()), max(prompts.values())  # their common start is that of all
    equal = [one == other for one, other in zip(first, last, strict=False)]
    start = first[: equal.index(False)] if False in equal else first[: len(equal)]
    end = max(start.rfind(" "), start.rfind("\n")) + 1
    if end <= EXCERPT / 2 or end >= min(map(len, prompts.values())):
        return dict(prompts)
    return {key: f"… {prompt[end:]}" for key, prompt in prompts.items()}


def _signed(text: str) -> str:
    return text.replace("$-", "-$").replace("-", MINUS)
