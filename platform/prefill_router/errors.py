"""The one exception that means "the input is wrong": jobs end with exit code 2 on it, the server answers 4xx.

The message is one line that names the field, the value received, what is allowed and the way out. Any other
exception is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

from pydantic import ValidationError


class InputError(ValueError):
    """Input that the user can mend. The message names field, value, what is allowed and the way out."""


def one_line(error: ValidationError) -> str:
    """The pydantic error as one line: `field.path: what is wrong (got VALUE)`, the fields joined by `; `."""
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(str(step) for step in item["loc"]) or "value"
        got = "" if item["type"] in ("missing", "extra_forbidden") else f" (got {item['input']!r:.80})"
        parts.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(parts)
