"""The Jinja environment of all pages, and one function that writes a page.

Templates are in templates/. Text from data is escaped; an undefined variable raises an error. A page is one file that
loads nothing from elsewhere.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from prefill_router.files import write_atomically
from prefill_router.reports import format as text

FILTERS = {
    "say": text.say,
    "percent": text.percent,
    "points": text.points,
    "number": text.number,
    "signed": text.signed,
    "significant": text.significant,
    "span": text.span,
    "signed_span": text.signed_span,
    "setting": text.setting,
    "excerpt": text.excerpt,
}


@cache
def environment() -> Environment:
    """The environment that every page is rendered in."""
    jinja = Environment(
        loader=PackageLoader("prefill_router.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= FILTERS
    jinja.globals["includes_zero"] = text.includes_zero
    return jinja


def render_page(template: str, **values: Any) -> str:
    """The page as text. `template` is a file name under templates/."""
    return environment().get_template(template).render(**values)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes the page to `path` atomically and returns `path`. Creates missing folders."""
    page = render_page(template, **values)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path
